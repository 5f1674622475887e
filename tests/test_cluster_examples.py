"""What is to be run on a cluster cannot be run here: it is read as SLURM's shell and Kubernetes read it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import yaml
from typer.main import get_command

from noisyclean.cli import app

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"


def options_of_score() -> set[str]:
    command = get_command(app).commands["score"]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in parameter.opts}


def options(line: str) -> set[str]:
    return {word for word in shlex.split(line) if word.startswith("-")}


def test_slurm() -> None:
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    (line,) = re.findall(r"^noisyclean score .*", script.read_text(encoding="utf-8"), re.M)
    assert options(line) <= options_of_score()


def test_kuberay() -> None:
    job = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].startswith("noisyclean score ")
    assert options(job["spec"]["entrypoint"]) <= options_of_score()
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {one["name"] for one in pod["volumes"]}
        for container in pod["containers"]:
            assert {one["name"] for one in container["volumeMounts"]} <= volumes
