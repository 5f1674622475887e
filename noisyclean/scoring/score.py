"""``score``: stream the shards, score every pair against the reference bank, then rank and split."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import noisyclean
from noisyclean.corpus.identity import pair_id
from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import Shard, ShardSpec, absolute_paths, find_shards
from noisyclean.corpus.parallel import default_workers
from noisyclean.corpus.source import StreamSource
from noisyclean.corpus.stream import stream_chunks
from noisyclean.device import choose_device
from noisyclean.encoders import DualEncoder, load_encoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import write_json
from noisyclean.manifest.parts import PartInfo, list_parts, part_path, read_part_info, shard_state, write_part
from noisyclean.manifest.splitting import DEFAULT_FDR, DEFAULT_OUT, OUT_FILE, Summary, read_out, split
from noisyclean.progress import SILENT, Progress
from noisyclean.scoring.reference import ReferenceBank, ReferenceModel, build_bank
from noisyclean.scoring.run import DEFAULT_RUN, is_run, load_run, read_record
from noisyclean.scoring.scorer import ScoredShard, Scorer, ScoringStream

BANK_FILE = "bank.safetensors"
BANK_SIZE = 8192
DEFAULT_BATCH = 64
MIN_BATCH = 32
"""Narrower passes are rounded visibly otherwise than wide ones (measured: 2e-5 of a match score at one pair a pass)."""
_CHUNK = 128
# The bank of a pretrained model is drawn from about this many times as many pairs: enough to be a fair sample, without
# reading all of a corpus of a billion.
_DRAW_FROM = 8


def score(
    shards: ShardSpec | None = None,
    *,
    model: str | Path = DEFAULT_RUN,
    out: Path | str = DEFAULT_OUT,
    fdr: float = DEFAULT_FDR,
    batch_size: int = DEFAULT_BATCH,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Summary:
    """Score every pair and write the clean / noisy / uncertain manifest.

    Memory does not grow with the corpus while scoring. One Parquet file is written for each shard as it is done; when
    called again with the same arguments, shards that are done and unchanged are not scored again.

    Args:
        shards: the corpus; None: the shards that ``model``, a RUN, was fitted to.
        model: a RUN folder, or a pretrained encoder as :func:`noisyclean.encoders.load_encoder` takes it; for the
            latter a reference bank is first drawn from the corpus, and kept in ``out``.
        out: the OUT folder.
        fdr: the mismatch rate asked of the clean part.
        batch_size: pairs in a forward pass, at least ``MIN_BATCH``; the scores do not depend on it.
        workers: decoding processes; None: as many as there are cores.
        device: a torch device; None: CUDA if there is one, else the CPU.
        progress: who is told how it goes.

    Raises:
        UsageError: the shards or the model cannot be what is meant, or ``out`` holds scores of something else.
        NoisycleanError: a shard cannot be opened, or no pair can be read.
    """
    started = time.perf_counter()
    out = Path(out)
    if batch_size < MIN_BATCH:
        raise UsageError(f"--batch-size {batch_size}: at least {MIN_BATCH}")
    place = choose_device(device)
    workers = default_workers() if workers is None else workers
    fitted = is_run(model)
    if shards is None:
        if not fitted:
            raise UsageError(f"{model}: no folder that `noisyclean fit` wrote; with any other model, name SHARDS too")
        shards = read_record(Path(model)).shards
    found = find_shards(shards)
    if fitted:
        models, folds = load_run(Path(model))
        scorer = Scorer([one.to(place) for one in models], folds)
    else:
        encoder = load_encoder(str(model)).to(place)
        bank = _bank(encoder, found, out, workers, progress).to(place)
        scorer = Scorer([ReferenceModel(encoder, bank)], None)

    about: dict[str, Any] = {
        "model": str(model),
        "scorer": scorer.fingerprint(),
        "null_pairs": sum(len(one.bank) for one in scorer.models),
        "shards": [shard.name for shard in found],
        "paths": absolute_paths(found),
        "device": str(place),
        "version": noisyclean.__version__,
    }
    seconds_before = _claim(out, about)
    todo = [shard for shard in found if not _is_done(out, shard, about["scorer"])]
    if len(todo) < len(found):
        progress.say(f"{len(found) - len(todo):,} of {len(found):,} shards are scored already")
    scored = _score_shards(scorer, about["scorer"], todo, out, batch_size, workers, progress)
    if scored:
        about["seconds"] = round(seconds_before + time.perf_counter() - started, 2)
        write_json(out / OUT_FILE, about)
    return split(out, fdr=fdr, progress=progress)


def _score_shards(
    scorer: Scorer,
    fingerprint: str,
    shards: Sequence[Shard],
    out: Path,
    batch_size: int,
    workers: int,
    progress: Progress,
) -> int:
    """Score and write the given shards; returns how many samples there were. ``fingerprint`` is the scorer's."""
    states = {shard.name: shard_state(shard) for shard in shards}
    encoder = scorer.models[0].encoder
    stream = ScoringStream(scorer, batch_size)
    written = samples = 0

    def write(finished: Iterable[ScoredShard]) -> int:
        count = 0
        for one in finished:
            write_part(out, one.shard, one.table, PartInfo(fingerprint, states[one.shard], one.damage or ""))
            count += 1
        return count

    # How many pairs are to come is not known before they are read: the shards give the time left.
    with progress.task("scoring", len(shards), "shards") as task:
        for chunk in stream_chunks(
            shards,
            encoder.preprocessor,
            chunk_size=_CHUNK,
            workers=workers,
            pin_memory=encoder.device.type == "cuda",
        ):
            done = write(stream.add(chunk))
            samples += len(chunk.samples)
            written += done
            task.advance(done, f"{samples:,} pairs")
        done = write(stream.finish())
        written += done
        task.advance(done, f"{samples:,} pairs")
    if written != len(shards):
        raise NoisycleanError(f"{out}: {len(shards) - written} shards were not finished; repeat the command")
    return samples


def _is_done(out: Path, shard: Shard, scorer: str) -> bool:
    if not part_path(out, shard.name).is_file():
        return False
    try:
        info = read_part_info(out, shard.name)
    except UsageError:
        return False  # broken, or of another version: scored anew
    return info.scorer == scorer and info.source == shard_state(shard)


def _claim(out: Path, about: dict[str, Any]) -> float:
    """Make ``out`` the place of these scores, or refuse if it is that of others; returns the seconds spent so far."""
    seconds = 0.0
    if (out / OUT_FILE).is_file():
        before = read_out(out)
        if before["scorer"] != about["scorer"]:
            raise UsageError(f"{out}: holds scores by another model ({before['model']}); give another folder with -o")
        if not set(before["shards"]) <= set(about["shards"]):
            raise UsageError(f"{out}: holds scores of other shards; give another folder with -o, or remove this one")
        seconds = before.get("seconds") or 0.0
    elif list_parts(out):
        raise UsageError(f"{out}: holds scores of unknown origin (no {OUT_FILE}); give another folder with -o")
    write_json(out / OUT_FILE, {**about, "seconds": seconds})
    return seconds


def _bank(encoder: DualEncoder, shards: Sequence[Shard], out: Path, workers: int, progress: Progress) -> ReferenceBank:
    """The bank of a pretrained encoder, drawn from the corpus, or read back from ``out``."""
    path = out / BANK_FILE
    fingerprint = encoder.fingerprint()
    if path.is_file():
        try:
            return ReferenceBank.load(path, encoder=fingerprint)
        except UsageError as error:
            raise UsageError(f"{out}: holds scores by another model; give another folder with -o") from error
    if (out / OUT_FILE).is_file():
        raise UsageError(
            f"{out}: holds scores by another model ({read_out(out)['model']}); give another folder with -o"
        )
    index = _sample(shards, workers, progress)
    source = StreamSource(index, encoder.preprocessor, workers=workers)
    bank = build_bank(encoder, source, np.flatnonzero(index.usable), BANK_SIZE, progress=progress)
    out.mkdir(parents=True, exist_ok=True)
    bank.save(path, encoder=fingerprint)
    return bank


def _sample(shards: Sequence[Shard], workers: int, progress: Progress) -> CorpusIndex:
    """An index of all shards, or of as many as are needed, taken in an order that only their names decide."""
    order = sorted(shards, key=lambda shard: pair_id(shard.name, ""))
    taken = 16
    while True:
        index = index_corpus(order[:taken], workers=workers, progress=progress)
        if taken >= len(order) or int(index.usable.sum()) >= BANK_SIZE * _DRAW_FROM:
            return index
        taken *= 4
