"""The empty prompt's embedding against the formulas, written out in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from qvsr.models.text import TextError, empty_prompt, tower_shapes

WIDTH, LAYERS, TOKENS = 128, 3, 6  # two heads


def random_tower(width: int = WIDTH, layers: int = LAYERS) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        key: torch.randn(shape) * 0.3 + (".ln_" in key or key.startswith("ln_"))
        for key, shape in tower_shapes(width, layers, TOKENS).items()
    }


def norm(x: Tensor, tower: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * tower[name + ".weight"] + tower[name + ".bias"]


def by_hand(tower: dict[str, Tensor], layers: int) -> Tensor:
    """Tokens 49406, 49407, 0, 0, …; causal attention with heads of 64; exact GELU; as the published description has it."""
    tower = {key: value.double() for key, value in tower.items()}
    x = tower["token_embedding.weight"][[49406, 49407] + [0] * (TOKENS - 2)] + tower["positional_embedding"]
    for i in range(layers):
        name = f"transformer.resblocks.{i}."
        h = norm(x, tower, name + "ln_1")
        q, k, v = (h @ tower[name + "attn.in_proj_weight"].T + tower[name + "attn.in_proj_bias"]).chunk(3, -1)
        heads = []
        for a in range(x.shape[1] // 64):
            own = slice(64 * a, 64 * a + 64)
            scores = (q[:, own] @ k[:, own].T / 8).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, own])
        x = x + torch.cat(heads, -1) @ tower[name + "attn.out_proj.weight"].T + tower[name + "attn.out_proj.bias"]
        h = norm(x, tower, name + "ln_2") @ tower[name + "mlp.c_fc.weight"].T + tower[name + "mlp.c_fc.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ tower[name + "mlp.c_proj.weight"].T + tower[name + "mlp.c_proj.bias"]
    return norm(x, tower, "ln_final")


def test_penultimate_layer_of_the_empty_prompt() -> None:
    tower = random_tower()
    context = empty_prompt(tower, "here")
    assert context.shape == (1, TOKENS, WIDTH) and context.dtype == torch.float32 and not context.requires_grad
    torch.testing.assert_close(context[0].double(), by_hand(tower, LAYERS - 1), rtol=0, atol=2e-5)  # float32, values up to 4
    assert (context[0] - by_hand(tower, LAYERS)).abs().max() > 0.1, "the last layer would show"


def test_half_precision_and_a_whole_model() -> None:
    tower = random_tower()
    halves = {key: value.half() for key, value in tower.items()}
    others = {"visual.conv1.weight": torch.zeros(2, 2), "attn_mask": torch.zeros(TOKENS, TOKENS)}
    found = empty_prompt(halves | others, "here")
    assert torch.equal(found, empty_prompt({key: value.float() for key, value in halves.items()}, "here"))
    last = {key: value for key, value in tower.items() if f"resblocks.{LAYERS - 1}" in key}
    spoiled = {key: torch.full_like(value, math.nan) for key, value in last.items()}
    assert torch.equal(empty_prompt(tower | spoiled, "here"), empty_prompt(tower, "here")), "the last layer is not used"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_embedding.weight": None}, "here is no text tower of OpenCLIP: it has no token_embedding.weight"),
        ({"ln_final.bias": None}, "here is no text tower of OpenCLIP: it misses 1 keys, first ln_final.bias"),
        ({"text_model.x": torch.zeros(1)}, "here is no text tower of OpenCLIP: it has unknown 1 keys, first text_model.x"),
        ({"ln_final.bias": torch.zeros(3)}, "here is no text tower of OpenCLIP: ln_final.bias is (3,), expected (128,)"),
        ({"token_embedding.weight": torch.zeros(7, WIDTH)}, "here: the text tower knows 7 tokens, OpenCLIP's tokenizer 49408"),
        ({"token_embedding.weight": torch.zeros(49408, 96)}, "the text tower is 96 channels wide, a multiple of 64 is needed"),
    ],
)
def test_what_is_no_tower_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    tower = {key: value for key, value in (random_tower() | change).items() if value is not None}
    with pytest.raises(TextError, match=f"^{re.escape(message)}") as caught:
        empty_prompt(tower, "here")
    assert "\n" not in str(caught.value)
