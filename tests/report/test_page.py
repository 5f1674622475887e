"""The page and its numbers: against the manifest, the tars and the truth that it is made of."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import encode_noise, simulate_scores, write_scores, write_tar

import noisyclean as nc
from noisyclean.corpus.locate import Shard
from noisyclean.corpus.pick import pick_pictures
from noisyclean.errors import UsageError
from noisyclean.evaluation.detection import evaluate
from noisyclean.files import write_json
from noisyclean.manifest.parts import PartInfo, read_part, shard_state, write_part
from noisyclean.manifest.reading import Manifest
from noisyclean.report.digest import NUMBERS, Digest, digest
from noisyclean.report.gallery import draw, thumbnail
from noisyclean.report.page import MAX_BYTES, report
from noisyclean.report.rows import open_rows

PAIRS = 300
HOSTILE = {
    0: '<img src=x onerror="document.title=1">',
    1: "مرحبا بالعالم \u202e reversed",
    2: "\x1b[31mred\x00\x07 & <b>bold</b>",
    3: "long " * 5000,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three shards, their truth, and the scores and split of them in ``out``."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_corpus(root: Path) -> Path:
    """Shards, their truth, and their scores and split; the hostile captions are those of the cleanest pairs."""
    parts, truth = {}, []
    for number, noise in enumerate((0.2, 0.3, 0.7)):
        shard = f"{number:05d}"
        matched, score, p = simulate_scores(PAIRS, noise, seed=number)
        if number == 0:
            best = np.argsort(-score)
            matched, score, p = matched[best], score[best] + np.where(np.arange(PAIRS) < len(HOSTILE), 9, 0), p[best]
        captions = [HOSTILE.get(i, f"caption {i}") if number == 0 else f"caption {i}" for i in range(PAIRS)]
        samples = {
            f"{i:05d}": {"png": encode_noise(1000 * number + i), "txt": captions[i].encode()} for i in range(PAIRS)
        }
        write_tar(root / "shards" / f"{shard}.tar", samples)
        parts[shard] = {
            "match_score": score,
            "p_value": p,
            "caption": captions,
            "bank_place": range(PAIRS) if number == 0 else [None] * PAIRS,
            "best_text_place": range(PAIRS),
            "best_image_place": np.roll(range(PAIRS), 1).tolist(),
            "fault": ["no image" if i >= PAIRS - 5 * number else None for i in range(PAIRS)],
        }
        truth.append(pd.DataFrame({"shard": shard, "key": list(samples), "matched": matched}))
    pd.concat(truth).to_parquet(root / "shards" / "truth.parquet")
    out = write_scores(root / "out", parts)
    run = json.loads((out / "run.json").read_text())
    for shard in parts:
        path = root / "shards" / f"{shard}.tar"
        write_part(out, shard, read_part(out, shard), PartInfo("scorer", shard_state(Shard(shard, str(path)))))
    paths = [str(root / "shards" / f"{shard}.tar") for shard in parts]
    write_json(out / "run.json", {**run, "paths": paths, "rematch": True})
    nc.split(out)
    return root


def count(out: Path) -> Digest:
    manifest = Manifest(out)
    with open_rows(manifest, columns=[*NUMBERS, "key"]) as db:
        return digest(manifest, db)


class Page(html.parser.HTMLParser):
    """What there is on a page: the words, the tags, and the sources of pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[str]:
        return [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]


class TestNumbers:
    def test_histogram_holds_every_readable_pair(self, corpus: Path) -> None:
        found = count(corpus / "out")
        assert found.scores is not None
        assert found.density is not None
        for split in ("clean", "noisy", "uncertain"):
            expected = getattr(found.summary, split)
            assert expected > 0
            assert found.scores.pairs[split].sum() == expected
            assert found.density.pairs[split].sum() == expected
        readable = found.summary.pairs - found.summary.unreadable
        assert found.scores.null.sum() == pytest.approx(readable * found.summary.estimated_noise)

    def test_thresholds_are_the_ends_of_the_splits(self, corpus: Path) -> None:
        scores = count(corpus / "out").scores
        rows = nc.Manifest(corpus / "out").pairs()
        assert scores is not None
        assert scores.clean_from == [pytest.approx(rows.loc[rows["split"] == "clean", "match_score"].min())]
        assert scores.noisy_to == [pytest.approx(rows.loc[rows["split"] == "noisy", "match_score"].max())]

    @pytest.mark.parametrize("asked", [0.01, 0.05, 0.2])
    def test_kept_is_what_split_keeps(self, corpus: Path, asked: float) -> None:
        kept = count(corpus / "out").kept
        try:
            clean = nc.split(corpus / "out", fdr=asked).clean
        finally:
            nc.split(corpus / "out")
        assert kept is not None
        assert kept.at(asked) == clean > 0

    def test_shards_add_up_to_the_corpus(self, corpus: Path) -> None:
        found = count(corpus / "out")
        assert [one.name for one in found.shards] == ["00002", "00001", "00000"]
        readable = [one.pairs - one.sizes["unreadable"] for one in found.shards]
        rates = [one.mismatch.estimate for one in found.shards if one.mismatch is not None]
        assert np.average(rates, weights=readable) == pytest.approx(found.summary.estimated_noise)
        assert [one.sizes["unreadable"] for one in found.shards] == [10, 5, 0]

    def test_truth_curves_are_those_of_evaluate(self, corpus: Path) -> None:
        truth = count(corpus / "out").truth
        assert truth is not None
        assert truth.evaluation == evaluate(corpus / "out", truth=corpus / "shards" / "truth.parquet")
        area = np.trapezoid(truth.found, truth.false_alarm)
        assert area == pytest.approx(truth.evaluation.auroc, abs=0.005)
        at_5 = truth.evaluation.calibration[2]
        assert at_5.asked == 0.05
        assert truth.realised[20] == pytest.approx(at_5.realised_noise)

    def test_summary_of_another_split_is_refused(self, tmp_path: Path) -> None:
        out = write_scores(tmp_path / "out", {"0": {"p_value": np.linspace(0.001, 1, 50)}})
        nc.split(out)
        summary = json.loads((out / "summary.json").read_text())
        write_json(out / "summary.json", {**summary, "noisy": summary["noisy"] + 1})
        with pytest.raises(UsageError, match=r"summary\.json: says .* `noisyclean split"):
            report(out)


class TestPage:
    def test_says_what_the_manifest_says(self, corpus: Path) -> None:
        page = Page(report(corpus / "out"))
        summary = nc.Manifest(corpus / "out").summary
        words = " ".join(page.text.split())
        assert f"About {summary.estimated_noise:.1%} of the {summary.pairs - summary.unreadable:,} readable" in words
        assert f"keeps {summary.clean:,} pairs" in words
        assert "noisyclean split OUT --fdr 0.05" in words
        assert len(page.source) < MAX_BYTES

    def test_loads_nothing(self, corpus: Path) -> None:
        page = Page(report(corpus / "out"))
        links = [
            str(value) for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
        ]
        links += re.findall(r"url\(([^)]*)\)", page.source)
        assert len(links) > 50
        assert all(link.startswith(("data:", "#")) for link in links)
        assert "default-src 'none'" in page.source

    def test_pictures_come_from_the_tars(self, corpus: Path) -> None:
        page = Page(report(corpus / "out"))
        cards = [attributes["data-split"] for tag, attributes in page.tags if attributes.get("class") == "card"]
        assert {*cards} == {"clean", "noisy", "uncertain", "unreadable"}
        noisy = cards.count("noisy")
        assert len(page.pictures()) - noisy == len(cards) > 100  # a noisy card has that of its suggestion as well
        assert len(set(page.pictures())) > 50
        assert all(one.startswith("data:image/webp;base64,") for one in page.pictures())

    def test_figures_lie_beside_it(self, corpus: Path, tmp_path: Path) -> None:
        page = report(corpus / "out", to=tmp_path / "here" / "my.html")
        assert page == tmp_path / "here" / "my.html"
        names = ["energy-entropy", "kept", "match-scores", "truth-curves", "truth-realised"]
        files = [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
        assert sorted(one.name for one in (tmp_path / "here" / "my").iterdir()) == files

    def test_figures_of_before_do_not_outlive_the_truth(self, tmp_path: Path) -> None:
        corpus = make_corpus(tmp_path)
        report(corpus / "out")
        (corpus / "shards" / "truth.parquet").unlink()
        report(corpus / "out")
        left = {one.stem for one in (corpus / "out" / "report").iterdir()}
        assert left == {"energy-entropy", "kept", "match-scores"}

    def test_hostile_captions_are_text(self, corpus: Path) -> None:
        out = corpus / "out"
        rows = nc.Manifest(out).pairs()
        assert set(HOSTILE.values()) <= set(rows["caption"])
        page = Page(report(out))
        assert HOSTILE[0] in page.text
        assert not any("onerror" in attributes for _, attributes in page.tags)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page.source)

    def test_changed_and_missing_shards_cost_only_their_pictures(self, tmp_path: Path) -> None:
        root = make_corpus(tmp_path)
        (root / "shards" / "00000.tar").unlink()
        with (root / "shards" / "00001.tar").open("ab") as file:
            file.write(bytes(10240))
        page = Page(report(root / "out"))
        words = " ".join(page.text.split())
        assert "00000.tar is no longer there, so its pictures are not shown" in words
        assert "00001.tar has changed since it was scored" in words
        left = [card.row["shard"] for card in draw(root / "out", split="noisy", pairs=100) if card.picture is not None]
        assert set(left) == {"00002"}

    def test_embeddings_have_no_pictures(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        img = rng.normal(size=(400, 16)).astype(np.float32)
        np.savez(tmp_path / "pairs.npz", img=img, txt=img + rng.normal(size=img.shape).astype(np.float32) / 4)
        nc.score(embeddings=tmp_path / "pairs.npz", out=tmp_path / "out")
        page = Page(report(tmp_path / "out"))
        assert "scored from embeddings, so there are no pictures" in page.text
        assert page.pictures() == []

    def test_nothing_readable(self, tmp_path: Path) -> None:
        out = write_scores(tmp_path / "out", {"0": {"p_value": np.ones(3), "fault": ["not a picture"] * 3}})
        nc.split(out)
        assert "None of the 3 samples can be read" in Page(report(out)).text

    @pytest.mark.parametrize("rule", [{"keep": 0.3, "by": "similarity"}, {"min_score": 0.5, "by": "energy_text"}])
    def test_other_rules(self, tmp_path: Path, rule: dict[str, Any]) -> None:
        _, score, p = simulate_scores(400, 0.4, seed=0)
        out = write_scores(tmp_path / "out", {"0": {"p_value": p, "match_score": score}})
        summary = nc.split(out, **rule)
        page = Page(report(out))
        assert f"The clean part was chosen by hand: {summary.clean:,} pairs" in " ".join(page.text.split())
        assert "so no score begins it" in page.text

    def test_a_truth_of_other_pairs_is_left_out(self, tmp_path: Path) -> None:
        root = make_corpus(tmp_path)
        path = root / "shards" / "truth.parquet"
        pd.read_parquet(path).assign(shard="other").to_parquet(path)
        page = Page(report(root / "out"))
        assert "A truth lies beside the shards, but it is of other pairs" in page.text

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no manifest in it"):
            report(tmp_path / "nothing")

    def test_page_must_be_html(self, corpus: Path) -> None:
        with pytest.raises(UsageError, match=r"ends in \.html"):
            report(corpus / "out", to=corpus / "out" / "summary.json")


class TestDraw:
    def test_suggestions_are_the_manifests(self, corpus: Path) -> None:
        rows = nc.Manifest(corpus / "out").pairs().query("shard == '00000'").set_index("key")["caption"]
        cards = draw(corpus / "out", pairs=20)
        assert len(cards) == 20
        for card in cards:
            assert card.best_caption == rows[card.row["best_text_key"].removeprefix("00000/")]
            assert card.best_picture == thumbnail(encode_noise(int(card.row["best_image_key"][-5:])))
        assert all(card.best_caption is None for card in draw(corpus / "out", split="clean", pairs=20))

    def test_random_draw_is_that_of_its_seed(self, corpus: Path) -> None:
        keys = [[card.row["key"] for card in draw(corpus / "out", seed=seed, pairs=8)] for seed in (0, 0, 1)]
        assert keys[0] == keys[1] != keys[2]

    @pytest.mark.parametrize(("by", "best_first"), [("match_score", False), ("energy_text", True), ("rank", True)])
    def test_worst_by_a_column(self, corpus: Path, by: str, best_first: bool) -> None:
        rows = nc.Manifest(corpus / "out").pairs("clean").sort_values(by, ascending=not best_first)
        found = [(card.row["shard"], card.row["key"]) for card in draw(corpus / "out", split="clean", by=by, pairs=5)]
        assert found == list(rows[["shard", "key"]].head(5).itertuples(index=False, name=None))


class TestPick:
    def test_takes_what_is_asked_for(self, tmp_path: Path) -> None:
        samples = [
            ("a/0.1", {"txt": b"not me"}),
            ("b", {"depth.png": b"depth", "txt": b"x", "PNG": b"b's"}),
            ("c", {"jpg": b"c's"}),
            ("b", {"jpg": b"the second b"}),
            ("d", {"txt": b"no picture"}),
        ]
        shard = Shard("s", str(write_tar(tmp_path / "s.tar", samples)))
        assert pick_pictures(shard, ["b", "d", "missing"]) == {"b": b"b's"}
        assert pick_pictures(shard, ["c"]) == {"c": b"c's"}

    @pytest.mark.parametrize("mode", ["w", "w:gz"])
    def test_stops_at_damage(self, tmp_path: Path, mode: str) -> None:
        path = write_tar(tmp_path / "s.tar", {f"{i:03d}": {"png": encode_noise(i)} for i in range(40)}, mode)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        found = pick_pictures(Shard("s", str(path)), ["000", "001", "039"])
        assert found == {f"{i:03d}": encode_noise(i) for i in range(2)}
