"""The quantization core: one layer, its quantizers, transforms and branch, and the file that holds them.

Needs torch, numpy, safetensors and pydantic; nothing here imports a model, a data set or a method.
"""
