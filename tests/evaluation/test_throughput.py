"""``bench throughput``: its corpus, its rounds, and one whole small run of it with and without webdataset."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers import Listener, pair, read_tar, write_tar
from PIL import Image

import noisyclean as nc
from noisyclean.cli import main
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.evaluation.bench.throughput import corpus, measure, plain, scoring
from noisyclean.evaluation.bench.throughput.corpus import (
    PHOTO,
    THUMBNAIL,
    break_some,
    link_tars,
    make_pairs,
    take_pairs,
    write_tars,
)
from noisyclean.evaluation.bench.throughput.result import Throughput, throughput_markdown
from noisyclean.evaluation.bench.throughput.rounds import rate, ratio, take_turns

PAIRS = 64
RATIOS = (
    "end_to_end_over_model",
    "end_to_end_over_limit",
    "tiny_end_to_end_over_model",
    "tiny_end_to_end_over_limit",
    "bank_over_matmul",
    "bank_share",
    "text_speedup",
    "fit_over_bare",
    "refilter_share",
)


@pytest.fixture(scope="module")
def small(one_tokenizer: None) -> Iterator[None]:
    """All of it, but of little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PAIRS_PER_WORKER", PAIRS)
        patch.setattr(measure, "PAIRS_PER_TAR", 16)
        patch.setattr(measure, "MEMORY_TARS", 2)
        patch.setattr(measure, "MEMORY_PAIRS_PER_TAR", 128)
        patch.setattr(measure, "MEMORY_COPIES", 3)
        patch.setattr(measure, "BANK_SIZES", (256, 8192))
        patch.setattr(scoring, "BANK_SIZE", 512)
        patch.setattr(corpus, "DIFFERENT", 4)
        yield


@pytest.fixture(scope="module")
def found(small: None) -> Throughput:
    return measure.bench_throughput(model="noisyclean-nano", times=1, workers=1, device="cpu")


class TestCorpus:
    def test_photographs_are_large_and_no_two_files_are_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(corpus, "DIFFERENT", 4)
        pairs = list(make_pairs(6, PHOTO))
        images = [image for image, _ in pairs]
        assert len(set(images)) == 6
        assert 60 < np.mean([len(image) for image in images]) / 1024 < 100
        assert {Image.open(io.BytesIO(image)).size for image in images} == {(640, 480)}
        decoded = [np.asarray(Image.open(io.BytesIO(images[i]))) for i in (0, 1, 4)]
        assert (decoded[0] == decoded[2]).all()
        assert not (decoded[0] == decoded[1]).all()
        # Neighbours in a photograph are alike, pixels of noise are not.
        grey = decoded[0].mean(axis=2)
        assert np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1] > 0.85

    def test_tars_hold_the_pairs_in_order(self, tmp_path: Path) -> None:
        pairs = list(make_pairs(5, THUMBNAIL))
        tars = write_tars(tmp_path / "tars", iter(pairs), 2)
        assert [tar.name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
        assert list(take_pairs(str(tmp_path / "tars"), 100)) == pairs
        assert list(take_pairs(str(tmp_path / "tars"), 3)) == pairs[:3]

    def test_every_hundredth_picture_is_broken_and_has_its_row(self, tmp_path: Path) -> None:
        pairs = list(make_pairs(301, THUMBNAIL))
        broken = list(break_some(pairs))
        assert [number for number in range(301) if broken[number] != pairs[number]] == [0, 100, 200, 300]
        write_tars(tmp_path / "tars", broken, 301)
        found = nc.inspect(str(tmp_path / "tars"))
        assert (found.samples, sum(found.unreadable.values())) == (301, 4)

    def test_links_are_whole_tars_in_the_order_of_what_they_are_of(self, tmp_path: Path) -> None:
        tars = write_tars(tmp_path / "tars", make_pairs(4, THUMBNAIL), 2)
        linked = sorted(link_tars(tmp_path / "links", tars, 3).iterdir())
        assert [path.stat().st_ino for path in linked] == [tar.stat().st_ino for tar in tars for _ in range(3)]
        assert len(read_tar(linked[-1])) == 2


class TestRounds:
    def test_ways_take_turns_and_every_other_round_goes_backwards(self) -> None:
        ran: list[str] = []

        def way(name: str) -> float:
            ran.append(name)
            return float(len(ran))

        listener = Listener()
        found = take_turns("turns", {"a": lambda: way("a"), "b": lambda: way("b")}, 3, listener)
        assert "".join(ran) == "abbaab"
        assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}
        assert len(listener.notes) == 6

    def test_a_ratio_is_taken_within_rounds(self) -> None:
        # The machine was ten times as slow in the second round: a ratio of medians would be 2/3.
        found = {"a": [10.0, 1.5, 8.0], "b": [20.0, 3.0, 12.0]}
        assert ratio(found, "a", "b") == 0.5

    def test_a_rate_is_how_many_a_second(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([10.0, 14.0])
        monkeypatch.setattr("time.perf_counter", lambda: next(clock))
        assert rate(lambda: 100)() == 25


class TestRun:
    def test_no_row_is_lost(self, found: Throughput) -> None:
        assert found.rows_lost == 0

    def test_every_ratio_and_rate_is_positive(self, found: Throughput) -> None:
        assert all(getattr(found, name) > 0 for name in RATIOS)
        assert min(found.rates.values()) > 0

    def test_of_one_round_ratios_are_those_of_the_rates(self, found: Throughput) -> None:
        rates = found.rates
        assert found.end_to_end_over_model == pytest.approx(rates["end_to_end"] / rates["model"])
        assert found.tiny_end_to_end_over_model == pytest.approx(rates["tiny_end_to_end"] / rates["tiny_model"])
        assert found.over_plain_loop == pytest.approx(rates["end_to_end"] / rates["plain_loop"])
        assert found.loader_over_plain == pytest.approx(rates["loader"] / rates["plain_loader"])
        kept = rates["tiny_end_to_end_1%_broken"] / rates["tiny_end_to_end"]
        assert found.corrupt_slowdown == pytest.approx(1 - kept)
        alone = 1 / rates["model"] + 1 / rates["loader"]
        assert found.end_to_end_over_limit == pytest.approx(rates["end_to_end"] * alone)

    def test_stages_are_positive_and_the_share_of_the_bank_is_of_the_whole(self, found: Throughput) -> None:
        assert found.stages.keys() == found.tiny_stages.keys()
        assert min(*found.stages.values(), *found.tiny_stages.values()) > 0
        assert found.bank_share == pytest.approx(found.stages["bank"] * found.rates["end_to_end"] / 1000)

    def test_each_bank_has_its_time(self, found: Throughput) -> None:
        assert [one["bank"] for one in found.growth_in_bank] == [256, 8192]
        assert all(one["seconds"] > 0 for one in found.growth_in_bank)

    @pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
    def test_memory_is_that_of_whole_processes(self, found: Throughput) -> None:
        small, large = found.growth_in_pairs
        assert (small["pairs"], large["pairs"]) == (256, 768)
        assert min(small["peak_mb"], large["peak_mb"]) > 200  # torch alone
        assert found.memory_growth_mb == pytest.approx(large["peak_mb"] - small["peak_mb"])

    def test_settings_are_told(self, found: Throughput) -> None:
        told = {"model": "noisyclean-nano", "workers": 1, "times": 1, "pairs": PAIRS, "device": "cpu", "width": 64}
        assert told.items() <= found.machine.items()

    def test_tables_hold_every_ratio_rate_and_stage(self, found: Throughput) -> None:
        text = throughput_markdown(found)
        assert found.notes == []
        for table in text.split("\n\n")[1:]:
            assert len({line.count("|") for line in table.splitlines()}) == 1
        assert f"| {found.rates['tiny_end_to_end']:,.1f} |" in text
        assert f"{found.fit_over_bare:.2f} |" in text
        assert all(f"| {stage.replace('_', ' ')} |" in text for stage in found.stages)

    def test_what_cannot_be_measured_is_null_with_a_sentence(
        self, small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(plain, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "platform", "darwin")
        write_tar(tmp_path / "own.tar", {f"{i:03d}": pair(i) for i in range(PAIRS + 1)})
        found = measure.bench_throughput(str(tmp_path), model="noisyclean-nano", times=1, workers=0)
        assert (found.loader_over_plain, found.over_plain_loop, found.memory_growth_mb) == (None, None, None)
        assert [note for note in found.notes if "pip install 'noisyclean[bench]'" in note]
        assert found.machine["pairs"] == PAIRS
        assert "webdataset is not installed" in throughput_markdown(found)

    def test_pictures_may_be_decoded_by_the_device(
        self, small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(plain, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(measure, "CPU_SHARE", 1)
        decoded: list[int] = []
        decode = torchvision.io.decode_jpeg
        monkeypatch.setattr(
            torchvision.io, "decode_jpeg", lambda jpegs, **how: (decoded.append(len(jpegs)), decode(jpegs, **how))[1]
        )
        write_tars(tmp_path / "own", make_pairs(PAIRS, THUMBNAIL), PAIRS)
        found = measure.bench_throughput(
            str(tmp_path / "own"), model="noisyclean-nano", times=1, workers=0, device="cpu", decode="gpu"
        )
        # Two loaders, passes for two models, and both end to end, at the least.
        assert sum(decoded) > 6 * PAIRS
        assert found.rows_lost == 0
        assert "0 decoding processes (--decode gpu)" in throughput_markdown(found)


class TestMistakes:
    def test_no_such_model(self) -> None:
        with pytest.raises(UsageError, match="ViT-S-61"):
            measure.bench_throughput(model="ViT-S-61")

    def test_no_pair(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "00000.tar", {"a": {"txt": b"no picture"}})
        with pytest.raises(NoisycleanError, match="no pair"):
            measure.bench_throughput(str(tmp_path), model="noisyclean-nano")


class TestCommand:
    @pytest.fixture(autouse=True)
    def _measured(self, found: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, object] = {}

        def bench(shards: list[str] | None, **options: object) -> Throughput:
            self.asked = {"shards": shards, **options}
            return found

        monkeypatch.setattr(measure, "bench_throughput", bench)

    def run(self, *words: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["noisyclean", "bench", "throughput", *words])
            with pytest.raises(SystemExit) as stop:
                main()
        assert not stop.value.code

    def test_json_is_one_object(self, found: Throughput, capsys: pytest.CaptureFixture[str]) -> None:
        self.run("--json")
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(dataclasses.asdict(found)))

    def test_text_is_the_tables(self, found: Throughput, capsys: pytest.CaptureFixture[str]) -> None:
        words = "a.tar b.tar -m ViT-B-32 --times 3 --workers 2 --device cpu --decode gpu"
        self.run(*words.split())
        assert capsys.readouterr().out == throughput_markdown(found) + "\n"
        del self.asked["progress"]
        assert self.asked == {
            "shards": ["a.tar", "b.tar"],
            "model": "ViT-B-32",
            "times": 3,
            "workers": 2,
            "device": "cpu",
            "decode": "gpu",
        }
