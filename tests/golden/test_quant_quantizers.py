"""Weight and activation quantizers with corner cases and gradients: quant_quantizers."""

from __future__ import annotations

import golden
from torch import Tensor

from qvsr.quant import affine


def names(tensors: dict[str, Tensor], bits: int) -> list[str]:
    """Cases that have a weight quantizer of their own."""
    return sorted(name for (name,) in golden.matching(tensors, rf"(.+)\.w{bits}\.scale"))


def test_weights_per_output_channel() -> None:
    meta, tensors = golden.load("quant_quantizers")
    for bits in meta["bits"]:
        for name in names(tensors, bits):
            x, key = tensors[f"{name}.x"], f"{name}.w{bits}"
            low, high = affine.channel_range(x)
            scale, zero_point = affine.qparams(low, high, bits)
            for found, role in ((low, "x_min"), (high, "x_max"), (scale, "scale"), (zero_point, "zero_point")):
                golden.assert_close(found, tensors[f"{key}.{role}"], meta, f"{key} {role}")
            golden.assert_close(affine.fake_quantize(x, scale, zero_point, bits), tensors[f"{key}.out"], meta, key)
            golden.assert_close(
                affine.dequantize(affine.quantize(x, scale, zero_point, bits), scale, zero_point), tensors[f"{key}.out"], meta, key
            )


def test_activations_per_tensor() -> None:
    meta, tensors = golden.load("quant_quantizers")
    for bits in meta["bits"]:
        for name in names(tensors, bits):
            x, key = tensors[f"{name}.x"], f"{name}.a{bits}"
            scale, zero_point = affine.qparams(*affine.tensor_range(x), bits)
            golden.assert_close(scale.reshape(1), tensors[f"{key}.scale"], meta, f"{key} scale")
            golden.assert_close(zero_point.reshape(1), tensors[f"{key}.zero_point"], meta, f"{key} zero point")
            golden.assert_close(affine.fake_quantize(x, scale, zero_point, bits), tensors[f"{key}.out"], meta, key)
            golden.assert_close(affine.round_to_grid(x, scale, zero_point, bits), tensors[f"{key}.out"], meta, key)


def test_range_of_other_values() -> None:
    """A static range is taken once; values outside it clamp."""
    meta, tensors = golden.load("quant_quantizers")
    for (bits,), expected in golden.matching(tensors, r"stale\.w(\d+)\.out").items():
        scale, zero_point = affine.qparams(tensors[f"stale.w{bits}.x_min"], tensors[f"stale.w{bits}.x_max"], int(bits))
        golden.assert_close(affine.fake_quantize(tensors["stale.x"], scale, zero_point, int(bits)), expected, meta, f"stale, {bits} bits")


def test_straight_through_gradients() -> None:
    meta, tensors = golden.load("quant_quantizers")
    given = tensors["normal.x"]
    for (kind, digits), expected in golden.matching(tensors, r"ste\.(dynamic_a|static_w)(\d+)\.grad").items():
        ranges, name = (affine.tensor_range(given), "normal") if kind == "dynamic_a" else (affine.channel_range(given), "stale")
        bits, x = int(digits), tensors[f"{name}.x"].clone().requires_grad_(True)
        affine.fake_quantize(x, *affine.qparams(*ranges, bits), bits).backward(tensors["ste.upstream_grad"])
        assert x.grad is not None
        golden.assert_close(x.grad, expected, meta, f"{kind}{bits}")
