"""Worker processes that are killed or hang are replaced, and nothing is lost or doubled by it."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults.dying import count_past_deadly, count_to, die, killed, nothing, once, wait_for_the_last, work
from helpers import encode_image, pair, write_tar

from noisyclean.corpus import decoding, parallel
from noisyclean.corpus.decoding import UndecodableError, decode_apart, decode_image
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.parallel import LostError, map_in_processes, read_in_processes
from noisyclean.corpus.stream import stream_chunks
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_turns_and_pieces_are_as_if_nothing_had_been(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SILENCE", 1.0)
    pieces = [(item, piece) for item in range(5) for piece in range(5)]
    undisturbed = list(
        read_in_processes(partial(count_to, tmp_path, "none"), range(3), 2, in_order=True, prepare=nothing)
    )
    assert undisturbed == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3), (0, 4), (1, 4)] + [
        (2, piece) for piece in range(5)
    ]
    (tmp_path / "none").touch()
    whole = list(read_in_processes(partial(count_to, tmp_path, "none"), range(5), 2, in_order=True, prepare=nothing))
    read = partial(count_to, tmp_path, fault)
    assert list(read_in_processes(read, range(5), 2, in_order=True, prepare=nothing)) == whole
    (tmp_path / fault).unlink()
    found = list(read_in_processes(read, range(5), 2, in_order=False, prepare=nothing))
    assert sorted(found) == pieces
    assert [one for one in found if one[0] == 3] == [(3, piece) for piece in range(5)]


@pytest.mark.parametrize("in_order", [True, False])
def test_what_always_ends_its_process_is_named(tmp_path: Path, in_order: bool) -> None:
    with pytest.raises(LostError, match="was killed by signal 9") as lost:
        list(read_in_processes(partial(count_to, tmp_path, "always"), range(5), 2, in_order=in_order, prepare=nothing))
    assert lost.value.item == 3


def test_the_last_process_is_told_to_be_careful(tmp_path: Path) -> None:
    read = partial(count_to, tmp_path, "careless")
    found = list(read_in_processes(read, range(5), 2, in_order=False, prepare=nothing))
    assert sorted(found) == [(item, piece) for item in range(5) for piece in range(5)]


def test_items_are_dealt_to_who_is_through(tmp_path: Path) -> None:
    """While one process is long at an item, the other reads all that was not dealt before."""
    read = partial(wait_for_the_last, tmp_path, 9)
    assert list(read_in_processes(read, range(10), 2, in_order=False, prepare=nothing)) == [1, *range(3, 10), 0, 2]


def test_a_death_is_not_laid_to_the_piece_before_it() -> None:
    """What was read with care is handed over before the next piece is begun, which may end the process too."""
    assert list(read_in_processes(count_past_deadly, [0], 1, in_order=True, prepare=nothing)) == [0, 1, 2, 3]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_killed_function_is_called_again(tmp_path: Path, ordered: bool) -> None:
    found = list(map_in_processes(partial(work, tmp_path), range(8), 2, ordered=ordered))
    assert (found if ordered else sorted(found)) == list(range(8))


def test_functions_that_are_always_killed() -> None:
    with pytest.raises(NoisycleanError, match="were killed 3 times in a row"):
        list(map_in_processes(die, range(2), 2))


class Killer:
    """Prepares pairs as the given preparer does; the process ends at the 30th picture, once."""

    def __init__(self, encoder: DualEncoder, flag: Path) -> None:
        self.preprocessor = encoder.preprocessor
        self.flag = flag
        self.seen = 0

    def prepare(self, data: bytes) -> object:
        self.seen += 1
        if self.seen == 30 and once(self.flag):
            killed(os.getpid())
        return self.preprocessor.prepare(data)

    def finish(self, *prepared: Any) -> object:
        return self.preprocessor.finish(*prepared)

    def tokens(self, captions: list[str]) -> object:
        return self.preprocessor.tokens(captions)


def test_chunks_do_not_depend_on_deaths(faulty_index: CorpusIndex, encoder: DualEncoder, tmp_path: Path) -> None:
    def chunks(preparer: object) -> list[tuple[object, ...]]:
        found = stream_chunks(faulty_index.shards, preparer, chunk_size=7, workers=2)  # type: ignore[arg-type]
        return [
            (one.shard, one.last, one.damage, one.rows.to_pylist(), one.image.tolist(), one.text.tolist())
            for one in found
        ]

    assert chunks(Killer(encoder, tmp_path / "flag")) == chunks(encoder.preprocessor)
    assert (tmp_path / "flag").exists()


class Deadly(Killer):
    """A decoder that some of the pictures crash, at every try."""

    def __init__(self, encoder: DualEncoder, *pictures: bytes) -> None:
        super().__init__(encoder, Path())
        self.pictures = pictures

    def prepare(self, data: bytes) -> object:
        if data in self.pictures:
            killed(os.getpid())
        return self.preprocessor.prepare(data)


def test_pictures_that_kill_their_decoder_are_all_that_is_lost(encoder: DualEncoder, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"{i:02}": pair(i) for i in range(40)})
    write_tar(tmp_path / "1.tar", {f"{i:02}": pair(i) for i in range(40, 60)})

    def read(preparer: object) -> dict[str, list[tuple[str, str | None]]]:
        found: dict[str, list[tuple[str, str | None]]] = {"0": [], "1": []}
        for one in stream_chunks(find_shards(tmp_path), preparer, chunk_size=8, workers=2):  # type: ignore[arg-type]
            found[one.shard] += zip(one.rows["key"].to_pylist(), one.rows["fault"].to_pylist(), strict=True)
            assert len(one.image) == len(one.text) == one.rows["fault"].null_count
        return found

    expected = read(encoder.preprocessor)
    for at in (12, 13, 17):
        expected["0"][at] = (str(at), "crashes the decoder")
    assert read(Deadly(encoder, *map(encode_image, (12, 13, 17)))) == expected


def test_a_decoder_apart_may_answer_refuse_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "DECODING_SECONDS", 1)
    assert decode_apart(decode_image, encode_image(3)).getpixel((0, 0)) == (0, 0, 3)
    with pytest.raises(UndecodableError, match="not a picture"):
        decode_apart(decode_image, b"nothing")
    with pytest.raises(UndecodableError, match="crashes the decoder"):
        decode_apart(lambda _: time.sleep(30), b"")


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit, MemoryError])
def test_a_decoder_apart_that_is_broken_off_comes_to_an_end(how: type[BaseException]) -> None:
    """Also where a thread has started it: the process must not go on with what its parent would do next."""

    def broken_off(_: bytes) -> None:
        raise how

    here = os.getpid()
    with ThreadPoolExecutor(1) as pool, pytest.raises(UndecodableError, match="crashes the decoder"):
        pool.submit(decode_apart, broken_off, b"").result(20)
    assert os.getpid() == here


@pytest.mark.parametrize("shard", range(6))
def test_skipped_chunks_are_the_first(faulty_index: CorpusIndex, encoder: DualEncoder, shard: int) -> None:
    """A process that died between a shard's last chunk and the word of its end leaves nothing to hand over."""
    from noisyclean.corpus.stream import _ChunkReader

    reader = _ChunkReader(encoder.preprocessor, 10, None)
    whole = [one.chunk.rows for one in reader.read(faulty_index.shards[shard])]
    for skip in range(len(whole) + 1):
        assert [one.chunk.rows for one in reader.read(faulty_index.shards[shard], skip)] == whole[skip:]
