"""Low-quality video from ground truth: the two-stage degradation of RealBasicVSR (arXiv 2111.12704, Sec. 4).

Real-ESRGAN's chain (arXiv 2107.10833: blur, resize, noise, JPEG, twice, then a sinc filter) with a video codec after each JPEG
step. One draw of parameters holds for a whole clip, since a camera does not change its lens between two frames; the noise is
drawn anew for each frame, and in the published recipe every number drifts a little from frame to frame. Every draw comes from a
generator keyed by (seed, clip name), so a clip's LQ frames do not depend on which clips were made before it.

Three presets: ``realbasicvsr`` (as published), ``mild`` (one stage, light; what the small backbone is trained and
measured on) and ``bicubic`` (reduction with antialiasing, nothing else).

Of ``realbasicvsr`` there are two published readings: MGLD-VSR's (arXiv 2312.00853) drifts every number and fixes the order of the last
steps; RealBasicVSR and DOVE (arXiv 2505.16239) shuffle them, and DOVE drifts the JPEG quality alone. Where ours differs: the shape of the
generalized and plateau kernels is drawn as in Real-ESRGAN, borders are reflected, bytes are rounded and not cut, and no size is below
half of the LQ size. Frames whose sizes have drifted apart take the first one's size in the video step, as its encoder does there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

UPSCALE = 4
PUBLISHED = "realbasicvsr"
CODECS = ("libx264", "h264", "mpeg4")
INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}

Frame = NDArray[np.float32]
"""HWC float32, RGB in [0, 1]."""

# What changes from frame to frame in the published recipe: the largest step of a number's random walk.
BLUR_DRIFT = {"sigma": 0.02, "angle": 0.31416, "beta_generalized": 0.05, "beta_plateau": 0.1, "cutoff": 0.0628}
NOISE_DRIFT = {"gaussian_sigma": 0.1, "poisson_scale": 0.005}
JPEG_DRIFT = {"quality": 3}

# All numbers of the presets. They are hashed into every clip's recipe, so that a changed number is another recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "bicubic": {"version": 1, "stages": []},
    "mild": {
        "version": 1,
        "stages": [
            {
                "blur": {"probability": 1.0, "sizes": [7, 9, 11], "kinds": {"iso": 0.7, "aniso": 0.3}, "sigma": [0.6, 1.4]},
                "resize": {"to_lq": True, "interpolation": ["bilinear", "area", "bicubic"], "antialias": True},
                "noise": {"gaussian_probability": 1.0, "gaussian_sigma": [1.0, 4.0], "poisson_scale": [0.0, 0.0], "gray_probability": 0.4},
                "jpeg": {"quality": [75, 95]},
                "codec": None,
            }
        ],
        "sinc_probability": 0.0,
    },
    "realbasicvsr": {
        "version": 2,
        "stages": [
            {
                "blur": {
                    "probability": 1.0,
                    "sizes": [7, 9, 11, 13, 15, 17, 19, 21],
                    "kinds": {
                        "iso": 0.405,
                        "aniso": 0.225,
                        "generalized_iso": 0.108,
                        "generalized_aniso": 0.027,
                        "plateau_iso": 0.108,
                        "plateau_aniso": 0.027,
                        "sinc": 0.1,
                    },
                    "sigma": [0.2, 3.0],
                    "beta_generalized": [0.5, 4.0],
                    "beta_plateau": [1.0, 2.0],
                    "drift": BLUR_DRIFT,
                },
                "resize": {
                    "up": 0.2,
                    "down": 0.7,
                    "keep": 0.1,
                    "scale": [0.15, 1.5],
                    "interpolation": ["bilinear", "area", "bicubic"],
                    "drift": {"scale": 0.015},
                },
                "noise": {
                    "gaussian_probability": 0.5,
                    "gaussian_sigma": [1.0, 30.0],
                    "poisson_scale": [0.05, 3.0],
                    "gray_probability": 0.4,
                    "drift": NOISE_DRIFT,
                },
                "jpeg": {"quality": [30, 95], "drift": JPEG_DRIFT},
                "codec": {"names": list(CODECS), "bitrate": [1e4, 1e5], "rate": 1},
            },
            {
                "blur": {
                    "probability": 0.8,
                    "sizes": [7, 9, 11, 13, 15, 17, 19, 21],
                    "kinds": {
                        "iso": 0.405,
                        "aniso": 0.225,
                        "generalized_iso": 0.108,
                        "generalized_aniso": 0.027,
                        "plateau_iso": 0.108,
                        "plateau_aniso": 0.027,
                        "sinc": 0.1,
                    },
                    "sigma": [0.2, 1.5],
                    "beta_generalized": [0.5, 4.0],
                    "beta_plateau": [1.0, 2.0],
                    "drift": BLUR_DRIFT,
                },
                "resize": {
                    "up": 0.3,
                    "down": 0.4,
                    "keep": 0.3,
                    "scale": [0.3, 1.2],
                    "interpolation": ["bilinear", "area", "bicubic"],
                    "drift": {"scale": 0.03},
                },
                "noise": {
                    "gaussian_probability": 0.5,
                    "gaussian_sigma": [1.0, 25.0],
                    "poisson_scale": [0.05, 2.5],
                    "gray_probability": 0.4,
                    "drift": NOISE_DRIFT,
                },
                "jpeg": {"quality": [30, 95], "drift": JPEG_DRIFT},
                "codec": {"names": list(CODECS), "bitrate": [1e4, 1e5], "rate": 1},
            },
        ],
        "sinc_probability": 0.8,  # of the filter after the last resize
    },
}


class DegradationError(ValueError):
    """A clip that cannot be degraded as asked."""


class Degradation(Protocol):
    """What :class:`qvsr.config.DegradationSettings` offers; any object with these fields will do."""

    @property
    def preset(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def order(self) -> str: ...

    @property
    def drift(self) -> str: ...


# --- blur kernels -----------------------------------------------------------------------------------------------------


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, angle: float, *, beta: float = 1.0, plateau: bool = False
) -> NDArray[np.float64]:
    """A blur kernel of the Gaussian family (arXiv 2107.10833, Eq. 2-4).

    Args:
        size: odd side in pixels.
        sigma_x, sigma_y: standard deviations along the axes in pixels; equal ones make it isotropic.
        angle: rotation of the axes in radians.
        beta: shape; 1 is the Gaussian.
        plateau: flat-topped ``1 / (1 + d^beta)`` instead of ``exp(-d^beta / 2)``, d the squared Mahalanobis distance.

    Returns:
        ``size x size`` array that sums to 1.

    >>> k = gaussian_kernel(7, 1.0, 1.0, 0.0)
    >>> round(float(k.sum()), 6), bool(k[3, 3] == k.max())
    (1.0, True)
    """
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(rotation @ np.diag([sigma_x**2, sigma_y**2]) @ rotation.T)
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(axis, axis)
    distance = inverse[0, 0] * x * x + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y * y
    kernel = 1 / (1 + distance**beta) if plateau else np.exp(-0.5 * distance**beta)
    return kernel / kernel.sum()


def sinc_kernel(size: int, cutoff: float) -> NDArray[np.float64]:
    """Circular low-pass filter with cutoff angular frequency (arXiv 2107.10833, Eq. 6); it rings, as sharpening cameras do.

    Args:
        size: odd side in pixels.
        cutoff: in radians a pixel, in (0, pi].
    """
    from scipy.special import j1

    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(axis, axis)
    radius = np.hypot(x, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        kernel = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)  # the limit at radius 0
    return kernel / kernel.sum()


def draw_kernels(rng: np.random.Generator, blur: dict[str, Any], count: int) -> list[NDArray[np.float64]]:
    """Random kernels of one stage's blur settings: one for each of `count` frames, of one kind and size."""
    kinds = list(blur["kinds"])
    weights = np.array([blur["kinds"][kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    size = int(rng.choice(blur["sizes"]))
    steps = blur.get("drift", {})
    if kind == "sinc":
        # Real-ESRGAN keeps small filters from blurring everything away: they cannot resolve a low cutoff.
        return sinc_kernels(rng, size, math.pi / 3 if size < 13 else math.pi / 5, steps.get("cutoff", 0), count)
    sigma_x = float(rng.uniform(*blur["sigma"]))
    isotropic = kind.endswith("iso") and not kind.endswith("aniso")
    sigma_y, angle = (sigma_x, 0.0) if isotropic else (float(rng.uniform(*blur["sigma"])), float(rng.uniform(-math.pi, math.pi)))
    shape = next((name for name in ("beta_generalized", "beta_plateau") if kind.startswith(name.removeprefix("beta_"))), "")
    beta = _draw_beta(rng, *blur[shape]) if shape else 1.0
    along_x = walk(rng, sigma_x, steps.get("sigma", 0), blur["sigma"], count)
    along_y = along_x if isotropic else walk(rng, sigma_y, steps.get("sigma", 0), blur["sigma"], count)
    angles = [0.0] * count if isotropic else walk(rng, angle, steps.get("angle", 0), (-math.pi, math.pi), count)
    betas = walk(rng, beta, steps.get(shape, 0), blur[shape], count) if shape else [1.0] * count
    made: dict[tuple[float, ...], NDArray[np.float64]] = {}
    for values in zip(along_x, along_y, angles, betas, strict=True):
        if values not in made:
            made[values] = gaussian_kernel(size, *values[:3], beta=values[3], plateau=kind.startswith("plateau"))
    return [made[values] for values in zip(along_x, along_y, angles, betas, strict=True)]


def sinc_kernels(rng: np.random.Generator, size: int, lowest: float, step: float, count: int) -> list[NDArray[np.float64]]:
    """Sinc filters of `count` frames with a random cutoff from `lowest` to pi, which drifts."""
    cutoffs = walk(rng, float(rng.uniform(lowest, math.pi)), step, (lowest, math.pi), count)
    made = {cutoff: sinc_kernel(size, cutoff) for cutoff in dict.fromkeys(cutoffs)}
    return [made[cutoff] for cutoff in cutoffs]


def walk(rng: np.random.Generator, start: float, step: float, bounds: Sequence[float], count: int) -> list[float]:
    """A number for each of `count` frames: steps uniform in [-step, step], kept inside `bounds`; without a step nothing is drawn.

    >>> walk(np.random.default_rng(0), 2.0, 0.0, (0.0, 3.0), 3)
    [2.0, 2.0, 2.0]
    """
    values = [start]
    for _ in range(count - 1):
        values.append(min(max(values[-1] + float(rng.uniform(-step, step)), bounds[0]), bounds[1]) if step else start)
    return values


def _draw_beta(rng: np.random.Generator, low: float, high: float) -> float:
    """Half of the draws below 1, half above, whichever side is wider (as Real-ESRGAN does); all above 1 where low is 1."""
    return float(rng.uniform(low, 1.0) if rng.random() < 0.5 and low < 1 else rng.uniform(1.0, high))


# --- the steps, each on one frame; the codec on a whole clip ---------------------------------------------------------


def blur(frame: Frame, kernel: NDArray[np.float64]) -> Frame:
    """Filter a frame; borders are reflected."""
    return np.asarray(cv2.filter2D(frame, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101))


def resize(frame: Frame, height: int, width: int, interpolation: str) -> Frame:
    """Resize a frame without antialiasing other than ``area``'s own, as the published pipeline does."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(cv2.resize(frame, (width, height), interpolation=INTERPOLATION[interpolation]))


def resampling_matrix(size: int, new_size: int, kernel: str) -> NDArray[np.float32]:
    """Matrix ``new_size x size`` that reduces a line of pixels with antialiasing: the kernel is stretched by the factor.

    ``bilinear`` is the triangle of support 1, ``bicubic`` Keys' cubic with a = -0.5 and support 2; rows sum to 1, and the
    kernel is cut and renormalised at the border (Pillow's convention).

    >>> (resampling_matrix(4, 2, "bilinear") * 7).round(5).tolist()
    [[3.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 3.0]]
    """
    factor = max(size / new_size, 1.0)
    centre = (np.arange(new_size) + 0.5) * size / new_size
    distance = np.abs(np.arange(size) + 0.5 - centre[:, None]) / factor
    if kernel == "bilinear":
        weights = np.maximum(1 - distance, 0)
    else:
        a = -0.5
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def reduce(frame: Frame, height: int, width: int, interpolation: str) -> Frame:
    """Reduce a frame with antialiasing."""
    if interpolation == "area":
        return resize(frame, height, width, "area")
    rows, columns = (resampling_matrix(old, new, interpolation) for old, new in zip(frame.shape[:2], (height, width), strict=True))
    half = (rows @ frame.reshape(frame.shape[0], -1)).reshape(height, frame.shape[1], -1)
    return np.asarray(columns @ half)


def add_gaussian_noise(frame: Frame, sigma: float, gray: bool, rng: np.random.Generator) -> Frame:
    """White noise of standard deviation ``sigma`` (in units of 1/255); gray noise is the same in all channels."""
    shape = (*frame.shape[:2], 1) if gray else frame.shape
    return frame + rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma / 255)


def add_poisson_noise(frame: Frame, scale: float, gray: bool, rng: np.random.Generator) -> Frame:
    """Shot noise times ``scale`` (arXiv 2107.10833): values are counts on a grid of 2^k levels."""
    clipped = np.clip(frame, 0, 1)
    image = clipped @ np.array([0.299, 0.587, 0.114], dtype=np.float32) if gray else clipped
    levels = 2.0 ** math.ceil(math.log2(max(len(np.unique((image * 255).round())), 2)))
    noise = (rng.poisson(image * levels) / levels - image).astype(np.float32)
    return frame + (noise[..., None] if gray else noise) * np.float32(scale)


def compress_jpeg(frame: Frame, quality: int) -> Frame:
    """Write and read a frame as JPEG with 4:2:0 colour."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(to_uint8(frame), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]
    return decoded.astype(np.float32) / np.float32(255)


def compress_video(frames: Sequence[Frame], codec: str, bitrate: float, rate: int) -> list[Frame]:
    """Write and read a clip as H.264 or MPEG-4 video of ``bitrate`` bits and ``rate`` frames a second.

    Frames of another size than the first are resized to it. Odd sizes are padded to even by repeating the border and cut again: 4:2:0
    video has no odd sizes. One thread, since the number of slices depends on it, and x264's ``cpu-independent``: without it two runs in
    one process gave different frames.

    Raises:
        DegradationError: PyAV or the encoder is missing, or the decoder returned another number of frames.
    """
    try:
        import av
    except ImportError:
        raise DegradationError("degradation realbasicvsr encodes video and needs PyAV: pip install av, or use preset mild") from None
    height, width = frames[0].shape[:2]
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            options = {} if codec == "mpeg4" else {"x264-params": "cpu-independent=1:threads=1"}
            stream: Any = container.add_stream(codec, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width + width % 2, height + height % 2, "yuv420p", int(bitrate)
            stream.codec_context.thread_count = 1
            for frame in frames:
                padding = ((0, height % 2), (0, width % 2), (0, 0))
                padded = np.pad(to_uint8(resize(frame, height, width, "bilinear")), padding, mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
            container.mux(stream.encode())
    except (av.FFmpegError, ValueError) as error:
        raise DegradationError(
            f"PyAV could not encode {width}x{height} with {codec}: {error}; use preset mild, or a PyAV with {codec}"
        ) from None
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = [frame.to_ndarray(format="rgb24")[:height, :width] for frame in container.decode(video=0)]
    if len(decoded) != len(frames):
        raise DegradationError(f"{codec} at {bitrate:.0f} bit/s returned {len(decoded)} of {len(frames)} frames; try another seed")
    return [frame.astype(np.float32) / np.float32(255) for frame in decoded]


def to_uint8(frames: Frame) -> NDArray[np.uint8]:
    """[0, 1] to 0..255, clipped, rounded to nearest."""
    return np.clip(frames * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)


# --- the whole -----------------------------------------------------------------------------------------------------------


def recipe_digest(settings: Degradation) -> str:
    """SHA-256 (first 16 hex digits) of everything that decides how a clip is degraded: preset, its numbers, order, drift, seed."""
    recipe = {"preset": settings.preset, "seed": settings.seed, "upscale": UPSCALE, **_recipe(settings)}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def describe(settings: Degradation) -> dict[str, Any]:
    """What ``clip.json`` says about the degradation: the settings that are read, and the digest of all its numbers."""
    chosen = {"order": settings.order, "drift": settings.drift} if settings.preset == PUBLISHED else {}
    return {"preset": settings.preset, "seed": settings.seed, **chosen, "upscale": UPSCALE, "digest": recipe_digest(settings)}


def generator(seed: int, key: str) -> np.random.Generator:
    """A numpy generator that depends on the seed and a name only."""
    digest = hashlib.sha256(f"degrade/{seed}/{key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def degrade_clip(gt_THWC: NDArray[np.uint8], settings: Degradation, key: str) -> NDArray[np.uint8]:
    """Low-quality frames of a clip, a quarter of its height and width.

    Args:
        gt_THWC: ground truth, uint8 RGB, height and width multiples of 4.
        settings: preset and seed.
        key: the clip's name; with the seed it decides every random draw.

    Returns:
        lq_THWC uint8 RGB.

    Raises:
        DegradationError: a size that is not a multiple of 4, or an unknown preset.
    """
    height, width = gt_THWC.shape[1:3]
    if height % UPSCALE or width % UPSCALE:
        raise DegradationError(f"clip {key}: frames of {width}x{height} cannot be reduced by {UPSCALE}; crop to multiples of {UPSCALE}")
    recipe = _recipe(settings)
    lq_size = (height // UPSCALE, width // UPSCALE)
    if not recipe["stages"]:
        return np.stack([to_uint8(reduce(_as_float(frame), *lq_size, "bicubic")) for frame in gt_THWC])
    rng = generator(settings.seed, key)
    frames = [_as_float(frame) for frame in gt_THWC]
    for number, stage in enumerate(recipe["stages"]):
        final = number == len(recipe["stages"]) - 1 > 0
        frames = _run_stage(frames, stage, lq_size, rng, recipe if final else None)
    return np.stack([to_uint8(frame) for frame in frames])


def _as_float(frame_HWC: NDArray[np.uint8]) -> Frame:
    return frame_HWC.astype(np.float32) / np.float32(255)


def _recipe(settings: Degradation) -> dict[str, Any]:
    if settings.preset not in RECIPES:
        raise DegradationError(f"no degradation preset {settings.preset!r}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[settings.preset]
    if settings.preset != PUBLISHED:
        return recipe
    kept = {"all": ("blur", "resize", "noise", "jpeg"), "jpeg": ("jpeg",), "none": ()}[settings.drift]
    stages = [{name: part if name in kept else _steady(part) for name, part in stage.items()} for stage in recipe["stages"]]
    return {**recipe, "stages": stages, "order": settings.order}


def _steady(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "drift"}


def _run_stage(
    frames: list[Frame], stage: dict[str, Any], lq_size: tuple[int, int], rng: np.random.Generator, recipe: dict[str, Any] | None
) -> list[Frame]:
    """One stage; `recipe` where it ends the published chain: JPEG, then the codec and the resize with its sinc filter, in some order."""
    count = len(frames)
    if rng.random() < stage["blur"]["probability"]:
        frames = [blur(frame, kernel) for frame, kernel in zip(frames, draw_kernels(rng, stage["blur"], count), strict=True)]
    same = stage["resize"].get("to_lq")
    sizes = [lq_size] * count if same else _draw_sizes(frames[0].shape[:2], lq_size, stage["resize"], rng, count)
    change, interpolation = reduce if stage["resize"].get("antialias") else resize, str(rng.choice(stage["resize"]["interpolation"]))
    frames = [change(frame, *size, interpolation) for frame, size in zip(frames, sizes, strict=True)]
    frames = _add_noise(frames, stage["noise"], rng)
    low, high = stage["jpeg"]["quality"]
    start, step = int(rng.integers(low, high + 1)), stage["jpeg"].get("drift", {}).get("quality", 0)
    qualities = walk(rng, start, step, (low, high), count)
    frames = [compress_jpeg(frame, round(quality)) for frame, quality in zip(frames, qualities, strict=True)]
    if recipe is None:
        return _compress(frames, stage["codec"], rng)
    codec_last = recipe["order"] == "shuffled" and rng.random() < 0.5
    if not codec_last:
        frames = _compress(frames, stage["codec"], rng)
    interpolation = str(rng.choice(stage["resize"]["interpolation"]))
    frames = [resize(frame, *lq_size, interpolation) for frame in frames]
    if rng.random() < recipe["sinc_probability"]:
        size, step = int(rng.choice(stage["blur"]["sizes"])), stage["blur"].get("drift", {}).get("cutoff", 0)
        frames = [blur(frame, kernel) for frame, kernel in zip(frames, sinc_kernels(rng, size, math.pi / 3, step, count), strict=True)]
    if codec_last:
        frames = _compress(frames, stage["codec"], rng)
    return [np.clip(frame, 0, 1) for frame in frames]


def _add_noise(frames: list[Frame], noise: dict[str, Any], rng: np.random.Generator) -> list[Frame]:
    gaussian, gray = rng.random() < noise["gaussian_probability"], bool(rng.random() < noise["gray_probability"])
    kind, add = ("gaussian_sigma", add_gaussian_noise) if gaussian else ("poisson_scale", add_poisson_noise)
    amounts = walk(rng, float(rng.uniform(*noise[kind])), noise.get("drift", {}).get(kind, 0), noise[kind], len(frames))
    return [np.clip(add(frame, amount, gray, rng), 0, 1) for frame, amount in zip(frames, amounts, strict=True)]


def _compress(frames: list[Frame], codec: dict[str, Any] | None, rng: np.random.Generator) -> list[Frame]:
    if codec is None:
        return frames
    return compress_video(frames, str(rng.choice(codec["names"])), float(rng.uniform(*codec["bitrate"])), codec["rate"])


def _draw_sizes(
    size: tuple[int, ...], lq_size: tuple[int, int], settings: dict[str, Any], rng: np.random.Generator, count: int
) -> list[tuple[int, int]]:
    """Random sizes, even and never below half of the LQ size, which would leave nothing to restore (and no macroblock to encode)."""
    mode = int(rng.choice(3, p=[settings["up"], settings["down"], settings["keep"]]))
    low, high = settings["scale"]
    start = (float(rng.uniform(1, high)), float(rng.uniform(low, 1)), 1.0)[mode]
    factors = walk(rng, start, settings.get("drift", {}).get("scale", 0), (low, high), count)
    height, width = (
        [max(int(whole * factor) // 2 * 2, smallest // 4 * 2, 16) for factor in factors]
        for whole, smallest in zip(size, lq_size, strict=True)
    )
    return list(zip(height, width, strict=True))
