from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from helpers import encode_image, pair, write_tar

import noisyclean as nc
from noisyclean.cli import main

SMALL = ["encoder.image_size=32", "optimiser.epochs=2", "objective.warmup_epochs=1", "bank.size=64", "data.workers=0"]


def noisyclean(*words: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "noisyclean", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


class Refusals:
    """Runs commands in this process, which saves importing torch for each, and expects one line and exit code 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capfd = capfd

    def __call__(self, *words: str | Path, cwd: Path) -> str:
        self.monkeypatch.chdir(cwd)
        self.monkeypatch.setattr(sys, "argv", ["noisyclean", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        out, err = self.capfd.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1, err
        return err


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusals:
    return Refusals(monkeypatch, capfd)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards/`` in it, some samples of which are damaged, and a default run and scores of them."""
    home = tmp_path_factory.mktemp("home")
    nc.generate_corpus(home / "shards", pairs=200, pairs_per_shard=100, image_size=32, seed=3)
    for extra in ("truth.parquet", "00000.parquet", "00001.parquet"):
        (home / "shards" / extra).unlink(missing_ok=True)
    broken = {
        "good": pair(1),
        "torn": {"jpg": encode_image(1, (300, 300), "JPEG")[:-100], "txt": b"a torn picture"},
        "mute": {"png": pair(2)["png"], "txt": b"  "},
        "blind": {"txt": b"no picture here"},
        "silent": {"png": pair(3)["png"]},
    }
    write_tar(home / "shards" / "00002.tar", broken)
    write_tar(home / "shards" / "00003.tar", {})
    noisyclean("fit", "shards/", *[f"--set={one}" for one in SMALL], cwd=home)
    noisyclean("score", cwd=home)
    return home


def test_help_is_quick_because_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, noisyclean.cli; from typer.testing import CliRunner;"
        "result = CliRunner().invoke(noisyclean.cli.app, ['fit', '--help']); assert result.exit_code == 0;"
        "heavy = {'torch', 'open_clip', 'pandas', 'pyarrow', 'numpy', 'sklearn'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    subprocess.run(
        [sys.executable, "-c", "import sys, noisyclean; assert 'torch' not in sys.modules; noisyclean.fit"],
        check=True,
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    "command",
    ["demo", "fit", "score", "split", "export", "evaluate", "calibrate", "inspect", "corrupt", "convert"],
)
def test_every_help_has_examples(command: str, tmp_path: Path) -> None:
    assert f"  noisyclean {command}" in noisyclean(command, "--help", cwd=tmp_path).stdout


def test_two_words_do_the_main_job(home: Path) -> None:
    rows = pd.read_parquet(home / "noisyclean-out" / "manifest")
    assert len(rows) == 205
    reasons = rows[rows["split"] == "unreadable"].set_index("key")["reason"].to_dict()
    assert reasons == {
        "torn": "truncated JPEG",
        "mute": "empty caption",
        "blind": "no image",
        "silent": "no caption",
    }
    parts = sorted(path.name for path in (home / "noisyclean-out" / "scores").iterdir())
    assert parts == ["00000.parquet", "00001.parquet", "00002.parquet", "00003.parquet"]
    summary = json.loads((home / "noisyclean-out" / "summary.json").read_text())
    assert summary["pairs"] == 205
    assert summary["clean"] + summary["noisy"] + summary["uncertain"] + summary["unreadable"] == 205


def test_score_says_what_it_found_and_where(home: Path) -> None:
    done = noisyclean("score", cwd=home)
    assert "4 of 4 shards are scored already" in done.stderr
    assert "Estimated mismatch rate" in done.stdout
    assert "noisyclean-out/manifest" in done.stdout


def test_a_changed_shard_is_scored_again(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home", dirs_exist_ok=True)
    shard = tmp_path / "home" / "shards" / "00002.tar"
    write_tar(shard, {"good": pair(1), "new": pair(9)})
    done = noisyclean("score", "shards", cwd=tmp_path / "home")
    rows = pd.read_parquet(tmp_path / "home" / "noisyclean-out" / "manifest")
    assert sorted(rows.loc[rows["shard"] == "00002", "key"]) == ["good", "new"]
    assert "shards are scored already" in done.stderr


def test_scores_do_not_depend_on_batch_workers_or_order(home: Path) -> None:
    listing = home / "reversed.txt"
    listing.write_text("\n".join(f"shards/0000{i}.tar" for i in (3, 1, 2, 0)))
    noisyclean("score", "@reversed.txt", "-o", "other", "--batch-size", "100", "--workers", "0", cwd=home)
    first, other = (
        pd.read_parquet(home / name / "manifest").set_index(["shard", "key"]).sort_index()
        for name in ("noisyclean-out", "other")
    )
    assert first["split"].tolist() == other["split"].tolist()
    for column in ("match_score", "energy", "swapped_entropy", "similarity", "p_value", "q_value"):
        pd.testing.assert_series_equal(first[column], other[column], rtol=0, atol=1e-5)


def test_split_json_and_duckdb(home: Path) -> None:
    shutil.copytree(home / "noisyclean-out", home / "copy")
    summary = json.loads(noisyclean("split", "copy", "--keep", "0.25", "--json", cwd=home).stdout)
    assert summary["clean"] == 50
    counted = duckdb.sql(
        f"select split, count(*) from read_parquet('{home}/copy/manifest/**/*.parquet', hive_partitioning=true) "
        "group by split"
    ).fetchall()
    assert dict(counted) == {name: summary[name] for name in dict(counted)}
    assert sum(count for _, count in counted) == 205


def test_corrupt_inspect_evaluate(home: Path) -> None:
    noisyclean("corrupt", "shards", "-o", "noisy", "--rate", "0.4", "--seed", "1", cwd=home)
    seen = json.loads(noisyclean("inspect", "noisy", "--json", cwd=home).stdout)
    assert (seen["samples"], seen["readable"]) == (205, 201)
    noisyclean("score", "noisy", "-o", "noisy-out", "--workers", "1", cwd=home)
    words = ("evaluate", "noisy-out", "--truth", "noisy/truth.parquet", "--json")
    found = json.loads(noisyclean(*words, cwd=home).stdout)
    assert found["planted_noise"] == pytest.approx(0.4, abs=0.01)
    assert found["unreadable"] == 4
    assert {"auroc", "average_precision", "f1", "estimated_noise", "noise_interval", "target_fdr"} <= set(found)
    assert "AUROC" in noisyclean(*words[:-1], cwd=home).stdout


def test_a_pretrained_model_needs_no_fit(home: Path) -> None:
    encoder = home / "noisyclean-run" / "fold-0" / "encoder"
    noisyclean("score", "shards", "-m", f"local-dir:{encoder}", "-o", "frozen", cwd=home)
    rows = pd.read_parquet(home / "frozen" / "manifest")
    assert len(rows) == 205
    assert (home / "frozen" / "bank.safetensors").is_file()
    again = noisyclean("score", "shards", "-m", encoder, "-o", "frozen", cwd=home)
    assert "scored already" in again.stderr


def test_a_single_fold_is_fitted_and_its_pairs_are_said_to_be_in_sample(home: Path) -> None:
    words = ("fit", "shards", "-o", "single", "--folds", "1", "--json", "--set=data.holdout=0.45")
    record = json.loads(noisyclean(*words, *[f"--set={one}" for one in SMALL], cwd=home).stdout)
    assert len(record["folds"]) == 1
    assert not (home / "single" / "fold-1").exists()
    done = noisyclean("score", "-m", "single", "-o", "single-out", cwd=home)
    rows = pd.read_parquet(home / "single-out" / "manifest")
    trained = rows["in_sample"].fillna(False).sum()
    assert 0 < trained < 201
    assert f"{trained:,} pairs were scored by a model that has trained on them" in done.stdout


def test_export_and_calibrate(home: Path) -> None:
    clean = json.loads(noisyclean("split", "--keep", "0.5", "--json", cwd=home).stdout)["clean"]
    exported = noisyclean("export", "--format", "shards", "-o", "clean", cwd=home)
    assert f"{clean:,} pairs (clean)" in exported.stdout
    assert sum(json.loads((home / "clean" / "sizes.json").read_text()).values()) == clean
    noisyclean("calibrate", "--sample", "5", "-o", "labels.csv", cwd=home)
    labels = pd.read_csv(home / "labels.csv", dtype=str)  # a key may begin with zeros
    labels.assign(matched=True).to_csv(home / "labels.csv", index=False)
    found = json.loads(noisyclean("calibrate", "--labels", "labels.csv", "--json", cwd=home).stdout)
    assert found["mismatch_rate"] == 0
    assert sum(one["labelled"] for one in found["splits"].values()) == len(labels)


def test_shards_that_are_not_there(refusal: Refusals, home: Path, tmp_path: Path) -> None:
    assert "matches no shards" in refusal("fit", "nothing/*.tar", cwd=home)
    assert "no .tar files" in refusal("inspect", tmp_path, cwd=home)


def test_a_run_that_is_none(refusal: Refusals, home: Path, tmp_path: Path) -> None:
    assert "no such run" in refusal("score", cwd=tmp_path)
    assert "not a run" in refusal("score", "shards", "-m", "shards", cwd=home)
    assert "no such model" in refusal("score", "shards", "-m", "ViT-B-23/laion", cwd=home)


def test_a_recipe_with_a_misspelt_key(refusal: Refusals, home: Path) -> None:
    assert "did you mean optimiser.epochs?" in refusal("fit", "shards", "--set", "optimiser.epoch=3", cwd=home)
    (home / "mine.yaml").write_text("optimiser: {epoch: 3}\n")
    line = refusal("fit", "shards", "-r", "mine.yaml", cwd=home)
    assert "mine.yaml" in line
    assert "did you mean optimiser.epochs?" in line
    assert "folds: input should be greater than or equal to 1" in refusal("fit", "shards", "--folds", "0", cwd=home)
    assert "no such recipe; did you mean icons?" in refusal("fit", "shards", "-r", "ikons", cwd=home)


def test_an_out_that_holds_other_scores(refusal: Refusals, home: Path, tmp_path: Path) -> None:
    before = sorted((home / "noisyclean-out").iterdir())
    nc.generate_corpus(tmp_path / "other", pairs=40, image_size=32, seed=9)
    assert "holds scores of other shards; give another folder with -o" in refusal("score", tmp_path / "other", cwd=home)
    encoder = home / "noisyclean-run" / "fold-0" / "encoder"
    assert "holds scores by another model" in refusal("score", "shards", "-m", encoder, cwd=home)
    assert sorted((home / "noisyclean-out").iterdir()) == before
    assert "no scores in it" in refusal("split", tmp_path, cwd=home)


def test_evaluate_without_truth(refusal: Refusals, home: Path) -> None:
    assert "needs --truth" in refusal("evaluate", cwd=home)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "noisyclean", "fit", "nothing", "--debug"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_progress_goes_to_stderr_with_rate_and_time(home: Path, tmp_path: Path) -> None:
    done = noisyclean("inspect", "shards", cwd=home)
    assert "/s" in done.stderr
    assert "Samples" in done.stdout


def test_ctrl_c_says_how_to_go_on(home: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "noisyclean",
        "fit",
        str(home / "shards"),
        "-o",
        "run",
        "--set=optimiser.epochs=500",
    ]
    # What a shell runs in the background ignores Ctrl-C, and so do its children: tests may be run there.
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    for line in running.stderr:
        if "decoding the pairs" in line:
            break
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.splitlines()[-1] == "noisyclean: interrupted; repeat the same command to go on"


def test_a_shard_that_cannot_be_had_is_one_line(home: Path) -> None:
    words = ("score", "file:///nowhere/00000.tar", "-o", "nowhere", "--workers", "2")
    done = noisyclean(*words, cwd=home, code=1)
    assert done.stderr.splitlines()[-1].startswith("noisyclean: file:///nowhere/00000.tar: no such object")
