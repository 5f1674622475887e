"""Export the clean pairs as shards, and train on them with open_clip's own training loop.

python examples/filter_then_train.py noisyclean-out --model ViT-B-32 --batch-size 256 --epochs 8

What follows the OUT folder goes to open_clip, which needs webdataset: pip install webdataset
"""

import sys
from pathlib import Path

import open_clip_train.data
from open_clip_train.main import main as train

import noisyclean as nc
import noisyclean.encoders  # makes the small encoders known to open_clip: --model noisyclean-tiny

out, *options = sys.argv[1:] or ["noisyclean-out"]

done = nc.export(out, to="clean-shards", format="shards")
print(f"{done.rows} clean pairs in {done.files} shards")

# webdataset marks the end of each shard since 0.2.96; the loader of open_clip 3.3 takes the mark for a file.
expand = open_clip_train.data.tar_file_expander
open_clip_train.data.tar_file_expander = lambda *words, **options: filter(None, expand(*words, **options))

# sizes.json in the folder tells open_clip how many pairs an epoch has.
shards = sorted(str(path) for path in Path("clean-shards").rglob("*.tar"))
train(["--train-data", "::".join(shards), "--dataset-type", "webdataset", "--name", "clean", *options])
