"""Integers in memory: packed layouts, and the operators that compute on them."""
