"""Measuring speed and memory: layers, one step of the U-Net, a whole clip; behind ``python -m qvsr bench``."""
