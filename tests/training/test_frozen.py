"""Frozen towers: a model that open_clip loads and that embeds as the maps did, and towers that run once a pair."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers import Listener
from torch import Tensor

import noisyclean as nc
from noisyclean.corpus.identity import caption_id
from noisyclean.corpus.index import CorpusIndex
from noisyclean.corpus.source import MemorySource, StreamSource
from noisyclean.encoders import DualEncoder, create_encoder, last_projections
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.scoring.reference import embed
from noisyclean.scoring.run import load_run
from noisyclean.training.frozen import EmbeddedPairs, FrozenEncoder

CAPTIONS = ["a red circle", "", "three blue squares beside a green one", "no"]
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "mlp_ratio": 2.0}
VIT = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "resnet": {
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
        "text_cfg": TEXT,
    },
    "timm-linear": {"vision_cfg": {"timm_proj": "linear", "timm_proj_bias": True}, "text_cfg": TEXT},
    "timm-mlp": {"vision_cfg": {"timm_proj": "mlp"}, "text_cfg": TEXT},
    "timm-classifier": {
        "vision_cfg": {"timm_proj": None, "timm_pool": "avg"},
        "text_cfg": {**TEXT, "proj_bias": True},
        "custom_text": True,
    },
    "timm-vit": {
        "vision_cfg": {
            "timm_model_name": "vit_tiny_patch16_224",
            "image_size": 224,
            "timm_proj": None,
            "timm_pool": "token",
        },
        "text_cfg": TEXT,
        "custom_text": True,
    },
    "no-projection": {"embed_dim": 320, "vision_cfg": {"timm_proj": "none", "timm_pool": "avg"}, "text_cfg": TEXT},
}
SETTINGS = [
    "optimiser.epochs=3",
    "optimiser.batch_size=32",
    "optimiser.learning_rate=1e-2",
    "objective.warmup_epochs=1",
    "bank.size=64",
    "data.workers=0",
    "data.holdout=0.2",
]

pytestmark = pytest.mark.usefixtures("one_tokenizer")


def settings(base: Path, *more: str) -> list[str]:
    return [f"encoder.name=local-dir:{base}", "encoder.pretrained=null", *SETTINGS, *more]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix under which open_clip knows the architectures."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in KINDS.items():
        timm = {"timm_model_name": "convnext_atto", "timm_pool": "", "image_size": 32}
        vision = {**(timm if "timm_proj" in config["vision_cfg"] else {}), **config["vision_cfg"]}
        text = json.dumps({"embed_dim": 24, **config, "vision_cfg": vision})
        (folder / f"frozen-{name}.json").write_text(text)
    open_clip.add_model_config(folder)
    return "frozen-"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights, as a user has one."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("base")
    create_encoder("pico", temperature=0.05).save(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    nc.generate_corpus(made, pairs=240, pairs_per_shard=100, image_size=32, seed=5)
    return made


@pytest.fixture(scope="module")
def run(base: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit") / "run"
    nc.fit(shards, out=out, recipe="frozen", overrides=settings(base))
    return out


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of pictures that went through a tower."""
    found: list[int] = []
    plain = DualEncoder.encode_image

    def counted(self: DualEncoder, pixels: Tensor) -> Tensor:
        found.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(DualEncoder, "encode_image", counted)
    return found


def trained(base: DualEncoder, seed: int = 0) -> FrozenEncoder:
    """As if maps and temperature had been trained."""
    torch.manual_seed(seed)
    encoder = FrozenEncoder(base)
    with torch.no_grad():
        encoder.maps.image.normal_(std=0.3)
        encoder.maps.text.normal_(std=0.3)
        encoder.maps.logit_scale.add_(0.5)
    return encoder


def pixels(encoder: DualEncoder, count: int) -> Tensor:
    return torch.randint(0, 256, (count, *encoder.image_size, 3), dtype=torch.uint8)


class TestFolding:
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "no-projection"])
    def test_what_open_clip_loads_embeds_as_the_maps_did(self, kind: str, kinds: str, tmp_path: Path) -> None:
        torch.manual_seed(1)
        plain = create_encoder(f"{kinds}{kind}")
        for bias in (one for side in last_projections(plain) for one in side if one.ndim == 1):
            bias.normal_()
        encoder = trained(plain)
        encoder.save(tmp_path)
        pictures, tokens = pixels(plain, len(CAPTIONS)), plain.preprocessor.tokens(CAPTIONS)
        with encoder.inference():
            before = plain.encode(pictures, tokens)
            expected = encoder.encode(*before)
        loaded = create_encoder(f"local-dir:{tmp_path}")
        with loaded.inference():
            found = loaded.encode(pictures, tokens)
        for mine, theirs, was in zip(found, expected, before, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
            assert (mine * was).sum(1).max() < 0.99
        torch.testing.assert_close(loaded.temperature, encoder.temperature)
        assert loaded.fingerprint() == encoder.fingerprint() != plain.fingerprint()

    def test_a_model_that_open_clip_makes_is_the_same(self, kinds: str, tmp_path: Path) -> None:
        encoder = trained(create_encoder(f"{kinds}vit"))
        encoder.save(tmp_path)
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
        tokens = encoder.preprocessor.tokens(CAPTIONS)
        with encoder.inference():
            found = model.eval().encode_text(tokens, normalize=True)
            torch.testing.assert_close(found, encoder.encode_text(tokens), rtol=0, atol=2e-6)

    def test_it_starts_as_the_base_and_leaves_it_alone(self, kinds: str) -> None:
        plain = create_encoder(f"{kinds}resnet")
        before = plain.fingerprint()
        encoder = FrozenEncoder(plain)
        assert encoder.fingerprint() == before
        pictures, tokens = pixels(plain, 4), plain.preprocessor.tokens(CAPTIONS)
        with plain.inference():
            expected = plain.encode(pictures, tokens)
        for mine, theirs in zip(encoder.encode(pictures, tokens), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        trained(plain).folded()
        assert plain.fingerprint() == before

    def test_from_pixels_or_from_embeddings(self, kinds: str) -> None:
        plain = create_encoder(f"{kinds}vit")
        encoder = trained(plain)
        pictures, tokens = pixels(plain, 4), plain.preprocessor.tokens(CAPTIONS)
        with encoder.inference():
            towers = encoder.encode(pictures, tokens)
            maps = encoder.encode(*plain.encode(pictures, tokens))
        for mine, theirs in zip(towers, maps, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_a_tower_that_ends_in_something_else_is_refused(self, kinds: str, shards: Path, tmp_path: Path) -> None:
        create_encoder(f"{kinds}no-projection").save(tmp_path / "model")
        with pytest.raises(UsageError, match=r"^encoder\.frozen .* picture tower does not; ") as caught:
            nc.fit(shards, out=tmp_path / "run", recipe="frozen", overrides=settings(tmp_path / "model"))
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "run").glob("embeddings*"))


class TestEmbeddedPairs:
    def test_they_are_what_the_towers_say(self, faulty_index: CorpusIndex, base: Path, tmp_path: Path) -> None:
        encoder = create_encoder(f"local-dir:{base}")
        stream = StreamSource(faulty_index, encoder.preprocessor, workers=0)
        pairs = EmbeddedPairs(stream, encoder, tmp_path)
        usable = np.flatnonzero(faulty_index.usable)
        rows, image, text = embed(encoder, stream, usable)
        assert 0 < len(rows) < len(usable)  # some cannot be decoded
        kept = embed(FrozenEncoder(encoder), pairs, usable)
        assert kept[0].tolist() == sorted(rows)
        order = torch.from_numpy(np.argsort(rows))
        for mine, theirs in zip(kept[1:], (image, text), strict=True):
            torch.testing.assert_close(mine, theirs[order], rtol=0, atol=5e-4)

    @pytest.mark.parametrize("shuffle", [None, 7])
    def test_they_come_in_the_order_of_decoded_ones(
        self, faulty_index: CorpusIndex, base: Path, tmp_path: Path, shuffle: int | None
    ) -> None:
        encoder = create_encoder(f"local-dir:{base}")
        stream = StreamSource(faulty_index, encoder.preprocessor, workers=0)
        rows = np.flatnonzero(faulty_index.usable)[::-2]
        found, expected = (
            [batch.rows.tolist() for batch in source.batches(rows, 16, shuffle=shuffle)]
            for source in (EmbeddedPairs(stream, encoder, tmp_path), MemorySource(stream))
        )
        assert found == expected

    def test_they_are_made_once_for_each_encoder(
        self, faulty_index: CorpusIndex, base: Path, tmp_path: Path, seen: list[int]
    ) -> None:
        encoder = create_encoder(f"local-dir:{base}")
        stream = StreamSource(faulty_index, encoder.preprocessor, workers=0)
        EmbeddedPairs(stream, encoder, tmp_path)
        once = sum(seen)
        EmbeddedPairs(stream, encoder, tmp_path)
        assert sum(seen) == once > 0
        (first,) = tmp_path.iterdir()
        EmbeddedPairs(stream, trained(encoder).folded(), tmp_path)
        assert sum(seen) == 2 * once
        (second,) = tmp_path.iterdir()  # what nobody can use any more takes no room
        assert first != second

    def test_a_full_disk_is_told_beforehand(
        self, faulty_index: CorpusIndex, base: Path, tmp_path: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = create_encoder(f"local-dir:{base}")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
        with pytest.raises(NoisycleanError, match=r"0\.0 GB are free"):
            EmbeddedPairs(StreamSource(faulty_index, encoder.preprocessor, workers=0), encoder, tmp_path)
        assert not seen
        assert not list(tmp_path.iterdir())


class TestFit:
    def test_each_fold_is_the_base_but_for_its_last_layers(self, run: Path, base: Path) -> None:
        before = create_encoder(f"local-dir:{base}").model.state_dict()
        models = [model.encoder.model.state_dict() for model in load_run(run).models]
        for after in models:
            changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
            last = {"visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias", "text_projection", "logit_scale"}
            assert changed == last
        assert not torch.equal(models[0]["text_projection"], models[1]["text_projection"])

    def test_the_maps_learn(self, run: Path) -> None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for fold in range(2):
            first, *_, last = [row["holdout_loss"] for row in rows if row["fold"] == fold]
            assert last < first

    def test_the_bank_is_what_the_saved_model_embeds(self, run: Path, shards: Path) -> None:
        found = load_run(run)
        nc.score(model=run, out=run.parent / "out", workers=0)
        scored = nc.Manifest(run.parent / "out").pairs()
        assert len(scored) == 240
        assert set(scored["fold"]) == {0, 1}
        for model in found.models:
            own = (model.bank.image * model.bank.text).sum(1).numpy()
            similarities = dict(zip(map(caption_id, scored["caption"]), scored["similarity"], strict=True))
            again = np.array([similarities[one] for one in model.bank.ids.tolist()])
            assert np.median(np.abs(own - again)) < 1e-3

    def test_nothing_of_the_embeddings_is_left(self, run: Path) -> None:
        assert not list(run.glob("embeddings*"))
        assert not (run / "checkpoint.pt").exists()

    def test_the_towers_see_each_pair_once_even_if_interrupted(
        self, run: Path, base: Path, shards: Path, tmp_path: Path, seen: list[int]
    ) -> None:
        out = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            nc.fit(shards, out=out, recipe="frozen", overrides=settings(base), progress=Listener("epoch 3/3, fold 1"))
        listener = Listener()
        record = nc.fit(shards, out=out, recipe="frozen", overrides=settings(base), progress=listener)
        assert "going on after epoch 2 of 3" in listener.said
        assert record.folds == json.loads((run / "run.json").read_text())["folds"]
        assert sum(seen) == record.pairs == 240

    def test_weight_decay_keeps_the_maps_near_the_identity(
        self, run: Path, base: Path, shards: Path, tmp_path: Path
    ) -> None:
        nc.fit(shards, out=tmp_path / "run", recipe="frozen", overrides=settings(base, "optimiser.weight_decay=50"))
        before = create_encoder(f"local-dir:{base}").model.text_projection
        light, heavy = (
            (load_run(one).models[0].encoder.model.text_projection - before).norm().item() / before.norm().item()
            for one in (run, tmp_path / "run")
        )
        assert heavy < light / 2
