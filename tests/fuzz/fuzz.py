"""Feeds mutated tars and recipes to the readers of both, guided by which lines of code they reach (atheris).

    python tests/fuzz/fuzz.py tar -runs=10000
    python tests/fuzz/fuzz.py recipe -runs=10000
    python tests/fuzz/fuzz.py tar -max_total_time=28800 corpus/    # a night; corpus/ keeps what was found

What may come of them: rows and damage, or a UsageError. Anything else is a crash, and atheris writes the input down.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["noisyclean", "tarfile", "yaml"]):
    import tarfile

    from noisyclean.corpus import shards
    from noisyclean.corpus.locate import Shard
    from noisyclean.errors import UsageError
    from noisyclean.recipe import load_recipe


def check_tar(data: bytes) -> None:
    """Every sample comes out once, in order, whole or with a fault; what does not end well has damage."""
    global _tar
    _tar = data
    reader = shards.ShardReader(Shard("0", "0.tar"))
    samples = list(reader)
    assert [one.index for one in samples] == list(range(len(samples)))
    for one in samples:
        assert one.fault is not None or (one.image and one.caption), one
        one.key.encode()
        (one.caption or "").encode()


def check_recipe(data: bytes) -> None:
    """It is a recipe, or it is refused in one line that names the file."""
    path = _SCRATCH / "mine.yaml"
    path.write_bytes(data)
    said = str(path)
    try:
        load_recipe(path)
    except UsageError as error:
        said = str(error)
    assert str(path) in said


def seeds(folder: Path) -> None:
    """A small tar, plain, compressed and with long names, and the recipes that come with noisyclean."""
    for name, mode, form in (("plain", "w", tarfile.PAX_FORMAT), ("gz", "w:gz", tarfile.GNU_FORMAT)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode, format=form) as tar:
            for member in ("a.jpg", "a.txt", "a.json", "é/b.png", "b" * 120 + ".txt"):
                shards.add_member(tar, member, b'{"caption": "a dog"}')
        (folder / name).write_bytes(buffer.getvalue())
    for recipe in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        (folder / recipe.name).write_bytes(recipe.read_bytes())


def open_gates() -> None:
    """Have tars read from memory, since files would cost most of the time, and all checksums taken to be right."""
    shards.open_shard = lambda shard: io.BytesIO(_tar)
    tarfile.calc_chksums = lambda header: (tarfile.nti(header[148:156]),) * 2


_tar = b""

if __name__ == "__main__":
    what, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        _SCRATCH = Path(scratch)
        (_SCRATCH / "seeds").mkdir()
        seeds(_SCRATCH / "seeds")
        open_gates()
        if not any(not one.startswith("-") for one in options):
            options.append(str(_SCRATCH / "found"))
            (_SCRATCH / "found").mkdir()
        options += [str(_SCRATCH / "seeds"), "-max_len=16384", "-rss_limit_mb=2048", "-timeout=20"]
        atheris.Setup([sys.argv[0], *options], {"tar": check_tar, "recipe": check_recipe}[what])
        atheris.Fuzz()
