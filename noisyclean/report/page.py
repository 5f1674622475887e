"""``report``: one self-contained HTML page of what a corpus, or a fit, turned out to be."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import noisyclean
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.files import local_place, replacing
from noisyclean.manifest.reading import Manifest
from noisyclean.manifest.schema import UNREADABLE
from noisyclean.manifest.splitting import DEFAULT_OUT, MANIFEST, SUMMARY_FILE, Summary
from noisyclean.progress import SILENT, Progress
from noisyclean.report.digest import NUMBERS, READABLE, Digest, ShardFigures, digest
from noisyclean.report.figures import (
    Figure,
    course_figure,
    density_figure,
    kept_figure,
    save,
    score_figure,
    truth_figures,
)
from noisyclean.report.gallery import ROW, choose, deciding_column, illustrate, legible
from noisyclean.report.rows import open_rows

REPORT_FILE = "report.html"
MAX_BYTES = 10_000_000
"""What a page may take, whatever the corpus."""

_RECIPE_FILE = "recipe.yaml"
"""As ``noisyclean.scoring.run`` has it, whose import would bring torch."""
_LONGEST = 400
"""Characters of a caption, or of anything else from outside, that are shown."""
_WORST_SHARDS = 20
_REASONS = 20
_TEMPLATES = Path(__file__).parent / "templates"


def report(folder: Path | str = DEFAULT_OUT, *, to: Path | str | None = None, progress: Progress = SILENT) -> Path:
    """Write the page of an OUT folder, or of a RUN folder, and its figures as SVG and PNG in a folder beside it.

    The page needs no network. Pictures are taken from the shards where these still lie as they were scored; without
    them the page says so. A truth that lies beside the shards is compared with, for reading only.

    Args:
        folder: what ``score`` or ``fit`` wrote.
        to: the page; None: ``report.html`` in ``folder``. Its figures go to a folder of its name without ``.html``.
        progress: who is told how it goes.

    Returns:
        Where the page lies.

    Raises:
        UsageError: the folder holds neither a manifest nor a complete run, or one that is broken.
    """
    folder = local_place(folder)
    page = folder / REPORT_FILE if to is None else local_place(to)
    if page.suffix not in (".html", ".htm"):
        raise UsageError(f"{page}: the page is HTML; give a name that ends in .html")
    text, drawn = _fit_page(folder) if _is_fit(folder) else _corpus_page(folder, progress)
    data = text.encode()
    if len(data) > MAX_BYTES:
        raise NoisycleanError(f"{page}: would take {len(data):,} bytes, more than {MAX_BYTES:,}")
    with replacing(page) as temporary:
        temporary.write_bytes(data)
    save(drawn, page.with_suffix(""))
    return page


def _is_fit(folder: Path) -> bool:
    if (folder / MANIFEST).is_dir():
        return False
    from noisyclean.report.course import METRICS_FILE  # what a RUN consists of is known beside torch

    return (folder / METRICS_FILE).is_file()


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _corpus_page(out: Path, progress: Progress) -> tuple[str, list[Figure]]:
    manifest = Manifest(out)
    columns = dict.fromkeys([*NUMBERS, *ROW, deciding_column(manifest.summary.rule)])
    with open_rows(manifest, columns=list(columns), progress=progress) as db:
        found = digest(manifest, db)
        galleries, missing = illustrate(choose(db, found.summary.rule), db, out, found.run, progress=progress)
    drawn = _figures(found)
    text = _render(
        "corpus.html",
        title=_name(out),
        found=found,
        summary=found.summary,
        readable=found.summary.pairs - found.summary.unreadable,
        splits=(*READABLE, UNREADABLE),
        figures={one.name: one for one in drawn},
        worst=found.shards[:_WORST_SHARDS],
        unread=_most_unreadable(found.shards),
        reasons=list(found.summary.reasons.items())[:_REASONS],
        galleries=galleries,
        missing=missing,
        rule=_rule(found.summary),
        recipe=_recipe(found.run["model"]),
        drawn_at=_time(manifest.out / SUMMARY_FILE),
    )
    return text, drawn


def _figures(found: Digest) -> list[Figure]:
    drawn: list[Figure] = []
    if found.scores is not None and found.density is not None and found.kept is not None:
        readable = found.summary.pairs - found.summary.unreadable
        drawn += [
            score_figure(found.scores),
            kept_figure(found.kept, readable, found.summary.target_fdr),
            density_figure(found.density),
        ]
    if found.truth is not None:
        drawn += truth_figures(found.truth)
    return drawn


def _fit_page(run: Path) -> tuple[str, list[Figure]]:
    from noisyclean.report.course import RUN_FILE, read_course

    course = read_course(run)
    asked = [
        ("losses", "Loss", {"training": "loss", "held-out pairs": "holdout_loss"}, False),
        ("retrieval", "Held-out recall@1", {"held-out pairs": "holdout_recall_at_1"}, True),
        ("estimate", "Estimated mismatch rate", {"estimate": "estimated_noise"}, True),
        ("trained-share", "Share of the pairs trained on", {"mean weight of a pair": "mean_weight"}, True),
        ("throughput", "Pairs a second", {"pairs a second": "pairs_per_second"}, False),
    ]
    drawn = []
    for name, title, shown, share in asked:
        lines = {what: course.lines(column) for what, column in shown.items()}
        there = {what: folds for what, folds in lines.items() if any(folds)}
        if there:
            drawn.append(course_figure(name, title, there, share=share))
    last = course.last()
    columns = [name for name in dict.fromkeys(key for row in last for key in row) if name not in ("epoch", "fold")]
    text = _render(
        "fit.html",
        title=_name(run),
        course=course,
        record=course.record,
        last=last,
        columns=columns,
        figures={one.name: one for one in drawn},
        drawn_at=_time(run / RUN_FILE),
    )
    return text, drawn


def _render(template: str, **values: Any) -> str:
    script, style = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: "–" if value is None else f"{value:.1%}",
        "count": lambda value: f"{value:,}",
        "number": lambda value: "–" if value is None else f"{value:.3g}",
        "legible": lambda value: _shorten(legible(str(value))),
        "data_uri": lambda value: f"data:image/webp;base64,{base64.b64encode(value).decode()}",
        "svg": Markup,
    }
    return environment.get_template(template).render(
        **values,
        script=Markup(script),
        style=Markup(style),
        script_digest=digest,
        version=noisyclean.__version__,
        made_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
    )


def _name(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:]).lstrip("/")


def _most_unreadable(shards: Sequence[ShardFigures]) -> list[ShardFigures]:
    bad = [one for one in shards if one.sizes["unreadable"] or one.damage]
    return sorted(bad, key=lambda one: (one.unreadable_share, one.damage is not None), reverse=True)[:_WORST_SHARDS]


def _rule(summary: Summary) -> str:
    """The command that draws this split."""
    options = [f"--{name.replace('_', '-')} {value}" for name, value in summary.rule.items()]
    return " ".join(["noisyclean split OUT", *options])


def _recipe(model: str) -> str | None:
    """The recipe of the RUN that scored, if it can be found."""
    path = Path(model) / _RECIPE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone().strftime("%Y-%m-%d %H:%M %z")
