"""The text context: what OpenCLIP's text tower says of the empty prompt. It is computed once, when the official weights are converted."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Of a whole OpenCLIP model, and of the tower's end, which the penultimate layer does not need.
UNUSED = re.compile(r"^(visual\..*|text_projection|logit_scale|logit_bias|attn_mask)$")
BLOCK = re.compile(r"^transformer\.resblocks\.(\d+)\.")
HEAD_WIDTH = 64
"""Of every OpenCLIP text tower; 16 heads at the 1024 channels of ViT-H-14."""


class TextError(ValueError):
    """Weights that are no text tower of OpenCLIP; one line."""


def build(width: int, layers: int, tokens: int = 77, vocabulary: int = 49408) -> nn.Module:
    """OpenCLIP's text tower on the meta device: its last layer, then its last norm, over all tokens; no pooling, no projection."""
    from open_clip.transformer import TextTransformer

    if width % HEAD_WIDTH:
        raise TextError(f"the text tower is {width} channels wide, a multiple of {HEAD_WIDTH} is needed: its heads have {HEAD_WIDTH} each")
    with torch.device("meta"):
        heads = width // HEAD_WIDTH
        return TextTransformer(tokens, vocabulary, width, heads, layers, output_dim=None, pool_type="none").eval()  # type: ignore[arg-type]


def tower_shapes(width: int, layers: int = 24, tokens: int = 77, vocabulary: int = 49408) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a text tower as checkpoints hold it, the parts without use included."""
    shapes = {key: tuple(value.shape) for key, value in build(width, layers, tokens, vocabulary).state_dict().items()}
    return {**shapes, "text_projection": (width, width), "logit_scale": ()}


def empty_prompt(tower: Mapping[str, Tensor], where: str) -> Tensor:
    """The context that Stable Diffusion 2.1 makes of the empty prompt: the penultimate layer's tokens after the last norm.

    Args:
        tower: tensors by OpenCLIP's names, of the text tower or of the whole model; computed in float32 whatever their type.
        where: what the tower was read from, for messages.
    Returns:
        (1, tokens, width) float32.
    Raises:
        TextError: keys or shapes are not those of a text tower; the first are named.
    """
    from open_clip.tokenizer import SimpleTokenizer

    found = {key: value for key, value in tower.items() if not UNUSED.match(key)}
    blocks = {int(match[1]) for key in found if (match := BLOCK.match(key))}
    for key, dimensions in (("token_embedding.weight", 2), ("positional_embedding", 2), ("transformer.resblocks.1.ln_1.weight", 1)):
        if key not in found or found[key].dim() != dimensions:
            raise TextError(
                f"{where} is no text tower of OpenCLIP: it has no {key}" if key not in found else _shape(where, key, found[key])
            )
    vocabulary, width = found["token_embedding.weight"].shape
    last = max(blocks)  # the context leaves it out
    kept = {key: value for key, value in found.items() if not key.startswith(f"transformer.resblocks.{last}.")}
    network = build(width, last, found["positional_embedding"].shape[0], vocabulary)
    expected = network.state_dict()
    for what, keys in (("misses", expected.keys() - kept.keys()), ("has unknown", kept.keys() - expected.keys())):
        if keys:
            raise TextError(f"{where} is no text tower of OpenCLIP: it {what} {len(keys)} keys, first {', '.join(sorted(keys)[:3])}")
    for key, value in kept.items():
        if value.shape != expected[key].shape:
            raise TextError(_shape(where, key, value, expected[key]))
    network.load_state_dict({key: value.float() for key, value in kept.items()}, assign=True)
    network.attn_mask = network.build_causal_mask()  # a buffer that no file holds
    tokenizer = SimpleTokenizer()
    if vocabulary != tokenizer.vocab_size:
        raise TextError(f"{where}: the text tower knows {vocabulary} tokens, OpenCLIP's tokenizer {tokenizer.vocab_size}")
    with torch.no_grad():
        context: Tensor = network(tokenizer("", context_length=network.context_length))
    return context


def _shape(where: str, key: str, found: Tensor, expected: Tensor | None = None) -> str:
    wanted = f", expected {tuple(expected.shape)}" if expected is not None else ""
    return f"{where} is no text tower of OpenCLIP: {key} is {tuple(found.shape)}{wanted}"
