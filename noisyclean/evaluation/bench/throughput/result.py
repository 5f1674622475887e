"""What was measured, and the tables that say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from noisyclean.evaluation.markdown import table_heading, table_row

TINY = "noisyclean-tiny"
_WORDS = {
    "end_to_end_over_model": "from tar to Parquet, over the passes of the model alone",
    "end_to_end_over_limit": "the same, over what model and decoding allow together",
    "tiny_end_to_end_over_model": "with the tiny encoder, over its passes alone",
    "tiny_end_to_end_over_limit": "the same, over what model and decoding allow together",
    "over_plain_loop": "over a loop written by hand (webdataset, Pillow, open_clip)",
    "loader_over_plain": "decoding alone, over webdataset, Pillow and open_clip's transform",
    "corrupt_slowdown": "throughput lost where 1 % of the pictures are broken",
    "rows_lost": "rows lost there",
    "bank_over_matmul": "time of the bank classification, over that of its matrix products",
    "bank_share": "its share of the time from tar to Parquet",
    "text_speedup": "captions among those of their length, over the full context",
    "fit_over_bare": "training steps, over a bare loop of forward, backward and step",
    "refilter_share": "time of a filtering pass, over that of an epoch",
    "memory_growth_mb": "MB that peak memory grows with ten times the pairs",
}
_SHARES = {"corrupt_slowdown", "bank_share", "refilter_share"}


@dataclass(frozen=True)
class Throughput:
    """What was measured. Every ratio of rates is a median of ratios within a round.

    Attributes:
        end_to_end_over_model: samples/s of ``score`` from the first tar to the last Parquet file, over pairs/s of the
            passes of the model that these pairs take, decoded and in memory.
        end_to_end_over_limit: the same over the rate at which decoding alone and the model alone are done one after the
            other, as they share the cores; on a GPU, over the slower of the two.
        tiny_end_to_end_over_model, tiny_end_to_end_over_limit: with the tiny encoder.
        over_plain_loop: over a loop of webdataset, Pillow and open_clip with the same weights; None without webdataset.
        loader_over_plain: decoding alone over that loop's, with as many workers; None without webdataset.
        corrupt_slowdown: 1 − rate ratio, with the tiny encoder, where every hundredth picture is broken.
        rows_lost: samples of those that ``score`` made no row of.
        bank_over_matmul: time of classifying pairs against a bank of 8,192 × 512, over that of its two matrix products.
        bank_share: time in the bank over the time end to end.
        text_speedup: rate of the text tower by captions of one length, over that of the full context.
        fit_over_bare: rate of training steps over that of a bare loop with the same batches in memory.
        refilter_share: time of weighing the pairs anew over that of training on them for an epoch.
        memory_growth_mb: MB by which the peak memory of a scoring process grows from 10,000 to 100,000 pairs, with the
            tiny encoder; None where it cannot be told.
        rates: pairs/s of each way, medians.
        stages, tiny_stages: seconds that 1,000 pairs take in each stage alone, in one process.
        growth_in_pairs: ``pairs``, ``seconds`` and ``peak_mb`` of each of the two processes, from start to end.
        growth_in_bank: ``bank`` and ``seconds`` per 1,000 pairs.
        machine: what it was measured on, and with what settings; ``load`` is the system's load average before and
            after.
        notes: what was not measured, and why.
    """

    end_to_end_over_model: float
    end_to_end_over_limit: float
    tiny_end_to_end_over_model: float
    tiny_end_to_end_over_limit: float
    over_plain_loop: float | None
    loader_over_plain: float | None
    corrupt_slowdown: float
    rows_lost: int
    bank_over_matmul: float
    bank_share: float
    text_speedup: float
    fit_over_bare: float
    refilter_share: float
    memory_growth_mb: float | None
    rates: dict[str, float]
    stages: dict[str, float]
    tiny_stages: dict[str, float]
    growth_in_pairs: list[dict[str, float]]
    growth_in_bank: list[dict[str, float]]
    machine: dict[str, Any]
    notes: list[str]


def throughput_markdown(found: Throughput) -> str:
    """Tables of all figures."""
    machine = found.machine
    lines = [
        f"{machine['cores']} cores, {machine['threads']} threads of torch {machine['torch']}, "
        f"device {machine['device']}, {machine['precision']}, "
        f"{machine['workers']} decoding processes (--decode {machine['decode']}), "
        f"passes of {machine['width']}; {machine['pairs']:,} pairs, pictures of {machine['picture_kb']:.0f} KB; "
        f"medians of {machine['times']} rounds; "
        f"load {machine['load'][0]:.1f} before, {machine['load'][1]:.1f} after",
        "",
        *table_heading([f"{machine['model']}, and {TINY} where it says so", "figure"]),
    ]
    lines += [table_row([words, _figure(name, getattr(found, name))]) for name, words in _WORDS.items()]
    lines += ["", *table_heading(["alone or together", "pairs/s"])]
    lines += [table_row([name.replace("_", " "), f"{rate:,.1f}"]) for name, rate in found.rates.items()]
    lines += ["", *table_heading(["one stage alone, one process: ms a pair", machine["model"], TINY])]
    for stage, seconds in found.stages.items():
        cells = [stage.replace("_", " "), *(f"{one:.3f}" for one in (seconds, found.tiny_stages[stage]))]
        lines.append(table_row(cells))
    lines += ["", *table_heading(["pairs in the bank", "ms a pair"])]
    lines += [table_row([f"{one['bank']:,}", f"{one['seconds']:.3f}"]) for one in found.growth_in_bank]
    if found.growth_in_pairs:
        lines += ["", *table_heading(["pairs scored by a process of its own", "seconds, start to end", "peak MB"])]
        lines += [
            table_row([f"{one['pairs']:,}", f"{one['seconds']:.1f}", f"{one['peak_mb']:,.0f}"])
            for one in found.growth_in_pairs
        ]
    return "\n".join([*lines, *("\n" + note for note in found.notes)])


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name in _SHARES:
        return f"{value:.1%}"
    return f"{value:,.0f}" if name in {"rows_lost", "memory_growth_mb"} else f"{value:.2f}"
