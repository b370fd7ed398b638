"""Hadamard rotations: quant_rotation. Which Hadamard matrix a size has is free (the set says so); orthogonality and the signs' side are not."""

from __future__ import annotations

import golden
import torch

from qvsr.quant.rotation import can_rotate, hadamard, rotation_from_signs


def test_rotations() -> None:
    meta, tensors = golden.load("quant_rotation")
    assert {str(case["n"]) for case in meta["sizes"]} == {n for (n,) in golden.matching(tensors, r"n(\d+)\.rot")}
    for case in meta["sizes"]:
        n = case["n"]
        signs, stored = tensors[f"n{n}.signs"], tensors[f"n{n}.rot"]
        if not case["supported"]:
            golden.assert_close(stored, torch.eye(n), meta, f"{n}: the reference does not rotate")
            continue
        assert can_rotate(n), f"the reference rotates {n}"
        matrix = stored * signs[:, None] * n**0.5
        golden.assert_close(matrix.abs(), torch.ones(n, n), meta, f"{n}: rows times signs are a Hadamard matrix")
        own = rotation_from_signs(signs, torch.float64)
        golden.assert_close(own @ own.T, torch.eye(n, dtype=torch.float64), meta, f"{n} orthogonal")
        golden.assert_close((own * n**0.5 * signs[:, None]).float(), hadamard(n).float(), meta, f"{n}: signs multiply rows")
        if n & (n - 1) == 0:
            golden.assert_close(own.float(), stored, meta, f"{n}: Sylvester's matrix")
