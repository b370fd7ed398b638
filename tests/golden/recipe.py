"""Fills a network with the random weights that a reference data set describes by seed, key names and standard deviations."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from golden import under
from torch import Tensor


def fill(recipe: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a recipe; its SHA-256 is compared with the stated one.

    Args:
        recipe: of a set's JSON: `seed`, and for each key `shape`, `kind`, `mean` and `std`.
        tensors: of the same set: what is added to single weights (`add_index.KEY`, `add_value.KEY`).
    """
    generator, state = np.random.Generator(np.random.PCG64(recipe["seed"])), {}
    for key in sorted(recipe["keys"]):
        how = recipe["keys"][key]
        z = generator.standard_normal(how["shape"])
        if how["kind"] == "fan_centred":
            z -= z.mean(1, keepdims=True)
        if how["kind"] == "absnormal":
            z = abs(z)
        state[key] = torch.from_numpy(np.float32(how["mean"] + how["std"] * z))
    for key, index in under(tensors, "add_index.").items():
        state[key][tuple(index.long().T)] += tensors[f"add_value.{key}"]
    digest = hashlib.sha256(b"".join(state[key].numpy().astype("<f4").tobytes() for key in sorted(state))).hexdigest()
    assert digest == recipe["sha256_after_everything"], "the recipe gives other weights here: compare NumPy's version"
    for alias, key in recipe.get("same_tensor_under_two_names", {}).items():
        state[alias] = state[key]
    return state | {key: torch.tensor(0) for key in recipe.get("integer_buffers_zero", ())}
