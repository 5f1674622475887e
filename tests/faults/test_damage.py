"""A corpus with everything wrong that can be: every sample has one row, and the sound ones score as ever."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Members, encode_image, encode_noise, write_tar
from PIL import Image

import noisyclean as nc
from noisyclean.cli import main
from noisyclean.manifest.schema import MEASURED

RECIPE = ["encoder.name=pico", "optimiser.epochs=2", "objective.warmup_epochs=1", "bank.size=64", "data.workers=0"]


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def sound(number: int) -> dict[str, bytes]:
    return {"png": encode_noise(number), "txt": f"caption {number} of {number % 7} things".encode()}


PICTURE = Image.open(io.BytesIO(encode_noise(1, (40, 30))))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
GREY16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))

ODD: dict[str, Members] = {
    "cmyk": {"jpg": saved(PICTURE.convert("CMYK"), "JPEG"), "txt": b"odd 0"},
    "16-bit": {"png": saved(GREY16, "PNG"), "txt": b"odd 1"},
    "palette": {"png": saved(PICTURE.convert("P"), "PNG"), "txt": b"odd 2"},
    "animated": {"gif": saved(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]), "txt": b"odd 3"},
    "rotated": {"jpg": saved(PICTURE, "JPEG", exif=ROTATED), "txt": b"odd 4"},
    "pixel": {"png": encode_image(7, (1, 1)), "txt": b"odd 5"},
    "wide": {"png": encode_image(8, (30_000, 400)), "txt": b"odd 6"},
    "misnamed": {"jpg": encode_noise(9), "txt": b"odd 7"},
    "several": {"depth.png": encode_noise(10), "jpg": saved(PICTURE, "JPEG"), "txt": b"odd 8"},
    "caption-first": {"txt": b"odd 9", "png": encode_noise(11)},
    "nested/path/x": {"png": encode_noise(12), "txt": b"odd 10"},
    "long": {"png": encode_noise(13), "txt": b"odd 11 " * 200_000},
    "escape": {"png": encode_noise(14), "txt": b"\x1b[2J<script>alert(1)</script> =1+1"},
}
"""Unusual, but samples as good as any."""

BROKEN: dict[str, tuple[Members, str]] = {
    "torn": ({"jpg": saved(PICTURE.resize((300, 300)), "JPEG")[:-400], "txt": b"a"}, "truncated JPEG"),
    "line": ({"png": encode_image(3, (30_000, 10)), "txt": b"a"}, "PNG of 30,000 × 10 pixels"),
    "page": ({"jpg": b"<html>", "txt": b"a"}, "not a picture"),
    "blind": ({"txt": b"a"}, "no image"),
    "hollow": ({"png": b"", "txt": b"a"}, "empty image"),
    "mute": ({"png": encode_noise(20)}, "no caption"),
    "empty": ({"png": encode_noise(21), "txt": b" "}, "empty caption"),
    "latin": ({"png": encode_noise(22), "txt": "café".encode("latin-1")}, "caption is not UTF-8"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``clean/`` with two shards, ``run`` fitted to them, ``out`` their scores, and ``damaged/`` with much else."""
    home = tmp_path_factory.mktemp("damage")
    good = {name: {f"{name}{i:04d}": sound(1000 * int(name) + i) for i in range(60)} for name in ("00000", "00001")}
    for name, samples in good.items():
        write_tar(home / "clean" / f"{name}.tar", samples)
    nc.fit(home / "clean", out=home / "run", overrides=RECIPE)
    nc.score(home / "clean", model=home / "run", out=home / "out", workers=0)

    damaged = home / "damaged"
    between = [*ODD.items(), *((key, members) for key, (members, _) in BROKEN.items()), ("000000003", sound(3))]
    mixed = list(good["00000"].items())
    for at, one in enumerate(between):
        mixed.insert(2 * at + 1, one)
    mixed.append(("000000003", sound(4)))  # a key that was there
    write_tar(damaged / "00000.tar", mixed)
    write_tar(damaged / "00001.tar.gz", good["00001"], "w:gz")
    cut = write_tar(damaged / "cut.tar", {f"c{i}": sound(5000 + i) for i in range(9)})
    cut.write_bytes(cut.read_bytes()[: 5 * 3072 + 700])
    write_tar(damaged / "void.tar", {})
    (damaged / "nothing.tar").write_bytes(b"")
    (damaged / "garbage.tar").write_bytes(np.random.default_rng(0).bytes(20_000))
    (damaged / "00000.parquet").write_bytes(b"a dangling sidecar")
    (damaged / "00000_stats.json").write_text("{")
    return home


@pytest.fixture
def noisyclean(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["noisyclean", *words])
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert isinstance(code, int)
        return code, out, err

    return run


def test_every_sample_is_accounted_for(home: Path, noisyclean: Callable[..., tuple[int, str, str]]) -> None:
    words = ("score", "damaged", "-m", "run", "-o", "damaged-out", "--workers", "0")
    code, out, err = noisyclean(*words, "--max-unreadable", "0.01")
    assert code == 1
    assert "all is done, but 11 of 149 samples are unreadable, more than --max-unreadable 0.01" in err.splitlines()[-1]
    assert "Shard garbage: damaged tar" in out
    assert "\x1b" not in out + err
    assert noisyclean(*words)[0] == 0  # 10 % are not too many

    rows = pd.read_parquet(home / "damaged-out" / "manifest").set_index(["shard", "key"])
    summary = json.loads((home / "damaged-out" / "summary.json").read_text())
    assert set(summary["damaged_shards"]) == {"cut", "nothing", "garbage"}
    assert len(rows) == summary["pairs"] == 60 + len(ODD) + len(BROKEN) + 2 + 60 + 6
    bad = rows[rows["split"] == "unreadable"]
    expected = {("00000", key): reason for key, (_, reason) in BROKEN.items()}
    expected |= {("00000", "000000003"): "duplicate key", ("cut", "c5"): "cut off with its shard"}
    assert {key: value for key, value in bad["reason"].items() if key in expected} == expected
    assert rows.loc["00000"].loc[list(ODD), "match_score"].notna().all()


def test_sound_samples_score_as_if_the_others_were_not_there(
    home: Path, noisyclean: Callable[..., tuple[int, str, str]]
) -> None:
    noisyclean("score", "damaged", "-m", "run", "-o", "damaged-out", "--workers", "0")
    columns = [*MEASURED, "fold", "caption", "width", "height"]
    clean, damaged = (
        nc.Manifest(home / out).pairs("clean", "noisy", "uncertain").set_index(["shard", "key"])[columns]
        for out in ("out", "damaged-out")
    )
    pd.testing.assert_frame_equal(damaged.loc[clean.index], clean, check_exact=True)
