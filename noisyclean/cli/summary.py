"""The closing table of a scored corpus."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from noisyclean.cli.console import console
from noisyclean.manifest.schema import SPLITS
from noisyclean.manifest.splitting import MANIFEST, SUMMARY_FILE, Summary

_LISTED = 8
_BARS, _LINES = 48, 3
_BLOCKS = " ▁▂▃▄▅▆▇█"


def print_summary(summary: Summary, out: Path) -> None:
    """Counts, the estimated mismatch rate, and where to look."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("split")
    table.add_column("pairs", justify="right")
    table.add_column("share", justify="right")
    for name in SPLITS:
        count = getattr(summary, name)
        table.add_row(name, f"{count:,}", f"{count / summary.pairs:.1%}" if summary.pairs else "–")
    table.add_section()
    table.add_row("all", f"{summary.pairs:,}", "")
    console.out.print(table)

    readable = summary.pairs - summary.unreadable
    if readable:
        _print_scores(out)
    low, high = summary.noise_interval
    console.out.print(
        f"Estimated mismatch rate: [bold]{summary.estimated_noise:.1%}[/] (95 % interval {low:.1%} to {high:.1%})"
    )
    if readable and high >= 1:
        console.out.print(
            "[bold]The pairs do not stand out from random pairings[/]: either the model cannot tell true pairs from "
            "mismatched ones, or all of them are mismatched"
        )
    if summary.close_noise is not None and summary.close_interval is not None:
        low, high = summary.close_interval
        passing = summary.near_miss_pass_rate
        console.out.print(
            f"Like near misses: {summary.close_noise:.1%} ({low:.1%} to {high:.1%}), counting true pairs that look so"
            + ("" if passing is None else f"; {passing:.0%} of near misses would pass as clean")
        )
    if summary.in_sample_noise is not None:
        _print_memorisation(summary)
    if summary.target_fdr is not None:
        console.out.print(f"Mismatch rate asked of the clean part: {summary.target_fdr:.1%}")
    else:
        console.out.print(f"Expected mismatch rate of the clean part: {summary.expected_clean_noise:.1%}")
    if readable and not summary.clean:
        console.out.print(f"[bold]The clean part is empty[/]: {_remedy(summary)}")
    reasons = list(summary.reasons.items())
    console.out.print("Reasons: " + escape("; ".join(f"{count:,} {reason}" for reason, count in reasons[:_LISTED])))
    if len(reasons) > _LISTED:
        console.out.print(f"  and {len(reasons) - _LISTED} more, in {SUMMARY_FILE}")
    for shard, damage in list(summary.damaged_shards.items())[:_LISTED]:
        console.out.print(escape(f"Shard {shard}: {damage}"))
    if summary.seconds:
        console.out.print(f"Scored in {summary.seconds:,.1f} s, {summary.pairs_per_second:,.0f} pairs/s")
    console.out.print(escape(f"Manifest: {out / MANIFEST}"))
    console.out.print(escape(f"Summary:  {out / SUMMARY_FILE}"))


def _print_scores(out: Path) -> None:
    """The match scores, and under them what random pairings would look like, as many as are estimated to be mismatched.

    Drawn from the manifest, so that it is what the split has seen.
    """
    import numpy as np

    from noisyclean.manifest.reading import Manifest
    from noisyclean.report.digest import score_histogram
    from noisyclean.report.rows import open_rows

    manifest = Manifest(out)
    with open_rows(manifest, columns=["split", "fold", "match_score"]) as db:
        scores = score_histogram(manifest, db, bins=_BARS)
    pairs = np.sum(list(scores.pairs.values()), axis=0)
    top = max(pairs.max(), scores.null.max())
    left, right = f"{scores.edges[0]:.1f}", f"{scores.edges[-1]:.1f}"
    console.out.print("Match scores, and of random pairings as many as are estimated to be mismatched:")
    for name, values in (("pairs", pairs), ("random", scores.null)):
        eighths = np.ceil(values / top * 8 * _LINES).astype(int)
        for line in reversed(range(_LINES)):
            bars = "".join(_BLOCKS[one] for one in np.clip(eighths - 8 * line, 0, 8)).rstrip()
            if bars:
                console.out.print(f"  {'' if line else name:<7} {bars}")
    console.out.print(f"          {left}{right:>{_BARS - len(left)}}\n")


def _remedy(summary: Summary) -> str:
    if summary.target_fdr is None:
        return "give `noisyclean split` a larger --keep or an easier --min-score"
    return (
        f"no pair is sure enough at {summary.target_fdr:.1%}; ask for less with a larger --fdr, take the best with "
        "`noisyclean split --keep 0.1`, or score with a better model"
    )


def _print_memorisation(summary: Summary) -> None:
    seen, interval = summary.in_sample_noise, summary.in_sample_interval
    assert seen is not None
    assert interval is not None
    console.out.print(
        f"{summary.in_sample:,} pairs were scored by a model that has trained on them; their mismatch rate "
        f"seems {seen:.1%}"
    )
    if summary.noise_interval[0] > interval[1]:
        hidden = 100 * (summary.estimated_noise - seen)
        console.out.print(
            f"[bold]Memorisation hides {hidden:.1f} points of mismatches[/], and the clean part holds more than "
            "was asked: fit with --folds 2"
        )
    else:
        console.out.print("That is no less than of pairs it has never seen: no sign of memorisation")
