"""JPEGs decoded where the model is: here that is the CPU, by the same calls as on a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from helpers import Members, encode_image, write_tar
from PIL import Image
from torch import Tensor

import noisyclean as nc
from noisyclean.corpus import device_decoding
from noisyclean.corpus.decoding import Encoded, UndecodableError, whole_jpeg
from noisyclean.corpus.device_decoding import require_decoder
from noisyclean.corpus.locate import find_shards
from noisyclean.corpus.resizing import Fit, fit_all
from noisyclean.corpus.stream import stream_chunks
from noisyclean.encoders import DualEncoder, load_encoder
from noisyclean.errors import UsageError
from noisyclean.scoring.run import load_run

Decoder = Callable[..., Any]


def photo(number: int, image_format: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """A picture of about 100 × 80, too small to be decoded at a smaller scale."""
    noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    image = Image.fromarray(noise).resize((100 + number % 3, 80), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def with_broken_tables(jpeg: bytes) -> bytes:
    """Its header and its end are as they should be, but no decoder can make anything of it."""
    at = jpeg.index(b"\xff\xc4") + 5
    return jpeg[:at] + b"\xff" * 16 + jpeg[at + 16 :]


ODD = {
    3: photo(3, "PNG"),
    5: photo(5, mode="L"),
    8: photo(8, progressive=True),
    9: photo(9, mode="CMYK"),
    13: photo(13)[:700],
    14: b"<html>404</html>",
    17: b"",
    20: with_broken_tables(photo(20)),
    21: photo(21, keep_rgb=True),
    22: photo(22) + b"more",
    23: photo(23) + b"\0\0",
    24: photo(24, "WEBP"),
    25: with_broken_tables(photo(25)),
}
FIRST = 40 - len(ODD) + 5
"""So many of the first shard are left to the device; the odd ones among them are 5, 8, 20, 23 and 25."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jpegs")

    def sample(number: int) -> Members:
        return {"jpg": ODD.get(number, photo(number)), "txt": f"caption {number} of {number % 7} things".encode()}

    for shard in range(4):
        numbers = range(40 * shard, 40 * (shard + 1))
        write_tar(root / f"{shard}.tar", {f"{number:04}": sample(number) for number in numbers})
    return root


@pytest.fixture(scope="module")
def model(encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    encoder.save(folder)
    return folder


@pytest.fixture(scope="module")
def fast(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return scored(corpus, model, tmp_path_factory.mktemp("fast"), decode="fast")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    require_decoder.cache_clear()
    yield
    require_decoder.cache_clear()


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decoder], None]:
    """Have torchvision decode so from now on; the function is given the pictures, and how it would be done."""

    def install(decode: Decoder) -> None:
        original = torchvision.io.decode_jpeg
        monkeypatch.setattr(
            torchvision.io, "decode_jpeg", lambda jpegs, **how: decode(jpegs, lambda: original(jpegs, **how))
        )

    return install


def scored(corpus: Path, model: Path, out: Path, **how: Any) -> pd.DataFrame:
    nc.score(str(corpus), model=model, out=out, device="cpu", **{"workers": 0, **how})
    found = nc.Manifest(out).pairs()
    return found.sort_values(["shard", "index"], ignore_index=True)


def assert_alike(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    unreadable = expected["split"] == "unreadable"
    assert found["key"].tolist() == expected["key"].tolist()
    assert found.loc[unreadable, "reason"].tolist() == expected.loc[unreadable, "reason"].tolist()
    assert (found["split"] == "unreadable").tolist() == unreadable.tolist()
    assert found["caption"].tolist() == expected["caption"].tolist()
    for name in ("similarity", "match_score"):
        assert np.allclose(found[name], expected[name], atol=2e-3, equal_nan=True)
    readable = ~unreadable
    assert found.loc[readable, ["width", "height"]].equals(expected.loc[readable, ["width", "height"]])


def test_rows_and_scores_are_those_of_fast(
    corpus: Path, model: Path, fast: pd.DataFrame, tmp_path: Path, decoder: Callable[[Decoder], None]
) -> None:
    alone: list[int] = []
    decoder(lambda jpegs, decode: (alone.append(len(jpegs)), decode())[1])
    here = scored(corpus, model, tmp_path / "here", decode="gpu")
    assert_alike(here, fast)
    assert fast.loc[[13, 14, 17, 20, 25], "reason"].tolist() == [
        "truncated JPEG",
        "not a picture",
        "empty image",
        "broken JPEG",
        "broken JPEG",
    ]
    # Whole chunks, and of that which holds broken ones each alone: once for the bank, and once to be scored.
    assert sorted(alone) == sorted([1] + 2 * ([40, 40, 40, FIRST] + FIRST * [1]))
    there = scored(corpus, model, tmp_path / "there", decode="gpu", workers=2)
    assert there.equals(here)


def test_what_the_device_refuses_is_decoded_as_fast_and_its_neighbours_keep_their_scores(
    corpus: Path, model: Path, fast: pd.DataFrame, tmp_path: Path, decoder: Callable[[Decoder], None]
) -> None:
    sound, broken = ({photo(number) for number in some} for some in ((1, 30, 79), (20, 25)))
    refused: list[bytes] = []

    def decode(jpegs: list[Tensor], decode: Callable[[], list[Tensor]]) -> list[Tensor]:
        data = {jpeg.numpy().tobytes() for jpeg in jpegs}
        if data & sound:
            refused.extend(data)
            raise RuntimeError("Failed to decode jpeg stream: 5")
        return decode()

    decoder(decode)
    assert_alike(scored(corpus, model, tmp_path, decode="gpu"), fast)
    assert all(refused.count(one) == 4 for one in sound)  # in its chunk and alone, for the bank and to be scored
    assert not broken & {*refused}


def test_few_pixels_are_held_at_a_time(
    corpus: Path,
    model: Path,
    fast: pd.DataFrame,
    tmp_path: Path,
    decoder: Callable[[Decoder], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []
    decoder(lambda jpegs, decode: (counts.append(len(jpegs)), decode())[1])
    monkeypatch.setattr(device_decoding, "MAX_PIXELS", 5 * 102 * 80)
    assert_alike(scored(corpus, model, tmp_path, decode="gpu"), fast)
    assert max(counts) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_every_picture_of_a_chunk_is_at_its_place(corpus: Path, encoder: DualEncoder, workers: int) -> None:
    def pixels(decode: Any) -> list[Tensor]:
        encoder.decode_as(decode)
        chunks = stream_chunks(find_shards(corpus), encoder.preprocessor, chunk_size=9, workers=workers)
        return [chunk.image.int() for chunk in chunks if len(chunk.image)]

    try:
        for one, other in zip(pixels("gpu"), pixels("fast"), strict=True):
            assert (one - other).abs().max() <= 2
            assert len({picture.numpy().tobytes() for picture in one}) == len(one)
    finally:
        encoder.decode_as("fast")


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_a_fit_and_its_scores(corpus: Path, tmp_path: Path, cache: str, decoder: Callable[[Decoder], None]) -> None:
    decoded: list[int] = []
    decoder(lambda jpegs, decode: (decoded.append(len(jpegs)), decode())[1])
    overrides = [
        "encoder.decode=gpu",
        "encoder.image_size=32",
        "encoder.context_length=16",
        "optimiser.epochs=2",
        "optimiser.batch_size=16",
        "objective.warmup_epochs=1",
        "bank.size=64",
        "data.holdout=0",
        "data.workers=0",
        f"data.cache={cache}",
    ]
    nc.fit(str(corpus), out=tmp_path / "run", recipe="cpu-small", overrides=overrides, device="cpu")
    assert sum(decoded) >= 120 + FIRST
    assert load_run(tmp_path / "run").models[0].encoder.preprocessor.decode == "gpu"
    summary = nc.score(model=tmp_path / "run", out=tmp_path / "out", device="cpu", workers=0)
    assert (summary.pairs, summary.unreadable) == (160, 5)
    with pytest.raises(UsageError, match=r"fitted with encoder\.decode gpu; leave --decode out"):
        nc.score(model=tmp_path / "run", out=tmp_path / "other", decode="fast")


def test_without_nvjpeg_it_is_said_once_and_nothing_is_begun(
    corpus: Path, model: Path, fast: pd.DataFrame, tmp_path: Path, decoder: Callable[[Decoder], None]
) -> None:
    def lacking(jpegs: object, decode: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat some line")

    decoder(lacking)
    expected = r"needs a torchvision with nvJPEG \(decode_jpegs_cuda: .* support\); take --decode fast$"
    with pytest.raises(UsageError, match=expected):
        scored(corpus, model, tmp_path / "out", decode="gpu")
    with pytest.raises(UsageError, match=expected):
        nc.fit(str(corpus), out=tmp_path / "run", overrides=["encoder.decode=gpu"], device="cpu")
    assert not any(tmp_path.iterdir())
    encoder = load_encoder(str(model))
    encoder.decode_as("gpu")
    with pytest.raises(UsageError, match=expected):  # where the models run, which may be another machine
        list(stream_chunks(find_shards(corpus), encoder.preprocessor, chunk_size=9, workers=0))
    assert scored(corpus, model, tmp_path / "out", decode="fast").equals(fast)


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (photo(0), True),
        (photo(0, mode="L"), True),
        (photo(0, progressive=True), True),
        (photo(0) + b"\0\0\0", True),
        (photo(0)[:-2], False),
        (photo(0) + b"more", False),
        (photo(0, mode="CMYK"), False),
        (photo(0, keep_rgb=True), False),
        (photo(0, "PNG"), False),
        (photo(0, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]), False),
    ],
)
def test_what_is_left_to_the_device(data: bytes, left: bool) -> None:
    jpeg = whole_jpeg(data)
    assert (jpeg is not None) == left
    if jpeg is not None:
        assert jpeg.data.tobytes() == data
        assert jpeg.size == (100, 80)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", photo(0)[:20], encode_image(0, (1, 30_000), "JPEG")])
def test_what_is_refused_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(UndecodableError):
        whole_jpeg(data)


def test_on_a_gpu_nothing_waits_to_be_computed_when_nvjpeg_begins(
    monkeypatch: pytest.MonkeyPatch, decoder: Callable[[Decoder], None]
) -> None:
    """It would write over memory that is still to be read."""
    events: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            events.append("through")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    decoder(lambda jpegs, decode: events.append("decodes"))
    require_decoder(torch.device("cuda"))
    assert events == ["through", "decodes"]


def test_what_a_gpu_cannot_resize_is_left_to_the_workers(encoder: DualEncoder) -> None:
    encoder.decode_as("gpu")
    try:
        preprocessor = encoder.preprocessor
        most = 32 * min(preprocessor.size)
        kept, left = (preprocessor.prepare(encode_image(0, (side, side), "JPEG")) for side in (most + 1, most))
    finally:
        encoder.decode_as("fast")
    assert isinstance(left, Encoded)
    assert not isinstance(kept, Encoded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decode", ["fast", "gpu"])
def test_a_gpu_scores_as_a_cpu_does(corpus: Path, model: Path, fast: pd.DataFrame, tmp_path: Path, decode: str) -> None:
    nc.score(str(corpus), model=model, out=tmp_path, device="cuda", batch_size=32, workers=2, decode=decode)
    found = nc.Manifest(tmp_path).pairs().sort_values(["shard", "index"], ignore_index=True)
    assert found["reason"].fillna("").tolist() == fast["reason"].fillna("").tolist()
    assert found["match_score"].corr(fast["match_score"], method="spearman") > 0.99  # in half precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_resizes_what_is_left_to_it_at_most(encoder: DualEncoder) -> None:
    side = 32 * min(encoder.preprocessor.size)
    picture = torch.zeros((3, side, 2 * side), dtype=torch.uint8, device="cuda")
    fit = Fit.of(encoder.preprocessor.picture.transforms[0], encoder.preprocessor.size)
    assert fit is not None
    assert fit_all([picture], fit).shape == (1, 3, *encoder.preprocessor.size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"mode": "L"}, {"progressive": True}, {"subsampling": 0}])
def test_a_gpu_shows_what_a_cpu_does(encoder: DualEncoder, options: dict[str, Any]) -> None:
    jpegs = {}
    for number in range(9):
        jpeg = whole_jpeg(photo(number, **options))
        assert jpeg is not None
        jpegs[number] = jpeg
    encoder.decode_as("gpu")
    try:
        here, there = (replace(encoder.preprocessor, device=torch.device(one)) for one in ("cpu", "cuda"))
        (expected, _), (found, faults) = (one.finish(torch.empty(0), jpegs) for one in (here, there))
    finally:
        encoder.decode_as("fast")
    assert faults == {}
    assert found.device.type == "cuda"
    assert (found.cpu().float() - expected.float()).abs().mean() < 2
