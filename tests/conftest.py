"""One small corpus, with everything wrong that can be, and the models that score it; made once."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import Members, encode_noise, write_tar
from hypothesis import settings

from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.source import StreamSource
from noisyclean.encoders import DualEncoder, create_encoder
from noisyclean.scoring.folds import FoldMap, assign_folds
from noisyclean.scoring.reference import ReferenceModel, build_bank


def pytest_configure(config: pytest.Config) -> None:
    """Where there is a process for every core, each takes one, and so do those it starts."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_demo.py", "test_distributed.py", "test_ray.py"))


# How long an example takes says more of the machine than of the code.
settings.register_profile("noisyclean", deadline=None)
settings.load_profile("noisyclean")

# An encoder for tests that train: most of what a step and a checkpoint cost is its vocabulary times its width.
open_clip.add_model_config(Path(__file__).parent / "pico.json")


def make_encoder(seed: int) -> DualEncoder:
    """A tiny encoder with random weights."""
    torch.manual_seed(seed)
    return create_encoder("noisyclean-tiny", image_size=32, temperature=0.05)


@pytest.fixture(scope="module")
def one_tokenizer() -> Iterator[None]:
    """For modules that make encoders by the dozen: reading the vocabulary takes longer than all else about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", functools.cache(open_clip.get_tokenizer))
        yield


@pytest.fixture(scope="session")
def encoder() -> DualEncoder:
    return make_encoder(0)


@pytest.fixture(scope="session")
def faulty_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards: with faults, empty, with faults at both ends, nothing readable, whole, and cut off."""
    root = tmp_path_factory.mktemp("corpus")

    def good(number: int) -> dict[str, bytes]:
        return {"png": encode_noise(number), "txt": f"caption {number} of {number % 7} things".encode()}

    def shard(name: str, samples: list[Members]) -> Path:
        return write_tar(root / f"{name}.tar", {f"{name}{i:04d}": one for i, one in enumerate(samples)})

    truncated = {"png": encode_noise(1)[:400], "txt": b"cut off"}
    no_picture = {"png": b"<html>", "txt": b"not found"}
    no_caption = {"png": encode_noise(2)}
    first: list[Members] = [good(i) for i in range(60)]
    first[7], first[11], first[20] = truncated, no_caption, no_picture
    shard("00000", first)
    shard("00001", [])
    shard("00002", [no_caption, *(good(i) for i in range(100, 145)), truncated])
    shard("00003", [truncated, no_caption])
    shard("00004", [good(i) for i in range(200, 270)])
    whole = shard("00005", [good(i) for i in range(300, 310)])
    whole.write_bytes(whole.read_bytes()[: 7 * 3072 + 1000])
    return root


@pytest.fixture(scope="session")
def faulty_index(faulty_corpus: Path) -> CorpusIndex:
    return index_corpus(find_shards(faulty_corpus), workers=1)


@pytest.fixture(scope="session")
def fold_map(faulty_index: CorpusIndex) -> FoldMap:
    usable = faulty_index.usable
    return assign_folds(faulty_index.caption[usable], faulty_index.image[usable], 2)


@pytest.fixture(scope="session")
def fold_models(faulty_index: CorpusIndex, fold_map: FoldMap, encoder: DualEncoder) -> list[ReferenceModel]:
    """One model a fold, of different weights, with a bank of 40 pairs of its fold."""
    usable = np.flatnonzero(faulty_index.usable)
    fold = fold_map.fold_of(faulty_index.caption[usable])
    source = StreamSource(faulty_index, encoder.preprocessor, workers=0)
    encoders = [encoder, make_encoder(1)]
    return [ReferenceModel(one, build_bank(one, source, usable[fold == k], 40)) for k, one in enumerate(encoders)]
