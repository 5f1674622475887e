"""Planted noise: what the truth says is what the shards hold."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import webdataset
from helpers import encode_image, pair, read_tar, write_tar

from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.noise import PLANTED_KIND, NoiseProtocol, corrupt
from noisyclean.corpus.shards import Sample, ShardReader
from noisyclean.corpus.synthetic import generate_corpus
from noisyclean.errors import NoisycleanError, UsageError

PROTOCOLS: tuple[NoiseProtocol, ...] = get_args(NoiseProtocol)
PASSING_ON: tuple[NoiseProtocol, ...] = ("caption", "image", "hard")

Corpus = dict[tuple[str, str, int], Sample]


def load(folder: Path) -> Corpus:
    """(shard, key, index) → sample."""
    return {
        (one.shard, one.key, one.index): one for shard in find_shards(folder) for one in ShardReader(shard)
    }  # fmt: skip


def load_truth(path: Path) -> pd.DataFrame:
    truth = pd.read_parquet(path)
    assert list(truth.columns) == ["shard", "key", "matched", "kind", "donor_shard", "donor_key"]
    assert truth["matched"].dtype == bool
    return truth


def check(before: Path, truth_path: Path, protocol: NoiseProtocol) -> pd.DataFrame:
    """The copy against the original and the truth; returns the planted rows."""
    old, new, truth = load(before), load(truth_path.parent), load_truth(truth_path)
    assert list(old) == list(new)
    assert [(shard, key) for shard, key, _ in old] == list(zip(truth["shard"], truth["key"], strict=True))
    shown = {(one.image, one.caption) for one in old.values() if one.fault is None}
    by_name = {(shard, key): one for (shard, key, _), one in reversed(old.items())}
    planted = []
    for was, now, row in zip(old.values(), new.values(), truth.itertuples(), strict=True):
        assert was.fault == now.fault
        if was.fault is not None:
            assert (row.kind, row.matched, pd.isna(row.donor_key)) == ("unreadable", True, True)
        if (was.image, was.caption) == (now.image, now.caption):
            continue
        planted.append(row.Index)
        assert (row.matched, row.kind) == (False, PLANTED_KIND[protocol])
        assert (now.image, now.caption) not in shown
        assert (now.caption if protocol == "image" else now.image) == (
            was.caption if protocol == "image" else was.image
        )
        if protocol != "uninformative":
            donor = by_name[row.donor_shard, row.donor_key]
            assert (now.image == donor.image) if protocol == "image" else (now.caption == donor.caption)
    return truth.loc[planted]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three shards of 60 readable pairs in all and a few others; some captions and images come more than once."""
    folder = tmp_path / "clean"
    places = ("beach", "city", "garden", "forest", "kitchen")
    numbers = iter(range(100))
    for shard in range(3):
        samples = []
        for index in range(20):
            number = next(numbers)
            caption = f"a {('dog', 'cat', 'horse', 'bird')[number % 4]} in the {places[number % 5]} {number // 2}"
            image = number - number % 3 if number < 30 else number
            samples.append((f"{shard:05}{index:04}", pair(number, caption, image=image, width=8, extra=number)))
        samples.insert(3, ("text-only", {"txt": b"a text"}))
        samples.insert(9, (f"{shard:05}0000", pair(7, "a second sample of that key")))
        samples.append(("empty", {"png": encode_image(1), "txt": b""}))
        write_tar(folder / f"{shard:05}.tar", samples)
    (folder / "00000.parquet").write_bytes(b"a sidecar")
    return folder


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("rate", [0, 0.05, 0.35, 1])
def test_truth_is_what_the_shards_hold(corpus: Path, tmp_path: Path, protocol: NoiseProtocol, rate: float) -> None:
    truth = corrupt(corpus, tmp_path / "out", rate=rate, protocol=protocol, workers=1)
    assert truth == tmp_path / "out" / "truth.parquet"
    planted = check(corpus, truth, protocol)
    assert len(planted) == round(rate * 60)
    table = load_truth(truth)
    assert set(planted.index) == set(table.index[~table["matched"]])
    kinds = Counter(table["kind"])
    assert kinds == {k: n for k, n in ((PLANTED_KIND[protocol], len(planted)), ("unreadable", 9)) if n} | (
        {"match": 60 - len(planted)} if rate < 1 else {}
    )
    assert sorted(path.name for path in truth.parent.iterdir()) == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "truth.parquet",
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_same_seed_same_bytes(corpus: Path, tmp_path: Path, protocol: NoiseProtocol) -> None:
    def content(name: str, **options: int) -> list[bytes]:
        truth = corrupt(corpus, tmp_path / name, rate=0.4, protocol=protocol, **options)
        return [path.read_bytes() for path in sorted(truth.parent.iterdir())]

    first = content("first", seed=3, workers=1)
    assert content("again", seed=3, workers=2) == first
    assert content("other", seed=4, workers=1) != first


def test_caption_protocol_permutes(corpus: Path, tmp_path: Path) -> None:
    planted = check(corpus, corrupt(corpus, tmp_path / "out", rate=0.5, workers=1), "caption")
    recipients = sorted(zip(planted["shard"], planted["key"], strict=True))
    donors = sorted(zip(planted["donor_shard"], planted["donor_key"], strict=True))
    assert recipients == donors


def test_pairs_of_one_image_go_wrong_together(corpus: Path, tmp_path: Path) -> None:
    truth = corrupt(corpus, tmp_path / "out", rate=0.5, protocol="image", workers=1)
    old, new = load(corpus), load(truth.parent)
    partners: dict[bytes | None, set[bytes | None]] = {}
    for was, now in zip(old.values(), new.values(), strict=True):
        if was.fault is None:
            partners.setdefault(was.image, set()).add(now.image)
    assert all(len(images) == 1 for images in partners.values())


def test_hard_captions_are_near(corpus: Path, tmp_path: Path) -> None:
    truth = corrupt(corpus, tmp_path / "out", rate=0.5, protocol="hard", workers=1)
    old, new = load(corpus), load(truth.parent)
    common = [
        len(set((was.caption or "").split()) & set((now.caption or "").split()) - {"a", "in", "the"})
        for was, now in zip(old.values(), new.values(), strict=True)
        if was.caption != now.caption
    ]
    assert sum(count > 0 for count in common) > 0.8 * len(common)


def test_other_members_and_metadata_are_kept(tmp_path: Path) -> None:
    samples = {
        f"dir/{i}": {"cls": b"%d" % i, **pair(i, uid=str(i)), "captions.json": b"[]", "seg.npy": b"\x00%d" % i}
        for i in range(4)
    }
    write_tar(tmp_path / "in" / "0.tar", samples)
    corrupt(tmp_path / "in", tmp_path / "out", rate=1, workers=1)
    (shard,) = find_shards(tmp_path / "out")
    for raw, (key, members) in zip(ShardReader(shard).members(), samples.items(), strict=True):
        assert (raw.key, list(raw.members)) == (key, list(members))
        changed = {name for name in members if members[name] != raw.members[name]}
        assert changed == {"json", "txt"}
        metadata = json.loads(raw.members["json"])
        assert metadata == {"caption": raw.members["txt"].decode(), "uid": json.loads(members["json"])["uid"]}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ([{"caption": "one"}, {"caption": "two"}], [{"caption": "two"}, {"caption": "one"}]),
        (
            [{"captions": ["one", "uno"], "id": 1}, {"captions": ["two"], "id": 2}],
            [{"captions": ["two"], "caption": "two", "id": 1}, {"captions": ["one", "uno"], "caption": "one", "id": 2}],
        ),
        (
            [{"captions": ["one"]}, {"caption": "two", "text": "two"}],
            [{"caption": "two"}, {"caption": "one", "text": "one"}],
        ),
        ([{"caption": "one", "text": 1}, {"caption": "two"}], [{"caption": "two", "text": 1}, {"caption": "one"}]),
    ],
)
def test_captions_in_json(tmp_path: Path, metadata: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    samples = {str(i): {"png": encode_image(i), "json": json.dumps(one).encode()} for i, one in enumerate(metadata)}
    write_tar(tmp_path / "in" / "0.tar", samples)
    corrupt(tmp_path / "in", tmp_path / "out", rate=1, workers=1)
    (shard,) = find_shards(tmp_path / "out")
    assert [json.loads(raw.members["json"]) for raw in ShardReader(shard).members()] == expected


def test_image_brings_its_extension_and_sizes(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "in" / "0.tar",
        {
            "a": {"cls": b"1", "jpg": encode_image(1, (4, 4), "JPEG"), "txt": b"one", "json": b'{"width": 4, "id": 1}'},
            "b": {"png": encode_image(2), "json": b'{"width": 8, "height": 6, "id": 2}', "txt": b"two"},
        },
    )
    corrupt(tmp_path / "in", tmp_path / "out", rate=1, protocol="image", workers=1)
    (shard,) = find_shards(tmp_path / "out")
    a, b = ShardReader(shard).members()
    assert (list(a.members), list(b.members)) == (["cls", "png", "txt", "json"], ["jpg", "json", "txt"])
    assert json.loads(a.members["json"]) == {"width": 8, "id": 1}
    assert json.loads(b.members["json"]) == {"width": 4, "height": 6, "id": 2}


def test_image_never_overwrites_another_member(tmp_path: Path) -> None:
    mask = encode_image(9)
    write_tar(
        tmp_path / "in" / "0.tar",
        {
            "a": {"jpg": encode_image(1, (4, 4), "JPEG"), "png": mask, "txt": b"one"},
            "b": {"png": encode_image(2), "txt": b"two"},
        },
    )
    corrupt(tmp_path / "in", tmp_path / "out", rate=1, protocol="image", workers=1)
    a, _ = ShardReader(find_shards(tmp_path / "out")[0]).members()
    assert a.members == {"jpg": encode_image(2), "png": mask, "txt": b"one"}


def test_one_pair_alone_gets_a_copy(corpus: Path, tmp_path: Path) -> None:
    planted = check(corpus, corrupt(corpus, tmp_path / "out", rate=1 / 60, workers=1), "caption")
    assert len(planted) == 1


@pytest.mark.parametrize("protocol", PASSING_ON)
def test_what_cannot_be_made_wrong_stays(tmp_path: Path, protocol: NoiseProtocol) -> None:
    write_tar(tmp_path / "in" / "0.tar", {str(i): pair(i, "A dog" if i % 2 else "a  DOG") for i in range(6)})
    truth = corrupt(tmp_path / "in", tmp_path / "out", rate=0.5, protocol=protocol, workers=1)
    assert check(tmp_path / "in", truth, protocol).empty
    assert set(load_truth(truth)["kind"]) == {"match"}


def test_captions_of_one_image_are_not_exchanged(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", {str(i): pair(i, image=i // 5) for i in range(10)})
    assert len(check(tmp_path / "in", corrupt(tmp_path / "in", tmp_path / "out", rate=1, workers=1), "caption")) == 10


def test_captions_without_words(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", {str(i): pair(i, "!" * (i + 1)) for i in range(4)})
    truth = corrupt(tmp_path / "in", tmp_path / "out", rate=1, protocol="hard", workers=1)
    assert load_truth(truth)["matched"].all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_earlier_truth_is_carried_forward(tmp_path: Path, protocol: NoiseProtocol) -> None:
    before = generate_corpus(
        tmp_path / "in",
        pairs=120,
        image_size=16,
        pairs_per_shard=40,
        near_duplicates=0.2,
        wrong_attribute=0.2,
        uninformative=0.2,
    )
    path = corrupt(tmp_path / "in", tmp_path / "out", rate=0.3, protocol=protocol, workers=1)
    planted = check(tmp_path / "in", path, protocol)
    assert len(planted) == 36
    old, new = load_truth(before), load_truth(path)
    assert set(old.loc[planted.index, "kind"]) <= {"match", "near_duplicate"}
    pd.testing.assert_frame_equal(old.drop(planted.index), new.drop(planted.index))
    if protocol == "uninformative":
        assert planted["donor_key"].isna().all()
    else:
        donors = pd.MultiIndex.from_frame(planted[["donor_shard", "donor_key"]])
        assert set(old.set_index(["shard", "key"]).loc[donors, "kind"]) <= {"match", "near_duplicate"}


def test_noise_can_be_planted_twice(corpus: Path, tmp_path: Path) -> None:
    first = corrupt(corpus, tmp_path / "first", rate=0.25, workers=1)
    second = corrupt(first.parent, tmp_path / "second", rate=0.25, protocol="hard", workers=1)
    assert Counter(load_truth(second)["kind"]) == {"random": 15, "hard": 15, "match": 30, "unreadable": 9}


def test_truths_of_several_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_tar(tmp_path / "clean" / folder / "0.tar", {str(i): pair(i, f"{folder} {i}") for i in range(10)})
        corrupt(tmp_path / "clean" / folder, tmp_path / "once" / folder, rate=0.5, workers=1)
    apart = load_truth(corrupt(tmp_path / "once", tmp_path / "apart", rate=0, workers=1))
    assert set(apart["shard"]) == {"x/0", "y/0"}
    assert Counter(apart["kind"]) == {"match": 10, "random": 10}
    wrong = apart[~apart["matched"]]
    assert (wrong["donor_shard"] == wrong["shard"]).all()
    again = load_truth(corrupt(tmp_path / "apart", tmp_path / "again", rate=0, workers=1))
    pd.testing.assert_frame_equal(again, apart)


def test_broken_truth(corpus: Path, tmp_path: Path) -> None:
    (corpus / "truth.parquet").write_bytes(b"no table")
    with pytest.raises(NoisycleanError, match=r"truth\.parquet: not a truth table"):
        corrupt(corpus, tmp_path / "out", rate=0.1, workers=1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gzipped_damaged_and_remote_shards(tmp_path: Path, protocol: NoiseProtocol) -> None:
    import fsspec

    write_tar(tmp_path / "in" / "0.tar.gz", {f"{i}": pair(i) for i in range(20)}, "w:gz")
    cut = write_tar(tmp_path / "in" / "1.tar", {f"{i}": pair(20 + i) for i in range(20)})
    cut.write_bytes(cut.read_bytes()[:-20_000])
    write_tar(tmp_path / "in" / "2.tar", {})
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "in").iterdir():
        memory.pipe_file(f"/noise/{path.name}", path.read_bytes())
    try:
        local = corrupt(tmp_path / "in", tmp_path / "local", rate=0.5, protocol=protocol, workers=1)
        remote = corrupt("memory://noise", tmp_path / "remote", rate=0.5, protocol=protocol, workers=1)
    finally:
        memory.rm("/noise", recursive=True)
    assert 10 < len(check(tmp_path / "in", local, protocol)) < 20
    for name in ("0.tar", "1.tar", "2.tar", "truth.parquet"):
        assert (local.parent / name).read_bytes() == (remote.parent / name).read_bytes()
    read_tar(local.parent / "1.tar")  # the copy is whole


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_webdataset_reads_the_copy(corpus: Path, tmp_path: Path, protocol: NoiseProtocol) -> None:
    truth = corrupt(corpus, tmp_path / "out", rate=0.5, protocol=protocol, workers=1)
    urls = [shard.path for shard in find_shards(truth.parent)]
    keys = [one["__key__"] for one in webdataset.WebDataset(urls, shardshuffle=False) if "__key__" in one]
    assert keys == load_truth(truth)["key"].to_list()


def test_long_and_foreign_keys(tmp_path: Path) -> None:
    keys = ["x" * 150, "日本/é", "plain"]
    write_tar(tmp_path / "in" / "0.tar", {key: pair(i) for i, key in enumerate(keys)})
    truth = load_truth(corrupt(tmp_path / "in", tmp_path / "out", rate=1, workers=1))
    assert truth["key"].to_list() == keys
    assert sorted(truth["donor_key"]) == sorted(keys)


def test_usage_errors(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="rate must be 0 to 1"):
            corrupt(corpus, out, rate=rate)
    with pytest.raises(UsageError, match="no such noise protocol"):
        corrupt(corpus, out, rate=0.1, protocol="random")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="where the shards lie"):
        corrupt(corpus, corpus, rate=0.1)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        corrupt(corpus, tmp_path / "file", rate=0.1)
    corrupt(corpus, out, rate=0.1, workers=1)
    with pytest.raises(UsageError, match="holds shards already"):
        corrupt(corpus, out, rate=0.1)


def test_interrupted_run_leaves_nothing_behind(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            corrupt(corpus, tmp_path / "out", rate=0.1, workers=1)
    assert list((tmp_path / "out").iterdir()) == []
    corrupt(corpus, tmp_path / "out", rate=0.1, workers=1)


def test_shard_that_changes_meanwhile(corpus: Path, tmp_path: Path) -> None:
    class Meddler:
        """Shortens a shard once the first pass is over."""

        def task(self, name: str, total: int | None, unit: str) -> Meddler:
            if name.startswith("gathering"):
                write_tar(corpus / "00001.tar", {"only": pair(1)})
            return self

        def __enter__(self) -> Meddler:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def advance(self, amount: int = 1, note: str | None = None) -> None: ...

        def say(self, text: str) -> None: ...

    with pytest.raises(NoisycleanError, match=r"00001\.tar: changed while it was read"):
        corrupt(corpus, tmp_path / "out", rate=0.5, workers=1, progress=Meddler())
