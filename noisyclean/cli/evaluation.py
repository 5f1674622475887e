"""The figures of an evaluation, as a table."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from noisyclean.cli.console import console
from noisyclean.evaluation.detection import Evaluation


def print_evaluation(found: Evaluation) -> None:
    """Headline figures, then the harder kinds."""
    low, high = found.noise_interval
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("AUROC", _number(found.auroc))
    table.add_row("Average precision", _number(found.average_precision))
    table.add_row("F1 of the clean split", _number(found.f1))
    table.add_row("Planted noise", _share(found.planted_noise))
    table.add_row("Estimated noise", f"{found.estimated_noise:.1%}  (95 % interval {low:.1%} to {high:.1%})")
    asked = "chosen by rank or score" if found.target_fdr is None else f"asked {found.target_fdr:.1%}"
    table.add_row(
        "Clean",
        f"{found.clean.size:,} pairs, {_share(found.clean.realised_noise)} mismatched ({asked}), "
        f"recall {_share(found.clean.recall)}",
    )
    table.add_row(
        "Noisy",
        f"{found.noisy.size:,} pairs, {_share(found.noisy.precision)} mismatched, recall {_share(found.noisy.recall)}",
    )
    table.add_row("Uncertain", f"{found.uncertain.size:,} pairs")
    table.add_row("Unreadable", f"{found.unreadable:,} samples")
    console.out.print(table)
    if found.kinds:
        kinds = Table("kind", box=box.SIMPLE_HEAD)
        for name in ("pairs", "AUROC", "clean", "noisy", "uncertain"):
            kinds.add_column(name, justify="right")
        for name, kind in found.kinds.items():
            shares = (f"{part / kind.pairs:.1%}" for part in (kind.clean, kind.noisy, kind.uncertain))
            kinds.add_row(escape(name), f"{kind.pairs:,}", _number(kind.auroc), *shares)
        console.out.print(kinds)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
