"""PSNR and SSIM conventions against values stored from pyiqa, scikit-image and torchmetrics."""

from __future__ import annotations

import re
from functools import partial

import torch
from golden import load

from metrics.psnr import psnr
from metrics.ssim import ssim

RELATIVE = 1e-6  # stated in the set
LUMA_SSIM = 2e-5  # stated in the set: pyiqa rounds the luma from float32, a few pixels fall on the other side elsewhere
CAP = 1e-8  # what pyiqa's PSNR adds to the error
CONVENTIONS = {
    "psnr": partial(psnr, colour="rgb", eps=CAP),
    "psnry": partial(psnr, colour="y", eps=CAP),
    "ssim": partial(ssim, colour="y"),
    "ssimc": partial(ssim, colour="rgb"),
}


def frames(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    prediction, reference = ((tensors[name].float() / 255).permute(0, 3, 1, 2) for name in ("prediction", "reference"))
    return prediction, reference


def test_every_convention_that_we_offer() -> None:
    meta, tensors = load("eval_psnr_ssim")
    pair = frames(tensors)
    seen = set()
    for name, stored in meta["values"].items():
        match = re.fullmatch(rf"pyiqa_({'|'.join(CONVENTIONS)})(?:_crop(\d+))?", name)
        if not match:
            continue
        value = CONVENTIONS[match[1]](*pair, crop=int(match[2] or 0))
        expected = torch.tensor(stored["per_frame"], dtype=torch.float64)
        close = {"atol": LUMA_SSIM, "rtol": 0.0} if match[1] == "ssim" else {"atol": 0.0, "rtol": RELATIVE}
        torch.testing.assert_close(value, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
        assert abs(value.mean().item() - stored["mean"]) <= max(close["atol"], close["rtol"] * abs(stored["mean"])), name
        seen.add(match[1])
    assert seen == set(CONVENTIONS)


def test_our_defaults_agree_with_other_packages() -> None:
    meta, tensors = load("eval_psnr_ssim")
    pair = frames(tensors)
    values, gap = meta["values"], meta["max_abs_differences"]
    without_cap = torch.tensor(values["skimage_psnr"]["per_frame"], dtype=torch.float64)
    torch.testing.assert_close(psnr(*pair), without_cap, atol=0.0, rtol=RELATIVE)
    # the stored difference between the packages, and the set's tolerance on top
    expected = torch.tensor(values["skimage_ssim_gaussian"]["per_frame"], dtype=torch.float64)
    torch.testing.assert_close(ssim(*pair), expected, atol=gap["ssimc_minus_skimage_gaussian"] + RELATIVE, rtol=0.0)


def test_identical_frames() -> None:
    meta, tensors = load("eval_psnr_ssim")
    _, reference = frames(tensors)
    for name, expected in meta["identical_frames"].items():
        value = CONVENTIONS[name](reference, reference)
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=RELATIVE, atol=0.0)
    assert torch.isinf(psnr(reference, reference)).all()
