"""``score``: stream the pairs, score each against the reference bank, then rank and split.

Pairs come from tars, decoded and embedded by a model, or embedded already. What differs is gathered in a :class:`_Job`;
from there on the two are one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import noisyclean
from noisyclean.corpus.chunk import Chunk
from noisyclean.corpus.decoding import Decode
from noisyclean.corpus.device_decoding import require_decoder
from noisyclean.corpus.embeddings import (
    common_origin,
    embedding_files,
    find_embeddings,
    index_embeddings,
    read_embeddings,
    take_embeddings,
)
from noisyclean.corpus.identity import pair_id
from noisyclean.corpus.index import CorpusIndex, index_corpus
from noisyclean.corpus.locate import Shard, ShardSpec, absolute_paths, find_shards
from noisyclean.corpus.parallel import default_workers, map_in_threads
from noisyclean.corpus.remote import MissingObjectError
from noisyclean.corpus.source import StreamSource
from noisyclean.corpus.stream import stream_chunks
from noisyclean.device import beside, left_to_model
from noisyclean.encoders import DualEncoder, EncoderEnsemble, Preprocessor, load_encoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import at_hand, is_file, local_place, place, remove_leftovers, write_json
from noisyclean.manifest.nulls import write_nulls
from noisyclean.manifest.parts import list_parts, part_path, read_part_info, shard_state
from noisyclean.manifest.rules import DEFAULT_FDR
from noisyclean.manifest.splitting import DEFAULT_OUT, OUT_FILE, Summary, read_out, split
from noisyclean.progress import SILENT, Progress
from noisyclean.scoring.engines import EngineName, open_engine
from noisyclean.scoring.engines.work import Engine, Place, Saving, Work
from noisyclean.scoring.folds import known_share
from noisyclean.scoring.reference import BankedEncoder, ReferenceBank, build_bank, draw_bank_rows
from noisyclean.scoring.run import DEFAULT_RUN, Run, is_run, load_run, read_record
from noisyclean.scoring.scorer import NoEncoder, Scorer

BANK_FILE = "bank.safetensors"
BANK_SIZE = 8192
DEFAULT_BATCH = 64
GPU_BATCH = 512
"""A GPU is busy with wide passes only."""
EMBEDDED_BATCH = 256
"""Without an encoder a pass is little more than products with the bank, which wide passes make better use of."""
MIN_BATCH = 32
"""Narrower passes are rounded visibly otherwise than wide ones (measured: 2e-5 of a match score at one pair a pass)."""
DEFAULT_TEMPERATURE = 0.01
"""CLIP's, as that of most models trained like it: their temperature is held to no less."""
CHUNK = 128
"""Samples that a decoding process hands over at a time."""
_GIVE_WAY = 19
"""On the CPU, decoding is left to the moments when the model waits for pairs. It then waits a moment longer, once, but
no pass is held up half way by a core that decodes (with a ViT-S/16 on two cores a sixth faster than otherwise)."""
# The bank of a pretrained model is drawn from about this many times as many pairs: enough to be a fair sample, without
# reading all of a corpus of a billion.
_DRAW_FROM = 8


def score(
    shards: ShardSpec | None = None,
    *,
    model: str | Path | None = None,
    embeddings: str | Path | None = None,
    temperature: float | None = None,
    save_embeddings: str | Path | None = None,
    out: Path | str = DEFAULT_OUT,
    fdr: float = DEFAULT_FDR,
    rematch: bool = False,
    decode: Decode | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    progress: Progress = SILENT,
) -> Summary:
    """Score every pair and write the clean / noisy / uncertain manifest.

    Memory does not grow with the corpus while scoring. One Parquet file is written for each shard as it is done; when
    called again with the same arguments, shards that are done and unchanged are not scored again.

    Args:
        shards: the corpus; None: the shards that ``model``, a RUN, was fitted to.
        model: a RUN folder, or a pretrained encoder as :func:`noisyclean.encoders.load_encoder` takes it; for the
            latter a reference bank is first drawn from the corpus, and kept in ``out``. None: the default RUN.
        embeddings: instead of shards and model: pairs that are embedded already, in a layout of
            :mod:`noisyclean.corpus.embeddings`, all by one model; the bank is drawn from them. A file is a shard.
        temperature: τ of the model that made the ``embeddings``; None: what ``save_embeddings`` recorded in them,
            else ``DEFAULT_TEMPERATURE``.
        save_embeddings: a folder for the embeddings of the readable pairs, float16, an npz with its Parquet file a
            shard; ``embeddings`` reads it. Not for what a RUN of several folds was fitted to: each pair is embedded by
            its own fold's model, and embeddings by two models cannot be compared.
        out: the OUT folder.
        fdr: the mismatch rate asked of the clean part.
        rematch: whether noisy pairs get suggestions: which caption of the bank suits their picture best, and which
            picture of it their caption.
        decode: how pictures become model input: ``exact``, to the pixel as open_clip's validation transform does it,
            ``fast``, or ``gpu``, which is ``fast`` but for JPEGs, decoded where the model is. None: as the model was
            fitted, or ``fast``. A RUN is scored as it was fitted.
        batch_size: pairs in a pass, at least ``MIN_BATCH``; the scores do not depend on it. None: what
            :func:`default_batch` says, or ``EMBEDDED_BATCH`` for ``embeddings``.
        workers: decoding processes beside each set of models; None: as many as it has cores.
        device: a torch device; None: CUDA if there is one, else the CPU.
        engine: where shards are scored: ``local``, in this process, or ``ray``, a set of models on each GPU of a Ray
            cluster, or on each node where there are none. What one has begun, the other finishes.
        address: of the Ray cluster, as ``ray.init`` takes it; None: this machine alone. Shards, ``out`` and
            ``save_embeddings`` must lie where all of its nodes reach them.
        progress: who is told how it goes.

    Raises:
        UsageError: the shards, the model or the embeddings cannot be what is meant, arguments exclude one another, or
            ``out`` or ``save_embeddings`` holds something else.
        NoisycleanError: a shard cannot be opened, no pair can be read, or models on the cluster are lost all the time.
    """
    started = time.perf_counter()
    out = place(out)
    if batch_size is not None and batch_size < MIN_BATCH:
        raise UsageError(f"--batch-size {batch_size}: at least {MIN_BATCH}")
    _refuse_contradictions(shards, model, embeddings, temperature, save_embeddings, decode)
    with open_engine(engine, address=address, device=device, workers=workers, progress=progress) as opened:
        if embeddings is not None:
            job = _embedded_job(embeddings, temperature, out, opened, progress)
        else:
            workers = default_workers() if workers is None else workers
            model = DEFAULT_RUN if model is None else model
            job = _decoded_job(shards, model, decode, out, opened, workers, progress)
        scorer = job.scorer(torch.device("cpu"))  # at rest: engines bring it to where it scores
        saving = None if save_embeddings is None else Saving.of(local_place(save_embeddings), scorer, job.model)

        about: dict[str, Any] = {
            "model": job.model,
            "scorer": scorer.fingerprint(),
            "null_pairs": sum(len(one.bank) for one in scorer.models),
            "shards": [shard.name for shard in job.shards],
            "paths": absolute_paths(job.shards),
            "decode": job.decode,
            "rematch": rematch,
            "device": str(opened.device),
            "version": noisyclean.__version__,
        }
        states = dict(zip(job.shards, map_in_threads(job.state, job.shards), strict=True))
        # Asked before anything is written to ``out``: something else may lie where the embeddings go.
        saved = {shard for shard, state in states.items() if saving is None or saving.is_done(shard.name, state)}
        seconds_before = _claim(out, about)
        write_nulls(out, scorer.mismatches())
        is_done = partial(_is_done, out, about["scorer"])
        done = map_in_threads(lambda one: one[0] in saved and is_done(*one), states.items())
        todo = {shard: state for (shard, state), skip in zip(states.items(), done, strict=True) if not skip}
        if embeddings is not None:
            _refuse_changed(out, list(todo), about["scorer"])
        if len(todo) < len(job.shards):
            progress.say(f"{len(job.shards) - len(todo):,} of {len(job.shards):,} shards are scored already")
        work = Work(job.scorer, job.chunks, batch_size or job.batch_size, rematch, saving, out, about["scorer"])
        if _score_shards(opened, work, todo, progress):
            about["seconds"] = round(seconds_before + time.perf_counter() - started, 2)
            write_json(out / OUT_FILE, about)
    return split(out, fdr=fdr, progress=progress)


def default_batch(device: torch.device) -> int:
    """Pairs in a pass of a model."""
    return DEFAULT_BATCH if device.type == "cpu" else GPU_BATCH


def _refuse_contradictions(
    shards: ShardSpec | None,
    model: str | Path | None,
    embeddings: str | Path | None,
    temperature: float | None,
    save_embeddings: str | Path | None,
    decode: Decode | None,
) -> None:
    if embeddings is None:
        if temperature is not None:
            raise UsageError("--temperature goes with --embeddings; a model has its own")
        return
    for given, name in (
        (shards, "SHARDS"),
        (model, "--model"),
        (save_embeddings, "--save-embeddings"),
        (decode, "--decode"),
    ):
        if given is not None:
            raise UsageError(f"--embeddings stands for the pairs and their model; leave out {name}")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise UsageError(f"--temperature {temperature}: a number above 0, such as {DEFAULT_TEMPERATURE}")


@dataclass(frozen=True)
class _Job:
    """What is scored, and by what.

    Attributes:
        shards: all of them, those that are done included.
        scorer: puts the models with their banks on a device.
        model: what the user knows the models as.
        decode: how pictures become model input; None: there are none.
        batch_size: how many pairs make a good pass.
        chunks: shards → their pairs, ready for the scorer, as a place can decode them.
        state: when that of a shard changes, it is scored again.
    """

    shards: list[Shard]
    scorer: Callable[[torch.device], Scorer]
    model: str
    decode: Decode | None
    batch_size: int
    chunks: Callable[[Sequence[Shard], Place], Iterator[Chunk]]
    state: Callable[[Shard], str]


def _decoded_job(
    shards: ShardSpec | None,
    model: str | Path,
    decode: Decode | None,
    out: Path,
    engine: Engine,
    workers: int,
    progress: Progress,
) -> _Job:
    """Tars, embedded by a RUN or a pretrained encoder."""
    fitted = is_run(model)
    if shards is None:
        if not fitted:
            raise UsageError(f"{model}: no folder that `noisyclean fit` wrote; with any other model, name SHARDS too")
        shards = read_record(Path(model)).shards
    found = find_shards(shards)
    _refuse_other_shards(out, found)
    sample = cache(lambda: _sample(found, partial(index_corpus, workers=workers, progress=progress)))
    run = load_run(Path(model)) if fitted else None
    encoders = [load_encoder(str(model))] if run is None else [one.encoder for one in run.models]
    if decode is not None:
        for one in encoders:
            if run is not None and one.preprocessor.decode != decode:
                raise UsageError(f"{model}: fitted with encoder.decode {one.preprocessor.decode}; leave --decode out")
            one.decode_as(decode)
    preprocessor = encoders[0].preprocessor
    if preprocessor.decode == "gpu":
        require_decoder(engine.own_device)
    _refuse_other_decode(out, preprocessor.decode)
    fitted_shards = set() if run is None else _fitted_shards(found, run)
    if run is not None and (fitted_shards or _holds_fitted_pairs(sample(), run, progress)):
        # Where none of them lies where it was fitted, they have moved, and any may have been.
        scorer = partial(_fitted_scorer, run, fitted_shards or None)
    else:
        encoder = EncoderEnsemble.of(encoders)

        def draw() -> ReferenceBank:
            for one in encoders:
                one.to(engine.own_device)
            source = StreamSource(sample(), encoder.preprocessor, workers=workers)
            return build_bank(encoder, source, np.flatnonzero(sample().usable), BANK_SIZE, progress=progress)

        scorer = partial(_banked_scorer, encoders, _bank(out, encoder.fingerprint(), draw))
    chunks = partial(_decoded_chunks, preprocessor)
    return _Job(found, scorer, str(model), preprocessor.decode, default_batch(engine.device), chunks, shard_state)


def _decoded_chunks(preprocessor: Preprocessor, shards: Sequence[Shard], place: Place) -> Iterator[Chunk]:
    niceness = _GIVE_WAY if place.device.type == "cpu" else 0
    device = torch.empty(0, device=place.device).device  # which GPU is meant by `cuda`, each thread has its own mind of
    preparer = replace(preprocessor, device=device)
    chunks = stream_chunks(shards, preparer, chunk_size=CHUNK, workers=place.workers, in_order=False, niceness=niceness)
    return chunks if device.type == "cpu" else map_in_threads(partial(_put_on, device), chunks, threads=1)


def _put_on(device: torch.device, chunk: Chunk) -> Chunk:
    """The chunk with its pictures on a GPU."""
    if chunk.image.is_cuda:  # where they were decoded
        return chunk
    with beside(device):
        return replace(chunk, image=left_to_model(chunk.image.to(device)))


def _fitted_scorer(run: Run, fitted: set[str] | None, device: torch.device) -> Scorer:
    return Scorer([one.to(device) for one in run.models], run.folds, fitted)


def _banked_scorer(encoders: Sequence[DualEncoder], bank: ReferenceBank, device: torch.device) -> Scorer:
    encoder = EncoderEnsemble.of([one.to(device) for one in encoders])
    return Scorer([BankedEncoder(encoder, bank.to(device))], None)


def _embedded_scorer(origin: str, bank: ReferenceBank, device: torch.device) -> Scorer:
    return Scorer([BankedEncoder(NoEncoder(origin, device), bank.to(device))], None)


def _fitted_shards(shards: Sequence[Shard], run: Run) -> set[str]:
    """The names of those shards that a RUN was fitted to, by where they lie."""
    paths = set(run.shards)
    return {one.name for one, path in zip(shards, absolute_paths(shards), strict=True) if path in paths}


def _holds_fitted_pairs(sample: CorpusIndex, run: Run, progress: Progress) -> bool:
    """Whether the models of a RUN may have trained on these pairs: then each pair has one model that may score it.

    Shards may have been renamed, moved or packed anew since, so a sample of the pairs themselves is looked at.
    """
    share = known_share(run.sketch, sample.caption[sample.usable], sample.image[sample.usable])
    if share:
        progress.say(
            f"{share:.0%} of a sample of these pairs were fitted: each is scored by the model that never saw it"
        )
    else:
        progress.say(
            "no pair of a sample was fitted: all models score each pair together, against a bank of its own kind"
        )
    return share > 0


def _embedded_job(
    embeddings: str | Path, temperature: float | None, out: Path, engine: Engine, progress: Progress
) -> _Job:
    """Pairs that are embedded already."""
    found = find_embeddings(embeddings)
    _refuse_other_shards(out, found)
    origin = common_origin(found)
    if temperature is None:
        temperature = DEFAULT_TEMPERATURE if origin is None else float(origin.temperature)
    made_by = Path(found[0].path).suffix if origin is None else origin.encoder
    name = f"embeddings {made_by} {temperature!r}"

    def draw() -> ReferenceBank:
        index = _sample(found, partial(index_embeddings, progress=progress))
        rows, image, text = take_embeddings(index, draw_bank_rows(index, np.flatnonzero(index.usable), BANK_SIZE))
        return ReferenceBank.build(
            index.caption[rows],
            torch.from_numpy(image).to(engine.own_device),
            torch.from_numpy(text).to(engine.own_device),
            temperature,
            index.pair[rows],
        )

    bank = _bank(out, name, draw)
    return _Job(
        found,
        partial(_embedded_scorer, name, bank),
        f"embeddings at temperature {temperature:g}",
        None,
        EMBEDDED_BATCH,
        partial(_embedded_chunks, bank.image.shape[1]),
        lambda shard: " ".join(shard_state(Shard(shard.name, str(path))) for path in embedding_files(shard)),
    )


def _embedded_chunks(width: int, shards: Sequence[Shard], place: Place) -> Iterator[Chunk]:
    return read_embeddings(shards, width=width)


def _score_shards(engine: Engine, work: Work, todo: Mapping[Shard, str], progress: Progress) -> int:
    """Have the shards scored, each given with its state; returns how many samples there were."""
    left, samples = len(todo), 0
    # How many pairs are to come is not known before they are read: the shards give the time left.
    with progress.task("scoring", len(todo), "shards") as task:
        for done, samples in engine.run(work, todo):
            left -= len(done)
            task.advance(len(done), f"{samples:,} pairs")
    if left:
        raise NoisycleanError(f"{work.out}: {left} shards were not finished; repeat the command")
    return samples


def _refuse_changed(out: Path, todo: Sequence[Shard], scorer: str) -> None:
    """Of a changed file of embeddings nothing says whether the model that made it is still the bank's."""
    for shard in todo:
        if is_file(part_path(out, shard.name)) and read_part_info(out, shard.name).scorer == scorer:
            raise UsageError(
                f"{shard.path}: changed since {out} was made, maybe by another model; give another folder with -o"
            )


def _is_done(out: Path, scorer: str, shard: Shard, state: str) -> bool:
    try:
        info = read_part_info(out, shard.name)
    except (UsageError, MissingObjectError):
        return False  # not there, broken, or of another version: scored anew
    return info.scorer == scorer and info.source == state


def _claim(out: Path, about: dict[str, Any]) -> float:
    """Make ``out`` the place of these scores, or refuse if it is that of others; returns the seconds spent so far."""
    seconds = 0.0
    if is_file(out / OUT_FILE):
        before = read_out(out)
        if before["scorer"] != about["scorer"]:
            raise _by_another_model(out)
        if before.get("rematch", False) != about["rematch"]:
            remedy = "leave it out too" if about["rematch"] else "give it again"
            said = "without" if about["rematch"] else "with"
            raise UsageError(f"{out}: scored {said} --rematch; {remedy}, or give another folder with -o")
        seconds = before.get("seconds") or 0.0
    elif list_parts(out):
        raise UsageError(f"{out}: holds scores of unknown origin (no {OUT_FILE}); give another folder with -o")
    remove_leftovers(out)
    write_json(out / OUT_FILE, {**about, "seconds": seconds})
    return seconds


def _refuse_other_shards(out: Path, shards: Sequence[Shard]) -> None:
    """Told before any of them is read: ``out`` may hold scores of some of these shards, not of others."""
    if is_file(out / OUT_FILE) and not set(read_out(out)["shards"]) <= {shard.name for shard in shards}:
        raise UsageError(f"{out}: holds scores of other shards; give another folder with -o, or remove this one")


def _refuse_other_decode(out: Path, decode: Decode) -> None:
    """Told before the bank is looked for, which then would seem to be that of another model."""
    before = read_out(out).get("decode", decode) if is_file(out / OUT_FILE) else decode
    if before != decode:
        raise UsageError(f"{out}: scored with --decode {before}; give that again, or another folder with -o")


def _by_another_model(out: Path) -> UsageError:
    model = f" ({read_out(out)['model']})" if is_file(out / OUT_FILE) else ""
    return UsageError(f"{out}: holds scores by another model{model}; give another folder with -o")


def _bank(out: Path, encoder: str, draw: Callable[[], ReferenceBank]) -> ReferenceBank:
    """The bank of an encoder (its fingerprint) that was not fitted here: drawn, or read back from ``out``."""
    path = out / BANK_FILE
    if is_file(path):
        try:
            with at_hand(path) as file:
                return ReferenceBank.load(file, encoder=encoder)
        except UsageError as error:
            raise _by_another_model(out) from error
    if is_file(out / OUT_FILE):
        raise _by_another_model(out)
    bank = draw().to("cpu")
    bank.save(path, encoder=encoder)
    return bank


def _sample(shards: Sequence[Shard], index_of: Callable[[Sequence[Shard]], CorpusIndex]) -> CorpusIndex:
    """An index of all shards, or of as many as are needed, taken in an order that only their names decide."""
    order = sorted(shards, key=lambda shard: pair_id(shard.name, ""))
    taken = 16
    while True:
        index = index_of(order[:taken])
        if taken >= len(order) or int(index.usable.sum()) >= BANK_SIZE * _DRAW_FROM:
            return index
        taken *= 4
