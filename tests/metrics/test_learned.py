"""Metrics with weights, on files of random weights: nothing is downloaded, what the arithmetic is, what is refused."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torch import Tensor

from metrics import clipiqa, dists, lpips, maniqa, musiq, niqe
from metrics._frames import MetricError
from metrics._pyiqa import network, read_state, replaced
from qvsr.registry import METRICS
from tests.metrics.recipes import fill, save

Weights = dict[str, Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any connection fails the test, also where a library catches the error and goes on."""
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("a metric asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not asked, f"a metric asked for the network: {asked}"


def frames(count: int = 2, height: int = 72, width: int = 96, seed: int = 0) -> Tensor:
    """Smooth frames with some texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [0.5 + 0.3 * np.sin(x / (4 + c) + t) * np.cos(y / (5 + c)) for t in range(count) for c in range(3)]
    clip = np.array(waves).reshape(count, 3, height, width) + rng.uniform(-0.1, 0.1, (count, 3, height, width))
    return torch.from_numpy((clip.clip(0, 1) * 255).round() / 255).float()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A file of random weights for each asset, made when it is asked for."""
    folder = tmp_path_factory.mktemp("weights")

    class Made(dict):  # type: ignore[type-arg]
        def __missing__(self, name: str) -> Path:
            self[name] = MAKERS[name](folder / name)
            return self[name]

    return Made()


def alexnet(path: Path) -> Path:
    from torchvision.models import alexnet

    with torch.device("meta"):
        like = alexnet(weights=None).features.state_dict(prefix="features.")
    return save(path, fill(like))


def vgg16(path: Path) -> Path:
    from torchvision.models import vgg16

    with torch.device("meta"):
        like = vgg16(weights=None).features.state_dict(prefix="features.")
    return save(path, fill(like))


def alpha_beta(path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    return save(path, {name: torch.rand((1, 1475, 1, 1), generator=generator) for name in ("alpha", "beta")})


def clip_shapes() -> dict[str, Tensor]:
    from pyiqa.archs.clip_model import CLIP

    with torch.device("meta"):
        return CLIP(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12).state_dict()


def clip_rn50(path: Path) -> Path:
    state = fill(clip_shapes())
    state["logit_scale"] = torch.tensor(3.0)
    return save(path, state)


def musiq_koniq(path: Path) -> Path:
    from pyiqa.archs.musiq_arch import MUSIQ

    return save(path, fill(MUSIQ(pretrained=False).state_dict()))


def maniqa_koniq(path: Path) -> Path:
    import timm
    from pyiqa.archs import maniqa_arch

    class Untrained:
        create_model = staticmethod(lambda name, pretrained: timm.create_model(name))

    with replaced(maniqa_arch, "timm", Untrained):
        return save(path, {f"module.{key}": value for key, value in fill(maniqa_arch.MANIQA(pretrained=False).state_dict()).items()})


def niqe_model(path: Path) -> Path:
    rng = np.random.default_rng(3)
    root = rng.normal(size=(36, 36))
    scipy.io.savemat(path, {"mu_prisparam": rng.normal(size=(1, 36)), "cov_prisparam": root @ root.T / 36}, appendmat=False)
    return path


MAKERS = {
    "alexnet": alexnet,
    "vgg16": vgg16,
    "dists": alpha_beta,
    "clip-rn50": clip_rn50,
    "musiq-koniq": musiq_koniq,
    "maniqa-koniq": maniqa_koniq,
    "niqe": niqe_model,
}
FULL_REFERENCE = {"lpips": lpips.lpips, "dists": dists.dists}
NO_REFERENCE = {"clipiqa": clipiqa.clipiqa, "musiq": musiq.musiq, "niqe": niqe.niqe}


def chosen(name: str, weights: Mapping[str, Path]) -> Weights:
    return {asset: weights[asset] for asset in METRICS[name].facts["weights"]}


def test_lpips_is_what_pyiqa_computes(weights: Weights) -> None:
    """Another implementation around the same trunk, with the heads that the package's wheel carries."""
    import lpips as package
    import torchvision
    from pyiqa.archs import lpips_arch

    class Untrained:
        alexnet = staticmethod(lambda weights: torchvision.models.alexnet(weights=None))

    with replaced(lpips_arch, "models", Untrained):  # its constructor downloads the trunk whatever it is told
        other = lpips_arch.LPIPS(pretrained=False)
    other.load_state_dict(
        torch.load(Path(package.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu", weights_only=True), strict=False
    )
    features = {key.removeprefix("features."): value for key, value in read_state("lpips", weights["alexnet"]).items()}
    with torch.no_grad():
        for key, value in other.net.state_dict().items():
            value.copy_(features[key.split(".", 1)[1]])
    pred, target = frames(seed=1), frames(seed=2)
    ours = lpips.lpips(pred, target, weights=chosen("lpips", weights))
    with torch.inference_mode():
        theirs = other.eval()(pred, target).flatten().double()
    assert ours.min() > 1e-3  # a number that says something
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)  # float32
    old = lpips.lpips(pred, target, version="0.0", weights=chosen("lpips", weights))
    assert not torch.allclose(old, ours, rtol=1e-2)


def test_clipiqa_is_openai_s_clip_on_five_pairs_of_prompts(weights: Weights) -> None:
    """By OpenAI's own network, whose positional embedding is set to zero: pyiqa leaves it out."""
    with clipiqa.packaging_found():
        import clip
        from clip.model import build_model

    state = read_state("clipiqa", weights["clip-rn50"])
    state["visual.attnpool.positional_embedding"] = torch.zeros_like(state["visual.attnpool.positional_embedding"])
    model = build_model(dict(state)).float()
    frame = frames(1, 224, 224)
    mean, std = (
        torch.tensor(value).view(1, 3, 1, 1) for value in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    pairs = (("Good image", "bad image"), ("Sharp image", "blurry image"), ("sharp edges", "blurry edges"))
    pairs += (("High resolution image", "low resolution image"), ("Noise-free image", "noisy image"))
    with torch.inference_mode():
        logits = model((frame - mean) / std, clip.tokenize([text for pair in pairs for text in pair]))[0]
        expected = logits.reshape(5, 2).softmax(-1)[:, 0].mean().double()
    value = clipiqa.clipiqa(frame, weights=chosen("clipiqa", weights))[0]
    assert abs(value - 0.5) > 1e-4  # the prompts are told apart
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)  # pyiqa keeps its tensors of 16 bits for some of the weights


def test_clip_as_published_is_read_too(tmp_path: Path) -> None:
    """OpenAI's file is a TorchScript archive; one of a small network stands for it."""
    small = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.script(small), tmp_path / "RN50.pt")
    state = clipiqa.read_clip(tmp_path / "RN50.pt")
    assert set(state) == {"weight", "bias"} and torch.equal(state["weight"], small.weight)


def test_niqe_is_the_distance_of_two_gaussians(weights: Weights, tmp_path: Path) -> None:
    """Equation 10 of the paper: with the covariance of the photographs grown by a factor, the distance shrinks as it says."""
    frame = frames(1, 192, 192)
    model = scipy.io.loadmat(weights["niqe"], appendmat=False)
    values = []
    for factor in (1e8, 4e8):  # large against the frame's own covariance, which then does not count
        file = tmp_path / f"{factor:g}"
        scipy.io.savemat(file, {"mu_prisparam": model["mu_prisparam"], "cov_prisparam": factor * np.eye(36)}, appendmat=False)
        values.append(niqe.niqe(frame, weights={"niqe": file}).item())
    assert math.isclose(values[0] / values[1], 2, rel_tol=1e-4)
    own = niqe.niqe(frame, weights=chosen("niqe", weights)).item()
    assert own > 0 and not math.isclose(own, niqe.niqe(frame, colour="ycbcr", weights=chosen("niqe", weights)).item(), rel_tol=1e-6)


@pytest.mark.parametrize("name", [*FULL_REFERENCE, *NO_REFERENCE])
def test_a_frame_does_not_depend_on_its_neighbours(name: str, weights: Weights) -> None:
    size = (96, 192) if name == "niqe" else (64, 80)
    clip, target = frames(3, *size, seed=1), frames(3, *size, seed=2)
    function, given = (FULL_REFERENCE | NO_REFERENCE)[name], chosen(name, weights)
    arguments = (clip, target) if name in FULL_REFERENCE else (clip,)
    whole = function(*arguments, weights=given)
    assert whole.shape == (3,) and whole.dtype == torch.float64 and len(set(whole.tolist())) == 3
    parts = [function(*(one[t : t + 1] for one in arguments), weights=given) for t in (2, 0, 1)]
    assert torch.equal(torch.cat(parts), whole[[2, 0, 1]])


@pytest.mark.parametrize("name", list(FULL_REFERENCE))
def test_a_clip_with_itself(name: str, weights: Weights) -> None:
    clip = frames()
    for same in (clip, torch.full_like(clip, 0.5)):  # constant frames too
        assert FULL_REFERENCE[name](same, same, weights=chosen(name, weights)).abs().max() < (1e-6 if name == "dists" else 1e-12)


@pytest.mark.parametrize("name", ["clipiqa", "musiq"])
def test_a_constant_frame_has_a_value(name: str, weights: Weights) -> None:
    assert NO_REFERENCE[name](torch.full((1, 3, 64, 64), 0.5), weights=chosen(name, weights)).isfinite().all()


def test_niqe_of_frames_that_have_none(weights: Weights) -> None:
    given = chosen("niqe", weights)
    clip = frames(3, 96, 192)
    clip[1] = 0.5
    with pytest.raises(MetricError, match="niqe: frame 1 has no value: fewer than two blocks vary"):
        niqe.niqe(clip, weights=given)
    with pytest.raises(MetricError, match="niqe: frames are 128x128 without their border, one block of 96x96; two are needed"):
        niqe.niqe(frames(1, 128, 128), weights=given)
    with pytest.raises(MetricError, match="niqe: frames are 128x80, at least 96x96 is needed"):
        niqe.niqe(frames(1, 128, 80), weights=given)


def test_maniqa_places_its_crops_anew_with_every_frame(weights: Weights) -> None:
    given = chosen("maniqa", weights)
    built = network(maniqa.Maniqa, given, crops=1, places="random", seed=123)
    seen: list[Tensor] = []
    handle = built.network.vit.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    clip = frames(2, 256, 288)
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    try:
        whole = maniqa.maniqa(clip, crops=1, places="random", seed=123, weights=given)
    finally:
        handle.remove()
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002 (the global generator is as it was)
    place = np.random.RandomState(123)
    top, left = place.randint(0, 256 - 224 + 1), place.randint(0, 288 - 224 + 1)
    for t in range(2):
        torch.testing.assert_close(seen[t][0], 2 * clip[t, :, top : top + 224, left : left + 224] - 1)
    assert whole.dtype == torch.float64 and whole.isfinite().all()


def test_maniqa_crop_by_crop_is_pyiqa_s_on_all_at_once(weights: Weights) -> None:
    given = chosen("maniqa", weights)
    frame = frames(1, 256, 320)
    value = maniqa.maniqa(frame, crops=2, weights=given)
    with torch.inference_mode():
        whole = network(maniqa.Maniqa, given, crops=2, places="grid", seed=0).network(frame)
    torch.testing.assert_close(value, whole.flatten().double(), rtol=1e-5, atol=0)  # float32, sums over other batches


def test_maniqa_s_grid_leaves_out_the_bottom(weights: Weights) -> None:
    """What the docstring says of pyiqa's grid of 20."""
    from pyiqa.archs.arch_util import uniform_crop

    rows = torch.arange(448.0).view(1, 1, 448, 1).expand(1, 3, 448, 448)
    crops = uniform_crop(rows, crop_size=224, crop_num=20)
    assert len(crops) == 20 and crops.max() == 224 + 3 * 56 - 1 < 447


def test_what_is_refused(weights: Weights, tmp_path: Path) -> None:
    clip = frames(1)
    broken = clip.clone()
    broken[0, 0, 0, 0] = math.nan
    for name, function in FULL_REFERENCE.items():
        with pytest.raises(MetricError, match=f"{name}: prediction has NaN in frame 0"):
            function(broken, clip, weights=weights)
        with pytest.raises(MetricError, match=f"{name}: frames are 24x96, at least 32x32 is needed"):
            function(clip[:, :, :24], clip[:, :, :24], weights=weights)
    for name, function in (NO_REFERENCE | {"maniqa": maniqa.maniqa}).items():
        with pytest.raises(MetricError, match=f"{name}: prediction has NaN in frame 0"):
            function(broken, weights=weights)
    for call, message in (
        (lambda: lpips.lpips(clip, clip, net="vgg", weights=weights), "lpips: no net 'vgg'; known: alex"),
        (lambda: lpips.lpips(clip, clip, version="0.2", weights=weights), "lpips: no version '0.2'; known: 0.1, 0.0"),
        (lambda: niqe.niqe(clip, colour="rgb", weights=weights), "niqe: no colour 'rgb'; known: yiq, ycbcr"),
        (lambda: maniqa.maniqa(clip, places="corners", weights=weights), "maniqa: no places 'corners'; known: grid, random"),
        (lambda: maniqa.maniqa(clip, crops=0, weights=weights), "maniqa: 0 crops; at least 1 is needed"),
    ):
        with pytest.raises(MetricError, match=message):
            call()


def test_files_that_are_not_the_weights(weights: Weights, tmp_path: Path) -> None:
    clip = frames(1)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"not weights")
    with pytest.raises(MetricError, match=r"lpips: bad.pth cannot be read as weights \(.*\); get it again"):
        lpips.lpips(clip, clip, weights={"alexnet": bad})
    with pytest.raises(MetricError, match="clipiqa: bad.pth cannot be read as weights"):
        clipiqa.clipiqa(clip, weights={"clip-rn50": bad})
    with pytest.raises(MetricError, match="niqe: bad.pth cannot be read as the model"):
        niqe.niqe(frames(1, 96, 192), weights={"niqe": bad})
    torch.save({"features.0.weight": torch.zeros(64, 3, 7, 7)}, bad)
    with pytest.raises(
        MetricError, match=r"lpips: bad.pth does not fit the network: slice1.0.weight is \(64, 3, 7, 7\), \(64, 3, 11, 11\) is needed"
    ):
        lpips.lpips(clip, clip, weights={"alexnet": bad})
    with pytest.raises(MetricError, match=r"dists: bad.pth holds \{.*\}; alpha and beta of \(1, 1475, 1, 1\) are needed"):
        dists.dists(clip, clip, weights={"vgg16": weights["vgg16"], "dists": bad})
    torch.save(torch.nn.Linear(2, 2), bad)  # a pickled object: never executed
    with pytest.raises(MetricError, match="musiq: bad.pth cannot be read as weights"):
        musiq.musiq(clip, weights={"musiq-koniq": bad})
    torch.save([1, 2], bad)
    with pytest.raises(MetricError, match="musiq: bad.pth is not a table of tensors"):
        musiq.musiq(clip, weights={"musiq-koniq": bad})


def test_another_file_is_another_network(weights: Weights, tmp_path: Path) -> None:
    pred, target = frames(seed=1), frames(seed=2)
    first = lpips.lpips(pred, target, weights=chosen("lpips", weights))
    other = save(tmp_path / "alexnet", fill(read_state("lpips", weights["alexnet"]), seed=9))
    assert not torch.allclose(lpips.lpips(pred, target, weights={"alexnet": other}), first, rtol=1e-3)
