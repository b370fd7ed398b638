"""The exported model: the checkpoint's numbers to the bit, a size that is planned, refusals by name, and nothing that quantizing needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qvsr.models.checkpoints import Backbone
from qvsr.plan import resolve
from qvsr.provenance import ROOT
from qvsr.quant import apply, checkpoint, exported
from qvsr.quant.cost import planned_facts
from qvsr.quant.exported import ModelError
from qvsr.quant.layer import QuantError
from tests.exporting import configured, quantized
from tests.workflow import tiny


def call(backbone: Backbone, t: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, lq = (torch.randn(5, 4, 16, 16, generator=generator) for _ in range(2))
    time = torch.tensor([t])
    with torch.no_grad():
        result: Tensor = backbone.unet(torch.cat([x, lq], 1), time, backbone.context, backbone.structure(lq, time))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_numbers_are_the_checkpoint_s_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    config = configured(tmp_path, dtype)
    backbone = quantized(config, tmp_path / "q.safetensors", forms=True)
    exported.write(tmp_path / "m.safetensors", config, tmp_path / "q.safetensors", "exact", licence="CC0-1.0")
    model = exported.load(tmp_path / "m.safetensors")
    for t in (300, 900):
        assert torch.equal(call(model.backbone, t), call(backbone, t))
    assert not torch.equal(call(model.backbone, 300), call(model.backbone, 900))
    image = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    (posterior, features), (same, others) = (one.vae.encode(image) for one in (backbone, model.backbone))
    assert torch.equal(posterior.mean, same.mean) and model.backbone.first_stage is model.backbone.vae
    assert torch.equal(backbone.vae.decode(posterior.mean, features), model.backbone.vae.decode(same.mean, others))
    assert model.sampling == config.sampling and model.header["licence"] == "CC0-1.0"
    assert (
        model.header["quantized"]["method"] == "maxmin"
        and model.header["layers"] == checkpoint.read_header(tmp_path / "q.safetensors")["layers"]
    )


def test_half_branches_are_rounded_once_and_nothing_else_is(tmp_path: Path) -> None:
    config = configured(tmp_path)
    backbone = quantized(config, tmp_path / "q.safetensors")
    header = exported.write(tmp_path / "m.safetensors", config, tmp_path / "q.safetensors", "half")
    model = exported.load(tmp_path / "m.safetensors")
    assert not torch.equal(call(model.backbone), call(backbone))
    squared = error = 0.0
    for layer in apply.quant_layers(backbone.unet).values():
        for role in ("up", "down"):
            before = getattr(layer, role).data
            getattr(layer, role).data = before.half().float()
            squared, error = squared + float(before.square().sum()), error + float((before - before.half().float()).square().sum())
    assert torch.equal(call(model.backbone), call(backbone))
    assert header["branch_error"] == pytest.approx((error / squared) ** 0.5, rel=0.01) and 1e-5 < header["branch_error"] < 2**-11


def test_two_separate_autoencoders(tmp_path: Path) -> None:
    image = {**tiny.BACKBONE["first_stage"], "num_res_blocks": 2}
    config = configured(tmp_path, share_encoder=False, first_stage=image)
    backbone = quantized(config, tmp_path / "q.safetensors")
    exported.write(tmp_path / "m.safetensors", config, tmp_path / "q.safetensors", "exact")
    model = exported.load(tmp_path / "m.safetensors")
    frames = torch.rand(5, 3, 32, 32) * 2 - 1
    assert torch.equal(model.backbone.first_stage.encode(frames)[0].mean, backbone.first_stage.encode(frames)[0].mean)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("first_stage_model.decoder.")]  # noqa: SIM118


def test_the_planned_size_is_that_of_the_file(tmp_path: Path) -> None:
    config = configured(tmp_path).model_copy(update={"methods": ("quantvsr",), "bits": ("W4A4",)})
    quantized(config, tmp_path / "q.safetensors", rank=3)
    _, (_, _, facts) = planned_facts(config, rank=3)
    found = {}
    for branch in ("half", "exact"):
        exported.write(tmp_path / "m.safetensors", config, tmp_path / "q.safetensors", branch)  # type: ignore[arg-type]
        found[branch] = exported.unet_bytes(tmp_path / "m.safetensors"), exported.planned_unet_bytes(facts, branch)
    assert found["half"][0] == found["half"][1]
    # branches of a few hundred values compress a little worse than those that the plan's figure was measured on
    assert found["exact"][0] == pytest.approx(found["exact"][1], rel=0.02)


def test_the_full_size_fits() -> None:
    """As published: 84.39 % off the 3.74 GB of float32."""
    config = resolve([ROOT / "config" / "paper.yaml"], {"methods": ["quantvsr"], "bits": ["W4A4"]})
    (_, _, full), (_, _, facts) = planned_facts(config, rank=24)
    assert sum(layer.weights + layer.bias for layer in full.layers) + full.other_params == 935_321_287
    sizes = [exported.planned_unet_bytes(facts, branch) for branch in ("exact", "half")]
    # by hand: 934.35 M weights at 4 bits, 29.44 M numbers of branches, and 7.6 MB of scales, zero points, signs, biases, norms, kept layers
    assert sizes == pytest.approx([934.35e6 / 2 + 29.44e6 * 4 * 0.87 + 7.6e6, 934.35e6 / 2 + 29.44e6 * 2 + 7.6e6], rel=1e-3)
    assert max(sizes) <= (1 - 0.8439) * 4 * 935_321_287


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(3),
        torch.tensor([1e-45, -3e38, float("inf"), -0.0, 1.0]),
        torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)),
        torch.zeros(0, 4),
    ],
    ids=["zeros", "extremes", "normal", "empty"],
)
def test_squeezing_loses_nothing(values: Tensor) -> None:
    again = exported.unsqueeze(exported.squeeze(values), tuple(values.shape))
    assert torch.equal(again.view(torch.int32), values.view(torch.int32)) and again.shape == values.shape


def test_same_bytes_twice_and_no_path_in_them(tmp_path: Path) -> None:
    config = configured(tmp_path)
    quantized(config, tmp_path / "q.safetensors")
    for name in "ab":
        exported.write(tmp_path / name, config, tmp_path / "q.safetensors")
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes() and str(tmp_path).encode() not in content


def test_other_weights_and_branches_out_of_range_are_refused(tmp_path: Path) -> None:
    config = configured(tmp_path)
    quantized(config, tmp_path / "q.safetensors", branch=1e6)
    with pytest.raises(
        ModelError, match=r"q.safetensors was made from other weights of backbone tiny \(digest [0-9a-f]{16}, .*w1.safetensors"
    ):
        exported.write(tmp_path / "m", configured(tmp_path, seed=1), tmp_path / "q.safetensors")
    with pytest.raises(ModelError, match=r"q.safetensors: .*\.up holds .*, beyond half precision: export with --branch exact"):
        exported.write(tmp_path / "m", config, tmp_path / "q.safetensors", "half")
    with pytest.raises(ModelError, match=r"no branch 'quarter'; known: exact, half"):
        exported.write(tmp_path / "m", config, tmp_path / "q.safetensors", "quarter")  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_files_that_are_no_whole_model_are_refused_by_name(tmp_path: Path) -> None:
    config, file = configured(tmp_path), tmp_path / "m.safetensors"
    quantized(config, tmp_path / "q.safetensors")
    with pytest.raises(ModelError, match=r"no exported model .*m.safetensors; `python -m qvsr export` writes one"):
        exported.load(file)
    with pytest.raises(ModelError, match=r"q.safetensors is no exported model of qvsr: .*it is a quantized checkpoint"):
        exported.load(tmp_path / "q.safetensors")
    with pytest.raises(ModelError, match=r"w0.safetensors is no exported model of qvsr: its header has no 'qvsr_model'$"):
        exported.load(Path(config.backbone.weights))  # type: ignore[arg-type]
    exported.write(file, config, tmp_path / "q.safetensors")
    with pytest.raises(QuantError, match=r"no execution 'pakced'"):
        exported.load(file, "pakced")
    whole = file.read_bytes()
    header = json.dumps(exported.read_header(file)["sampling"]["steps"])
    for damaged in (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole.replace(b'steps\\": ' + header.encode(), b'steps\\": 7', 1)):
        assert damaged != whole
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"m.safetensors is damaged \(its content is not what was written\)"):
            exported.load(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"m.safetensors is damaged or no safetensors file"):
        exported.load(file)


def run(code: str) -> Any:
    """What a new process prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_loading_imports_nothing_that_quantizes(tmp_path: Path) -> None:
    config = configured(tmp_path)
    quantized(config, tmp_path / "q.safetensors")
    exported.write(tmp_path / "m.safetensors", config, tmp_path / "q.safetensors")
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom qvsr.quant import exported\n"
        f"exported.load(Path({str(tmp_path / 'm.safetensors')!r}))\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = run(code)
    assert "qvsr.quant.layer" in loaded
    quantizing = ("qvsr.data.calibration", "qvsr.quantvsr", "qvsr.training", "qvsr.stages", "baselines", "metrics", "pyiqa", "torchvision")
    assert not [name for name in loaded if name.startswith(quantizing)]


def test_packed_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """A U-Net of 68 million parameters, so that the process itself does not hide what the weights take.

    Not rotated: layers of less than 256 channels keep a dense matrix each, which at these widths is no small part; at full size it is.
    """
    wide = {
        **tiny.BACKBONE["unet"],
        "model_channels": 256,
        "channel_mult": [1, 2],
        "attention_resolutions": [1, 2],
        "num_head_channels": 64,
    }
    config = configured(tmp_path, unet=wide)
    quantized(config, tmp_path / "q.safetensors", rank=0, rotate=False)
    file = tmp_path / "m.safetensors"
    exported.write(file, config, tmp_path / "q.safetensors")
    code = (
        "import json\nfrom pathlib import Path\nfrom qvsr.quant import exported\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        f"exported.load(Path({str(tmp_path / 'small.safetensors')!r}), 'packed')\n"
        "before = resident()\n"
        f"model = exported.load(Path({str(file)!r}), 'packed')\n"
        "print(json.dumps(resident() - before))"
    )
    small = configured(tmp_path, seed=2)
    quantized(small, tmp_path / "qs.safetensors")
    exported.write(tmp_path / "small.safetensors", small, tmp_path / "qs.safetensors")
    assert run(code) < 1.1 * file.stat().st_size
