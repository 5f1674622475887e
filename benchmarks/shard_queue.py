"""How long a corpus takes on a cluster whose nodes fail, are slow and come back: a simulation of the queue of shards.

    python benchmarks/shard_queue.py

Nothing is scored. Shards are handed out as the Ray engine does it, by the very function. Each decoding process takes
one after another; what it takes for each varies. A node that fails takes all of its models with it: the shards they had
not finished wait again, and it is back later. Rates are those that were measured of one GPU with its cores.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from noisyclean.scoring.engines.parcels import parcel_size

HOUR = 3600.0


@dataclass(frozen=True)
class Cluster:
    """What shards are scored on.

    Attributes:
        nodes, gpus: so many nodes, each with so many GPUs.
        workers: decoding processes beside each GPU.
        rate: pairs a second that a GPU scores with these.
        spread: standard deviation of the logarithm of what a shard takes.
        pause: seconds between two parcels of a GPU, in which its decoding starts again.
        between_failures: mean seconds from when a node is there to when it fails.
        away: seconds until it scores again.
        slow: so many nodes work at half the rate.
    """

    nodes: int
    gpus: int
    workers: int
    rate: float
    spread: float
    pause: float
    between_failures: float
    away: float
    slow: int

    def failures(self, random: np.random.Generator, until: float) -> list[NDArray[np.float64]]:
        """For each node, when it fails."""
        expected = until / self.between_failures
        times = int(expected + 10 * np.sqrt(expected) + 10)
        ups = random.exponential(self.between_failures, (self.nodes, times))
        return list(np.cumsum(ups + self.away, axis=1) - self.away)


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        seconds: until the last shard was done.
        again: shards that were begun and cut off.
        failures: of nodes, meanwhile.
        idle: GPU-seconds from when a GPU had nothing left to do to the end.
    """

    seconds: float
    again: int
    failures: int
    idle: float


def simulate(cluster: Cluster, shards: int, pairs: int, seed: int) -> Outcome:
    """Score so many shards of so many pairs each."""
    random = np.random.default_rng(seed)
    crew = cluster.nodes * cluster.gpus
    failures = cluster.failures(random, 20 * shards * pairs / (cluster.rate * crew))
    waiting, again = shards, 0
    idle: list[int] = []
    last = np.zeros(crew)
    # When a GPU is free, or, of none, so many shards wait again.
    events: list[tuple[float, int, int]] = [(0.0, gpu, 0) for gpu in range(crew)]
    while events:
        now, gpu, lost = heapq.heappop(events)
        if lost:
            waiting += lost
            for one in idle:
                heapq.heappush(events, (now, one, 0))
            idle = []
            continue
        node = gpu // cluster.gpus
        fails = failures[node]
        k = int(np.searchsorted(fails, now, side="right"))
        if k and now < fails[k - 1] + cluster.away:
            heapq.heappush(events, (fails[k - 1] + cluster.away, gpu, 0))
            continue
        if not waiting:
            idle.append(gpu)
            continue
        size = parcel_size(waiting, crew, cluster.workers)
        waiting -= size
        mean = pairs * cluster.workers / cluster.rate * (2 if node < cluster.slow else 1)
        each = mean * random.lognormal(-(cluster.spread**2) / 2, cluster.spread, size)
        ends = now + cluster.pause + _ends(each, cluster.workers)
        finished = ends[ends <= fails[k]]
        last[gpu] = max(last[gpu], finished.max(initial=0.0))
        if len(finished) == size:
            heapq.heappush(events, (ends.max(), gpu, 0))
        else:
            again += int(((ends - each <= fails[k]) & (ends > fails[k])).sum())
            heapq.heappush(events, (fails[k], -1, size - len(finished)))
            heapq.heappush(events, (fails[k] + cluster.away, gpu, 0))
    end = float(last.max())
    failed = sum(int(np.searchsorted(one, end)) for one in failures)
    return Outcome(end, again, failed, float((end - last).sum()))


def _ends(each: NDArray[np.float64], workers: int) -> NDArray[np.float64]:
    """When shards end that take so long each, and go to whichever decoding process is through first."""
    free = [0.0] * workers
    ends = []
    for one in each:
        ends.append(free[0] + one)
        heapq.heapreplace(free, ends[-1])
    return np.array(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=float, default=1e9)
    parser.add_argument("--shard", type=int, default=10_000, help="pairs in a shard")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--workers", type=int, default=8, help="decoding processes beside a GPU")
    parser.add_argument("--rate", type=float, default=1530, help="pairs a second of a GPU with these")
    parser.add_argument("--spread", type=float, default=0.2, help="of what shards take: 0.2 is a fifth more or less")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two parcels of a GPU")
    parser.add_argument("--away", type=float, default=900.0, help="seconds until a node that failed scores again")
    parser.add_argument("--times", type=int, default=5, help="seeds; medians are told")
    wanted = parser.parse_args()
    shards = int(wanted.pairs) // wanted.shard
    gpus = wanted.nodes * wanted.gpus
    least = shards * wanted.shard / (wanted.rate * gpus)
    print(f"{shards:,} shards of {wanted.shard:,} pairs on {gpus} GPUs: {least / HOUR:.2f} h at the least\n")
    print("| a node fails | nodes at half the rate | hours | over the least | failures | shards cut off | idle |")
    print("|---|---|---|---|---|---|---|")
    for between, slow in [(np.inf, 0), (24, 0), (2, 0), (0.5, 0), (np.inf, 1), (2, 1)]:
        cluster = Cluster(
            wanted.nodes,
            wanted.gpus,
            wanted.workers,
            wanted.rate,
            wanted.spread,
            wanted.pause,
            between * HOUR if np.isfinite(between) else 1e15,
            wanted.away,
            slow,
        )
        runs = [simulate(cluster, shards, wanted.shard, seed) for seed in range(wanted.times)]
        hours, again, failures, idle = (
            statistics.median(getattr(one, name) for one in runs) for name in ("seconds", "again", "failures", "idle")
        )
        often = f"every {between:g} h" if np.isfinite(between) else "never"
        print(
            f"| {often} | {slow} | {hours / HOUR:.2f} | {hours / least - 1:.1%} | {failures:.0f} | {again:.0f} "
            f"| {idle / (gpus * hours):.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
