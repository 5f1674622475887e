"""Which device computes, and in what precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from noisyclean.errors import UsageError


def choose_device(name: str | None) -> torch.device:
    """The device the user named, or the best there is: CUDA, else CPU.

    Raises:
        UsageError: the device is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: no such device here; leave it out to have one chosen") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for a recipe's precision; None: plain float32.

    On a CPU bfloat16 is emulated on most machines, and many times slower than float32, so "auto" never takes it there.
    """
    if precision == "auto":
        precision = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. From page-locked memory it gets to a GPU without the CPU waiting for all before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Have a GPU do what this thread asks of it meanwhile beside all else that it has to do; in the end it is done.

    Of tensors that outlive this, :func:`left_to_model` must know.
    """
    if device.type != "cuda":
        yield
        return
    stream = _second_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def left_to_model(tensor: Tensor) -> Tensor:
    """The tensor; on a GPU its memory is not used again before the default stream, the model's, is through with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.default_stream(tensor.device))
    return tensor


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
