"""Clips on disk, the datasets they come from, and how low-quality frames are made."""
