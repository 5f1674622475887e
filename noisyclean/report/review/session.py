"""One review: which pair is next, what was said of the others, and what follows from it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any

from noisyclean.errors import NoisycleanError
from noisyclean.evaluation.labelling import Calibration, calibrate, proportion_interval
from noisyclean.files import local_place
from noisyclean.manifest.reading import Manifest
from noisyclean.manifest.schema import CLEAN
from noisyclean.manifest.splitting import DEFAULT_OUT, split
from noisyclean.progress import SILENT, Progress
from noisyclean.report.gallery import legible
from noisyclean.report.review.labels import Labels, Verdict
from noisyclean.report.review.pictures import NoPicture, Pictures
from noisyclean.report.review.precision import labels_to_go

DEFAULT_PAIRS = 100


class OutOfDate(NoisycleanError):
    """What is asked for is not what is shown by now, as where two windows are open."""


class Session:
    """A sample of each split, judged pair by pair; all that is said is in ``OUT/labels.parquet`` at once.

    Threads may share it. A pair has a name, which is one of its sample and tells nothing of the pair.

    Args:
        out: the OUT folder.
        pairs: from each split; a sample that is in OUT already grows to it.
        seed: another seed, another sample; None: go on with what is in OUT, or else 0.
        progress: is told of the files read.

    Raises:
        UsageError: there is no manifest, there are no shards to take pictures from, or the labels in OUT do not fit.
    """

    def __init__(
        self,
        out: Path | str = DEFAULT_OUT,
        *,
        pairs: int = DEFAULT_PAIRS,
        seed: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.out = local_place(out)
        self._pairs = pairs
        self._lock = RLock()
        self._pictures = Pictures(self.out)
        self._begin(seed, progress)

    def _begin(self, seed: int | None, progress: Progress) -> None:
        self.labels = Labels(self.out, pairs=self._pairs, seed=seed, progress=progress)
        self._clean_pairs = Manifest(self.out).summary.clean
        self._skipped: dict[int, str] = {}

    def state(self) -> dict[str, Any]:
        """What the page shows: the pair to judge, without its split and scores; the progress; the clean part so far."""
        with self._lock:
            place = self._place()
            rows = self.labels.rows
            return {
                "pair": None if place is None else self._describe(place),
                "judged": len(rows) - len(self.labels.open_places()),
                "drawn": len(rows),
                "unsure": int(rows["unsure"].sum()),
                "skipped": list(self._skipped.values()),
                "back": self.labels.last_place() is not None,
                "clean": self._clean(),
            }

    def picture(self, pair: str) -> bytes:
        """The picture of the pair that is to be judged, a WebP.

        Raises:
            OutOfDate: another pair is.
        """
        with self._lock:
            return self._picture(self._current(pair))

    def look_ahead(self) -> None:
        """Fetch the picture of the pair after the present one."""
        with self._lock:
            ahead = [place for place in self.labels.open_places() if place not in self._skipped][1:2]
        for place in ahead:
            with suppress(NoPicture):  # said when its turn comes
                self._picture(place)

    def judge(self, pair: str, verdict: Verdict) -> None:
        """Keep what is said of the pair that is to be judged.

        Raises:
            OutOfDate: another pair is.
            NoisycleanError: the file was changed by someone else, or cannot be written.
        """
        with self._lock:
            self.labels.judge(self._current(pair), verdict)

    def take_back(self) -> None:
        """Take back the last verdict, so that its pair is to be judged again.

        Raises:
            NoisycleanError: the file was changed by someone else, or cannot be written.
        """
        with self._lock:
            last = self.labels.last_place()
            if last is not None:
                self.labels.judge(last, None)

    def calibration(self) -> Calibration | None:
        """What ``calibrate`` says to the labels; None before there is one. It reads the manifest.

        Raises:
            UsageError: the manifest is broken, or was split anew meanwhile.
        """
        if not self.labels.rows["matched"].notna().any():
            return None
        return calibrate(self.out, labels=self.labels.path)

    def redraw(self, keep: float) -> Path:
        """Redraw the split at the certified cut-off, and begin with a new sample.

        The new sample is of another seed: the pairs by which the cut-off was chosen would speak for it once more.

        Args:
            keep: what the cut-off was when it was decided upon.

        Returns:
            Where the labels so far are kept.

        Raises:
            OutOfDate: the labels certify another cut-off by now.
        """
        with self._lock:
            found = self.calibration()
            if found is None or found.cutoff is None or found.cutoff.keep != keep:
                raise OutOfDate("the labels certify another part by now; look at the figures again")
            split(self.out, keep=keep)
            kept = self.labels.put_away()
            self._begin(self.labels.seed + 1, SILENT)
            return kept

    def _place(self) -> int | None:
        """The first open place whose picture can be had."""
        for place in self.labels.open_places():
            if place in self._skipped:
                continue
            try:
                self._picture(place)
            except NoPicture as error:
                self._skipped[place] = str(error)
                continue
            return place
        return None

    def _picture(self, place: int) -> bytes:
        row = self.labels.rows.iloc[place]
        return self._pictures.read(row["shard"], row["key"])

    def _name(self, place: int) -> str:
        return f"{self.labels.seed}-{place}"

    def _current(self, pair: str) -> int:
        place = self._place()
        if place is None or self._name(place) != pair:
            raise OutOfDate("another pair is to be judged by now; reload the page")
        return place

    def _describe(self, place: int) -> dict[str, Any]:
        caption = self.labels.rows["caption"].iloc[place]
        return {"name": self._name(place), "caption": legible(caption) if isinstance(caption, str) else None}

    def _clean(self) -> dict[str, Any]:
        matched, labelled = self.labels.counts(CLEAN)
        low, high = proportion_interval(matched, labelled)
        left = self._clean_pairs - labelled
        return {
            "pairs": self._clean_pairs,
            "labelled": labelled,
            "matched": matched,
            "interval": [float(low), float(high)],
            "more": min(labels_to_go(matched, labelled), left) if labelled else None,
        }
