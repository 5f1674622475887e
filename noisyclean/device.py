"""Which device computes, and in what precision."""

from __future__ import annotations

import torch

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
