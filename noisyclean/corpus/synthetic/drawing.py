"""Scenes made into pixels.

Everything is composed at the final resolution, on a float canvas ``[3, height, width]`` of grey levels 0 to 255. Only
the figures' outlines are drawn larger and averaged down, which makes their edges smooth without the cost of
supersampling the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from noisyclean.corpus.synthetic.scenes import COLOURS, SCENERIES, Figure, Scene

Floats = npt.NDArray[np.floating[Any]]

_SUPERSAMPLING = 4
_NOISE = 4.0  # standard deviation, in grey levels of 0 to 255


def draw(scene: Scene, image_size: int, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, RGB; its shorter side is ``image_size`` pixels. ``rng`` adds the sensor's noise."""
    width, height = (round(side * image_size) for side in scene.aspect)
    canvas = _paint_background(scene, width, height)
    for figure in scene.figures:
        _paint_figure(canvas, figure, image_size)
    level, across, down = scene.light
    x, y = _pixels(width, height)
    canvas *= level + across * (2 * x / width - 1) + down * (2 * y / height - 1)
    canvas += _NOISE * rng.standard_normal((height, width), np.float32)
    return Image.merge("RGB", [Image.fromarray(channel) for channel in canvas.clip(0, 255).astype(np.uint8)])


def _pixels(width: int, height: int) -> tuple[Floats, Floats]:
    """The centres of the pixels: x ``[1, width]`` and y ``[height, 1]``."""
    return _axis(width)[None, :], _axis(height)[:, None]


@cache
def _axis(length: int) -> Floats:
    return np.arange(length, dtype=np.float32) + 0.5


# ---------------------------------------------------------------------------------------------- figures


class Outline(NamedTuple):
    """A silhouette inside the unit circle, y downwards: polygons ``[n, 2]`` that are filled, then ones cut out."""

    solids: tuple[Floats, ...]
    holes: tuple[Floats, ...]


def _polygon(*points: tuple[float, float]) -> Floats:
    return np.array(points, np.float32)


def _ellipse(rx: float, ry: float, cx: float = 0.0, cy: float = 0.0, arc: tuple[float, float] = (0.0, 2.0)) -> Floats:
    """An ellipse, or its ``arc`` in units of π, clockwise from the right."""
    t = np.linspace(arc[0] * np.pi, arc[1] * np.pi, 32)
    return np.column_stack([cx + rx * np.cos(t), cy + ry * np.sin(t)]).astype(np.float32)


def _spokes(count: int, *radii: float) -> Floats:
    """``count`` corners at equal angles from the top, at the ``radii`` in turn."""
    t = np.arange(count) * (2 * np.pi / count) - np.pi / 2
    r = np.resize(radii, count)
    return np.column_stack([r * np.cos(t), r * np.sin(t)]).astype(np.float32)


def _heart() -> Floats:
    t = np.linspace(0, 2 * np.pi, 40)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.column_stack([x / 17, -y / 17 - 0.1]).astype(np.float32)


def _box(left: float, top: float, right: float, bottom: float) -> Floats:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _outline(*solids: Floats, holes: tuple[Floats, ...] = ()) -> Outline:
    """An outline scaled to touch the unit circle, so that figures of one radius look of one size."""
    reach = max(np.linalg.norm(solid, axis=1).max() for solid in solids)
    return Outline(tuple(solid / reach for solid in solids), tuple(hole / reach for hole in holes))


OUTLINES: dict[str, Outline] = {
    "circle": _outline(_ellipse(1, 1)),
    "square": _outline(_box(-1, -1, 1, 1)),
    "triangle": _outline(_polygon((0, -1.1), (0.95, 0.65), (-0.95, 0.65))),
    "star": _outline(_spokes(10, 1.0, 0.42)),
    "heart": _outline(_heart()),
    "crescent": _outline(_ellipse(0.95, 0.95), holes=(_ellipse(0.8, 0.8, 0.45),)),
    "ring": _outline(_ellipse(0.95, 0.95), holes=(_ellipse(0.55, 0.55),)),
    "cross": _outline(_box(-0.28, -0.95, 0.28, 0.95), _box(-0.95, -0.28, 0.95, 0.28)),
    "diamond": _outline(_polygon((0, -1), (0.62, 0), (0, 1), (-0.62, 0))),
    "arrow": _outline(_box(-1, -0.2, 0.2, 0.2), _polygon((0.1, -0.65), (1, 0), (0.1, 0.65))),
    "house": _outline(
        _box(-0.65, -0.15, 0.65, 0.8),
        _polygon((0, -1), (0.95, -0.1), (-0.95, -0.1)),
        holes=(_box(-0.15, 0.25, 0.2, 0.8),),
    ),
    "tree": _outline(
        _polygon((0, -1), (0.5, -0.3), (-0.5, -0.3)),
        _polygon((0, -0.6), (0.65, 0.2), (-0.65, 0.2)),
        _polygon((0, -0.15), (0.8, 0.65), (-0.8, 0.65)),
        _box(-0.15, 0.6, 0.15, 1.0),
    ),
    "fish": _outline(
        _ellipse(0.65, 0.45, 0.3),
        _polygon((-0.2, 0), (-0.9, -0.5), (-0.7, 0), (-0.9, 0.5)),
        holes=(_ellipse(0.1, 0.1, 0.6, -0.12),),
    ),
    "flower": _outline(
        *(_ellipse(0.36, 0.36, x, y) for x, y in _spokes(6, 0.6)),
        _ellipse(0.5, 0.5),
        holes=(_ellipse(0.2, 0.2),),
    ),
}


def _paint_figure(canvas: Floats, figure: Figure, image_size: int) -> None:
    _, height, width = canvas.shape
    centre = figure.x * width, figure.y * height
    radius = figure.radius * image_size
    # Only the square that holds the figure is touched.
    left, top = (max(0, math.floor(c - radius)) for c in centre)
    right, bottom = (min(side, math.ceil(c + radius)) for c, side in zip(centre, (width, height), strict=True))
    centre = centre[0] - left, centre[1] - top
    spin = _rotation(figure.angle)
    window = canvas[:, top:bottom, left:right]
    paint: Floats = np.array(figure.rgb, np.float32)[:, None, None]
    if figure.traits.texture != "plain":
        x, y = _pixels(right - left, bottom - top)
        dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
        # Turned back, so that the pattern turns with the figure.
        u, v = (dx * spin[i, 0] + dy * spin[i, 1] for i in range(2))
        blend = _PATTERNS[figure.traits.texture](u, v)
        paint = paint + blend * (_second_tone(paint, figure.traits.colour) - paint)
    window += _mask(figure, spin * radius, centre, window.shape) * (paint - window)


def _rotation(angle: float) -> Floats:
    """The matrix that turns row vectors ``[n, 2]`` clockwise on the screen."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin], [-sin, cos]], np.float32)


def _mask(figure: Figure, transform: Floats, centre: tuple[float, float], shape: tuple[int, ...]) -> Floats:
    """How far the figure covers each pixel of a window, ``[height, width]`` in 0 to 1."""
    _, height, width = shape
    large = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    pen = ImageDraw.Draw(large)
    outline = OUTLINES[figure.traits.shape]
    flip = np.array([-1 if figure.mirrored else 1, 1], np.float32)
    for polygons, ink in ((outline.solids, 255), (outline.holes, 0)):
        for polygon in polygons:
            corners = (polygon * flip @ transform + centre) * _SUPERSAMPLING
            pen.polygon(corners.ravel().tolist(), fill=ink)
    return np.asarray(large.reduce(_SUPERSAMPLING), np.float32) / 255


def _second_tone(tone: Floats, colour: str) -> Floats:
    """The other tone of a texture: one that leaves the named colour recognisable."""
    if tone.mean() <= 120:
        return tone + 0.4 * (255 - tone)
    # White must not become grey.
    return tone * (0.72 if colour == "white" else 0.62)


def _soft_step(wave: Floats) -> Floats:
    """0 to 1 where the wave is below or above zero, with the smooth edge that a pixel would show."""
    return (2 * wave + 0.5).clip(0, 1)


def _striped(u: Floats, v: Floats) -> Floats:
    return _soft_step(np.sin(9 * v))


def _dotted(u: Floats, v: Floats) -> Floats:
    return _soft_step(np.cos(9 * u) + np.cos(9 * v) - 0.6)


def _checked(u: Floats, v: Floats) -> Floats:
    return _soft_step(2 * np.sin(7 * u) * np.sin(7 * v))


_PATTERNS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
}


# ------------------------------------------------------------------------------------------ backgrounds


def _paint_background(scene: Scene, width: int, height: int) -> Floats:
    """A fresh canvas."""
    rng = np.random.default_rng(scene.background_seed)
    kind, names = scene.background
    colours = np.array([COLOURS[name] for name in names] or [SCENERIES[kind]], np.float32)
    colours += rng.uniform(-10, 10, colours.shape)
    x, y = _pixels(width, height)
    canvas = np.empty((3, height, width), np.float32)
    # From the top of the picture to its bottom: one colour throughout, or the two of a gradient.
    top, bottom = colours[0, :, None, None], colours[-1, :, None, None]
    canvas[:] = top + y / height * (bottom - top)
    if kind in _SCENERY_PAINTERS:
        short = min(width, height)
        _SCENERY_PAINTERS[kind](canvas, x / short, y / short, rng)
    return canvas


def _per_channel(red: float, green: float, blue: float) -> Floats:
    return np.array([red, green, blue], np.float32)[:, None, None]


def _specks(canvas: Floats, count: int, level: float, size: float, rng: np.random.Generator) -> None:
    """Squares of ``size`` times the picture's height, scattered."""
    _, height, width = canvas.shape
    side = max(1, round(size * height))
    for row, column in (rng.random((count, 2)) * (height, width)).astype(int).tolist():
        canvas[:, row : row + side, column : column + side] = level


def _night(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    _specks(canvas, 35, 235.0, 1 / 64, rng)


def _snow(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    drifts = np.sin(7 * y + np.sin(4 * x + rng.uniform(0, 6)))
    canvas += drifts * _per_channel(12, 10, 5) - 14
    _specks(canvas, 45, 255.0, 1 / 32, rng)


def _grass(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    _, height, width = canvas.shape
    blade = max(1, height // 10)
    blades = rng.uniform(-38, 38, (height // blade + 1, width))
    canvas += blades.repeat(blade, axis=0)[:height] * _per_channel(0.7, 1.0, 0.5)


def _sand(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    dunes = 8 * np.sin(9 * y + 2 * x + rng.uniform(0, 6))
    grain = rng.uniform(-22, 22, dunes.shape)
    canvas += grain + dunes


def _water(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    canvas += 26 * np.sin(45 * y + 2.2 * np.sin(9 * x + rng.uniform(0, 6)))


def _brick(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    course = y / 0.13 + rng.random()
    along = x / 0.28 + 0.5 * (np.floor(course) % 2) + rng.random()
    tones = rng.uniform(-22, 22, (16, 16))
    canvas += tones[course.astype(int) % 16, along.astype(int) % 16]
    canvas[:, (course % 1 < 0.14) | (along % 1 < 0.07)] = 200


def _wood(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    plank = y / 0.22 + rng.random()
    grain = 12 * np.sin(70 * y + 2 * np.sin(5 * x + 3 * np.floor(plank))) + 14 * np.sin(5 * np.floor(plank))
    canvas += grain
    canvas[:, plank[:, 0] % 1 < 0.09] *= 0.45


def _sky(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    for cx, cy, r in rng.uniform((0, 0, 0.09), (1.1, 1.1, 0.17), (4, 3)).tolist():
        cloud = np.exp(-((((x - cx) / (1.8 * r)) ** 2 + ((y - cy) / r) ** 2) ** 2))
        canvas += cloud * (250 - canvas)


def _paper(canvas: Floats, x: Floats, y: Floats, rng: np.random.Generator) -> None:
    canvas[:, (y[:, 0] / 0.12 + rng.random()) % 1 < 0.16] = _per_channel(140, 175, 225)


_SCENERY_PAINTERS: dict[str, Callable[[Floats, Floats, Floats, np.random.Generator], None]] = {
    "night": _night,
    "snow": _snow,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "brick": _brick,
    "wood": _wood,
    "sky": _sky,
    "paper": _paper,
}
