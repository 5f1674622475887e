"""Tiny benchmarks in the layouts of the real ones."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import encode_image, encode_noise

SPLITS = ("val", "train", "restval", "train", "test", "train", "restval", "train")
"""Of the eight images, in the order of the file."""


def caption(image: int, number: int) -> str:
    return f"Caption {number} of image {image} ."


def write_karpathy(folder: Path, *, coco: bool = False, splits: Sequence[str] = SPLITS) -> tuple[Path, Path]:
    """The annotations of an image for each of ``splits``, and their folder; five captions each, image 1 has six."""
    images = folder / "images"
    entries = []
    for image, split in enumerate(splits):
        name = f"{1000 + image}.jpg"
        entry: dict[str, Any] = {
            "filename": name,
            "split": split,
            "imgid": image,
            "sentids": [image * 10 + n for n in range(5 + (image == 1))],
            "sentences": [
                {"raw": f"{caption(image, n)} ", "tokens": ["caption"], "sentid": image * 10 + n}
                for n in range(5 + (image == 1))
            ],
        }
        if coco:
            entry["filepath"] = "val2014" if split == "restval" else "train2014"
        path = images / entry.get("filepath", "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_noise(image, image_format="JPEG"))
        entries.append(entry)
    annotations = folder / "dataset.json"
    annotations.write_text(json.dumps({"images": entries, "dataset": "coco" if coco else "flickr30k"}))
    return annotations, images


def write_cc(folder: Path, columns: str) -> tuple[Path, Path]:
    """Twelve lines with the columns named (``caption url``, ``id caption url`` …), and a folder of eleven images."""
    images, lines = folder / "images", []
    (images / "00000").mkdir(parents=True)
    for row in range(12):
        url = f"http://example.org/{row}.jpg?s=1"
        crc = zlib.crc32(url.encode())
        values = {"caption": f"caption {row}", "url": url, "id": f"{1100 + row}_{crc}"}
        lines.append("\t".join(values[column] for column in columns.split()))
        names = (
            [f"00000/{row:09}.jpg", f"{row}.PNG", f"{row}_{crc}"] if "id" not in columns else [f"{values['id']}.jpg"]
        )
        if row != 4:
            (images / names[row % len(names)]).write_bytes(encode_image(row, image_format="JPEG"))
    (images / "00000" / "000000000.txt").write_text("a sidecar")
    annotations = folder / "captions.tsv"
    annotations.write_text("\n".join(lines) + "\n")
    return annotations, images
