"""The layouts in which image–text benchmarks are distributed: an annotation file, and a folder of images.

Readers yield one :class:`Pair` a caption, in the order of the field's precomputed features, so that row n here is row n
there. Nothing is read of the images but their names.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from noisyclean.corpus.shards import IMAGE_EXTENSIONS
from noisyclean.errors import UsageError

Layout: TypeAlias = Literal["karpathy", "cc"]

Row: TypeAlias = list[str]


@dataclass(frozen=True, slots=True)
class Pair:
    """One caption and its picture; None: no file in the folder bears the picture's name."""

    caption: str
    image_index: int
    image: Path | None
    metadata: dict[str, Any]


def read_karpathy(annotations: Path, images: Path, splits: Sequence[str], captions: int) -> Iterator[Pair]:
    """Karpathy's ``dataset_flickr30k.json`` or ``dataset_coco.json``: the splits in the order named.

    Args:
        captions: so many of each image, the first ones: COCO has a few images with six or seven, and the field keeps
            five.

    Raises:
        UsageError: at once, for another layout, or a split that is not there; names the file and the key.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{annotations}: not JSON ({error}); give Karpathy's dataset_….json") from error
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{annotations}: no list of images under the key images; give Karpathy's dataset_….json")
    if "annotations" in content:
        raise UsageError(f"{annotations}: the key annotations is COCO's own layout; give Karpathy's dataset_coco.json")
    for number, entry in enumerate(entries):
        _check_entry(entry, f"{annotations}: images[{number}]")
    there = Counter(entry["split"] for entry in entries)
    for split in splits:
        if split not in there:
            listing = ", ".join(f"{name} ({count:,} images)" for name, count in there.items())
            raise UsageError(f"{annotations}: no image has the split {split}; there are {listing}")
    chosen = [entry for split in splits for entry in entries if entry["split"] == split]
    return (
        Pair(sentence["raw"], index, image, {"split": entry["split"], **_known(sentence, "sentid"), "image": name})
        for index, entry in enumerate(chosen)
        for name, image in [_karpathy_image(entry, images)]
        for sentence in entry["sentences"][:captions]
    )


def _check_entry(entry: Any, where: str) -> None:
    for key, kind in (("filename", str), ("split", str), ("sentences", list)):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise UsageError(f"{where}: no {kind.__name__} under the key {key}; give Karpathy's dataset_….json")
    for number, sentence in enumerate(entry["sentences"]):
        if not isinstance(sentence, dict) or not isinstance(sentence.get("raw"), str):
            raise UsageError(f"{where}.sentences[{number}]: no str under the key raw; give Karpathy's dataset_….json")


def _karpathy_image(entry: dict[str, Any], images: Path) -> tuple[str, Path | None]:
    name, folder = entry["filename"], entry.get("filepath", "")
    places = (images / folder / name, images / name) if isinstance(folder, str) else (images / name,)
    return name, next((place for place in places if place.is_file()), None)


def _known(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def read_cc(annotations: Path, images: Path) -> Iterator[Pair]:
    """Tab-separated lines of Conceptual Captions, without a header; the first line says which of these they are.

    - ``caption, url`` (Google's): the image of row n, counted from 0, is named ``n`` with or without leading zeros
      (img2dataset's ``files``), or ``n_crc32`` with the CRC-32 of the url (the usual downloader);
    - ``id, caption`` or ``id, caption, url`` (CC152K's ``train_caps.tsv`` and ``train_caps_img_urls.csv``): ``id``.

    Each with any image extension or none, and anywhere under ``images``.

    Raises:
        UsageError: at once, for other columns; on iteration, for a line unlike the first; names the file and the line.
    """
    with annotations.open(encoding="utf-8", errors="replace") as lines:
        columns = next(lines, "").rstrip("\n").split("\t")
    kinds = ["url" if "://" in column else "text" for column in columns]
    if kinds == ["text", "url"]:
        return _cc_pairs(annotations, len(columns), _GoogleRows(images))
    if kinds in (["text", "text"], ["text", "text", "url"]):
        return _cc_pairs(annotations, len(columns), _NamedRows(images))
    raise UsageError(
        f"{annotations}: line 1 has the columns {', '.join(kinds)}; "
        "a Conceptual Captions file has caption, url or id, caption or id, caption, url, with tabs between"
    )


def _cc_pairs(annotations: Path, columns: int, read: Callable[[int, Row], Pair]) -> Iterator[Pair]:
    with annotations.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            row = line.rstrip("\n").split("\t")
            if len(row) != columns:
                raise UsageError(f"{annotations}: line {number + 1} has {len(row)} columns, line 1 has {columns}")
            yield read(number, row)


class _GoogleRows:
    def __init__(self, images: Path) -> None:
        self._files = _files_by_stem(images, lambda stem: str(int(stem)) if stem.isdecimal() else stem)

    def __call__(self, number: int, row: Row) -> Pair:
        caption, url = row
        image = self._files.get(f"{number}_{zlib.crc32(url.encode())}") or self._files.get(str(number))
        return Pair(caption, number, image, {"url": url, "image": image.name if image else None})


class _NamedRows:
    def __init__(self, images: Path) -> None:
        self._files = _files_by_stem(images)

    def __call__(self, number: int, row: Row) -> Pair:
        name, caption, *url = row
        return Pair(caption, number, self._files.get(name), {"image": name, **({"url": url[0]} if url else {})})


def _files_by_stem(folder: Path, normal: Callable[[str], str] = str) -> dict[str, Path]:
    """All images under ``folder`` by their names without extension.

    Raises:
        UsageError: two have the same name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        extension = path.suffix[1:].lower()
        if (extension and extension not in IMAGE_EXTENSIONS) or not path.is_file():
            continue
        stem = normal(path.stem)
        if stem in found:
            raise UsageError(f"{path}: has the same name as {found[stem]}; keep one of them in the folder")
        found[stem] = path
    return found
