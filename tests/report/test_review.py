"""The review: what is drawn and kept, who is let in, and labelling by keyboard in a browser."""

from __future__ import annotations

import http.client
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page
from scipy.stats import binom
from test_browser import browser  # noqa: F401 - the fixture
from test_page import HOSTILE, make_corpus

import noisyclean as nc
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.pick import pick_pictures
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.evaluation.labelling import calibrate, draw_sample
from noisyclean.files import write_json
from noisyclean.manifest.reading import Manifest
from noisyclean.report.gallery import legible
from noisyclean.report.review.precision import WITHIN, labels_to_go
from noisyclean.report.review.session import OutOfDate, Session


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with hostile captions, their truth, and ``out``."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def out(corpus: Path, tmp_path: Path) -> Path:
    """An OUT of one's own, of these shards."""
    return Path(shutil.copytree(corpus / "out", tmp_path / "out"))


def truth(corpus: Path) -> pd.DataFrame:
    return pd.read_parquet(corpus / "shards" / "truth.parquet")


def pixels(data: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def labels_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "labels.parquet").astype({"matched": "boolean"})


def clopper_pearson(matched: int, labelled: int) -> tuple[float, float]:
    """By bisection of the binomial tails, and not by quantiles of the beta distribution."""

    def solve(too_low: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return low

    low = solve(lambda p: binom.sf(matched - 1, labelled, p) < 0.025) if matched else 0.0
    high = solve(lambda p: binom.cdf(matched, labelled, p) > 0.025) if matched < labelled else 1.0
    return low, high


def judge_all(session: Session, verdicts: list[str]) -> None:
    for verdict in verdicts:
        session.judge(session.state()["pair"]["name"], verdict)


class TestLabels:
    def test_are_the_sample_of_calibrate_in_turns(self, out: Path, tmp_path: Path) -> None:
        rows = Session(out, pairs=10, seed=3).labels.rows
        draw_sample(out, sample=tmp_path / "sample.parquet", pairs=10, seed=3)
        identity = ["split", "shard", "key"]
        drawn = pd.read_parquet(tmp_path / "sample.parquet").sort_values(identity)
        assert rows.sort_values(identity)[identity].values.tolist() == drawn[identity].values.tolist()
        turns = rows["split"].to_numpy().reshape(10, 3)
        assert {tuple(sorted(turn)) for turn in turns} == {("clean", "noisy", "uncertain")}
        assert len(set(map(tuple, turns))) > 1  # or the split of the next pair were known

    def test_are_kept_at_once_and_gone_on_with(self, out: Path) -> None:
        session = Session(out, pairs=5)
        judge_all(session, ["matches", "differs", "unsure"])
        kept = labels_of(out)
        assert kept["matched"][:3].tolist() == [True, False, pd.NA]
        assert kept["unsure"].tolist() == [False, False, True] + 12 * [False]
        found = calibrate(out, labels=out / "labels.parquet")
        assert sum(split.labelled for split in found.splits.values()) == 2
        again = Session(out, pairs=5)
        pd.testing.assert_frame_equal(again.labels.rows, session.labels.rows)
        assert again.state() == session.state()

    def test_a_larger_sample_begins_with_the_smaller_one(self, out: Path) -> None:
        small = Session(out, pairs=5, seed=2)
        judge_all(small, ["matches"] * 7)
        large = Session(out, pairs=8)
        assert len(large.labels.rows) == 24
        pd.testing.assert_frame_equal(large.labels.rows[:15], small.labels.rows)
        assert len(Session(out, pairs=1).labels.rows) == 24

    def test_back_takes_back(self, out: Path) -> None:
        session = Session(out, pairs=5)
        judge_all(session, ["matches", "unsure"])
        second = session.labels.last_place()
        session.take_back()
        assert session.state()["pair"]["name"].endswith(f"-{second}")
        assert not labels_of(out)["unsure"].any()
        session.take_back()
        session.take_back()  # there is nothing left
        assert session.state()["judged"] == 0
        assert labels_of(out)["matched"].isna().all()

    def test_a_verdict_on_another_pair_is_refused(self, out: Path) -> None:
        session = Session(out, pairs=5)
        first = session.state()["pair"]["name"]
        session.judge(first, "matches")
        with pytest.raises(OutOfDate, match="reload"):
            session.judge(first, "differs")
        assert labels_of(out)["matched"][0]

    def test_what_someone_else_wrote_is_not_written_over(self, out: Path) -> None:
        first, second = Session(out, pairs=5), Session(out, pairs=5)
        judge_all(second, ["matches"])
        with pytest.raises(NoisycleanError, match="changed by another program"):
            judge_all(first, ["differs"])
        assert labels_of(out)["matched"][0]

    def test_labels_that_do_not_fit(self, out: Path) -> None:
        session = Session(out, pairs=50)
        judge_all(session, ["matches"])
        with pytest.raises(UsageError, match=r"labels\.parquet: drawn with --seed 0"):
            Session(out, seed=1)
        nc.split(out, keep=0.1)
        with pytest.raises(UsageError, match="of another split"):
            Session(out)
        (out / "labels.parquet").write_bytes(b"PAR1")
        with pytest.raises(UsageError, match="cannot read the labels"):
            Session(out)


class TestSession:
    def test_tells_nothing_of_split_and_scores(self, out: Path) -> None:
        assert set(Session(out, pairs=5).state()["pair"]) == {"name", "caption"}

    def test_the_picture_is_that_of_the_pair(self, out: Path, corpus: Path) -> None:
        session = Session(out, pairs=3)
        shown, lying = [], []
        for row in session.labels.rows.itertuples():
            pair = session.state()["pair"]["name"]
            shown.append(pixels(session.picture(pair)))
            shard = Shard(row.shard, str(corpus / "shards" / f"{row.shard}.tar"))
            lying.append(pixels(pick_pictures(shard, [row.key])[row.key]))
            session.judge(pair, "matches")
        distance = np.abs(np.stack(shown)[:, None] - np.stack(lying)[None]).mean((2, 3, 4))
        assert distance.argmin(axis=1).tolist() == list(range(9))
        with pytest.raises(OutOfDate):
            session.picture(pair)

    def test_precision_is_that_of_calibrate(self, out: Path, corpus: Path) -> None:
        known = truth(corpus).set_index(["shard", "key"])["matched"]
        session = Session(out, pairs=20)
        for row in session.labels.rows.itertuples():
            judge_all(session, ["matches" if known[row.shard, row.key] else "differs"])
        state, found = session.state(), session.calibration()
        assert state["pair"] is None
        clean = found.splits["clean"]
        assert (state["clean"]["matched"], state["clean"]["labelled"]) == (clean.matched, 20)
        assert tuple(state["clean"]["interval"]) == clean.interval
        assert clean.interval == pytest.approx(clopper_pearson(clean.matched, 20))

    def test_pairs_without_a_picture_are_skipped(self, out: Path, tmp_path: Path) -> None:
        run = json.loads((out / "run.json").read_text())
        moved = tmp_path / "00001.tar"
        shutil.copy(run["paths"][1], moved)
        moved.write_bytes(moved.read_bytes() + b"\0")
        write_json(out / "run.json", {**run, "paths": [run["paths"][0], str(moved), str(tmp_path / "gone.tar")]})
        session = Session(out, pairs=10)
        shown = 0
        while (pair := session.state()["pair"]) is not None:
            session.judge(pair["name"], "matches")
            shown += 1
        rows = session.labels.rows
        assert rows["matched"].notna().equals(rows["shard"] == "00000")
        assert shown == (rows["shard"] == "00000").sum() > 0
        skipped = session.state()["skipped"]
        assert len(skipped) == len(rows) - shown
        assert set(skipped) == {
            f"{moved} has changed since it was scored",
            f"{tmp_path / 'gone.tar'} is no longer there",
        }

    def test_embeddings_have_no_pictures(self, out: Path) -> None:
        run = json.loads((out / "run.json").read_text())
        write_json(out / "run.json", {**run, "paths": ["a.npy", "b.npy", "c.npy"]})
        with pytest.raises(UsageError, match="no pictures to look at"):
            Session(out)

    def test_redraws_at_the_certified_cutoff(self, out: Path, corpus: Path) -> None:
        label_by_truth(out, corpus)
        session = Session(out, pairs=30)
        before = labels_of(out)
        cutoff = session.calibration().cutoff
        with pytest.raises(OutOfDate, match="another part"):
            session.redraw(cutoff.keep + 0.1)
        kept = session.redraw(cutoff.keep)
        summary = Manifest(out).summary
        assert (summary.clean, summary.rule["keep"]) == (cutoff.rank, cutoff.keep)
        pd.testing.assert_frame_equal(pd.read_parquet(kept).astype({"matched": "boolean"}), before)
        assert kept.parent == out
        assert session.state()["judged"] == 0
        assert session.calibration() is None
        assert session.labels.seed == 1
        assert session.labels.counts("clean") == (0, 0)
        judge_all(session, ["matches"])
        assert Session(out, pairs=30).state()["judged"] == 1


def label_by_truth(out: Path, corpus: Path) -> None:
    """Labels of a sample large enough to certify something."""
    draw_sample(out, sample=out / "labels.parquet", pairs=200)
    rows = labels_of(out).drop(columns="matched")
    rows.merge(truth(corpus), on=["shard", "key"]).to_parquet(out / "labels.parquet")


@pytest.mark.parametrize(("matched", "labelled"), [(10, 10), (1, 2), (0, 4), (19, 20), (950, 1000), (3000, 3000)])
def test_labels_to_go_are_as_many_as_it_takes(matched: int, labelled: int) -> None:
    def reach(total: int) -> float:
        low, high = clopper_pearson(total * matched // labelled, total)
        return max(high - matched / labelled, matched / labelled - low)

    total = labelled + labels_to_go(matched, labelled)
    step = labelled // math.gcd(matched, labelled)  # between whole pairs there is nothing to compare with
    assert reach(math.ceil(total / step) * step) <= WITHIN
    assert total == labelled or reach((math.ceil(total / step) - 1) * step) > WITHIN


@contextmanager
def serving(out: Path, *words: str) -> Iterator[str]:
    """The command at work; it must end well at Ctrl-C, and say where the labels are."""
    command = [sys.executable, "-m", "noisyclean", "review", str(out), "--no-open", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("Page: "):
                raise AssertionError(process.communicate())
            yield line.removeprefix("Page: ").strip()
            process.send_signal(signal.SIGINT)
            said, complaints = process.communicate(timeout=20)
            assert f"pairs judged: {out / 'labels.parquet'}" in said
            assert "Traceback" not in complaints
            assert process.returncode == 0
        finally:
            process.kill()


def status(address: str, path: str, *, method: str = "GET", host: str | None = None) -> int:
    there = urlsplit(address).netloc
    connection = http.client.HTTPConnection(there, timeout=10)
    connection.request(method, path, headers={"Host": host or there})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    return answer.status


def test_nobody_else_is_let_in(out: Path) -> None:
    with serving(out, "--pairs", "5") as address:
        port, root = urlsplit(address).port, urlsplit(address).path
        verdict = "judge/0-0/matches"
        assert urlsplit(address).hostname == "127.0.0.1"
        assert len(root) > 30
        for path in ("", "state", "page.css", "review.js"):
            assert status(address, root + path) == 200
            assert status(address, root + path, host=f"localhost:{port}") == 200
            assert status(address, f"/{path}") == 404
            assert status(address, f"/{'x' * (len(root) - 2)}/{path}") == 404
            assert status(address, root + path, host=f"evil.example:{port}") == 400
        assert status(address, f"/{verdict}", method="POST") == 404
        assert status(address, root + verdict, method="POST", host="evil.example") == 400
        assert status(address, root + verdict) == 404
        assert status(address, f"{root}../session.py") == 404
        assert status(address, f"{root}judge/0-0/perhaps", method="POST") == 404
        assert status(address, f"{root}judge/0-1/matches", method="POST") == 409
        assert labels_of(out)["matched"].isna().all()

        command = [sys.executable, "-m", "noisyclean", "review", str(out), "--no-open", "--port", str(port)]
        taken = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert taken.returncode == 2
        assert taken.stderr.splitlines()[-1].startswith(f"noisyclean: --port {port}: ")


@contextmanager
def visiting(chromium: Browser, address: str, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """The page, which may complain of nothing and ask for nothing elsewhere."""
    context = chromium.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.evaluate(SETTLED)
    try:
        yield page
        assert complaints == []
        assert all(url.startswith((address, "data:")) for url in asked)
    finally:
        context.close()


SETTLED = """() => new Promise((done) => {
    const look = () => document.querySelector("main").ariaBusy === "false" ? done() : requestAnimationFrame(look);
    look();
})"""


def press(page: Page, key: str, judged: int) -> None:
    """Press a key, after which so many pairs are judged."""
    page.keyboard.press(key)
    shows(page, judged)


def shows(page: Page, judged: int) -> None:
    page.evaluate(SETTLED)  # in the page, as Playwright looks only ten times a second
    assert page.locator("#progress").text_content().startswith(f"{judged} of ")


def test_thirty_pairs_by_keyboard(browser: Browser, out: Path) -> None:  # noqa: F811
    keys = [*"yyynyyyunyyyyyyyynyuyyyynyyyyy"]
    expected = [{"y": True, "n": False, "u": pd.NA}[key] for key in keys]
    with serving(out, "--pairs", "30") as address, visiting(browser, address) as page:
        rows = labels_of(out)
        for number, key in enumerate(keys, 1):
            assert page.locator("#caption").text_content() == legible(rows["caption"][number - 1])
            assert page.locator("#picture").evaluate("one => [one.naturalWidth, one.naturalHeight]") == [24, 20]
            press(page, key, number)
        press(page, "Backspace", 29)
        press(page, "b", 28)
        page.get_by_role("button", name="It does not").click()
        shows(page, 29)
        press(page, "b", 28)
        press(page, "y", 29)
        press(page, "Y", 30)

        page.reload()
        shows(page, 30)
        kept = labels_of(out)
        assert kept["matched"][:30].tolist() == expected
        assert kept["unsure"].sum() == 2
        assert kept["matched"][30:].isna().all()

        clean = kept.loc[kept["split"] == "clean", "matched"].dropna()
        low, high = clopper_pearson(int(clean.sum()), len(clean))
        said = page.locator("#precision").inner_text()
        assert said.startswith(f"{clean.mean():.1%} match: {clean.sum()} of {len(clean)} labelled")
        assert said.endswith(f"95\u00a0% interval {low:.1%} to {high:.1%}.")
        more = labels_to_go(int(clean.sum()), len(clean))
        left = Manifest(out).summary.clean - len(clean)
        assert f"Label {min(more, left)} more" in page.locator("#more").inner_text()
        assert "could not say: 2." in page.locator("#unsure").inner_text()
    assert Session(out).state()["judged"] == 30


def test_hostile_captions_are_text(browser: Browser, out: Path) -> None:  # noqa: F811
    """Each caption in turn: the sample is made of the pairs that have one."""
    session = Session(out, pairs=300)
    hostile = session.labels.rows[session.labels.rows["caption"].isin(HOSTILE.values())]
    assert len(hostile) == len(HOSTILE)
    rows = labels_of(out).drop(columns="unsure")
    rows.loc[~rows.index.isin(hostile.index), "matched"] = True
    rows.to_parquet(out / "labels.parquet")
    shown = {}
    with serving(out) as address, visiting(browser, address, 390, 844) as page:
        for number in range(len(rows) - len(HOSTILE) + 1, len(rows) + 1):
            caption = page.locator("#caption")
            shown[caption.text_content()] = caption.evaluate("one => getComputedStyle(one).direction")
            assert page.locator("#caption *").count() == 0
            assert page.title() == "Review – noisyclean"
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            press(page, "n", number)
        page.get_by_text("No pair of this sample is left").wait_for()
    assert shown[HOSTILE[0]] == "ltr"
    assert shown["مرحبا بالعالم   reversed"] == "rtl"
    assert shown[HOSTILE[3]] == "ltr"
    assert any(text.endswith("red  & <b>bold</b>") for text in shown)


def test_the_split_is_redrawn_by_a_button(browser: Browser, out: Path, corpus: Path) -> None:  # noqa: F811
    label_by_truth(out, corpus)
    rank = calibrate(out, labels=out / "labels.parquet").cutoff.rank
    before = Manifest(out).summary.clean
    asked: list[str] = []
    with serving(out) as address, visiting(browser, address) as page:
        page.get_by_text("are certified").wait_for()
        button = page.get_by_role("button", name="Redraw the split there")
        page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
        button.click()
        assert Manifest(out).summary.clean == before
        page.once("dialog", lambda dialog: dialog.accept())
        button.click()
        page.get_by_text("Nothing yet.").wait_for()
        assert Manifest(out).summary.clean == rank
        assert len(list(out.glob("labels-*.parquet"))) == 1
    assert f"({rank:,})" in asked[0]
