"""Builds the paper's data sets from unpacked archives, and checks them: clips, frames, sizes, the factor 4, shifts, digests.

A built set is a folder ``GT/CLIP`` and ``LQ/CLIP`` of clips, as a paired dataset has it, with ``manifest.json``: the digest of every clip as it
was first built, from which a later build, a check or a run may not differ. LQ frames are the authors' copy, or made here from the ground
truth by the dataset's degradation; which of them, and its digest, stands in each ``clip.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvsr.config import Config, DatasetSettings
from qvsr.data.clips import INFO, ClipError, digest, read_clip, read_frame_folder, write_clip
from qvsr.data.datasets import NAME, UPSCALE, check_made, dataset_settings, expected_clips, made_by
from qvsr.data.published import FORMAT, MANIFEST, PUBLISHED, DatasetError, Published, read_manifest, write_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qvsr.data.clips import Frames

SHIFT_FRAMES = 5  # of a clip, spread over it, from which its shift is estimated
HIGHEST_FREQUENCY = 0.25  # cycles a pixel: what is above it is noise and compression in LQ frames
REAL_SHIFT = 4  # how many times farther pairs of two lenses may be shifted: their authors align them, never exactly


@dataclass
class Report:
    """What a check found: errors, and remarks that are no errors."""

    dataset: str
    clips: int = 0
    errors: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, certain: bool, text: str) -> None:
        (self.errors if certain else self.remarks).append(text)


# --- building ---------------------------------------------------------------------------------------------------------


def build(config: Config, dataset: str, source: Path, lq_source: Path | None = None, say: Callable[[str], object] = print) -> Report:
    """Build a data set of the paper into its ``path``; clips that are there already, as recorded, stay.

    Args:
        source: folder of unpacked archives with the ground truth.
        lq_source: folder of those with the LQ frames; None: the same.
        say: gets a line a clip.
    Returns:
        what is remarkable about it; it has no errors.
    Raises:
        DatasetError: a clip that is missing, is not what is published, is shifted, or differs from what was built first; all is named.
    """
    settings, published, target = _of_paper(config, dataset)
    key = f"datasets.{dataset}"
    found = _find(source, settings.gt_folders or "", published.gt, f"{key}.gt_folders", key)
    chosen = _choose(found, settings, dataset, published)
    given = settings.lq == "given"
    lq_found = _find(lq_source or source, settings.lq_folders or "", published.lq, f"{key}.lq_folders", key) if given else {}
    missing = [name for name in chosen if given and name not in lq_found]
    if missing:
        where = lq_source or source
        raise DatasetError(
            f"{dataset}: {where} has no LQ frames of clip {', '.join(missing)}; unpack them there, or make them: {key}.lq made"
        )
    manifest = read_manifest(target) or {"format": FORMAT, **made_by(settings), "clips": {}}
    check_made(manifest, settings, dataset)
    report = Report(dataset)
    _check_names(report, list(found), settings, published)
    _refuse(report)
    for name in chosen:
        report.clips += 1
        if _built(target, name, manifest):
            say(f"{dataset}/{name}: here already")
            continue
        title = f"{dataset}: clip {name}"
        gt, place = _read(found[name], title), _shown(found[name], source)
        if given:
            lq_place = _shown(lq_found[name], lq_source or source)
            pair = _given(settings, published, gt, _read(lq_found[name], f"{title}, LQ"), lq_place, title, report)
        else:
            pair = _made(settings, gt, place, name)
        shift = _check_clip(report, settings, published, name, pair.gt_THWC, pair.lq_THWC)
        _refuse(report)
        record = _record(pair.gt_THWC, pair.lq_THWC, shift)
        _enforce(manifest, name, record, target)
        recipe = {"kind": settings.kind}
        write_clip(target / "GT" / name, pair.gt_THWC, {"source": place, "recipe": recipe})
        write_clip(target / "LQ" / name, pair.lq_THWC, {"source": pair.lq_source, "recipe": {**recipe, **pair.lq_recipe}})
        manifest["clips"][name] = record
        write_manifest(target, manifest)
        width, height = record["gt"]["size"]
        say(f"{dataset}/{name}: {record['frames']} frames of {width}x{height}, shift {_signed(shift)} LQ pixels")
    return report


def _refuse(report: Report) -> None:
    if report.errors:
        raise DatasetError("; ".join(report.errors))


def _of_paper(config: Config, dataset: str) -> tuple[DatasetSettings, Published, Path]:
    settings = dataset_settings(config, dataset)
    if settings.kind not in PUBLISHED:
        raise DatasetError(f"dataset {dataset} is of kind {settings.kind}, which is used as it is; built are {', '.join(PUBLISHED)}")
    assert settings.path is not None  # DatasetSettings refuses these kinds without path
    return settings, PUBLISHED[settings.kind], settings.path


def _find(source: Path, own: str, known: Sequence[str], setting: str, key: str) -> dict[str, Path]:
    """Folders of clips by name: those of the configured pattern, or of the first known one that has any."""
    if not source.is_dir():
        raise DatasetError(f"{key}: no folder {source}; unpack the archives there, or name their folder by --from")
    patterns = [own] if own else known
    for pattern in patterns:
        before, _, after = pattern.partition("{clip}")
        below = len(Path(after.strip("/")).parts)
        found: dict[str, Path] = {}
        for folder in sorted(source.glob(f"{before}*{after}")):
            name = folder.parts[-1 - below]
            if not folder.is_dir() or not NAME.match(name) or not any(folder.glob("*.[pP][nN][gG]")):
                continue
            if name in found:
                raise DatasetError(
                    f"{key}: clip {name} is in {found[name]} and in {folder}; choose by {setting}, such as {before}{{clip}}{after}"
                )
            found[name] = folder
        if found:
            return found
    raise DatasetError(
        f"{key}: no clips in {source}: looked for {', '.join(patterns)} with PNG frames; set {setting} to where they are, with {{clip}}"
    )


def _choose(found: dict[str, Path], settings: DatasetSettings, dataset: str, published: Published) -> list[str]:
    """Names of the clips that are built."""
    if settings.clips:
        wanted = [clip.source for clip in settings.clips.values()]
    else:
        wanted = list(published.clips) if "clips" in published.certain else sorted(found)
    wanted = wanted[: settings.limit]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DatasetError(f"{dataset}: clip {', '.join(missing)} of {published.title} is missing; found: {_some(sorted(found))}")
    return wanted


def _read(folder: Path, where: str) -> Frames:
    try:
        return read_frame_folder(folder)
    except ClipError as error:
        raise DatasetError(f"{where}: {error}") from None


@dataclass(frozen=True)
class _Pair:
    """Ground truth and LQ frames that fit each other, and how the latter came to be."""

    gt_THWC: Frames
    lq_THWC: Frames
    lq_source: str
    lq_recipe: dict[str, Any] = field(default_factory=dict)


def _made(settings: DatasetSettings, gt: Frames, source: str, name: str) -> _Pair:
    """LQ frames made here."""
    from qvsr.data.degrade import degrade_clip, describe

    return _Pair(gt, degrade_clip(gt, settings.degradation, name), source, {"degradation": describe(settings.degradation)})


def _given(settings: DatasetSettings, published: Published, gt: Frames, lq: Frames, lq_source: str, where: str, report: Report) -> _Pair:
    """The authors' LQ frames, reduced where they come as large as the ground truth and are known to."""
    if not published.lq_at_gt_size or lq.shape[1:3] != gt.shape[1:3]:
        return _Pair(gt, lq, lq_source)
    import numpy as np

    from qvsr.data.degrade import reduce, to_uint8

    height, width = (side - side % UPSCALE for side in gt.shape[1:3])
    how = f"{settings.lq_reduction}; the authors' filter is not known, datasets.{report.dataset}.lq_reduction sets it"
    report.remarks.append(f"{where}: LQ frames of the ground truth's size were reduced by {UPSCALE} ({how})")
    if (height, width) != gt.shape[1:3]:
        report.remarks.append(f"{where}: {gt.shape[2]}x{gt.shape[1]} was cut to {width}x{height}, multiples of {UPSCALE}")
    small = [
        to_uint8(reduce(frame.astype(np.float32) / np.float32(255), height // UPSCALE, width // UPSCALE, settings.lq_reduction))
        for frame in lq[:, :height, :width]
    ]
    return _Pair(np.ascontiguousarray(gt[:, :height, :width]), np.stack(small), lq_source, {"reduction": settings.lq_reduction})


def _built(target: Path, name: str, manifest: dict[str, Any]) -> bool:
    """Whether a clip is there as the manifest records it; by clip.json, whose digest every reader checks."""
    record = manifest["clips"].get(name)
    if record is None or not all((target / part / name / INFO).is_file() for part in ("GT", "LQ")):
        return False
    return all(read_clip(target / part / name).info.get("sha256") == record[part.lower()]["sha256"] for part in ("GT", "LQ"))


def _record(gt: Frames, lq: Frames, shift: tuple[float, float]) -> dict[str, Any]:
    sides = {part: {"size": [frames.shape[2], frames.shape[1]], "sha256": digest(frames)} for part, frames in (("gt", gt), ("lq", lq))}
    return {"frames": len(gt), **sides, "shift": [round(value, 2) for value in shift]}


def _enforce(manifest: dict[str, Any], name: str, record: dict[str, Any], folder: Path) -> None:
    first = manifest["clips"].get(name)
    for part in ("gt", "lq"):
        if first is not None and first[part]["sha256"] != record[part]["sha256"]:
            raise DatasetError(
                f"{folder / part.upper() / name}: its frames have SHA-256 {record[part]['sha256'][:16]}, when first built they had "
                f"{first[part]['sha256'][:16]}; find the right ones, or delete {folder / MANIFEST} to begin anew"
            )


def _shown(folder: Path, source: Path) -> str:
    """Where frames come from, without the place of the archives on this machine."""
    return str(folder.relative_to(source)) if folder.is_relative_to(source) and folder != source else folder.name


# --- checking ---------------------------------------------------------------------------------------------------------


def check(config: Config, dataset: str) -> Report:
    """Compare a built data set, or any paired one, with what is published, with itself and with its manifest; reads every frame.

    Raises:
        DatasetError: it is of another kind, or not there at all.
    """
    settings = dataset_settings(config, dataset)
    if settings.kind not in (*PUBLISHED, "paired"):
        raise DatasetError(f"dataset {dataset} is of kind {settings.kind}; checked are {', '.join(PUBLISHED)} and paired")
    assert settings.path is not None
    published, folder = PUBLISHED.get(settings.kind), settings.path
    report = Report(dataset)
    for part in ("GT", "LQ"):
        if not (folder / part).is_dir():
            raise DatasetError(f"datasets.{dataset}.path: no folder {folder / part}; python -m qvsr dataset build {dataset} makes it")
    inside = {part: sorted(one.name for one in (folder / part).iterdir() if one.is_dir()) for part in ("GT", "LQ")}
    manifest = read_manifest(folder)
    if published is not None:
        _check_names(report, inside["GT"], settings, published)
        if manifest is None:
            report.add(True, f"{dataset}: {folder} has no {MANIFEST}; python -m qvsr dataset build {dataset} --from {folder} records it")
        else:
            check_made(manifest, settings, dataset)
    names = [clip.source for clip in settings.clips.values()] or list(published.clips if published and "clips" in published.certain else ())
    for name in (names or sorted({*inside["GT"], *inside["LQ"], *(manifest or {"clips": ()})["clips"]}))[: settings.limit]:
        absent = [part for part in ("GT", "LQ") if name not in inside[part]]
        if absent:
            report.add(True, f"{dataset}: clip {name} is missing in {' and '.join(str(folder / part) for part in absent)}")
            continue
        try:
            gt, lq = (
                read_clip(folder / part / name).frames_THWC if published else read_frame_folder(folder / part / name)
                for part in ("GT", "LQ")
            )
        except ClipError as error:
            report.add(True, f"{dataset}: clip {name}: {error}")
            continue
        report.clips += 1
        shift = _check_clip(report, settings, published, name, gt, lq)
        if manifest is not None:
            try:
                _enforce(manifest, name, _record(gt, lq, shift), folder)
            except DatasetError as error:
                report.add(True, str(error))
            if name not in manifest["clips"]:
                report.add(True, f"{dataset}: clip {name} is not in {folder / MANIFEST}; build the dataset again")
    return report


def _check_names(report: Report, names: Sequence[str], settings: DatasetSettings, published: Published) -> None:
    """Compare a folder's clips with those published; what the settings choose has been chosen."""
    if settings.clips or settings.limit is not None:
        report.remarks.append(f"{report.dataset}: the settings choose {expected_clips(settings)} of {published.count} clips")
    elif "clips" in published.certain:
        missing = sorted(set(published.clips) - set(names))
        if missing:
            report.errors.append(f"{report.dataset}: clip {', '.join(missing)} of {published.title} is missing")
    elif len(names) != published.count:
        has = f"{published.title} has {published.count}: {_some(names)}"
        report.errors.append(f"{report.dataset}: {len(names)} clips, {has}; complete it, or choose clips")
    if "clips" not in published.certain:
        report.remarks.append(f"{report.dataset}: which clips are {published.title}'s is not published; taken are those found")


def _check_clip(
    report: Report, settings: DatasetSettings, published: Published | None, name: str, gt: Frames, lq: Frames
) -> tuple[float, float]:
    """Compare a clip with what is published and its sides with each other; its shift, (0, 0) where there is none to estimate."""
    where = f"{report.dataset}: clip {name}"
    size = gt.shape[2], gt.shape[1]
    if len(gt) != len(lq):
        report.add(True, f"{where}: GT has {len(gt)} frames, LQ {len(lq)}; both need the same frames")
    if published is not None and len(gt) != published.frames:
        whole = settings.frames >= published.frames  # else the settings take the first ones, of however many
        report.add(whole and "frames" in published.certain, f"{where}: {len(gt)} frames, {published.title} has {published.frames}")
    if len(gt) < settings.frames:
        report.add(True, f"{where}: {len(gt)} frames, datasets.{report.dataset}.frames asks for {settings.frames}")
    if published is not None and published.size is not None and size != published.size:
        expected = f"{published.size[0]}x{published.size[1]}"
        report.add("size" in published.certain, f"{where}: GT is {size[0]}x{size[1]}, {published.title} is {expected}")
    if size != (lq.shape[2] * UPSCALE, lq.shape[1] * UPSCALE):
        expected = f"{size[0] / UPSCALE:g}x{size[1] / UPSCALE:g}"
        report.add(True, f"{where}: GT is {size[0]}x{size[1]}, LQ {lq.shape[2]}x{lq.shape[1]}; x{UPSCALE} needs LQ of {expected}")
        return 0.0, 0.0
    shift = estimate_shift(gt, lq)
    most = max(abs(value) for value in shift)
    if most > settings.max_shift:
        certain = published is None or not published.real or most > REAL_SHIFT * settings.max_shift
        report.add(
            certain,
            f"{where}: LQ is shifted against GT by {_signed(shift)} LQ pixels (down, right); up to {settings.max_shift:g} is taken for none",
        )
    return shift


def estimate_shift(gt_THWC: Frames, lq_THWC: Frames) -> tuple[float, float]:
    """How far LQ frames lie below and to the right of the ground truth, in LQ pixels.

    Phase correlation of the reduced ground truth with the LQ frames, once more where these overlap after a shift by whole pixels: what only
    one of them shows pulls the estimate to zero. Of 20 draws of the published degradation at 80x64 LQ pixels the worst was off by 0.1;
    taking every fourth pixel shifts by 0.375.
    """
    import numpy as np

    height, width = lq_THWC.shape[1:3]
    count = min(len(gt_THWC), len(lq_THWC))
    chosen = sorted({round(at * (count - 1) / (SHIFT_FRAMES - 1)) for at in range(SHIFT_FRAMES)})
    reduced = np.stack([gt_THWC[index].reshape(height, UPSCALE, width, UPSCALE, 3).mean((1, 3, 4)) for index in chosen])
    lq = np.stack([lq_THWC[index].mean(2) for index in chosen])
    found = _correlate(reduced, lq)
    down, right = (round(value) for value in found)
    if (down, right) == (0, 0) or abs(down) > height // 2 or abs(right) > width // 2:
        return found
    rest = _correlate(
        reduced[:, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)],
        lq[:, max(down, 0) : height - max(-down, 0), max(right, 0) : width - max(-right, 0)],
    )
    return down + rest[0], right + rest[1]


def _correlate(reference_THW: NDArray[np.float64], moved_THW: NDArray[np.float64]) -> tuple[float, float]:
    """Shift between two grey clips of one size: cross spectra of the frames are added before their phases are taken; these count by the root
    of their strength, up to a frequency that survives noise and compression."""
    import numpy as np
    from skimage.registration import phase_cross_correlation

    height, width = moved_THW.shape[1:]
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    spectrum = np.zeros((height, width), complex)
    for reference, moved in zip(reference_THW, moved_THW, strict=True):
        spectrum += _spectrum(moved, window) * _spectrum(reference, window).conj()
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    strength = np.where(frequency > HIGHEST_FREQUENCY, 0, np.abs(spectrum))
    if not strength.max() > 1e-6:  # frames of one colour
        return 0.0, 0.0
    weighted = np.where(strength > 0, spectrum / np.sqrt(np.maximum(strength, 1e-12)), 0)
    shift, _, _ = phase_cross_correlation(weighted, np.ones_like(weighted), space="fourier", upsample_factor=20, normalization=None)
    return float(shift[0]) + 0.0, float(shift[1]) + 0.0


def _spectrum(frame: NDArray[Any], window: NDArray[np.float64]) -> NDArray[Any]:
    import numpy as np

    return np.asarray(np.fft.fft2((frame - frame.mean()) * window))


def _signed(shift: tuple[float, float]) -> str:
    return f"({shift[0]:+.2f}, {shift[1]:+.2f})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
