"""``demo``: the whole main job on the embedded corpus, with noise that is known."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from noisyclean.corpus.noise import corrupt
from noisyclean.corpus.synthetic import generate_corpus
from noisyclean.errors import UsageError
from noisyclean.evaluation.detection import Evaluation, evaluate
from noisyclean.manifest.splitting import Summary
from noisyclean.progress import SILENT, Progress
from noisyclean.scoring.score import score
from noisyclean.training.fit import fit

DEFAULT_DEMO = Path("noisyclean-demo")
PAIRS = 6000
NOISE = 0.4
SEED = 0

_MARK = "made-by-noisyclean-demo"


@dataclass(frozen=True)
class Demo:
    """What the demo made and found; all folders lie in the demo's own."""

    shards: Path
    truth: Path
    run: Path
    out: Path
    summary: Summary
    evaluation: Evaluation
    seconds: float


def demo(directory: Path | str = DEFAULT_DEMO, *, pairs: int = PAIRS, progress: Progress = SILENT) -> Demo:
    """Make the embedded corpus, permute 40 % of its captions, fit, score and compare with the truth.

    What an earlier demo left in ``directory`` is removed first, so that every run shows the whole job.

    Args:
        directory: where everything is put.
        pairs: size of the corpus; the ``demo`` recipe is made for the default.
        progress: who is told how it goes.

    Raises:
        UsageError: ``directory`` holds something that is not an earlier demo.
    """
    started = time.perf_counter()
    root = Path(directory)
    if root.exists() and any(root.iterdir()):
        if not (root / _MARK).is_file():
            raise UsageError(f"{root}: not empty and not an earlier demo; name a new folder")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / _MARK).touch()
    made = generate_corpus(root / "made", pairs=pairs, seed=SEED, progress=progress).parent
    truth = corrupt(made, root / "shards", rate=NOISE, protocol="caption", seed=SEED, progress=progress)
    fit(root / "shards", out=root / "run", recipe="demo", progress=progress)
    summary = score(root / "shards", model=root / "run", out=root / "out", progress=progress)
    return Demo(
        shards=root / "shards",
        truth=truth,
        run=root / "run",
        out=root / "out",
        summary=summary,
        evaluation=evaluate(root / "out", truth=truth),
        seconds=time.perf_counter() - started,
    )
