"""Scoring beside clip-retrieval's inference: the same shards, the same weights, as many processes.

    python -m venv CR && CR/bin/pip install clip-retrieval 'setuptools<70'
    python benchmarks/clip_retrieval.py CR/bin/python

clip-retrieval wants older packages, so it runs in an environment of its own, by its own reader, mapper, writer and
runner. It knows no weights in a folder: its loader is replaced by one that opens them with open_clip. Both embed
pictures and captions, and write what comes of it; noisyclean classifies the pairs by its bank besides. The two take
turns, of each the time from the first tar to the last file is measured, and of the reader alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from noisyclean.encoders import create_encoder
from noisyclean.evaluation.bench.throughput.corpus import PHOTO, make_pairs, write_tars
from noisyclean.evaluation.bench.throughput.rounds import rate, ratio, take_turns
from noisyclean.evaluation.bench.throughput.scoring import Subject
from noisyclean.progress import SILENT

PAIRS_PER_TAR = 128

_THEIRS = """
import json, sys, time
import open_clip
from clip_retrieval.clip_inference import mapper
from clip_retrieval.clip_inference.logger import LoggerWriter
from clip_retrieval.clip_inference.reader import WebdatasetReader
from clip_retrieval.clip_inference.runner import Runner
from clip_retrieval.clip_inference.writer import NumpyWriter

what, tars, model, out, width, workers = json.loads(sys.argv[1])
loaded, _, transform = open_clip.create_model_and_transforms(**model)
tokenizer = open_clip.get_tokenizer(model["model_name"])
mapper.load_clip = lambda **_: (loaded.eval(), transform, tokenizer)
started = 0.0

def reader(sampler):
    global started
    started = time.perf_counter()
    return WebdatasetReader(sampler, transform, tokenizer, tars, width, workers)

if what == "load":
    count = sum(len(batch["text"]) for batch in reader(lambda items: items))
else:
    Runner(
        reader,
        lambda: mapper.ClipMapper(True, True, False, False, "", False, ""),
        lambda part: NumpyWriter(part, out, True, True, False, 1),
        lambda part: LoggerWriter(part, out + "/stats"),
        1,
    )(0)
    import pyarrow.parquet as pq
    count = pq.read_metadata(out + "/metadata/metadata_0.parquet").num_rows
print(json.dumps({"pairs": count, "rate": count / (time.perf_counter() - started)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="that of an environment with clip-retrieval")
    parser.add_argument("-m", "--model", default="ViT-S-16", help="an open_clip name; its weights are drawn")
    parser.add_argument("--tars", type=int, default=12, help=f"of {PAIRS_PER_TAR} made-up photos; a third is scored")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--times", type=int, default=5, help="rounds; medians are told")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tars = write_tars(home / "shards", make_pairs(wanted.tars * PAIRS_PER_TAR, PHOTO), PAIRS_PER_TAR)
        torch.manual_seed(0)
        subject = Subject.make(home / "model", create_encoder(wanted.model), torch.device("cpu"), wanted.workers)
        weights = home / "weights.pt"
        torch.save(subject.encoder.model.state_dict(), weights)
        model = {"model_name": wanted.model, "pretrained": str(weights)}

        few = tars[: -(-len(tars) // 3)]  # what is scored: a large model takes its time

        def theirs(what: str, tars: Sequence[Path]) -> Callable[[], float]:
            def run() -> float:
                words = [what, [*map(str, tars)], model, str(home / "theirs"), subject.width, wanted.workers]
                done = subprocess.run(
                    [wanted.python, "-c", _THEIRS, json.dumps(words)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise SystemExit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                assert found["pairs"] == len(tars) * PAIRS_PER_TAR
                return float(found["rate"])

            return run

        found = take_turns(
            "beside clip-retrieval",
            {
                "loader": rate(lambda: subject.load(tars)),
                "their loader": theirs("load", tars),
                "end to end": lambda: subject.score(few, home / "ours")[1],
                "theirs, end to end": theirs("run", few),
            },
            wanted.times,
            SILENT,
        )
    print("| pairs/s | noisyclean | clip-retrieval | ratio |\n|---|---|---|---|")
    for ours, other in (("loader", "their loader"), ("end to end", "theirs, end to end")):
        rates = [median(found[way]) for way in (ours, other)]
        print(f"| {ours} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio(found, ours, other):.2f} |")


if __name__ == "__main__":
    main()
