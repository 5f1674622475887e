"""The figures of the pages, drawn by matplotlib: numbers in, a picture out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from noisyclean.files import replacing
from noisyclean.manifest.schema import CLEAN, NOISY, UNCERTAIN
from noisyclean.report.digest import ASKED, READABLE, Density, Kept, ScoreHistogram, TruthCurves

INK = "#1b1b1f"
"""Text and lines; on the page they take the colour of the text around."""
COLOURS = {CLEAN: "#0072b2", UNCERTAIN: "#e69f00", NOISY: "#d55e00"}
"""Of Okabe and Ito's palette, which colour-blind readers can tell apart."""
_FOLD_STYLES = ("-", "--", ":", "-.")

_STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",  # text stays text: to be read aloud, searched and copied
    "svg.hashsalt": "noisyclean",  # the same numbers make the same file
    "lines.linewidth": 1.6,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
}
_NARROW, _WIDE = (5.0, 3.2), (5.0, 2.4)

CORPUS_FIGURES = ("match-scores", "kept", "energy-entropy", "truth-curves", "truth-realised")
"""What may be drawn of a scored corpus."""

Point: TypeAlias = tuple[int, float]


@dataclass(frozen=True)
class Figure:
    """A figure of a page.

    Attributes:
        name: of its files.
        title: what it shows.
        text: what there is to see in it, in words: its alternative text.
        svg: the picture, to be put into a page.
        png: the picture for elsewhere.
        file: the picture as an SVG for elsewhere, with colours of its own.
    """

    name: str
    title: str
    text: str
    svg: str
    png: bytes
    file: bytes


def save(figures: Sequence[Figure], folder: Path) -> None:
    """Write each figure as ``folder/NAME.svg`` and ``.png``, and remove what was drawn of the same folder before."""
    for name in {*CORPUS_FIGURES} - {one.name for one in figures}:
        for suffix in ("svg", "png"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    for one in figures:
        for suffix, data in (("svg", one.file), ("png", one.png)):
            with replacing(folder / f"{one.name}.{suffix}") as temporary:
                temporary.write_bytes(data)


def draw(
    name: str, title: str, text: str, paint: Callable[[Canvas], None], *, size: tuple[float, float] = _NARROW
) -> Figure:
    """Make a figure of what ``paint`` draws."""
    with rc_context(_STYLE):
        canvas = Canvas(figsize=size, layout="constrained")
        paint(canvas)
        file, png = io.BytesIO(), io.BytesIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=200, facecolor="white")
    return Figure(name, title, text, inline(file.getvalue().decode(), name), png.getvalue(), file.getvalue())


def inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: with ids and colours of the page, and as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    for colour, variable in {INK: "currentColor", **{COLOURS[one]: f"var(--{one})" for one in COLOURS}}.items():
        svg = svg.replace(colour, variable)
    return svg


def score_figure(scores: ScoreHistogram) -> Figure:
    """The match scores by split, with what random pairings would look like, and where the splits end."""

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        base = np.zeros(len(scores.null))
        for split in (NOISY, UNCERTAIN, CLEAN):
            axes.stairs(base + scores.pairs[split], scores.edges, baseline=base, fill=True, color=COLOURS[split],
                        alpha=0.85, label=split)  # fmt: skip
            base = base + scores.pairs[split]
        axes.stairs(
            scores.null, scores.edges, color=INK, linewidth=1.8, label="random pairings,\nscaled to the estimate"
        )
        top = 1.12 * max(base.max(), scores.null.max())
        axes.set_ylim(0, top)
        for end in (*scores.noisy_to, *scores.clean_from):
            axes.axvline(end, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        words: dict[str, Any] = {"textcoords": "offset points", "va": "top", "fontsize": 8.5}
        if scores.noisy_to:
            axes.annotate("← noisy", (min(scores.noisy_to), top), (-5, 0), ha="right", **words)
        if scores.clean_from:
            axes.annotate("clean →", (max(scores.clean_from), top), (5, 0), ha="left", **words)
        axes.set_xlabel("match score")
        axes.set_ylabel("pairs")
        _thousands(axes)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.2), ncols=4, columnspacing=1.2, handlelength=1.2)

    pairs = sum(int(one.sum()) for one in scores.pairs.values())
    text = (
        f"Histogram of the match scores of {pairs:,} pairs, coloured by split, under the line of "
        f"{scores.null.sum():,.0f} random pairings, as many as are estimated to be mismatched. What stands above the "
        "line is matched."
    )
    if scores.clean_from:
        text += f" Clean pairs begin at a score of {_listed(scores.clean_from)}."
    if scores.noisy_to:
        text += f" Noisy pairs end at {_listed(scores.noisy_to)}."
    return draw("match-scores", "Match scores", text, paint)


def density_figure(density: Density) -> Figure:
    """Where the pairs of each split lie between energy and swapped entropy."""

    def paint(canvas: Canvas) -> None:
        panels = canvas.subplots(1, len(READABLE), sharex=True, sharey=True)
        most = max(int(one.max()) for one in density.pairs.values())
        extent = (density.energy[0], density.energy[-1], density.entropy[0], density.entropy[-1])
        for axes, split in zip(panels, READABLE, strict=True):
            cells = density.pairs[split].T
            shade = np.zeros((*cells.shape, 4))
            shade[..., :3] = to_rgb(COLOURS[split])
            # The root, so that what is rare is seen beside what is common; a single pair is seen too.
            shade[..., 3] = np.where(cells > 0, 0.12 + 0.88 * np.sqrt(cells / max(most, 1)), 0)
            axes.imshow(shade, origin="lower", extent=extent, aspect="auto", interpolation="nearest")
            axes.set_title(f"{split}: {int(cells.sum()):,}")
            axes.xaxis.set_major_locator(MaxNLocator(3))
        panels[0].set_ylabel("swapped entropy")
        panels[1].set_xlabel("energy (lower is surer)")

    peaks = []
    for split in READABLE:
        if density.pairs[split].any():
            row, column = np.unravel_index(int(density.pairs[split].argmax()), density.pairs[split].shape)
            peaks.append(f"{split} around {density.energy[row]:.3g} and {density.entropy[column]:.3g}")
    text = "Density of the pairs by energy and swapped entropy, one panel a split; the densest spots: " + "; ".join(
        peaks
    )
    return draw("energy-entropy", "Energy and swapped entropy", f"{text}.", paint, size=_WIDE)


def kept_figure(kept: Kept, readable: int, target: float | None) -> Figure:
    """How many pairs are clean at which asked mismatch rate."""

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.plot(ASKED, kept.pairs / readable, color=COLOURS[CLEAN])
        if target is not None and target <= ASKED[-1]:
            share = kept.at(target) / readable
            axes.plot([target], [share], "o", color=INK, markersize=5)
            words = f"asked: {target:.1%}\nclean: {share:.1%} of the pairs"
            axes.annotate(words, (target, share), (10, -4), textcoords="offset points", va="top", fontsize=8.5)
        axes.set_xlim(0, ASKED[-1])
        axes.set_ylim(0, 1)
        axes.set_xlabel("mismatch rate asked of the clean part")
        axes.set_ylabel("clean pairs")
        _percents(axes, "xy")

    some = ", ".join(f"{kept.at(asked) / readable:.1%} at {asked:.0%}" for asked in (0.01, 0.05, 0.1, 0.2))
    return draw(
        "kept", "Asked and kept", f"Share of the pairs that are clean by the asked mismatch rate: {some}.", paint
    )


def truth_figures(truth: TruthCurves) -> list[Figure]:
    """How well mismatches are found, and whether what was asked was kept: against the truth."""
    found = truth.evaluation

    def paint_curves(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2)
        left.plot(np.r_[0, truth.false_alarm], np.r_[0, truth.found], color=COLOURS[NOISY])
        left.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        left.set_xlabel("true pairs met")
        left.set_ylabel("mismatches found")
        right.plot(truth.found, truth.precision, color=COLOURS[NOISY])
        right.axhline(found.planted_noise or 0, color=INK, linewidth=0.8, linestyle=":")
        right.set_xlabel("mismatches found")
        right.set_ylabel("mismatches among all met")
        for axes in (left, right):
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
            axes.set_xticks([0, 0.5, 1])
            _percents(axes, "xy")

    def paint_realised(canvas: Canvas) -> None:
        axes = canvas.subplots()
        top = 1.1 * max(ASKED[-1], float(np.nanmax([0, *truth.realised])))
        axes.plot([0, ASKED[-1]], [0, ASKED[-1]], color=INK, linewidth=0.8, linestyle=":", label="as asked")
        axes.plot(ASKED, truth.realised, color=COLOURS[CLEAN], label="as it is")
        if found.target_fdr is not None and found.clean.realised_noise is not None:
            axes.plot([found.target_fdr], [found.clean.realised_noise], "o", color=INK, label="the clean part")
        axes.set_xlim(0, ASKED[-1])
        axes.set_ylim(0, top)
        axes.set_xlabel("asked mismatch rate")
        axes.set_ylabel("realised mismatch rate")
        axes.legend(loc="upper left")
        _percents(axes, "xy")

    area = "" if found.auroc is None else f"AUROC {found.auroc:.3f}; average precision {found.average_precision:.3f}."
    points = "; ".join(
        f"asked {one.asked:.0%}, realised {one.realised_noise:.1%}"
        for one in found.calibration
        if one.realised_noise is not None
    )
    figures = [draw("truth-realised", "Asked and realised", f"Mismatch rates: {points}.", paint_realised)]
    if found.auroc is not None:
        text = f"ROC and precision–recall curves. {area}"
        figures.insert(0, draw("truth-curves", "Finding the mismatches", text, paint_curves, size=_WIDE))
    return figures


def course_figure(
    name: str, title: str, lines: Mapping[str, Sequence[Sequence[Point]]], *, share: bool = False
) -> Figure:
    """Quantities by epoch.

    Args:
        name: of the figure.
        title: of the figure.
        lines: what each is → its (epoch, value) points of each fold.
        share: whether they are shares, to be shown in per cent.
    """
    colours = list(COLOURS.values())

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for colour, (what, folds) in zip(colours, lines.items(), strict=False):
            for fold, points in enumerate(folds):
                epochs, values = zip(*points, strict=True) if points else ((), ())
                label = what if fold == 0 else None
                line = _FOLD_STYLES[fold % len(_FOLD_STYLES)]
                axes.plot(epochs, values, line, marker="o", markersize=3, color=colour, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if share:
            axes.set_ylim(0, 1.02)
            _percents(axes, "y")
        if len(lines) > 1:
            axes.legend()

    ends = []
    for what, folds in lines.items():
        values = [points[-1][1] for points in folds if points]
        ends.append(f"{what} ends at {', '.join(f'{one:.1%}' if share else f'{one:,.3g}' for one in values)}")
    return draw(name, title, f"{title} by epoch, a line a fold: {'; '.join(ends)}.", paint)


def _percents(axes: Axes, sides: str) -> None:
    for side in sides:
        getattr(axes, f"{side}axis").set_major_formatter(PercentFormatter(1, decimals=0))


def _thousands(axes: Axes) -> None:
    def words(value: Any, _: Any) -> str:
        return f"{value:,.0f}"

    axes.yaxis.set_major_formatter(FuncFormatter(words))


def _listed(scores: Sequence[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in scores)
