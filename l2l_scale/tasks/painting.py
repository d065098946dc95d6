"""Pictures made of random numbers: scenes to paint, and styles to paint them in.

Every picture is (H, W, 3) uint8 with H = W = size, and a pure function of its generator. A scene is drawn to
the size of its picture; a style has its textures in pixels, whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_MAX_SHAPES = 7


def scene(rng: np.random.Generator, size: int) -> np.ndarray:
    """Paint a scene: a background of blending colours, and on it some shapes, filled in various ways."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    across, _ = _turn(x - 0.5, y - 0.5, rng.uniform(0, 2 * math.pi))
    picture = _blend(across / math.sqrt(2) + 0.5, _colours(rng, 3))
    for _ in range(rng.integers(3, _MAX_SHAPES + 1)):
        centre, scale = rng.uniform(0.1, 0.9, 2), rng.uniform(0.1, 0.35)
        u, v = _turn((x - centre[0]) / scale, (y - centre[1]) / scale, rng.uniform(0, 2 * math.pi))
        cover = _cover(rng, u, v)[..., None]
        picture = (1 - cover) * picture + cover * _filling(rng, u, v)
    return _to_bytes(picture)


def _cover(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape of about unit radius covers, (H, W) in [0, 1]."""
    radius = np.hypot(u, v)
    covers = (
        radius < 1,
        np.maximum(abs(u), abs(v)) < 0.8,
        abs(u) + abs(v) < 1,
        abs(radius - 0.8) < 0.25,
        np.exp(-2 * radius**2),
    )
    return covers[rng.integers(len(covers))].astype(float)


def _filling(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Colours of a shape's pixels, (H, W, 3): plain, striped, chequered or blending."""
    colours, count = _colours(rng, 2), rng.uniform(1.5, 4)
    mixes = (
        np.zeros_like(u),
        (np.floor(count * u) % 2),
        (np.floor(count * u) + np.floor(count * v)) % 2,
        (u + 1) / 2,
    )
    return _blend(mixes[rng.integers(len(mixes))], colours)


def waves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Bent stripes of blending colours."""
    y, x = np.mgrid[:size, :size].astype(float)
    u, v = _turn(x, y, rng.uniform(0, 2 * math.pi))
    bend = rng.uniform(2, 6) * np.sin(2 * math.pi * v / rng.uniform(20, 50))
    stripes = np.sin(2 * math.pi * (u + bend) / rng.uniform(6, 14))
    return _to_bytes(_blend((1 + stripes) / 2, _colours(rng, 4)))


def mosaic(rng: np.random.Generator, size: int) -> np.ndarray:
    """Tiles of random outlines and a few colours, with dark joints."""
    y, x = np.mgrid[:size, :size].astype(float)
    cell = rng.uniform(7, 12)
    points = rng.uniform(-cell, size + cell, (2, math.ceil((size / cell + 2) ** 2)))
    distances = np.hypot(x[..., None] - points[0], y[..., None] - points[1])
    nearest = np.partition(distances, 1, axis=-1)
    tiles = _colours(rng, 5)[rng.integers(5, size=points.shape[1])][distances.argmin(-1)]
    joint = nearest[..., 1] - nearest[..., 0] < 1.2
    return _to_bytes(np.where(joint[..., None], 0.1, tiles))


def strokes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Short strokes of a brush, one over the other, that follow a slowly turning direction."""
    colours, picture = _colours(rng, 6), np.empty((size, size, 3))
    picture[:] = colours[0]
    phase, wavelength = rng.uniform(0, 2 * math.pi), rng.uniform(30, 60)
    for _ in range(size * size // 10):
        cx, cy = rng.uniform(0, size, 2)
        direction = phase + 2 * math.sin(2 * math.pi * (cx + cy) / wavelength) + 0.2 * rng.standard_normal()
        length, width = rng.uniform(4, 8), rng.uniform(0.8, 1.6)
        rows, columns = (slice(max(int(c - length), 0), int(c + length) + 2) for c in (cy, cx))
        y, x = np.mgrid[rows, columns][:, : size - rows.start, : size - columns.start]
        u, v = _turn(x - cx, y - cy, direction)
        painted = (u / length) ** 2 + (v / width) ** 2 < 1
        picture[rows, columns][painted] = colours[rng.integers(6)]
    return _to_bytes(picture)


def dots(rng: np.random.Generator, size: int) -> np.ndarray:
    """A turned grid of dots, large and small, on a ground of another colour."""
    y, x = np.mgrid[:size, :size].astype(float)
    u, v = _turn(x, y, rng.uniform(0, 2 * math.pi))
    spacing, colours = rng.uniform(5, 9), _colours(rng, 3)
    off = np.hypot(*((w / spacing + 0.5) % 1 - 0.5 for w in (u, v)))
    wave = np.sin(2 * math.pi * (x + y) / rng.uniform(25, 60))
    ground = _blend((1 + wave) / 2, colours[:2])
    return _to_bytes(np.where((off < 0.3 + 0.12 * wave)[..., None], colours[2], ground))


def marble(rng: np.random.Generator, size: int) -> np.ndarray:
    """Veins that turbulence has bent."""
    y, x = np.mgrid[:size, :size].astype(float)
    u, _ = _turn(x, y, rng.uniform(0, 2 * math.pi))
    turbulence = sum(cell / 24 * abs(_smooth_noise(rng, size, cell)) for cell in (24, 12, 6, 3))
    veins = abs(np.sin(math.pi * (u / rng.uniform(12, 24) + turbulence)))
    return _to_bytes(_blend(veins**0.7, _colours(rng, 3)))


STYLES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    style.__name__: style for style in (waves, mosaic, strokes, dots, marble)
}
"""What a style is painted with, by its name."""


def _colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random colours, (count, 3) in [0, 1]."""
    return rng.uniform(0, 1, (count, 3))


def _blend(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """From values (H, W), 0 for the first colour and 1 for the last, to (H, W, 3); clamped at the ends."""
    places = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(values, places, channel) for channel in colours.T], -1)


def _turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along a direction and across it."""
    return math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x


def _smooth_noise(rng: np.random.Generator, size: int, cell: int) -> np.ndarray:
    """Normal numbers on a grid of so many pixels, and between them linearly interpolated, (H, W)."""
    count = size // cell + 2
    grid, knots, at = rng.standard_normal((count, count)), np.arange(count), np.arange(size) / cell
    rows = np.stack([np.interp(at, knots, row) for row in grid])
    noise: np.ndarray = np.stack([np.interp(at, knots, column) for column in rows.T], 1)
    return noise


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    """From [0, 1] to uint8."""
    pixels: np.ndarray = np.rint(255 * picture.clip(0, 1))
    return pixels.astype(np.uint8)
