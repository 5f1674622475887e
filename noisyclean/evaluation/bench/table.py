"""The bench's tables and figures, made of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisyclean.evaluation.bench.methods import METHODS, ORACLE
from noisyclean.evaluation.markdown import mean_cell, table_heading, table_row

if TYPE_CHECKING:
    import pandas as pd

COLUMNS: dict[str, tuple[str, float, int]] = {
    "auroc": ("AUROC", 1, 3),
    "auroc_fall": ("below best epoch", 1, 3),
    "average_precision": ("AP", 1, 3),
    "f1": ("F1", 1, 3),
    "estimated_noise": ("estimate %", 100, 1),
    "realised_1": ("asked 1 %: got %", 100, 1),
    "recall_1": ("recall", 1, 3),
    "realised_5": ("asked 5 %: got %", 100, 1),
    "recall_5": ("recall", 1, 3),
    "realised_10": ("asked 10 %: got %", 100, 1),
    "recall_10": ("recall", 1, 3),
    "rsum_last": ("rSum last", 1, 1),
    "rsum_best": ("rSum best", 1, 1),
    "seconds_per_epoch": ("s/epoch", 1, 1),
    "peak_memory": ("peak MB", 1e-6, 0),
}
"""Figure → (heading, factor, decimals)."""

LEADS: dict[str, tuple[str, float, int]] = {
    "auroc_lead": ("AUROC", 1, 3),
    "recall_5_lead": ("recall at 5 %", 1, 3),
    "rsum_last_lead": ("rSum last", 1, 1),
}
"""Figures in which SREM is compared with each method seed by seed: noise, weights and order are the same for both."""

FIGURE_FILES = ("auroc.svg", "filter.svg")


@dataclass(frozen=True)
class Tables:
    """What a bench wrote.

    Attributes:
        markdown: ``table.md``.
        parquet: ``summary.parquet``, a row for each method, protocol and rate: means, standard deviations, runs.
        figures: pictures.
        summary: the rows of ``summary.parquet``.
    """

    markdown: Path
    parquet: Path
    figures: list[Path]
    summary: pd.DataFrame


def summarise(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Means and standard deviations (n − 1) over seeds; training-free scorers are methods of their own.

    So are SREM's leads over each method, as differences of runs with the same seed: seeds move all methods together.
    """
    import pandas as pd

    flat = []
    for one in results:
        cell = {key: one[key] for key in ("method", "protocol", "rate", "seed")}
        flat.append({**cell, **{name: one.get(name) for name in COLUMNS}})
        flat += [{**cell, "method": name, **figures} for name, figures in one.get("training_free", {}).items()]
    runs = pd.DataFrame(flat, columns=["method", "protocol", "rate", "seed", *COLUMNS])
    figures = runs[list(COLUMNS)].astype("float64")
    compared = [name.removesuffix("_lead") for name in LEADS]
    cells = ["protocol", "rate", "seed"]
    ours = runs.loc[runs["method"] == "srem", cells].join(figures[compared])
    leads = runs[cells].merge(ours, "left", cells)[compared] - figures[compared]
    leads[runs["method"] == "srem"] = float("nan")
    grouped = pd.concat([runs[["method", "protocol", "rate"]], figures, leads.add_suffix("_lead")], axis=1).groupby(
        ["protocol", "rate", "method"], sort=False
    )
    summary = grouped.mean().join(grouped.std().add_suffix("_sd")).join(grouped.size().rename("runs"))
    order = {name: place for place, name in enumerate(METHODS)}
    return (
        summary.reset_index()
        .sort_values(
            ["protocol", "rate", "method"], key=lambda one: one.map(order).fillna(99) if one.name == "method" else one
        )
        .reset_index(drop=True)
    )


def write_tables(results: Sequence[dict[str, Any]], out: Path, *, title: str) -> Tables:
    """Write ``table.md``, ``summary.parquet`` and the figures."""
    summary = summarise(results)
    markdown, parquet = out / "table.md", out / "summary.parquet"
    markdown.write_text(to_markdown(summary, title), encoding="utf-8")
    summary.to_parquet(parquet, index=False)
    return Tables(markdown, parquet, _draw(summary, results, out, title), summary)


def to_markdown(summary: pd.DataFrame, title: str) -> str:
    """A table for each protocol and rate; mean ± standard deviation over seeds."""
    lines = [f"# {title}", ""]
    for (protocol, rate), rows in summary.groupby(["protocol", "rate"]):
        seeds = int(rows["runs"].max())
        lines += [f"## {rate:.0%} noise, protocol {protocol}, {seeds} seed{'s' * (seeds > 1)}", ""]
        lines += _table(rows, COLUMNS)
        compared = rows[rows["rsum_last_lead"].notna()]
        if len(compared):
            lines += ["SREM's lead, seed by seed:", "", *_table(compared, LEADS)]
    return "\n".join(lines)


def _table(rows: pd.DataFrame, columns: dict[str, tuple[str, float, int]]) -> list[str]:
    lines = table_heading(["method", *(name for name, _, _ in columns.values())])
    for row in rows.to_dict("records"):
        cells = [
            mean_cell(row[name] * factor, row[f"{name}_sd"] * factor, decimals)
            for name, (_, factor, decimals) in columns.items()
        ]
        lines.append(table_row([_title(row["method"]), *cells]))
    return [*lines, ""]


def _title(method: str) -> str:
    # A score that needs no training is known by its title alone.
    return METHODS[method].title if method in METHODS else method


def _draw(summary: pd.DataFrame, results: Sequence[dict[str, Any]], out: Path, title: str) -> list[Path]:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    protocol = summary["protocol"].iloc[0]  # a picture of several at once would be none at all
    chosen = summary[summary["protocol"] == protocol]
    for number, method in enumerate(chosen["method"].unique()):
        rows = chosen[chosen["method"] == method]
        style = {
            "label": _title(method),
            "linewidth": 2.5 if method == "srem" else 1.2,
            "linestyle": "--" if method == ORACLE else "-" if method in METHODS else ":",
            "color": colormaps["tab20"](number % 20),
            "marker": ".",
        }
        for axis, name in zip(axes, ("auroc", "recall_5", "rsum_last"), strict=True):
            if rows[name].notna().any():
                axis.errorbar(rows["rate"] * 100, rows[name], yerr=rows[f"{name}_sd"], capsize=2, **style)
    for axis, heading in zip(axes, ("AUROC, out of fold", "recall of true pairs at asked 5 %", "rSum"), strict=True):
        axis.set(xlabel="planted noise, %", ylabel=heading)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    title = f"{title}, protocol {protocol}"
    figure.suptitle(title)
    paths = [out / name for name in FIGURE_FILES]
    figure.savefig(paths[0], metadata={"Date": None})
    shown = [one for one in results if one["protocol"] == protocol]
    _draw_filters(shown, title).savefig(paths[1], metadata={"Date": None})
    return paths


def _draw_filters(results: Sequence[dict[str, Any]], title: str) -> Any:
    """Weighted precision and recall of the training filter by epoch: whether it feeds on its own mistakes."""
    import pandas as pd
    from matplotlib.figure import Figure

    epochs = pd.DataFrame(
        [
            {**row, "method": one["method"], "rate": one["rate"], "epoch": row["epoch"] + 1}
            for one in results
            for row in one["epochs"]
            if "filter_recall" in row
        ],
        columns=["method", "rate", "epoch", "filter_precision", "filter_recall"],
    )
    rates = sorted(epochs["rate"].unique()) or [0.0]
    figure = Figure(figsize=(3.5 * len(rates), 6), layout="constrained")
    axes = figure.subplots(2, len(rates), squeeze=False, sharex=True)
    for column, rate in enumerate(rates):
        for (method,), rows in epochs[epochs["rate"] == rate].groupby(["method"]):
            means = rows.groupby("epoch").mean(numeric_only=True)
            for line, name in enumerate(("filter_precision", "filter_recall")):
                axes[line][column].plot(means.index, means[name], marker="o", label=_title(method))
        axes[0][column].set_title(f"{rate:.0%} noise")
        axes[1][column].set_xlabel("epoch")
        axes[1][column].xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("precision of the filter")
    axes[1][0].set_ylabel("recall of the filter")
    if len(epochs):
        axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    return figure
