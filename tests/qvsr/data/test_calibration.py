"""Recording of calibration samples with a tiny backbone: what is kept, resuming, and refusals by name."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from qvsr.config import AutoencoderSettings, BackboneSettings, CalibrationSettings, SamplingSettings, StructureSettings, UNetSettings
from qvsr.data import calibration
from qvsr.data.calibration import CalibrationError, CalibrationSet, kept_steps, quotas, record
from qvsr.models import pipeline
from qvsr.models.checkpoints import Backbone, build

SAMPLING = SamplingSettings(
    steps=4, flow="none", guidance_scale=0.0, tile=8, tile_overlap=4, image_tile=32, image_tile_stride=32, pad_multiple=8
)
SETTINGS = CalibrationSettings(steps=2, samples=6)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    vae = AutoencoderSettings(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    settings = BackboneSettings(
        name="tiny",
        unet=UNetSettings(
            model_channels=32,
            channel_mult=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_head_channels=16,
            context_dim=8,
            semb_channels=32,
        ),
        structure=StructureSettings(model_channels=32, out_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,)),
        first_stage=vae,
        vae=vae,
        context_tokens=3,
        share_encoder=True,
    )
    torch.manual_seed(0)
    backbone = build(settings)
    torch.nn.init.normal_(backbone.unet.out[2].weight, std=0.1)  # built as zero: an output that carries nothing would hide mistakes
    return backbone


@pytest.fixture(scope="module")
def clips() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"set/clip{k}", torch.rand(5, 3, 8, 12, generator=generator)) for k in range(2)]


@pytest.fixture(scope="module")
def recorded(backbone: Backbone, clips: list[tuple[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    record(backbone, clips, SAMPLING, SETTINGS, folder, seed=1)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_steps_are_evenly_spaced() -> None:
    assert kept_steps(50, 10) == list(range(0, 50, 5)), "the released code keeps i % 5 == 0"
    assert kept_steps(50, 5) == list(range(0, 50, 10)) and kept_steps(3, 3) == [0, 1, 2] and len(kept_steps(10, 4)) == 4
    with pytest.raises(CalibrationError, match=r"calibration\.steps is 11, but sampling\.steps is 10"):
        kept_steps(10, 11)
    assert quotas(1800, 30) == [60] * 30 and sum(quotas(7, 3)) == 7


def test_the_network_gives_the_recorded_output_again(backbone: Backbone, recorded: Path) -> None:
    samples = CalibrationSet(recorded, backbone.structure)
    assert len(samples) == 6
    assert {samples[i].clip for i in range(6)} == {"set/clip0", "set/clip1"} and {samples[i].step for i in range(6)} == {0, 2}
    for i in range(len(samples)):
        sample = samples[i]
        with torch.no_grad():
            assert torch.equal(backbone.unet(sample.x, sample.t, sample.context, sample.struct), sample.out)
    assert samples[0].out.abs().max() > 0


def test_memory_is_flat(backbone: Backbone, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample stays in memory once it is let go; structure maps do up to a limit, and those beyond are made again, the same."""
    samples = CalibrationSet(recorded, backbone.structure)
    first = samples[0].struct
    one = sum(value.numel() * value.element_size() for value in first.values())
    monkeypatch.setattr(calibration, "STRUCT_CACHE_BYTES", 2 * one)
    samples = CalibrationSet(recorded, backbone.structure)
    assert len(samples) > 3
    alive = [weakref.ref(tensor) for i in range(len(samples)) for tensor in (samples[i].x, samples[i].out, samples[i].lq_latent)]
    gc.collect()
    assert [tensor() for tensor in alive if tensor() is not None] == []
    assert len(samples._struct) == 2
    beyond = [samples[3].struct, samples[3].struct]
    assert beyond[0] is not beyond[1] and all(torch.equal(beyond[0][key], beyond[1][key]) for key in beyond[0])


def test_two_recordings_are_the_same_bytes(
    backbone: Backbone, clips: list[tuple[str, torch.Tensor]], recorded: Path, tmp_path: Path
) -> None:
    samples = record(backbone, clips, SAMPLING, SETTINGS, tmp_path, seed=1)
    assert content(tmp_path) == content(recorded) and samples.digest == CalibrationSet(recorded).digest


def test_resumed_after_a_stop(
    backbone: Backbone, clips: list[tuple[str, torch.Tensor]], recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the second clip: no manifest, the first clip is kept as it is, and the end is the same."""
    restore, restored = pipeline.restore, []

    def stop_in_second(*args: object, clip: str, observe: object, **more: object) -> object:
        restored.append(clip)
        seen = 0

        def stop(observation: object) -> None:
            nonlocal seen
            observe(observation)  # type: ignore[operator]
            seen += 1
            if clip == "set/clip1" and seen == 2:
                raise KeyboardInterrupt

        return restore(*args, clip=clip, observe=stop, **more)

    monkeypatch.setattr(pipeline, "restore", stop_in_second)
    with pytest.raises(KeyboardInterrupt):
        record(backbone, clips, SAMPLING, SETTINGS, tmp_path, seed=1)
    with pytest.raises(CalibrationError, match=r"has no manifest\.json: finish it with the calibrate stage"):
        CalibrationSet(tmp_path)
    monkeypatch.setattr(pipeline, "restore", lambda *a, clip, **k: (restored.append(clip), restore(*a, clip=clip, **k))[1])
    record(backbone, clips, SAMPLING, SETTINGS, tmp_path, seed=1)
    assert restored == ["set/clip0", "set/clip1", "set/clip1"] and content(tmp_path) == content(recorded)


def test_another_setting_in_the_same_folder_is_refused(backbone: Backbone, clips: list[tuple[str, torch.Tensor]], recorded: Path) -> None:
    with pytest.raises(CalibrationError, match="holds samples recorded with another seed"):
        record(backbone, clips, SAMPLING, SETTINGS, recorded, seed=2)
    with pytest.raises(CalibrationError, match="recorded with another clips"):
        record(backbone, [(clips[0][0], clips[0][1] * 0.5), clips[1]], SAMPLING, SETTINGS, recorded, seed=1)


def test_refusals(backbone: Backbone, clips: list[tuple[str, torch.Tensor]], recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="was recorded with other weights"):
        CalibrationSet(recorded, backbone_digest="0123")
    with pytest.raises(CalibrationError, match="no clips to record from"):
        record(backbone, [], SAMPLING, SETTINGS, tmp_path, seed=0)
    with pytest.raises(CalibrationError, match="two calibration clips give the file name set_clip0"):
        record(backbone, [clips[0], ("set_clip0", clips[1][1])], SAMPLING, SETTINGS, tmp_path, seed=0)
    for name, data in content(recorded).items():
        (tmp_path / name).write_bytes(data)
    victim = tmp_path / CalibrationSet(tmp_path).names[0]
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CalibrationError, match=f"{victim.name} is damaged"):
        CalibrationSet(tmp_path)[0]
    victim.unlink()
    with pytest.raises(CalibrationError, match=f"1 files of its manifest are missing, first {victim.name}"):
        CalibrationSet(tmp_path)
