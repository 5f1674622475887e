"""What a picture shows, before it is drawn or described: one to three figures on a background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np

Rgb = tuple[int, int, int]
_T = TypeVar("_T")

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "crescent", "ring", "cross",
    "diamond", "arrow", "house", "tree", "fish", "flower",
)  # fmt: skip

COLOURS: dict[str, Rgb] = {
    "red": (214, 32, 36),
    "orange": (250, 130, 10),
    "yellow": (250, 222, 40),
    "green": (40, 155, 60),
    "blue": (35, 80, 210),
    "purple": (125, 45, 165),
    "pink": (250, 140, 190),
    "black": (20, 20, 22),
    "white": (248, 248, 248),
    "turquoise": (45, 195, 190),
}

# Radius of a figure, as a fraction of the picture's shorter side.
SIZES: dict[str, tuple[float, float]] = {"small": (0.15, 0.17), "medium": (0.22, 0.26), "large": (0.33, 0.38)}

TEXTURES = ("plain", "striped", "dotted", "checked")

# Centre of a figure, as fractions of the width and the height (y grows downwards).
PLACES: dict[str, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "left": (0.22, 0.5),
    "right": (0.78, 0.5),
    "top": (0.5, 0.22),
    "bottom": (0.5, 0.78),
    "top left": (0.22, 0.22),
    "top right": (0.78, 0.22),
    "bottom left": (0.22, 0.78),
    "bottom right": (0.78, 0.78),
}

# The mean colour of each scenery: figures take only colours that stand out from it.
SCENERIES: dict[str, Rgb] = {
    "night": (14, 18, 52),
    "grass": (78, 150, 52),
    "sand": (222, 190, 130),
    "water": (40, 115, 185),
    "snow": (222, 230, 240),
    "brick": (165, 75, 55),
    "wood": (165, 110, 62),
    "sky": (135, 190, 240),
    "paper": (245, 243, 232),
}

_ARRANGEMENTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: tuple((place,) for place in PLACES),
    2: (
        ("left", "right"),
        ("left", "right"),
        ("top", "bottom"),
        ("top", "bottom"),
        ("top left", "bottom right"),
        ("top right", "bottom left"),
    ),
    3: (
        ("top", "bottom left", "bottom right"),
        ("bottom", "top left", "top right"),
        ("left", "top right", "bottom right"),
        ("right", "top left", "bottom left"),
    ),
}

# How many scenes have one figure, and how many at most two.
_MORE_FIGURES = (0.8, 0.95)

# Turned freely, these shapes would be mistaken for one another (a square on its corner is a diamond) or be odd.
_UPRIGHT = frozenset(SHAPES) - {"circle", "star", "ring", "arrow", "flower"}

_ASPECTS = ((1.0, 1.0), (1.125, 1.0), (1.0, 1.125), (1.25, 1.0), (1.0, 1.25))

# Distance in RGB beyond which two colours cannot be taken for one another, jitter and lighting included.
_CONTRAST = 100.0


class Traits(NamedTuple):
    """What can be said of a figure, each a key of this module's tables; ``""`` leaves a trait unsaid."""

    shape: str = ""
    colour: str = ""
    size: str = ""
    texture: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: its traits, all of them set, and the exact way it is drawn."""

    traits: Traits
    x: float  # centre, as a fraction of the width
    y: float  # centre, as a fraction of the height
    radius: float  # as a fraction of the picture's shorter side
    angle: float  # radians, clockwise on the screen
    mirrored: bool
    rgb: tuple[float, float, float]


class Background(NamedTuple):
    """``plain`` in one colour, ``gradient`` from a colour at the top to another, or one of ``SCENERIES``."""

    kind: str
    colours: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a picture shows, down to the pixels but for the sensor's noise."""

    figures: tuple[Figure, ...]
    background: Background
    background_seed: int  # where the bricks, clouds and blades of grass lie
    aspect: tuple[float, float]  # width and height in units of the shorter side
    light: tuple[float, float, float]  # brightness at the centre; its change over the width and over the height


def pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    """One of ``items``, each as likely (``Generator.choice`` is far slower on short sequences)."""
    return items[int(rng.random() * len(items))]


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene. Its figures differ in shape and in colour, so that a caption can tell them apart."""
    count = 1 + int(np.searchsorted(_MORE_FIGURES, rng.random()))
    background = _sample_background(rng)
    aspect = _ASPECTS[0] if rng.random() < 0.7 else pick(rng, _ASPECTS[1:])
    traits = zip(
        _distinct(rng, SHAPES, count),
        _distinct(rng, visible_colours(background), count),
        _sample_sizes(rng, count),
        pick(rng, _ARRANGEMENTS[count]),
        strict=True,
    )
    return Scene(
        figures=tuple(_sample_figure(rng, *trait, aspect) for trait in traits),
        background=background,
        background_seed=int(rng.integers(2**32)),
        aspect=aspect,
        light=_sample_light(rng),
    )


def redraw(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene seen again: figures moved, scaled and turned by a hair, under another light."""

    def nudge(figure: Figure) -> Figure:
        dx, dy, grow, turn = rng.uniform(-1, 1, 4)
        return replace(
            figure,
            x=figure.x + 0.02 * dx,
            y=figure.y + 0.02 * dy,
            radius=figure.radius * (1 + 0.05 * grow),
            angle=figure.angle + 0.06 * turn,
        )

    return replace(scene, figures=tuple(map(nudge, scene.figures)), light=_sample_light(rng))


@cache
def visible_colours(background: Background) -> tuple[str, ...]:
    """The colours that stand out from a background."""
    behind = [COLOURS[name] for name in background.colours] or [SCENERIES[background.kind]]
    return tuple(name for name, rgb in COLOURS.items() if all(_distance(rgb, other) > _CONTRAST for other in behind))


def distinct_colours(first: str, second: str) -> bool:
    """Whether nobody would take one named colour for the other."""
    return _distance(COLOURS[first], COLOURS[second]) > _CONTRAST


def _distance(first: Rgb, second: Rgb) -> float:
    return float(np.linalg.norm(np.subtract(first, second)))


def _distinct(rng: np.random.Generator, items: Sequence[_T], count: int) -> list[_T]:
    return [items[i] for i in rng.permutation(len(items))[:count]]


def _sample_background(rng: np.random.Generator) -> Background:
    lot = rng.random()
    if lot < 0.5:
        return Background("plain", (pick(rng, tuple(COLOURS)),))
    if lot < 0.65:
        top = pick(rng, tuple(COLOURS))
        return Background("gradient", (top, pick(rng, [c for c in COLOURS if distinct_colours(c, top)])))
    return Background(pick(rng, tuple(SCENERIES)))


def _sample_sizes(rng: np.random.Generator, count: int) -> list[str]:
    sizes = [pick(rng, ("small", "medium", "medium")) for _ in range(count)]
    # Beside a large figure there is no room for another.
    return ["large"] if count == 1 and rng.random() < 0.7 else sizes


def _sample_figure(
    rng: np.random.Generator, shape: str, colour: str, size: str, place: str, aspect: tuple[float, float]
) -> Figure:
    # On a small figure a pattern would be finer than the pixels.
    texture = "plain" if size == "small" or rng.random() < 0.65 else pick(rng, TEXTURES[1:])
    radius = rng.uniform(*SIZES[size])
    # A figure stays inside the picture, whose sides are longer than 1 where the aspect says so.
    x, y = (
        _clamp(centre + rng.uniform(-0.03, 0.03), radius / side + 0.02)
        for centre, side in zip(PLACES[place], aspect, strict=True)
    )
    return Figure(
        traits=Traits(shape, colour, size, texture, place),
        x=x,
        y=y,
        radius=radius,
        angle=rng.uniform(-0.2, 0.2) if shape in _UPRIGHT else rng.uniform(-np.pi, np.pi),
        mirrored=rng.random() < 0.5,
        rgb=tuple((COLOURS[colour] + rng.uniform(-12, 12, 3)).tolist()),
    )


def _clamp(value: float, margin: float) -> float:
    return min(max(value, margin), 1 - margin)


def _sample_light(rng: np.random.Generator) -> tuple[float, float, float]:
    return rng.uniform(0.9, 1.05), rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)
