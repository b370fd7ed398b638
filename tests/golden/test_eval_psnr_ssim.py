"""PSNR and SSIM conventions against values stored from pyiqa, scikit-image and torchmetrics."""

from __future__ import annotations

import re
from functools import partial

import torch
from golden import load

from metrics.psnr import psnr
from metrics.ssim import ssim
from qvsr.protocols import read
from qvsr.registry import METRICS

RELATIVE = 1e-6  # stated in the set
LUMA_SSIM = 2e-5  # stated in the set: pyiqa rounds the luma from float32, a few pixels fall on the other side elsewhere
CAP = 1e-8  # what pyiqa's PSNR adds to the error
CONVENTIONS = {
    "psnr": partial(psnr, colour="rgb", eps=CAP),
    "psnry": partial(psnr, colour="y", eps=CAP),
    "psnr_ychannel_option": partial(psnr, colour="y_limited", eps=CAP),
    "ssim": partial(ssim, colour="y"),
    "ssimc": partial(ssim, colour="rgb"),
    "ssim_ychannel_option": partial(ssim, colour="y_limited"),
}
ROUNDED_LUMA = ("ssim", "ssim_ychannel_option")


def frames(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    prediction, reference = ((tensors[name].float() / 255).permute(0, 3, 1, 2) for name in ("prediction", "reference"))
    return prediction, reference


def test_every_convention_that_we_offer() -> None:
    meta, tensors = load("eval_psnr_ssim")
    pair = frames(tensors)
    seen = []
    for name, stored in meta["values"].items():
        match = re.fullmatch(rf"pyiqa_({'|'.join(CONVENTIONS)})(?:_crop(\d+))?", name)
        if not match:
            continue
        value = CONVENTIONS[match[1]](*pair, crop=int(match[2] or 0))
        expected = torch.tensor(stored["per_frame"], dtype=torch.float64)
        close = {"atol": LUMA_SSIM, "rtol": 0.0} if match[1] in ROUNDED_LUMA else {"atol": 0.0, "rtol": RELATIVE}
        torch.testing.assert_close(value, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
        assert abs(value.mean().item() - stored["mean"]) <= max(close["atol"], close["rtol"] * abs(stored["mean"])), name
        seen.append(match[1])
    assert sorted(seen) == sorted(2 * list(CONVENTIONS))  # each with and without a crop


def test_our_defaults_agree_with_other_packages() -> None:
    meta, tensors = load("eval_psnr_ssim")
    pair = frames(tensors)
    values, gap = meta["values"], meta["max_abs_differences"]
    without_cap = torch.tensor(values["skimage_psnr"]["per_frame"], dtype=torch.float64)
    torch.testing.assert_close(psnr(*pair), without_cap, atol=0.0, rtol=RELATIVE)
    single_precision = torch.tensor(values["torchmetrics_psnr"]["per_frame"], dtype=torch.float64)
    torch.testing.assert_close(psnr(*pair), single_precision, atol=0.0, rtol=RELATIVE)
    # scikit-image's window is the same, in float64 as ours: closer to it than pyiqa, whose window is in float32
    expected = torch.tensor(values["skimage_ssim_gaussian"]["per_frame"], dtype=torch.float64)
    assert (ssim(*pair) - expected).abs().max() < 1e-12 < gap["ssimc_minus_skimage_gaussian"]
    # torchmetrics counts the border too: as far from us as from pyiqa
    bordered = torch.tensor(values["torchmetrics_ssim"]["per_frame"], dtype=torch.float64)
    assert abs((ssim(*pair) - bordered).abs().max().item() - gap["ssimc_minus_torchmetrics"]) < RELATIVE


def test_the_released_script_s_numbers_under_its_protocol() -> None:
    meta, tensors = load("eval_psnr_ssim")
    protocol, pair = read("paper-v1"), frames(tensors)
    for name in ("psnr", "ssim"):
        value = METRICS[name](*pair, **protocol.options(METRICS[name])).mean().item()
        assert round(value, protocol.metrics[name].clip_digits) == meta["authors_script"]["crop0_rgb_frame"][name]


def test_identical_frames() -> None:
    meta, tensors = load("eval_psnr_ssim")
    _, reference = frames(tensors)
    for name, expected in meta["identical_frames"].items():
        value = CONVENTIONS[name](reference, reference)
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=RELATIVE, atol=0.0)
    assert torch.isinf(psnr(reference, reference)).all()
