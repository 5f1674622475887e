"""``bench detection``: methods × protocols × noise rates × seeds on one corpus, resumable, a line of JSON a run."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from noisyclean.corpus.index import index_corpus
from noisyclean.corpus.locate import Shard, ShardSpec, find_shards, without_secrets
from noisyclean.corpus.noise import PLANTED_KIND
from noisyclean.corpus.parallel import default_workers, map_in_processes
from noisyclean.corpus.synthetic import generate_corpus
from noisyclean.device import choose_device
from noisyclean.errors import UsageError
from noisyclean.evaluation.bench.corpus import BenchCorpus
from noisyclean.evaluation.bench.methods import DEFAULT_METHODS, find_methods
from noisyclean.evaluation.bench.run import RunKey, method_recipe, run
from noisyclean.evaluation.bench.table import Tables, write_tables
from noisyclean.files import write_json
from noisyclean.progress import SILENT, Progress
from noisyclean.recipe import EncoderRecipe
from noisyclean.training.crossfit import make_encoder

RESULTS_FILE = "results.jsonl"
SETTINGS_FILE = "bench.json"
DEFAULT_BENCH = Path("noisyclean-bench")
DEFAULT_RECIPE = "bench"
DEFAULT_RATES = (0.2, 0.4, 0.6, 0.8)
DEFAULT_SEEDS = (0, 1, 2)
EMBEDDED_PAIRS = 4000
EMBEDDED_SEED = 1000
"""Of the embedded corpus: none that a setting was chosen on."""


@dataclass(frozen=True)
class _Job:
    shards: tuple[Shard, ...]
    recipe: str
    overrides: tuple[str, ...]
    key: RunKey
    device: str
    threads: int | None


def bench_detection(
    shards: ShardSpec | None = None,
    *,
    out: Path | str = DEFAULT_BENCH,
    recipe: str | Path = DEFAULT_RECIPE,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = DEFAULT_METHODS,
    protocols: Sequence[str] = ("caption",),
    rates: Sequence[float] = DEFAULT_RATES,
    seeds: Sequence[int] = DEFAULT_SEEDS,
    pairs: int = EMBEDDED_PAIRS,
    jobs: int | None = None,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Tables:
    """Compare methods on a corpus of true pairs in which noise is planted.

    Every method trains the same encoder from the same initial weights on the same batches for as many epochs (the
    oracle on the true pairs among them only), in cross-fitted folds, and its models score the pairs that they never
    saw. Runs that ``out`` holds already are not done again, so that the grid can be interrupted, or widened.

    Args:
        shards: the corpus; None: the embedded one, made in ``out``.
        out: the folder for ``results.jsonl`` and the tables and figures.
        recipe: name or path of the base recipe; ``overrides`` change it for all methods alike.
        methods: names of :data:`noisyclean.evaluation.bench.methods.METHODS`.
        protocols: as ``corrupt`` has them.
        rates: shares of the pairs to make wrong.
        seeds: each plants other noise, and trains from other weights in another order.
        pairs: size of the embedded corpus.
        jobs: runs at a time; None: one a core on the CPU, one on a GPU.
        device: a torch device; None: CUDA if there is one, else the CPU.
        progress: who is told how it goes.

    Raises:
        UsageError: an argument makes no sense, or ``out`` holds a bench of another corpus or recipe.
    """
    out = Path(out)
    place = choose_device(device)
    methods = find_methods(methods)
    for option, given in (("methods", methods), ("protocol", protocols), ("noise", rates), ("seeds", seeds)):
        if not given:
            raise UsageError(f"--{option}: give at least one")
    for protocol in protocols:
        if protocol not in PLANTED_KIND:
            raise UsageError(f"--protocol {protocol}: no such protocol; there are {', '.join(PLANTED_KIND)}")
    for rate in rates:
        if not 0 <= rate < 1:
            raise UsageError(f"--noise {rate}: a share of the pairs, at least 0 and under 1")
    keys = list(dict.fromkeys(RunKey(m, p, r, s) for s, p, r, m in product(seeds, protocols, rates, methods)))
    for method, seed in product(methods, seeds):  # a mistake in the recipe is told before anything is made
        method_recipe(str(recipe), list(overrides), RunKey(method, protocols[0], rates[0], seed))
    jobs = jobs or (1 if place.type == "cuda" else default_workers())

    if shards is None:
        made = out / "corpus"
        if not made.is_dir():
            building = out / ".corpus.tmp"
            shutil.rmtree(building, ignore_errors=True)
            generate_corpus(building, pairs=pairs, seed=EMBEDDED_SEED, progress=progress)
            building.rename(made)
        found, name = find_shards(made), f"embedded corpus, {pairs:,} pairs"
    else:
        name = without_secrets(str(shards if isinstance(shards, str | Path) else next(iter(shards))))
        found, name = find_shards(shards), Path(name).name or name
    base = method_recipe(str(recipe), list(overrides), RunKey("srem", protocols[0], rates[0], 0))
    index = index_corpus(found, workers=default_workers(), progress=progress)
    if shards is None and len(index) != pairs:
        raise UsageError(
            f"{made}: an embedded corpus of {len(index):,} pairs, not {pairs:,}; give another folder with -o"
        )
    _claim(out, {"fingerprint": index.fingerprint(), "recipe": base.model_dump(mode="json")}, name)

    path = out / RESULTS_FILE
    done = {_key(one) for one in read_results(path)}
    todo = [key for key in keys if key not in done]
    if len(todo) < len(keys):
        progress.say(f"{len(keys) - len(todo):,} of {len(keys):,} runs are done already")
    # A single job has the threads that this process has.
    threads = max(1, default_workers() // jobs) if jobs > 1 else None
    work = [_Job(tuple(found), str(recipe), tuple(overrides), key, str(place), threads) for key in todo]
    with progress.task("running the bench", len(work), "runs") as task, path.open("a", encoding="utf-8") as file:
        for result in map_in_processes(_run_job, work, jobs, ordered=False):
            file.write(json.dumps(result) + "\n")
            file.flush()
            auroc = "" if result["auroc"] is None else f": AUROC {result['auroc']:.3f}"
            task.advance(1, f"{result['method']} at {result['rate']:.0%}, seed {result['seed']}{auroc}")
    return write_tables(read_results(path), out, title=name)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The runs of a ``results.jsonl``; a last line that an interruption cut short is removed from it.

    Raises:
        UsageError: a line that is no run.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines), encoding="utf-8")
    results = []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            _key(result)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: line {number} is no run of the bench; remove it") from error
        results.append(result)
    return results


def _key(result: dict[str, Any]) -> RunKey:
    return RunKey(result["method"], result["protocol"], result["rate"], result["seed"])


def _claim(out: Path, settings: dict[str, Any], name: str) -> None:
    """Make ``out`` the place of this bench, or refuse if it is that of another."""
    path = out / SETTINGS_FILE
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path}: not the record of a bench; give another folder with -o") from error
        if {key: before.get(key) for key in settings} != settings:
            raise UsageError(f"{out}: holds a bench of another corpus or recipe; give another folder with -o")
        return
    if (out / RESULTS_FILE).is_file():
        raise UsageError(f"{out}: holds results of unknown origin (no {SETTINGS_FILE}); give another folder with -o")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"corpus": name, **settings})


def _run_job(job: _Job) -> dict[str, Any]:
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    recipe = method_recipe(job.recipe, list(job.overrides), job.key)
    return run(_corpus(job.shards, recipe.encoder), recipe, job.key, torch.device(job.device))


@functools.lru_cache(maxsize=1)
def _corpus(shards: tuple[Shard, ...], encoder: EncoderRecipe) -> BenchCorpus:
    """Decoded once in the life of a worker process, for all its runs."""
    preprocessor = make_encoder(encoder, torch.device("cpu"), seed=0).preprocessor
    return BenchCorpus(shards, preprocessor, workers=0)  # a worker process can have none of its own
