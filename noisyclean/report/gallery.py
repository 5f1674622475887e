"""Which pairs the page shows, and their pictures, taken from the shards and made small."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisyclean.corpus.decoding import UndecodableError
from noisyclean.corpus.embeddings import SUFFIXES
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.parallel import default_workers, map_in_processes
from noisyclean.corpus.pick import pick_pictures
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.manifest.reading import Manifest
from noisyclean.manifest.schema import CLEAN, HIGHER_IS_BETTER, NOISY, UNCERTAIN, UNREADABLE
from noisyclean.manifest.splitting import DEFAULT_OUT, read_out
from noisyclean.progress import SILENT, Progress
from noisyclean.report.pictures import small_webp, what_happened
from noisyclean.report.rows import AT_RANDOM, open_rows

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROW = [
    "split", "shard", "key", "index", "caption", "url", "similarity", "energy", "swapped_entropy", "match_score",
    "p_value", "q_value", "match_probability", "rank", "reason", "best_text_key", "best_text_similarity",
    "best_image_key", "best_image_similarity",
]  # fmt: skip
"""The columns of ``rows`` that a card is made of."""

SHOWN = 12
"""Pairs in a gallery."""
THUMBNAIL = 160
"""Pixels of the longer side."""
_FEW_SHARDS = 8
"""Fewer are read in this process: others take longer to start."""

# Control characters, line separators, and the marks that turn the direction of the text after them.
_ILLEGIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


@dataclass(frozen=True)
class Card:
    """A pair as it is shown.

    Attributes:
        row: the columns of ``ROW``.
        picture: its thumbnail, a WebP; None: there is none.
        best_caption: the caption of the bank that is most like its picture, where there are suggestions.
        best_picture: the thumbnail of the picture of the bank that is most like its caption.
    """

    row: dict[str, Any]
    picture: bytes | None = None
    best_caption: str | None = None
    best_picture: bytes | None = None


@dataclass(frozen=True)
class Gallery:
    """Some pairs that have something in common.

    Attributes:
        name: for links and filters.
        title: what they have in common.
        note: how they were chosen.
    """

    name: str
    title: str
    note: str
    cards: list[Card] = field(default_factory=list)


def deciding_column(rule: Mapping[str, Any]) -> str:
    """By which column a rule (the summary's) tells the clean part from the rest."""
    return str(rule.get("by") or ("match_score" if "min_score" in rule else "rank"))


def choose(db: DuckDBPyConnection, rule: Mapping[str, Any]) -> list[Gallery]:
    """The galleries, without pictures and suggestions; an empty one is left out.

    Args:
        db: the ``rows`` of a manifest, with the columns of ``ROW`` and the rule's own.
        rule: the summary's.
    """
    by = deciding_column(rule)
    better, worse = ("desc", "asc") if HIGHER_IS_BETTER[by] else ("asc", "desc")
    worst, beyond = ("min", "<=") if HIGHER_IS_BETTER[by] else ("max", ">=")
    outside = (
        f"split in ('uncertain', 'noisy') and {by} {beyond} (select {worst}({by}) from rows where split = 'clean')"
    )
    chosen = AT_RANDOM.format(seed="")
    doubt = f"abs(match_probability - 0.5), {chosen}"
    clean, uncertain, noisy = (f"split = '{split}'" for split in (CLEAN, UNCERTAIN, NOISY))
    asked = [
        ("cleanest", "The cleanest", "the first by rank", "rank is not null", "rank"),
        ("last-clean", "Last that are clean", "just inside the clean part", clean, f"{by} {worse}, rank desc"),
        ("first-missed", "First that are not", "just beyond the clean part", outside, f"{by} {better}, rank"),
        ("most-uncertain", "The most uncertain", "match probability nearest to one half", uncertain, doubt),
        ("last-uncertain", "Last that are not noisy", "the worst uncertain pairs", uncertain, "rank desc"),
        ("first-noisy", "First that are noisy", "the best noisy pairs", noisy, "rank"),
        ("noisiest", "The noisiest", "the last by rank", "rank is not null", "rank desc"),
        *(
            (f"random-{split}", split.capitalize(), "drawn at random", f"split = '{split}'", chosen)
            for split in (CLEAN, UNCERTAIN, NOISY, UNREADABLE)
        ),
    ]
    galleries = [
        Gallery(name, title, note, [Card(row) for row in fetch(db, where, order, SHOWN)])
        for name, title, note, where, order in asked
    ]
    return [gallery for gallery in galleries if gallery.cards]


def draw(
    out: Path | str = DEFAULT_OUT,
    *,
    split: str = NOISY,
    pairs: int = SHOWN,
    by: str | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Card]:
    """Some pairs of a split, with what there is of pictures and suggestions.

    Args:
        out: the OUT folder.
        split: its name.
        pairs: how many.
        by: a column: the worst by it, instead of a random draw.
        seed: another seed, another draw.
        progress: who is told how it goes.

    Raises:
        UsageError: there is no manifest, split or column of that name, or a file of the manifest is broken.
    """
    if by is not None and by not in HIGHER_IS_BETTER:
        raise UsageError(f"--by {by}: no such column; there are {', '.join(HIGHER_IS_BETTER)}")
    manifest = Manifest(out)
    run = read_out(manifest.out)
    manifest.files(split)  # says so if there is no such split
    among = () if run.get("rematch") else (split,)  # what is suggested lies in any split
    order = (
        AT_RANDOM.format(seed=seed) if by is None else f"{by} {'asc' if HIGHER_IS_BETTER[by] else 'desc'}, shard, key"
    )
    columns = dict.fromkeys([*ROW, *([by] if by else [])])
    with open_rows(manifest, *among, columns=list(columns), progress=progress) as db:
        chosen = Gallery(split, split, "", [Card(row) for row in fetch(db, f"split = '{split}'", order, pairs)])
        ((drawn,), missing) = illustrate([chosen], db, manifest.out, run, progress=progress)
    for why in missing:
        progress.say(why)
    return drawn.cards


def fetch(db: DuckDBPyConnection, where: str, order: str, limit: int) -> list[dict[str, Any]]:
    """Rows by a condition and an order, both SQL, with the columns of ``ROW``."""
    columns = ", ".join(f'"{name}"' for name in ROW)
    query = f"select {columns} from rows where {where} order by {order} limit ?"
    rows: list[dict[str, Any]] = db.sql(query, params=[limit]).to_arrow_table().to_pylist()
    return rows


def illustrate(
    galleries: Sequence[Gallery],
    db: DuckDBPyConnection,
    out: Path,
    run: Mapping[str, Any],
    *,
    progress: Progress = SILENT,
) -> tuple[list[Gallery], list[str]]:
    """Give the cards their pictures and suggestions.

    Args:
        galleries: from :func:`choose`.
        db: the same ``rows``.
        out: the OUT folder.
        run: its run.json, which says where the shards lie.
        progress: is told of the shards read.

    Returns:
        The galleries, and in words why some pictures are missing.
    """
    rows = [card.row for gallery in galleries for card in gallery.cards]
    suggested = _suggested(db, {row[f"best_{side}_key"] for row in rows for side in ("text", "image")} - {None})
    wanted: dict[str, set[str]] = {}
    for row in [*rows, *suggested.values()]:
        wanted.setdefault(row["shard"], set()).add(row["key"])
    pictures, missing = _pictures(out, run, wanted, progress)

    def card(row: dict[str, Any]) -> Card:
        text, image = suggested.get(row["best_text_key"]), suggested.get(row["best_image_key"])
        return Card(
            row=row,
            picture=pictures.get((row["shard"], row["key"])),
            best_caption=None if text is None else text["caption"],
            best_picture=None if image is None else pictures.get((image["shard"], image["key"])),
        )

    return [
        Gallery(one.name, one.title, one.note, [card(before.row) for before in one.cards]) for one in galleries
    ], missing


def legible(text: str) -> str:
    """Text on one line, without what would steer a terminal or turn the text around it."""
    return _ILLEGIBLE.sub(" ", text)


def thumbnail(data: bytes) -> bytes | None:
    """A picture as a WebP of at most ``THUMBNAIL`` pixels a side; None where it cannot be decoded."""
    try:
        return small_webp(data, THUMBNAIL, quality=70)
    except UndecodableError:
        return None


def _suggested(db: DuckDBPyConnection, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``shard/key`` → that row; what no readable row is named is left out."""
    query = """
        select shard || '/' || key as name, shard, key, caption
        from rows where rank is not null and name in (select unnest(?))
    """
    found = db.sql(query, params=[sorted(names)]).to_arrow_table().to_pylist()
    return {row["name"]: row for row in found}


def _pictures(
    out: Path, run: Mapping[str, Any], wanted: Mapping[str, set[str]], progress: Progress
) -> tuple[dict[tuple[str, str], bytes], list[str]]:
    """(shard, key) → thumbnail, and why some are missing."""
    paths = dict(zip(run["shards"], run.get("paths", ()), strict=False))
    if any(path.endswith(SUFFIXES) for path in paths.values()):
        return {}, ["The pairs were scored from embeddings, so there are no pictures to show."]
    if not paths:
        return {}, ["This folder does not say where its shards lie, so there are no pictures to show."]
    shards = [Shard(name, paths[name]) for name in sorted(wanted) if name in paths]
    workers = default_workers() if len(shards) > _FEW_SHARDS else 1
    pictures: dict[tuple[str, str], bytes] = {}
    missing = []
    with progress.task("taking pictures from the shards", len(shards), "shards") as task:
        look = partial(_look_into, out=out, wanted=wanted)
        for shard, found in zip(shards, map_in_processes(look, shards, workers), strict=True):
            task.advance()
            if isinstance(found, str):
                missing.append(found)
                continue
            pictures |= {(shard.name, key): data for key, data in found.items()}
    return pictures, missing


def _look_into(shard: Shard, *, out: Path, wanted: Mapping[str, set[str]]) -> dict[str, bytes] | str:
    """The thumbnails of the samples wanted of one shard, or why there are none."""
    with suppress(UsageError):  # without its score part, nothing is known of how the shard was
        if (happened := what_happened(out, shard)) is not None:
            return f"{happened}, so its pictures are not shown."
    try:
        pictures = pick_pictures(shard, wanted[shard.name])
    except (NoisycleanError, OSError) as error:
        return f"{error}, so its pictures are not shown."
    small = {key: thumbnail(data) for key, data in pictures.items()}
    return {key: data for key, data in small.items() if data is not None}
