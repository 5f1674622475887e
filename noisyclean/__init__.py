"""noisyclean: find and remove the mismatched pairs of an image–text corpus.

>>> import noisyclean as nc
>>> nc.fit("shards/", out="run")
>>> nc.score("shards/", model="run", out="scored")
>>> nc.split("scored", fdr=0.01)
>>> nc.Manifest("scored").pairs("clean")

Importing this package is cheap: each function brings its dependencies with it when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from noisyclean.corpus.convert import convert as convert
    from noisyclean.corpus.inspection import inspect as inspect
    from noisyclean.corpus.noise import corrupt as corrupt
    from noisyclean.corpus.noise_index import apply_index as apply_index
    from noisyclean.corpus.synthetic import generate_corpus as generate_corpus
    from noisyclean.evaluation.demo import demo as demo
    from noisyclean.evaluation.detection import evaluate as evaluate
    from noisyclean.evaluation.labelling import calibrate as calibrate
    from noisyclean.evaluation.labelling import draw_sample as draw_sample
    from noisyclean.manifest.exporting.export import export as export
    from noisyclean.manifest.reading import Manifest as Manifest
    from noisyclean.manifest.splitting import split as split
    from noisyclean.scoring.score import score as score
    from noisyclean.training.fit import fit as fit

_HOMES = {
    "Manifest": "noisyclean.manifest.reading",
    "apply_index": "noisyclean.corpus.noise_index",
    "calibrate": "noisyclean.evaluation.labelling",
    "convert": "noisyclean.corpus.convert",
    "corrupt": "noisyclean.corpus.noise",
    "demo": "noisyclean.evaluation.demo",
    "draw_sample": "noisyclean.evaluation.labelling",
    "evaluate": "noisyclean.evaluation.detection",
    "export": "noisyclean.manifest.exporting.export",
    "fit": "noisyclean.training.fit",
    "generate_corpus": "noisyclean.corpus.synthetic",
    "inspect": "noisyclean.corpus.inspection",
    "score": "noisyclean.scoring.score",
    "split": "noisyclean.manifest.splitting",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
