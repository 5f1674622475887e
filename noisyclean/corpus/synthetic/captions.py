"""Scenes put into words.

A caption is made in two steps: :func:`describe` chooses which facts to state, :func:`write` puts them into words. A
fault goes in between (:func:`falsify`), so the wording of a false caption is no different from that of a true one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from string import capwords

import numpy as np

from noisyclean.corpus.synthetic.scenes import (
    PLACES,
    SHAPES,
    Background,
    Figure,
    Scene,
    Traits,
    distinct_colours,
    pick,
    visible_colours,
)

# The ways to say a trait, the plainest first; a trait that is not here is said by its own name.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "round shape"),
    "square": ("square", "box"),
    "triangle": ("triangle", "three-sided shape"),
    "star": ("star", "five-pointed star"),
    "heart": ("heart", "love heart"),
    "crescent": ("crescent", "crescent moon", "sickle"),
    "ring": ("ring", "hoop", "donut"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "arrow": ("arrow", "pointer"),
    "house": ("house", "cottage", "home"),
    "tree": ("tree", "fir tree", "pine"),
    "flower": ("flower", "blossom"),
    "red": ("red", "crimson"),
    "purple": ("purple", "violet"),
    "turquoise": ("turquoise", "teal", "cyan"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "plain": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted", "polka dot"),
    "checked": ("checked", "checkered"),
    "centre": ("in the middle", "in the centre", "at the center"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "top left": ("in the top left corner", "at the upper left"),
    "top right": ("in the top right corner", "at the upper right"),
    "bottom left": ("in the bottom left corner", "at the lower left"),
    "bottom right": ("in the bottom right corner", "at the lower right"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "next to": ("next to", "beside"),
}

SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": ("on a {0} background", "on {0}", "against a {0} backdrop", "with a {0} background"),
    "gradient": ("on a {0} to {1} gradient", "on a background fading from {0} to {1}"),
    "night": ("against the night sky", "in the night sky", "at night"),
    "grass": ("on grass", "on the lawn", "in a meadow"),
    "sand": ("on sand", "on the beach", "in the desert"),
    "water": ("on water", "in the sea", "in rippling water"),
    "snow": ("in the snow", "on snow", "in a snowy landscape"),
    "brick": ("on a brick wall", "in front of a brick wall", "against bricks"),
    "wood": ("on a wooden floor", "on wooden boards", "on wood"),
    "sky": ("in a cloudy sky", "in the sky", "among the clouds"),
    "paper": ("on lined paper", "on a notebook page", "on ruled paper"),
}

SETTING_TAGS: dict[str, str] = {
    "plain": "{0} background",
    "gradient": "{0} {1} gradient",
    "night": "night sky",
    "brick": "brick wall",
    "wood": "wooden floor",
    "sky": "cloudy sky",
    "paper": "lined paper",
}

PROSE = (
    "{0}", "{0}", "{0}.", "a photo of {0}", "a picture of {0}", "an image of {0}", "photo of {0}", "image showing {0}",
    "a drawing of {0}", "illustration of {0}", "there is {0}", "here is {0}", "this picture shows {0}.",
    "we see {0}", "you can see {0} here", "look: {0}!", "a simple scene with {0}", "graphic of {0}",
    "picture: {0}", "my drawing of {0}", "found this image of {0}", "close view of {0}", "poster with {0}",
    "postcard showing {0}", "a child's picture of {0}", "just {0}", "clip art of {0}",
)  # fmt: skip

HEADLINES = (
    "{0}", "{0}", "{0} - stock photo", "{0} | free clipart", "{0} vector illustration", "{0} wallpaper",
    "{0}, royalty free image", "new: {0}", "{0} (print)", "{0} icon", "buy {0} poster online", "{0} – gallery",
)  # fmt: skip

FRONTED = (
    "{setting}, {subject}", "{setting}: {subject}", "{setting} there is {subject}", "{setting} we see {subject}",
)  # fmt: skip

TAG_FILLERS = ("stock photo", "clipart", "illustration", "design", "shapes", "image", "vector")

UNINFORMATIVE = (
    "IMG_{0:04d}.JPG", "DSC{0:05d}", "DSCN{0:04d}.jpg", "P101{0:04d}", "image{0}.png", "download ({0})",
    "untitled-{0}", "photo {0}", "click to enlarge", "untitled", "photo", "image", "picture", "view larger",
    "thumbnail", "placeholder", "default alt text", "read more", "no description", "copyright 2019",
)  # fmt: skip

# To call the one shape the other would be no clear fault.
_LOOKALIKES = (frozenset({"square", "diamond"}),)

_ANY_SHAPE = ("shape", "object", "figure", "thing")

# How often a caption states a trait of a figure that it mentions, in the order of ``Traits``.
_CANDOUR = (0.97, 0.97, 0.5, 0.6, 0.4)


@dataclass(frozen=True, slots=True)
class Description:
    """What a caption claims: some traits of some figures, how the first lies to the second, and the background."""

    mentions: tuple[Traits, ...]
    relation: str = ""
    background: Background | None = None

    @property
    def facts(self) -> int:
        """How many things are claimed."""
        said = sum(bool(trait) for mention in self.mentions for trait in mention)
        return said + bool(self.relation) + (self.background is not None)


def describe(scene: Scene, rng: np.random.Generator) -> Description:
    """A true description that leaves things out, of two facts at least and mostly of three or more."""
    count = len(scene.figures)
    told = 1 if rng.random() < 0.15 else count
    figures = [scene.figures[i] for i in rng.permutation(count)[:told]]
    mentions = [_mention(figure, rng) for figure in figures]
    relation = ""
    if told == 2 and rng.random() < 0.6:
        relation = pick(rng, relations(*figures) or ("",))
    if relation:
        mentions = [mention._replace(place="") for mention in mentions]
    background = scene.background if rng.random() < 0.985 else None
    description = Description(tuple(mentions), relation, background)
    if description.facts >= (2 if rng.random() < 0.15 else 3):
        return description
    # Too vague: it would be true of many other pictures.
    true = figures[0].traits
    mentions[0] = mentions[0]._replace(shape=true.shape, colour=true.colour)
    return Description(tuple(mentions), relation, scene.background)


def falsify(description: Description, scene: Scene, rng: np.random.Generator) -> Description:
    """The description with one colour or one shape replaced by another that is nowhere in the scene."""
    options = [
        (index, trait)
        for index, mention in enumerate(description.mentions)
        for trait in ("shape", "colour")
        if getattr(mention, trait)
    ]
    index, trait = pick(rng, options)
    mention = description.mentions[index]
    if trait == "shape":
        wrong = mention._replace(shape=pick(rng, _absent_shapes(mention.shape, scene)))
    else:
        wrong = mention._replace(colour=pick(rng, _absent_colours(mention.colour, scene)))
    mentions = description.mentions
    return replace(description, mentions=(*mentions[:index], wrong, *mentions[index + 1 :]))


def holds(description: Description, scene: Scene) -> bool:
    """Whether all that is claimed is true of the scene, its mentions taken for different figures."""
    if description.background not in (None, scene.background):
        return False
    return any(
        all(_fits(mention, figure) for mention, figure in zip(description.mentions, figures, strict=True))
        and (not description.relation or description.relation in relations(figures[0], figures[1]))
        for figures in permutations(scene.figures, len(description.mentions))
    )


def relations(first: Figure, second: Figure) -> tuple[str, ...]:
    """How the first figure lies to the second; nothing where they lie askew."""
    (x1, y1), (x2, y2) = PLACES[first.traits.place], PLACES[second.traits.place]
    if y1 == y2:
        return ("left of" if x1 < x2 else "right of", "next to")
    if x1 == x2:
        return ("above" if y1 < y2 else "below",)
    return ()


def write(description: Description, rng: np.random.Generator) -> str:
    """The description in words, in one of the registers that captions on the web come in."""
    lot = rng.random()
    background = description.background
    if lot < 0.12 and background:
        subject = _subject(description, rng, articles=True)
        text = pick(rng, FRONTED).format(setting=_setting(background, rng), subject=subject)
    elif lot < 0.62:
        text = pick(rng, PROSE).format(_phrase(description, rng, articles=True))
    elif lot < 0.86:
        text = pick(rng, HEADLINES).format(_phrase(description, rng, articles=False))
    elif lot < 0.96:
        text = ", ".join(_tags(description, rng))
    else:
        return "-".join(_phrase(description, rng, articles=False).replace(",", "").split()) + ".jpg"
    return _in_some_case(text, rng)


def write_nothing(rng: np.random.Generator) -> str:
    """A caption that says nothing about its picture: a file's name, a button's label."""
    return pick(rng, UNINFORMATIVE).format(int(rng.integers(1, 10_000)))


def _mention(figure: Figure, rng: np.random.Generator) -> Traits:
    said = Traits(
        *(
            trait if lot < candour else ""
            for trait, lot, candour in zip(figure.traits, rng.random(5), _CANDOUR, strict=True)
        )
    )
    if said.size == "medium":
        said = said._replace(size="")
    if said.texture == "plain" and rng.random() < 0.85:
        said = said._replace(texture="")
    if not said.shape and not said.colour:
        said = said._replace(shape=figure.traits.shape)
    return said


def _fits(mention: Traits, figure: Figure) -> bool:
    return all(not said or said == true for said, true in zip(mention, figure.traits, strict=True))


def _absent_shapes(shape: str, scene: Scene) -> list[str]:
    taken = {shape, *(figure.traits.shape for figure in scene.figures)}
    alike = {other for group in _LOOKALIKES if shape in group for other in group}
    return [other for other in SHAPES if other not in taken | alike]


def _absent_colours(colour: str, scene: Scene) -> list[str]:
    taken = {figure.traits.colour for figure in scene.figures}
    # A colour that no figure would have on this background would give the fault away.
    return [
        other for other in visible_colours(scene.background) if other not in taken and distinct_colours(other, colour)
    ]


def _say(value: str, rng: np.random.Generator) -> str:
    words = SYNONYMS.get(value, (value,))
    return words[0] if rng.random() < 0.75 else pick(rng, words)


def _setting(background: Background, rng: np.random.Generator) -> str:
    phrase = pick(rng, SETTINGS[background.kind])
    text = phrase.format(*(_say(colour, rng) for colour in background.colours))
    return text.replace(" a orange", " an orange")


def _figure_words(mention: Traits, rng: np.random.Generator) -> str:
    noun = _say(mention.shape, rng) or pick(rng, _ANY_SHAPE)
    words = (_say(mention.size, rng), _say(mention.texture, rng), _say(mention.colour, rng), noun)
    return " ".join(filter(None, words))


def _noun_phrase(mention: Traits, rng: np.random.Generator, *, articles: bool) -> str:
    words = _figure_words(mention, rng)
    if articles:
        words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{words} {_say(mention.place, rng)}" if mention.place else words


def _subject(description: Description, rng: np.random.Generator, *, articles: bool) -> str:
    nouns = [_noun_phrase(mention, rng, articles=articles) for mention in description.mentions]
    if description.relation:
        return f"{nouns[0]} {_say(description.relation, rng)} {nouns[1]}"
    return " and ".join(filter(None, (", ".join(nouns[:-1]), nouns[-1])))


def _phrase(description: Description, rng: np.random.Generator, *, articles: bool) -> str:
    subject = _subject(description, rng, articles=articles)
    return f"{subject} {_setting(description.background, rng)}" if description.background else subject


def _tags(description: Description, rng: np.random.Generator) -> list[str]:
    """Keywords, but for the figures: where they lie takes a phrase to say."""
    tags = [_subject(description, rng, articles=False)]
    if description.background:
        kind, colours = description.background
        tags.append(SETTING_TAGS.get(kind, kind).format(*(_say(colour, rng) for colour in colours)))
    return [*tags, *dict.fromkeys((pick(rng, TAG_FILLERS), pick(rng, TAG_FILLERS)))]


def _in_some_case(text: str, rng: np.random.Generator) -> str:
    lot = rng.random()
    if lot < 0.35:
        return text
    if lot < 0.85:
        return text[0].upper() + text[1:]
    return capwords(text) if lot < 0.95 else text.upper()
