"""Integers in memory: packed layouts, and later the operators that compute on them."""
