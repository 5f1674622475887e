"""The pairs that a model scores next, embedded and scored in passes that all have the same shape.

Matrix products of other shapes are rounded otherwise. So that a pair's score depends on the pair alone, and not on what
it happened to come with, every pass has ``width`` rows, and a caption is embedded among captions of its length only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noisyclean.corpus.chunk import Chunk
from noisyclean.device import moved
from noisyclean.manifest.schema import MEASURED, REMATCH, STATISTICS
from noisyclean.scoring.reference import BankedEncoder

PASSES = 64
"""A window's pairs, in passes. Once a window the rest of each length is filled up to a pass: with so many passes, those
that are filled up hardly count."""
FOUND = (*MEASURED, *REMATCH)


@dataclass(frozen=True)
class WindowScores:
    """What was found of the n pairs of a window, in the order in which they came.

    Attributes:
        columns: (n, ``len(FOUND)``) float64, which holds both float32 and places exactly; NaN where there is nothing.
        image, text: (n, d) float32 unit-norm embeddings.
    """

    columns: NDArray[np.float64]
    image: Tensor
    text: Tensor


class Window:
    """Takes pairs until there is no ``room`` left; each different picture and caption among them is embedded once."""

    def __init__(self, model: BankedEncoder, width: int, *, rematch: bool) -> None:
        self._model = model
        self._width = width
        self._rematch = rematch
        self._start()

    def _start(self) -> None:
        self.room = PASSES * self._width
        self._ids: list[NDArray[np.int64]] = []
        self._pairs: list[NDArray[np.int64]] = []
        self._images = _Side(self._model.encoder.encode_image, self._width)
        self._texts = _Side(self._model.encoder.encode_text, self._width)

    def add(self, chunk: Chunk, pairs: NDArray[np.int64], at: NDArray[np.int64]) -> None:
        """Take n pairs of a chunk, at most ``room``, and embed what fills a pass.

        Args:
            pairs: (R,) int64 hashes of (shard, key) of the chunk's readable pairs.
            at: (n,) int64, which of these are taken, in ascending order.
        """
        ids, text = chunk.caption_ids[at], _taken(chunk.text, at)
        self._ids.append(ids)
        self._pairs.append(pairs[at])
        self.room -= len(at)
        with self._model.encoder.inference():
            self._images.add(chunk.image_ids[at].tolist(), _taken(chunk.image, at), np.zeros(len(at), np.int64))
            # Captions whose hashes are equal may differ in what a tokenizer sees: what it made of them is compared.
            names = [row.tobytes() for row in text.numpy()]
            self._texts.add(names, text, self._model.encoder.text_lengths(text))

    def scores(self) -> WindowScores:
        """The scores of all pairs since the last call; the window is empty after it."""
        encoder, bank = self._model.encoder, self._model.bank
        ids, pairs = np.concatenate(self._ids), np.concatenate(self._pairs)
        with encoder.inference():
            image, text = self._images.embeddings(), self._texts.embeddings()
            passes = [
                self._pass(image, text, ids, slice(start, start + self._width))
                for start in range(0, len(ids), self._width)
            ]
        self._start()
        found = torch.cat(passes).cpu().numpy().astype(np.float64)
        score = found[:, STATISTICS.index("match_score")].astype(np.float32)
        p = np.column_stack([bank.p_values(score), bank.near_miss_p_values(score)])
        statistics, partners = found[:, : len(STATISTICS)], found[:, len(STATISTICS) :]
        rematched = np.full((len(ids), len(REMATCH)), np.nan)
        if self._rematch:
            place = bank.places_of(ids, pairs)
            rematched[:, 0] = np.where(place >= 0, place, np.nan)
            rematched[:, 1:] = partners
        return WindowScores(np.column_stack([statistics, p, rematched]), image, text)

    def _pass(self, image: Tensor, text: Tensor, ids: NDArray[np.int64], where: slice) -> Tensor:
        """(n, statistics and, if asked for, partners) of at most ``width`` pairs."""
        here = ids[where]
        missing = self._width - len(here)
        padded = (
            padded_rows(image[where], missing),
            padded_rows(text[where], missing),
            np.pad(here, (0, missing), "edge"),
        )
        if self._rematch:
            statistics, partners = self._model.bank.score_and_rematch(*padded)
        else:
            statistics, partners = self._model.bank.score(*padded), None
        # Double holds the partners' places exactly.
        columns = [*(getattr(statistics, name) for name in STATISTICS), *(one.double() for one in partners or ())]
        return torch.stack(columns, dim=1)[: len(here)]


class _Side:
    """One side of a window's pairs: every different input is embedded once, among those of its length."""

    def __init__(self, encode: Callable[[Tensor], Tensor], width: int) -> None:
        self._encode = encode
        self._width = width
        self._place_of: dict[Hashable, int] = {}
        self._places: list[NDArray[np.int64]] = []
        self._queues: dict[int, list[tuple[NDArray[np.int64], Tensor]]] = {}
        self._embedded: list[tuple[NDArray[np.int64], Tensor]] = []

    def add(self, names: Sequence[Hashable], inputs: Tensor, lengths: NDArray[np.int64]) -> None:
        """Take n inputs, equal names for equal ones, and embed what fills a pass."""
        known = len(self._place_of)
        places = np.array([self._place_of.setdefault(name, len(self._place_of)) for name in names], np.int64)
        self._places.append(places)
        different, first = np.unique(places, return_index=True)
        new = first[different >= known]
        for length in np.unique(lengths[new]).tolist():
            at = new[lengths[new] == length]
            queue = self._queues.setdefault(length, [])
            queue.append((places[at], _taken(inputs, at)))
            if sum(len(places) for places, _ in queue) >= self._width:
                self._queues[length] = self._run(queue)

    def embeddings(self) -> Tensor:
        """(n, d), of all inputs in the order in which they came."""
        for queue in filter(None, self._queues.values()):
            for rest in self._run(queue):
                self._run_pass(*rest)
        order = np.concatenate([places for places, _ in self._embedded]).argsort()
        embedded = torch.cat([one for _, one in self._embedded])
        at = order[np.concatenate(self._places)]
        return embedded[torch.from_numpy(at).to(embedded.device)]

    def _run(self, queue: Sequence[tuple[NDArray[np.int64], Tensor]]) -> list[tuple[NDArray[np.int64], Tensor]]:
        """Embed all whole passes of a queue; returns what is left."""
        places = np.concatenate([places for places, _ in queue])
        inputs = torch.cat([one for _, one in queue])
        whole = len(places) - len(places) % self._width
        for start in range(0, whole, self._width):
            here = slice(start, start + self._width)
            self._run_pass(places[here], inputs[here])
        return [(places[whole:], inputs[whole:])] if whole < len(places) else []

    def _run_pass(self, places: NDArray[np.int64], inputs: Tensor) -> None:
        embedded = self._encode(padded_rows(inputs, self._width - len(places)))
        self._embedded.append((places, embedded[: len(places)]))


def _taken(batch: Tensor, at: NDArray[np.int64]) -> Tensor:
    """The rows ``at``, in ascending order; all of them need no copy."""
    return batch if len(at) == len(batch) else batch[moved(torch.from_numpy(at), batch.device)]


def padded_rows(batch: Tensor, missing: int) -> Tensor:
    """The batch with its last row ``missing`` times more."""
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch
