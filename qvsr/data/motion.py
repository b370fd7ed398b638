"""Clips with simulated motion from photographs: camera pan, zoom and rotation, and patches that move on their own.

Real video of free licence is scarce; photographs are not. A window moves over a photograph as a hand-held camera would, and
pieces of a second photograph with soft random outlines cross it. Frames are drawn at twice the size and area-averaged, so
that sub-pixel motion neither blurs one frame more than the next nor shimmers. Everything comes from one numpy generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

OVERSAMPLE = 2
STATIC = 0.08  # share of clips whose camera does not move
OBJECTS = (0.4, 0.35, 0.25)  # probabilities of 0, 1, 2 moving patches
BRIGHTNESS = 0.15  # share of clips whose brightness drifts
REDUCTION = (1.0, 4.0)  # photograph pixels per pixel of the clip: one photograph yields textures of several scales


@dataclass(frozen=True)
class Photograph:
    """A photograph and its reductions by powers of the square root of two, so that any scale is sampled without aliasing."""

    levels: tuple[NDArray[np.uint8], ...]
    factors: tuple[float, ...]
    detail: NDArray[np.float32]

    @classmethod
    def of(cls, image_HWC: NDArray[np.uint8]) -> Photograph:
        """From an RGB uint8 image with both sides at least 64 pixels.

        Raises:
            ValueError: not an RGB uint8 image of that size.
        """
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or min(image_HWC.shape[:2]) < 64:
            raise ValueError(f"a photograph is HWC uint8 RGB of at least 64x64, found {image_HWC.dtype} {image_HWC.shape}")
        image = np.ascontiguousarray(image_HWC)
        levels, factors = [image], [1.0]
        while factors[-1] * math.sqrt(2) <= REDUCTION[1] / OVERSAMPLE * (1 + 1e-9) and min(levels[-1].shape[:2]) >= 64:
            factor = factors[-1] * math.sqrt(2)
            size = (round(image.shape[1] / factor), round(image.shape[0] / factor))
            levels.append(np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8))
            factors.append(factor)
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        detail = cv2.resize(np.abs(cv2.Laplacian(gray, cv2.CV_32F)), (32, 32), interpolation=cv2.INTER_AREA)
        return cls(tuple(levels), tuple(factors), np.asarray(cv2.blur(detail, (9, 9)), dtype=np.float32))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the photograph in pixels."""
        return self.levels[0].shape[0], self.levels[0].shape[1]

    def level(self, reduction: float) -> tuple[NDArray[np.uint8], float]:
        """The coarsest level not coarser than ``reduction``, and its factor."""
        index = max((i for i, factor in enumerate(self.factors) if factor <= reduction + 1e-9), default=0)
        return self.levels[index], self.factors[index]


@dataclass(frozen=True)
class Motion:
    """A rigid path in the clip's pixels: per-frame shift (x, y), angle in radians and zoom factor, the first frame's being 0, 0, 1."""

    shift_T2: NDArray[np.float64]
    angle_T: NDArray[np.float64]
    zoom_T: NDArray[np.float64]


def load_photograph(path: Path) -> Photograph:
    """Read an image file as RGB.

    Raises:
        ValueError: the file is no image.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path} cannot be read as an image; remove it, or replace it by a JPEG or PNG")
    return Photograph.of(np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8))


def draw_motion(frames: int, rng: np.random.Generator, *, speed: float = 2.5, turn: float = 0.012, zoom: float = 0.012) -> Motion:
    """A random smooth path: constant velocity that turns a little, plus a trembling hand.

    Args:
        speed: typical shift in pixels a frame (the draw is exponential, so most are slower and few much faster).
        turn: standard deviation of the rotation in radians a frame.
        zoom: standard deviation of the relative zoom a frame.
    """
    time = np.arange(frames, dtype=np.float64)
    velocity = min(rng.exponential(speed), 4 * speed)
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(np.full(frames, rng.normal(0, 0.08)))
    steps = velocity * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    tremble = rng.normal(0, 0.25, (frames, 2)) * rng.uniform(0, 1)
    shift = np.cumsum(steps, axis=0) - steps[0] + tremble - tremble[0]
    turns = rng.random() < 0.5
    zooms = rng.random() < 0.5
    return Motion(shift, rng.normal(0, turn) * turns * time, np.exp(rng.normal(0, zoom) * zooms * time))


def no_motion(frames: int) -> Motion:
    """A camera on a tripod."""
    return Motion(np.zeros((frames, 2)), np.zeros(frames), np.ones(frames))


def simulate_clip(photograph: Photograph, other: Photograph, frames: int, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A clip with camera motion over one photograph and patches of another moving in front.

    Args:
        photograph: the scene.
        other: where the moving patches are cut from.
        frames: number of frames T.
        size: side of the square frames in pixels.
        rng: decides everything.

    Returns:
        clip_THWC uint8 RGB, ``frames x size x size x 3``.
    """
    camera = no_motion(frames) if rng.random() < STATIC else draw_motion(frames, rng)
    canvases = _camera_frames(photograph, camera, size, rng)
    for _ in range(int(rng.choice(len(OBJECTS), p=OBJECTS))):
        _add_object(canvases, other, camera, size, rng)
    gain = np.ones(frames)
    if rng.random() < BRIGHTNESS:
        gain = 1 + np.linspace(0, rng.uniform(-0.08, 0.08), frames)
    out = np.empty((frames, size, size, 3), dtype=np.uint8)
    for index, canvas in enumerate(canvases):
        frame = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
        out[index] = frame if gain[index] == 1 else cv2.convertScaleAbs(frame, alpha=float(gain[index]))
    return out


def _camera_frames(photograph: Photograph, camera: Motion, size: int, rng: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Oversampled frames of a window that moves over the photograph and stays inside it."""
    height, width = photograph.size
    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * size / 2
    # Where the window's corners go over all frames, in pixels of the clip, around the first frame's centre.
    reach = np.concatenate(
        [
            corners @ _rotation(angle).T / zoom + shift
            for shift, angle, zoom in zip(camera.shift_T2, camera.angle_T, camera.zoom_T, strict=True)
        ]
    )
    low, high = reach.min(0), reach.max(0)
    fits = min(width / (high[0] - low[0]), height / (high[1] - low[1]))
    largest = max(min(REDUCTION[1], fits), 0.25)
    reduction = math.exp(rng.uniform(math.log(min(REDUCTION[0], largest)), math.log(largest)))
    first, last = -low * reduction, np.array([width, height]) - high * reduction
    centre = _pick_centre(photograph, first, np.maximum(first, last), rng)
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    level, factor = photograph.level(reduction / OVERSAMPLE)
    out = []
    side = size * OVERSAMPLE
    for shift, angle, zoom in zip(camera.shift_T2, camera.angle_T, camera.zoom_T, strict=True):
        linear = _rotation(angle) * (reduction / zoom / OVERSAMPLE / factor)
        linear[:, 0] *= mirror
        where = (centre + shift * reduction + 0.5) / factor - 0.5 if factor > 1 else centre + shift * reduction
        offset = where - linear @ np.array([(side - 1) / 2, (side - 1) / 2])
        frame = cv2.warpAffine(
            level,
            np.column_stack([linear, offset]),
            (side, side),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        out.append(np.asarray(frame, dtype=np.uint8))
    return out


def _pick_centre(
    photograph: Photograph, low: NDArray[np.float64], high: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Of up to five random places the one with most detail: half of a photograph is often sky or blur."""
    tries = rng.uniform(low, high, (int(rng.integers(1, 6)), 2))
    height, width = photograph.size
    columns = np.clip(tries[:, 0] / width * 32, 0, 31).astype(int)
    rows = np.clip(tries[:, 1] / height * 32, 0, 31).astype(int)
    chosen: NDArray[np.float64] = tries[int(photograph.detail[rows, columns].argmax())]
    return chosen


def _add_object(canvases: list[NDArray[np.uint8]], other: Photograph, camera: Motion, size: int, rng: np.random.Generator) -> None:
    """Draw a patch of ``other`` with a soft random outline over every frame, in place."""
    side = size * OVERSAMPLE
    diameter = int(rng.uniform(0.2, 0.6) * side)
    reduction = math.exp(rng.uniform(math.log(1 / OVERSAMPLE), math.log(2.0)))
    level, _ = other.level(reduction)
    diameter = min(diameter, *level.shape[:2])
    half, factor = diameter / 2, level.shape[0] / other.size[0]
    room = np.array([level.shape[1], level.shape[0]]) - half
    left, top = (_pick_centre(other, np.array([half, half]) / factor, room / factor, rng) * factor - half).round().astype(int).clip(0)
    texture = level[top : top + diameter, left : left + diameter].astype(np.float32)
    alpha = draw_mask(diameter, rng)
    sprite = np.dstack([texture * alpha[..., None], alpha])
    # It moves relative to the scene, and the scene's own shift carries it along.
    own = draw_motion(len(canvases), rng, speed=3.5, turn=0.02, zoom=0.015)
    start = rng.uniform(0.15, 0.85, 2) * side
    for index, canvas in enumerate(canvases):
        linear = _rotation(own.angle_T[index]) * (own.zoom_T[index] * camera.zoom_T[index])
        where = start + (own.shift_T2[index] - camera.shift_T2[index]) * OVERSAMPLE
        offset = where - linear @ np.array([diameter / 2, diameter / 2])
        drawn = cv2.warpAffine(sprite, np.column_stack([linear, offset]), (side, side), flags=cv2.INTER_LINEAR)
        mixed = canvas * (1 - drawn[..., 3:]) + drawn[..., :3]
        canvases[index] = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)


def draw_mask(diameter: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A random blob in [0, 1], zero at the border, with an edge about two pixels soft."""
    axis = np.linspace(-1, 1, diameter, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    angle = np.arctan2(y, x)
    outline = np.full_like(x, 0.72)
    for wave in (2, 3, 5):
        outline += np.float32(rng.uniform(0, 0.24 / wave)) * np.cos(wave * angle + np.float32(rng.uniform(0, 2 * math.pi)))
    edge = np.float32(diameter / 4)
    return np.clip((outline - np.hypot(x, y)) * edge + 0.5, 0, 1) * (np.maximum(abs(x), abs(y)) < 1)


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
