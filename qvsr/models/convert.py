"""Official checkpoints (torch's ``.ckpt`` and ``.pth``) to safetensors, once.

A pickle is a program. Before anything of it runs, the names of everything that it would call are read and compared with :data:`TORCH` and
:data:`STAND_INS`; any other is refused by name. Then torch loads it with ``weights_only=True``, which knows the same limit.
"""

from __future__ import annotations

import collections
import hashlib
import json
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from qvsr.config import BackboneSettings
from qvsr.models import text
from qvsr.models.checkpoints import CONTEXT, FIRST_STAGE, STRUCTURE, UNET, UNUSED_FIRST_STAGE, build, finite, write_tensors
from qvsr.provenance import atomic_path

Precision = Literal["keep", "half", "single"]
TEXT = "cond_stage_model.model."
EMA = "model_ema."
EMA_OF = "model."  # what the averages are of; names have no dots there
FLOW = "flownet_model."
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
STEPS = 1000
"""Entries of each schedule buffer."""
MAX_PICKLE = 1 << 28
"""Bytes of a checkpoint's pickle: names and sizes, not values. The official ones have below 1 MB."""

TORCH = frozenset(
    {
        "collections.Counter",
        "collections.OrderedDict",
        "_codecs.encode",
        "__builtin__.set",
        "builtins.set",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch.BFloat16Storage",
        "torch.BoolStorage",
        "torch.ByteStorage",
        "torch.DoubleStorage",
        "torch.FloatStorage",
        "torch.HalfStorage",
        "torch.IntStorage",
        "torch.LongStorage",
    }
)
"""What holds tensors together and does nothing else; torch's own list has them too."""


class Inert:
    """Takes the place of a class of another package: remembers nothing and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _Dtype(Inert):
    """Of numpy's types."""


class _Callback(Inert):
    """Of a training callback, whose state is filed under its class."""


def _scalar(*_: object) -> None:
    """Of a number that numpy wrapped, such as the best loss."""


STAND_INS: dict[str, Callable[..., object]] = {
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _Dtype,
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": _Callback,
}
"""What PyTorch Lightning 1.x writes beside the weights. Nothing of these packages is run or needed: ours above take their place."""


class ConvertError(ValueError):
    """A checkpoint that is refused, damaged or of another model; one line."""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_official(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint or a safetensors file, by name; mapped into memory where the file's form allows it.

    Raises:
        ConvertError: it is missing, damaged or no checkpoint, or its pickle would call something that is not allowed; that is named.
    """
    if not path.is_file():
        raise ConvertError(f"no checkpoint {path}; get it with `python -m qvsr assets fetch`, or name another in official.*")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConvertError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from None
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        refused = sorted(set(_zip_globals(path) if zipped else _legacy_globals(file)) - TORCH - STAND_INS.keys())
    if refused:
        raise ConvertError(
            f"{path} is refused: its pickle would call {', '.join(refused[:5])}{' …' if len(refused) > 5 else ''}, which a checkpoint "
            "of weights does not need; nothing of it was run; use the official file"
        )
    stand_ins = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of a dozen types; each means that the file is not what it should be
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConvertError(f"{path} is damaged or no torch checkpoint ({reason}); fetch it again") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    tensors = {key: value for key, value in (state or {}).items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        held = f"keys {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise ConvertError(f"{path} holds no weights: found {held}; a dict of tensors is expected, or one under state_dict")
    return tensors


def _zip_globals(path: Path) -> Iterator[str]:
    """Names that the pickle in torch's zip form would look up; nothing of it runs."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [one for one in archive.infolist() if one.filename.rpartition("/")[2] == "data.pkl"]
            if not pickles:
                raise ConvertError(f"{path} is a zip archive without data.pkl, no torch checkpoint; is it to be unpacked first?")
            for one in pickles:
                if one.file_size > MAX_PICKLE:
                    raise ConvertError(f"{path} is refused: its pickle has {one.file_size} bytes, at most {MAX_PICKLE} are read")
                with archive.open(one) as file:
                    yield from _globals(file)
    except ConvertError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise ConvertError(f"{path} is damaged or cut short ({error}); fetch it again") from None


def _legacy_globals(file: IO[bytes]) -> Iterator[str]:
    """The same of torch's form before 1.6: five pickles one after the other, then the values."""
    for _ in range(5):
        try:
            yield from _globals(file)
        except (ValueError, EOFError, MemoryError, OverflowError, struct.error):  # its end, or no pickle: torch says what is wrong
            return


def _globals(file: IO[bytes]) -> Iterator[str]:
    words: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":  # of protocol 4, which torch does not write: never allowed, since the name may be another
            yield f"{'.'.join(words[-2:])} (pickle protocol 4)"
        elif opcode.name.startswith("EXT"):
            yield "a registered extension"
        elif isinstance(argument, str) and "UNICODE" in opcode.name:
            words.append(argument)


# --- converting -------------------------------------------------------------------------------------------------------


def official_keys(settings: BackboneSettings, text_layers: int = 24) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the diffusion checkpoint of a backbone, but for the flow network in it."""
    with torch.device("meta"):
        backbone = build(settings)
    shapes = {UNET + key: tuple(value.shape) for key, value in backbone.unet.state_dict().items()}
    shapes |= {STRUCTURE + key: tuple(value.shape) for key, value in backbone.structure.state_dict().items()}
    if not settings.share_encoder:
        shapes |= {FIRST_STAGE + key: tuple(value.shape) for key, value in backbone.first_stage.state_dict().items()}
    tower = text.tower_shapes(settings.unet.context_dim, text_layers, settings.context_tokens)
    return shapes | {TEXT + key: shape for key, shape in tower.items()} | dict.fromkeys(SCHEDULE, (STEPS,))


def vae_keys(settings: BackboneSettings) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the video autoencoder's checkpoint."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build(settings).vae.state_dict().items()}


def convert(
    settings: BackboneSettings,
    weights: Path,
    vae_weights: Path,
    text_tower: Path | None = None,
    ema: bool = False,
    precision: Precision = "keep",
    say: Callable[[str], object] = print,
) -> None:
    """Write the files that `settings` names from the official ones; both appear, each whole, or none does.

    Args:
        settings: the backbone; `weights` and `vae_weights` in it are written.
        weights: the diffusion checkpoint: U-Net, structure encoder, image autoencoder, and mostly the text tower.
        vae_weights: the video autoencoder's.
        text_tower: OpenCLIP's weights; None takes the tower from `weights`.
        ema: take the moving averages (``model_ema.*``) where `weights` has them.
        precision: of the written values: as they are, float16, or float32.
        say: gets lines about what was left out.
    Raises:
        ConvertError: a file is refused, damaged or of another model; the first differing keys are named.
        TextError: the text tower is not one.
    """
    if settings.weights is None or settings.vae_weights is None:
        raise ConvertError("backbone.weights and backbone.vae_weights are not both set: they name the files to write")
    with torch.device("meta"):
        backbone = build(settings)
    with atomic_path(settings.vae_weights) as vae_out, atomic_path(settings.weights) as out:
        _convert_diffusion(out, settings, backbone, weights, text_tower, ema, precision, say)
        _convert_vae(vae_out, settings, backbone.vae, vae_weights, precision, say)


def _convert_diffusion(
    out: Path,
    settings: BackboneSettings,
    backbone: Any,
    source: Path,
    text_tower: Path | None,
    ema: bool,
    precision: Precision,
    say: Callable[[str], object],
) -> None:
    found = read_official(source)
    networks = {UNET: ("U-Net", backbone.unet), STRUCTURE: ("structure encoder", backbone.structure)}
    if not settings.share_encoder:
        networks[FIRST_STAGE] = ("image autoencoder", backbone.first_stage)
    kept: dict[str, Tensor] = {}
    reasons = []
    for prefix, (name, network) in networks.items():
        unused = UNUSED_FIRST_STAGE if prefix == FIRST_STAGE else ()
        own = {key: value for key, value in _under(found, prefix).items() if not key.startswith((*unused, "loss."))}
        reasons += _differences(name, prefix, own, _shapes(network, unused))
        kept |= {prefix + key: value for key, value in own.items()}
    if reasons:
        raise ConvertError(f"{source} is the checkpoint of another model than {settings.name}: {'; '.join(reasons)}; check backbone.*")
    replaced = _averages(source, found, kept) if ema else {}
    kept |= replaced
    tower = _under(found, TEXT) if text_tower is None else _under_any(read_official(text_tower))
    if text_tower is None and not tower:
        raise ConvertError(f"{source} holds no text tower ({TEXT}*): name OpenCLIP's ViT-H-14 weights in official.text")
    context = text.empty_prompt(tower, str(text_tower or source))
    expected = (1, settings.context_tokens, settings.unet.context_dim)
    if tuple(context.shape) != expected:
        raise ConvertError(
            f"{text_tower or source}: the text tower gives {tuple(context.shape)}, the configuration {settings.name} needs {expected}"
        )
    parts = _left_out(key for key in found if key not in kept)
    facts = {"ema": f"{len(replaced)} of {len(kept)} tensors are moving averages" if ema else "not used"}
    facts["context"] = f"empty prompt, from {(text_tower or source).name}"
    _write(out, settings, source, kept, {CONTEXT: context}, precision, parts, facts, say)


def _convert_vae(
    out: Path, settings: BackboneSettings, vae: nn.Module, source: Path, precision: Precision, say: Callable[[str], object]
) -> None:
    found = read_official(source)
    prefix = FIRST_STAGE if any(key.startswith(FIRST_STAGE) for key in found) else ""
    expected = _shapes(vae)
    own = {key: value for key, value in _under(found, prefix).items() if prefix or key in expected or _part_of(key) == UNKNOWN}
    own = {key: value for key, value in own.items() if not key.startswith("loss.")}
    reasons = _differences("video autoencoder", prefix, own, expected)
    if reasons:
        raise ConvertError(f"{source} is the checkpoint of another model than {settings.name}: {'; '.join(reasons)}; check backbone.vae")
    _write(out, settings, source, own, {}, precision, _left_out(key for key in found if key.removeprefix(prefix) not in own), {}, say)


def _differences(name: str, prefix: str, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What a network's part of a checkpoint lacks, has too much or has in another shape; empty if nothing."""
    if not any(key in expected for key in found):
        return [f"it has no {name} ({prefix}* such as {next(iter(expected))})"]
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    unequal = sorted(key for key in expected.keys() & found.keys() if tuple(found[key].shape) != expected[key])
    reasons = []
    if missing:
        reasons.append(f"its {name} misses {len(missing)} keys, first {', '.join(prefix + key for key in missing[:3])}")
    if extra:
        reasons.append(f"its {name} has {len(extra)} keys too many, first {', '.join(prefix + key for key in extra[:3])}")
    if unequal:
        first = unequal[0]
        reasons.append(
            f"its {name} has {len(unequal)} of another shape, first {prefix}{first} {tuple(found[first].shape)}, expected {expected[first]}"
        )
    return reasons


def _shapes(network: nn.Module, unused: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items() if not (unused and key.startswith(unused))}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _under_any(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text tower's tensors: OpenCLIP's own file has no prefix, a diffusion checkpoint has."""
    return _under(tensors, TEXT) or tensors


def _averages(source: Path, found: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moving averages by the names of what they are of: there the dots are left out."""
    dotless = {EMA + key.removeprefix(EMA_OF).replace(".", ""): key for key in kept if key.startswith(EMA_OF)}
    averages = {dotless[key]: value for key, value in found.items() if key in dotless}
    if not averages:
        raise ConvertError(f"{source} holds no moving averages ({EMA}*): set official.ema to false")
    for key, value in averages.items():
        if value.shape != kept[key].shape:
            raise ConvertError(f"{source}: the moving average of {key} is {tuple(value.shape)}, the weight {tuple(kept[key].shape)}")
    return averages


UNKNOWN = "unknown"


def _part_of(key: str) -> str:
    """What a key that is not kept belongs to.

    >>> [_part_of(key) for key in ("betas", "model_ema.diffusion_modelout2bias", "first_stage_model.decoder.conv_in.bias", "lvlb")]
    ['schedule', 'moving averages', 'image decoder', 'unknown']
    """
    if key in SCHEDULE:
        return "schedule"
    for pattern, part in (
        (r"(first_stage_model\.)?loss\.", "training loss"),
        (r"cond_stage_model\.", "text tower"),
        (r"flownet_model\.", "flow network"),
        (r"[a-z_]*model_ema\.", "moving averages"),
        (r"first_stage_model\.(decoder|post_quant_conv)\.", "image decoder"),
        (r"first_stage_model\.", "image autoencoder"),
    ):
        if re.match(pattern, key):
            return part
    return UNKNOWN


def _left_out(keys: Iterable[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = collections.defaultdict(list)
    for key in keys:
        parts[_part_of(key)].append(key)
    return dict(sorted(parts.items()))


def _write(
    out: Path,
    settings: BackboneSettings,
    source: Path,
    kept: Mapping[str, Tensor],
    computed: Mapping[str, Tensor],
    precision: Precision,
    left_out: Mapping[str, list[str]],
    facts: Mapping[str, str],
    say: Callable[[str], object],
) -> None:
    def written(dtype: torch.dtype) -> torch.dtype:
        if precision == "keep":
            return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
        return torch.float16 if precision == "half" else torch.float32

    def value(key: str) -> Tensor:
        if key in computed:
            return computed[key]
        tensor = kept[key].to(written(kept[key].dtype))
        if not finite(tensor.float()):
            reason = "fetch it again" if not finite(kept[key].float()) else "they are too large for float16, set official.precision to keep"
            raise ConvertError(f"{source}: {key} holds values that are not finite; {reason}")
        return tensor

    layout = {key: (tuple(one.shape), written(one.dtype)) for key, one in kept.items()}
    layout |= {key: (tuple(one.shape), one.dtype) for key, one in computed.items()}
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    unknown = left_out.get(UNKNOWN, [])
    metadata = {
        "backbone": settings.name,
        "source": source.name,
        "source_sha256": digest,
        "precision": precision,
        "left_out": json.dumps({part: len(keys) for part, keys in left_out.items()}),
        "unknown": json.dumps(unknown),
        **facts,
    }
    write_tensors(out, layout, value, metadata)
    say(
        f"{source.name}: {len(kept)} tensors kept; left out: {', '.join(f'{part} {len(keys)}' for part, keys in left_out.items()) or 'none'}"
    )
    if unknown:
        say(
            f"{source.name}: {len(unknown)} keys of no known part are left out: {', '.join(unknown[:20])}{' …' if len(unknown) > 20 else ''}"
        )


# --- for rehearsals ---------------------------------------------------------------------------------------------------


def random_checkpoint(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float16, seed: int = 0) -> None:
    """Random weights under given names, such as :func:`official_keys`, by the name's ending as safetensors or as torch's ``.ckpt``.

    Matrices and kernels keep the size of what passes through them, norms are the identity, biases are 0: a network of them gives numbers.
    safetensors are written a tensor at a time; a ``.ckpt`` is held whole in memory, in `dtype`.
    """
    generator = torch.Generator().manual_seed(seed)

    def value(key: str) -> Tensor:
        shape = tuple(shapes[key])
        if key.endswith("temporal_alpha"):
            return torch.full(shape, 0.5, dtype=dtype)
        if len(shape) < 2:
            return torch.full(shape, 0.0 if key.endswith("bias") else 1.0, dtype=dtype)
        fan_in = torch.Size(shape[1:]).numel()
        return torch.randn(shape, generator=generator).mul_(0.5 * fan_in**-0.5).to(dtype)

    with atomic_path(path) as partial:
        if path.suffix == ".safetensors":
            write_tensors(partial, {key: (tuple(shape), dtype) for key, shape in shapes.items()}, value)
        else:
            state = {key: value(key) for key in shapes}
            torch.save({"epoch": 0, "global_step": 0, "pytorch-lightning_version": "1.4.2", "state_dict": state}, partial)
