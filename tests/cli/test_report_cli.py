"""``report`` and ``show`` as they are called, and the histogram of the closing summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import encode_image, simulate_scores, write_scores, write_tar
from typer.testing import CliRunner

import noisyclean as nc
from noisyclean.cli import app
from noisyclean.errors import UsageError
from noisyclean.files import write_json

ESCAPE = "\x1b[31mred\x07 \u202eturned"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An OUT folder with a split; the first caption would colour a terminal."""
    _, score, p = simulate_scores(200, 0.4, seed=0)
    captions = [ESCAPE, *(f"caption {i}" for i in range(1, 200))]
    out = write_scores(tmp_path / "out", {"00000": {"match_score": score, "p_value": p, "caption": captions}})
    nc.split(out)
    return out


def run(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.stdout


class TestReport:
    def test_names_what_it_wrote(self, out: Path) -> None:
        said = run("report", out)
        assert said.splitlines() == [f"Page:    {out / 'report.html'}", f"Figures: {out / 'report'}"]
        assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
        assert (out / "report" / "match-scores.png").is_file()

    def test_json(self, out: Path, tmp_path: Path) -> None:
        page = tmp_path / "p.html"
        assert json.loads(run("report", out, "-o", page, "--json")) == {
            "page": str(page),
            "figures": str(tmp_path / "p"),
        }
        assert page.is_file()


class TestShow:
    def test_prints_rows(self, out: Path) -> None:
        rows = nc.Manifest(out).pairs("noisy").sort_values("rank", ascending=False)
        said = run("show", out, "--split", "noisy", "-n", "2", "--by", "rank")
        assert [line.strip() for line in said.splitlines() if line.startswith("00000/")] == [
            f"00000/{key}" for key in rows["key"][:2]
        ]
        assert f"rank {rows['rank'].iloc[0]}, match score {rows['match_score'].iloc[0]:.2f}" in said
        assert "noisy: match probability ≤ 0.05" in said

    def test_steers_no_terminal(self, out: Path) -> None:
        said = "".join(run("show", out, "--split", split, "-n", "200") for split in ("clean", "noisy", "uncertain"))
        assert "[31mred" in said
        assert not set("\x1b\x07\u202e") & set(said)

    def test_json_has_captions_as_they_are(self, out: Path) -> None:
        found = json.loads(run("show", out, "--split", "clean", "-n", "200", "--json"))
        assert found["split"] == "clean"
        rows = nc.Manifest(out).pairs("clean").set_index("key")
        assert {one["key"]: one["caption"] for one in found["pairs"]} == rows["caption"].to_dict()

    def test_an_empty_split(self, out: Path) -> None:
        assert run("show", out, "--split", "unreadable") == "No pair is unreadable\n"

    def test_paints_pictures_in_a_terminal(self, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        picture = encode_image(0xFF0000, size=(16, 16))
        shard = write_tar(tmp_path / "00000.tar", {f"{i:05d}": {"png": picture} for i in range(200)})
        record = json.loads((out / "run.json").read_text())
        write_json(out / "run.json", {**record, "paths": [str(shard)]})
        for part in (out / "scores").iterdir():
            part.unlink()  # which says that the shard was another one
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLORTERM", "truecolor")
        monkeypatch.setenv("TERM", "xterm-256color")
        said = run("show", out, "-n", "1")
        assert said.count("▀") == 16 * 8
        monkeypatch.delenv("FORCE_COLOR")
        assert "▀" not in run("show", out, "-n", "1")

    @pytest.mark.parametrize(
        ("words", "refused"), [(("--by", "beauty"), "no such column"), (("--split", "dirty"), "no such split")]
    )
    def test_refuses(self, out: Path, words: tuple[str, str], refused: str) -> None:
        done = CliRunner().invoke(app, ["show", str(out), *words])
        assert isinstance(done.exception, UsageError)
        assert refused in str(done.exception)


def test_summary_draws_the_scores(out: Path) -> None:
    lines = run("split", out).splitlines()
    first = lines.index("Match scores, and of random pairings as many as are estimated to be mismatched:")
    (pairs,) = (at for at, line in enumerate(lines) if line.startswith("  pairs "))
    (random,) = (at for at, line in enumerate(lines) if line.startswith("  random "))
    assert first < pairs < random
    assert any("█" in line for line in lines[first:random])
    low, high = map(float, lines[random + 1].split())
    scores = nc.Manifest(out).pairs()["match_score"]
    assert low == pytest.approx(scores.min(), abs=0.3)
    assert high == pytest.approx(scores.max(), abs=0.3)
