"""Low-bit quantization of diffusion video super-resolution, measured so that people believe it."""

__version__ = "0.1.0"
