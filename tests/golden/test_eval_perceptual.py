"""LPIPS and DISTS against the packages' values, with networks filled by the stored recipes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import load
from torch import Tensor

from metrics import dists, lpips
from metrics._pyiqa import network

RELATIVE, ABSOLUTE = 1e-5, 1e-6  # stated in the set, for LPIPS and for DISTS


def networks(recipe: dict[str, Any]) -> dict[str, Tensor]:
    """Weights as the recipe says; its digest is checked."""
    generator, digest, state = np.random.Generator(np.random.PCG64(recipe["seed"])), hashlib.sha256(), {}
    for key in sorted(recipe["keys"]):
        entry = recipe["keys"][key]
        z = generator.standard_normal(entry["shape"])
        value = (entry.get("mean", 0.0) + entry["std"] * z).astype("<f4")
        assert entry["kind"] in ("fan", "normal"), key
        digest.update(value.tobytes())
        state[key] = torch.from_numpy(value)
    assert digest.hexdigest() == recipe["sha256_after_everything"]
    return state


def image(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[name][None].float() / 255


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    meta, _ = load("eval_perceptual")
    file = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(networks(meta["lpips"]["recipe"]), file)
    return file


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    meta, tensors = load("eval_perceptual")
    folder = tmp_path_factory.mktemp("dists")
    torch.save(networks(meta["dists"]["recipe"]), folder / "vgg16.pth")
    torch.save({name: tensors[f"dists_{name}"].reshape(1, -1, 1, 1) for name in ("alpha", "beta")}, folder / "dists.pth")
    return {"vgg16": folder / "vgg16.pth", "dists": folder / "dists.pth"}


def test_lpips(trunk: Path) -> None:
    meta, tensors = load("eval_perceptual")
    first, second = image(tensors, "image0"), image(tensors, "image1")
    value = lpips.lpips(first, second, weights={"alexnet": trunk}).item()
    assert math.isclose(value, meta["lpips"]["distance_in_float64"], rel_tol=RELATIVE)
    assert lpips.lpips(first, first, weights={"alexnet": trunk}).item() == meta["lpips"]["of_image0_with_itself"]


def test_lpips_layer_by_layer(trunk: Path) -> None:
    meta, tensors = load("eval_perceptual")
    built = network(lpips.Lpips, {"alexnet": trunk}, net="alex", version="0.1").network
    heads = [tensors[f"head.{k}"] for k in range(5)]
    for k, head in enumerate(heads):
        assert torch.equal(built.lins[k].model[-1].weight.flatten(), head), f"head {k} of the package is not the published one"
    with torch.inference_mode():
        first, second = (2 * image(tensors, name) - 1 for name in ("image0", "image1"))
        _, layers = built(first, second, retPerLayer=True)
    np.testing.assert_allclose([float(layer) for layer in layers], meta["lpips"]["per_layer"], rtol=RELATIVE)


def test_dists(vgg: dict[str, Path]) -> None:
    meta, tensors = load("eval_perceptual")
    first, second = image(tensors, "image0"), image(tensors, "image1")
    value = dists.dists(first, second, weights=vgg).item()
    assert math.isclose(value, meta["dists"]["distance_in_float64"], abs_tol=ABSOLUTE)
    assert math.isclose(dists.dists(second, first, weights=vgg).item(), meta["dists"]["exchanged"], abs_tol=ABSOLUTE)
    assert abs(dists.dists(first, first, weights=vgg).item()) <= ABSOLUTE


def test_dists_last_features(vgg: dict[str, Path]) -> None:
    _, tensors = load("eval_perceptual")
    with torch.inference_mode():
        features = network(dists.build, vgg).forward_once(image(tensors, "image0"))[-1][0]
    torch.testing.assert_close(features, tensors["dists_stage5.image0"], rtol=1e-4, atol=1e-4)  # sums of 4608 products in another order
