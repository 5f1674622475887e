"""How long it takes to score pairs against a bank, beside the two bare matrix products of it, and how it is rounded.

    python benchmarks/bank.py --threads 1 --pairs 256 --bank 2048,8192

Products and statistics take turns, and medians are printed. The errors are those of float32 against float64, for random
embeddings and for true pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from noisyclean.srem import bank_statistics

WIDTH = 512
TEMPERATURES = (0.01, 0.07)


def embeddings(pairs: int, device: str, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """Images and texts that have nothing to do with one another, or are as alike as ``noise`` leaves them."""
    image, other = torch.randn(2, pairs, WIDTH, generator=torch.Generator().manual_seed(pairs))
    text = other if noise is None else image + noise * other
    return normalize(image, dim=1).to(device), normalize(text, dim=1).to(device)


def seconds(work: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def print_times(pairs: int, sizes: list[int], device: str, rounds: int) -> None:
    print("| bank | products, ms | statistics, ms | ratio | with partners |\n|---|---|---|---|---|")
    image, text = embeddings(pairs, device)
    own = torch.full((pairs,), -1, device=device)
    for size in sizes:
        sides = embeddings(size, device)

        def products(sides: tuple[Tensor, Tensor] = sides) -> object:
            return image @ sides[1].T, text @ sides[0].T

        def score(sides: tuple[Tensor, Tensor] = sides) -> object:
            return bank_statistics(image, text, *sides, TEMPERATURES[0], own)

        def rematch(sides: tuple[Tensor, Tensor] = sides) -> object:
            return bank_statistics(image, text, *sides, TEMPERATURES[0], own, partners=True)

        runs = [[seconds(work, device) for work in (products, score, rematch)] for _ in range(rounds + 1)][1:]
        bare, scored, _ = (1000 * statistics.median(column) for column in zip(*runs, strict=True))
        ratio, with_partners = (statistics.median(run[i] / run[0] for run in runs) for i in (1, 2))
        print(f"| {size:,} | {bare:.1f} | {scored:.1f} | {ratio:.2f} | {with_partners:.2f} |", flush=True)


def print_errors(pairs: int, size: int, device: str) -> None:
    print("\n| pairs | τ | statistic | largest error | mean error |\n|---|---|---|---|---|")
    for name, noise in (("random", None), ("true", 0.2)):
        sides = *embeddings(pairs, device, noise), *embeddings(size, device, noise)
        own = torch.full((pairs,), -1, device=device)
        for temperature in TEMPERATURES:
            found = bank_statistics(*sides, temperature, own)
            exact = bank_statistics(*(side.double() for side in sides), temperature, own)
            for statistic, one, true in zip(found._fields, found, exact, strict=True):
                error = (one.double() - true).abs()
                print(f"| {name} | {temperature} | `{statistic}` | {error.max():.1e} | {error.mean():.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256, help="pairs that are scored")
    parser.add_argument("--bank", default="1024,8192,65536", help="bank sizes, such as 1024,8192")
    parser.add_argument("--rounds", type=int, default=9, help="of each, in turn")
    parser.add_argument("--threads", type=int, help="of torch; as many as it takes by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    sizes = [int(size) for size in arguments.bank.split(",")]
    print_times(arguments.pairs, sizes, arguments.device, arguments.rounds)
    print_errors(arguments.pairs, sizes[-1], arguments.device)


if __name__ == "__main__":
    main()
