"""Low-quality video from ground truth: the two-stage degradation of RealBasicVSR (arXiv 2111.12704, Sec. 4).

Real-ESRGAN's chain (arXiv 2107.10833: blur, resize, noise, JPEG, twice, then a sinc filter) with a video codec after each JPEG
step. One draw of parameters holds for a whole clip, since a camera does not change its lens between two frames; only the
noise is drawn anew for each frame. Every draw comes from a generator keyed by (seed, clip name), so a clip's LQ frames do not
depend on which clips were made before it.

Three presets: ``realbasicvsr`` (as published), ``mild`` (one stage, light; what the small backbone is trained and
measured on) and ``bicubic`` (reduction with antialiasing, nothing else).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

UPSCALE = 4
CODECS = ("libx264", "h264", "mpeg4")
INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}

Frames = NDArray[np.float32]
"""THWC float32, RGB in [0, 1]."""

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
        "version": 1,
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
                },
                "resize": {"up": 0.2, "down": 0.7, "keep": 0.1, "scale": [0.15, 1.5], "interpolation": ["bilinear", "area", "bicubic"]},
                "noise": {
                    "gaussian_probability": 0.5,
                    "gaussian_sigma": [1.0, 30.0],
                    "poisson_scale": [0.05, 3.0],
                    "gray_probability": 0.4,
                },
                "jpeg": {"quality": [30, 95]},
                "codec": {"names": list(CODECS), "bitrate": [1e4, 1e5]},
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
                },
                "resize": {"up": 0.3, "down": 0.4, "keep": 0.3, "scale": [0.3, 1.2], "interpolation": ["bilinear", "area", "bicubic"]},
                "noise": {
                    "gaussian_probability": 0.5,
                    "gaussian_sigma": [1.0, 25.0],
                    "poisson_scale": [0.05, 2.5],
                    "gray_probability": 0.4,
                },
                "jpeg": {"quality": [30, 95]},
                "codec": {"names": list(CODECS), "bitrate": [1e4, 1e5]},
            },
        ],
        "sinc_probability": 0.8,
    },
}


class DegradationError(ValueError):
    """A clip that cannot be degraded as asked."""


class Degradation(Protocol):
    """What :class:`qvsr.config.DegradationSettings` offers; any object with these two fields will do."""

    @property
    def preset(self) -> str: ...

    @property
    def seed(self) -> int: ...


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


def draw_kernel(rng: np.random.Generator, blur: dict[str, Any]) -> NDArray[np.float64]:
    """A random kernel of one stage's blur settings."""
    kinds = list(blur["kinds"])
    weights = np.array([blur["kinds"][kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    size = int(rng.choice(blur["sizes"]))
    if kind == "sinc":
        # Real-ESRGAN keeps small filters from blurring everything away: they cannot resolve a low cutoff.
        return sinc_kernel(size, float(rng.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi)))
    sigma_x = float(rng.uniform(*blur["sigma"]))
    isotropic = kind.endswith("iso") and not kind.endswith("aniso")
    sigma_y, angle = (sigma_x, 0.0) if isotropic else (float(rng.uniform(*blur["sigma"])), float(rng.uniform(-math.pi, math.pi)))
    beta = 1.0
    if kind.startswith("generalized"):
        beta = _draw_beta(rng, *blur["beta_generalized"])
    elif kind.startswith("plateau"):
        beta = _draw_beta(rng, *blur["beta_plateau"])
    return gaussian_kernel(size, sigma_x, sigma_y, angle, beta=beta, plateau=kind.startswith("plateau"))


def _draw_beta(rng: np.random.Generator, low: float, high: float) -> float:
    """Half of the draws below 1, half above, whichever side is wider (as Real-ESRGAN does); all above 1 where low is 1."""
    return float(rng.uniform(low, 1.0) if rng.random() < 0.5 and low < 1 else rng.uniform(1.0, high))


# --- the steps, each on a whole clip ----------------------------------------------------------------------------------


def blur(frames: Frames, kernel: NDArray[np.float64]) -> Frames:
    """Filter every frame with one kernel; borders are reflected."""
    kernel32 = kernel.astype(np.float32)
    return np.stack([cv2.filter2D(frame, -1, kernel32, borderType=cv2.BORDER_REFLECT_101) for frame in frames])


def resize(frames: Frames, height: int, width: int, interpolation: str) -> Frames:
    """Resize every frame without antialiasing other than ``area``'s own, as the published pipeline does."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([cv2.resize(frame, (width, height), interpolation=INTERPOLATION[interpolation]) for frame in frames])


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


def reduce(frames: Frames, height: int, width: int, interpolation: str) -> Frames:
    """Reduce every frame with antialiasing."""
    if interpolation == "area":
        return resize(frames, height, width, "area")
    rows, columns = (resampling_matrix(old, new, interpolation) for old, new in zip(frames.shape[1:3], (height, width), strict=True))
    out = np.empty((len(frames), height, width, frames.shape[3]), dtype=np.float32)
    for index, frame in enumerate(frames):
        half = (rows @ frame.reshape(frame.shape[0], -1)).reshape(height, frame.shape[1], -1)
        out[index] = columns @ half
    return out


def add_gaussian_noise(frames: Frames, sigma: float, gray: bool, rng: np.random.Generator) -> Frames:
    """White noise of standard deviation ``sigma`` (in units of 1/255), new for each frame; gray noise is the same in all channels."""
    shape = (*frames.shape[:3], 1) if gray else frames.shape
    return frames + rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma / 255)


def add_poisson_noise(frames: Frames, scale: float, gray: bool, rng: np.random.Generator) -> Frames:
    """Shot noise times ``scale``, new for each frame (arXiv 2107.10833): values are counts on a grid of 2^k levels."""
    out = np.empty_like(frames)
    for index, frame in enumerate(np.clip(frames, 0, 1)):
        image = frame @ np.array([0.299, 0.587, 0.114], dtype=np.float32) if gray else frame
        levels = 2.0 ** math.ceil(math.log2(max(len(np.unique((image * 255).round())), 2)))
        noise = (rng.poisson(image * levels) / levels - image).astype(np.float32)
        out[index] = frames[index] + (noise[..., None] if gray else noise) * np.float32(scale)
    return out


def compress_jpeg(frames: Frames, quality: int) -> Frames:
    """Write and read every frame as JPEG with 4:2:0 colour."""
    out = np.empty_like(frames)
    for index, frame in enumerate(to_uint8(frames)):
        _, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
        out[index] = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]
    return out / np.float32(255)


def compress_video(frames: Frames, codec: str, bitrate: float) -> Frames:
    """Write and read the clip as H.264 or MPEG-4 video at ``bitrate`` bits a second, 24 frames a second.

    Odd sizes are padded to even by repeating the border and cut again: 4:2:0 video has no odd sizes. One thread, since the
    number of slices depends on it, and x264's ``cpu-independent``: without it two runs in one process gave different frames.

    Raises:
        DegradationError: PyAV or the encoder is missing, or the decoder returned another number of frames.
    """
    try:
        import av
    except ImportError:
        raise DegradationError("degradation realbasicvsr encodes video and needs PyAV: pip install av, or use preset mild") from None
    height, width = frames.shape[1:3]
    padded = np.pad(to_uint8(frames), ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            options = {} if codec == "mpeg4" else {"x264-params": "cpu-independent=1:threads=1"}
            stream: Any = container.add_stream(codec, rate=24, options=options)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = padded.shape[2], padded.shape[1], "yuv420p", int(bitrate)
            stream.codec_context.thread_count = 1
            for frame in padded:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    except (av.FFmpegError, ValueError) as error:
        raise DegradationError(
            f"PyAV could not encode {width}x{height} with {codec}: {error}; use preset mild, or a PyAV with {codec}"
        ) from None
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if len(decoded) != len(frames):
        raise DegradationError(f"{codec} at {bitrate:.0f} bit/s returned {len(decoded)} of {len(frames)} frames; try another seed")
    return np.stack(decoded)[:, :height, :width].astype(np.float32) / np.float32(255)


def to_uint8(frames: Frames) -> NDArray[np.uint8]:
    """[0, 1] to 0..255, clipped, rounded to nearest."""
    return np.clip(frames * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)


# --- the whole -----------------------------------------------------------------------------------------------------------


def recipe_digest(settings: Degradation) -> str:
    """SHA-256 (first 16 hex digits) of everything that decides how a clip is degraded: preset, its numbers, seed."""
    recipe = {"preset": settings.preset, "seed": settings.seed, "upscale": UPSCALE, **_recipe(settings.preset)}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


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
    recipe = _recipe(settings.preset)
    lq_size = (height // UPSCALE, width // UPSCALE)
    frames: Frames = gt_THWC.astype(np.float32) / np.float32(255)
    if not recipe["stages"]:
        return to_uint8(reduce(frames, *lq_size, "bicubic"))
    rng = generator(settings.seed, key)
    for number, stage in enumerate(recipe["stages"]):
        last = number == len(recipe["stages"]) - 1
        frames = _run_stage(frames, stage, lq_size, rng, recipe["sinc_probability"] if last and number else None)
    return to_uint8(frames)


def _recipe(preset: str) -> dict[str, Any]:
    if preset not in RECIPES:
        raise DegradationError(f"no degradation preset {preset!r}; known: {', '.join(RECIPES)}")
    return RECIPES[preset]


def _run_stage(frames: Frames, stage: dict[str, Any], lq_size: tuple[int, int], rng: np.random.Generator, sinc: float | None) -> Frames:
    """One stage; ``sinc`` is the probability of the final filter, or None where this stage does not end the published chain."""
    if rng.random() < stage["blur"]["probability"]:
        frames = blur(frames, draw_kernel(rng, stage["blur"]))
    size = lq_size if stage["resize"].get("to_lq") else _draw_size(frames.shape[1:3], lq_size, stage["resize"], rng)
    change = reduce if stage["resize"].get("antialias") else resize
    frames = change(frames, *size, str(rng.choice(stage["resize"]["interpolation"])))
    noise = stage["noise"]
    gaussian, gray = rng.random() < noise["gaussian_probability"], bool(rng.random() < noise["gray_probability"])
    amount = float(rng.uniform(*(noise["gaussian_sigma"] if gaussian else noise["poisson_scale"])))
    frames = np.clip((add_gaussian_noise if gaussian else add_poisson_noise)(frames, amount, gray, rng), 0, 1)
    quality = int(rng.integers(stage["jpeg"]["quality"][0], stage["jpeg"]["quality"][1] + 1))
    if sinc is None:
        frames = compress_jpeg(frames, quality)
        return _compress(frames, stage["codec"], rng)
    # The order of arXiv 2312.00853's released settings: JPEG, codec, then the resize to the final size and the sinc filter.
    frames = _compress(compress_jpeg(frames, quality), stage["codec"], rng)
    frames = resize(frames, *lq_size, str(rng.choice(stage["resize"]["interpolation"])))
    if rng.random() < sinc:
        frames = blur(frames, sinc_kernel(int(rng.choice(stage["blur"]["sizes"])), float(rng.uniform(math.pi / 3, math.pi))))
    return np.clip(frames, 0, 1)


def _compress(frames: Frames, codec: dict[str, Any] | None, rng: np.random.Generator) -> Frames:
    if codec is None:
        return frames
    return compress_video(frames, str(rng.choice(codec["names"])), float(rng.uniform(*codec["bitrate"])))


def _draw_size(size: tuple[int, ...], lq_size: tuple[int, int], settings: dict[str, Any], rng: np.random.Generator) -> tuple[int, int]:
    """A random size, never below half of the LQ size, which would leave nothing to restore (and no macroblock to encode)."""
    mode = int(rng.choice(3, p=[settings["up"], settings["down"], settings["keep"]]))
    low, high = settings["scale"]
    factor = (float(rng.uniform(1, high)), float(rng.uniform(low, 1)), 1.0)[mode]
    return max(round(size[0] * factor), lq_size[0] // 2, 16), max(round(size[1] * factor), lq_size[1] // 2, 16)
