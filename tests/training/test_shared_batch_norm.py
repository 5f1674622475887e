"""Batch normalisation of several processes is torch's own: in value, in gradient, and in what is kept for backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from noisyclean.training.distributed import SharedBatchNorm, World, share_batch_norm

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A world of one, which talks to itself as one of many would: on a GPU by NCCL."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(module: nn.Module, values: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], float]:
    """All that comes of a step, and the bytes kept for backward, for each number of the input."""
    values = values.clone().requires_grad_()
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes if tensor.numel() >= values.numel() else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(values)
    output.backward(gradient)
    assert values.grad is not None
    parameters = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    return {"output": output, "input": values.grad, **parameters, **dict(module.named_buffers())}, kept / values.numel()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchs_own(device: str, dtype: torch.dtype, tolerance: float, training: bool) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.BatchNorm2d(8, momentum=0.3)).to(device)
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    shared = nn.Sequential(nn.BatchNorm2d(8, momentum=0.3)).to(device)
    shared.load_state_dict(whole.state_dict())
    share_batch_norm(shared, World(0, 2))
    assert isinstance(shared[0], SharedBatchNorm)
    values, gradient = ((torch.randn(6, 8, 5, 7) * 3 + 5).to(device, dtype) for _ in range(2))
    (expected, least), (found, kept) = (run(one.train(training), values, gradient) for one in (whole, shared))
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        scale = one.double().abs().max().item()
        torch.testing.assert_close(found[name], one, atol=tolerance * scale, rtol=0, msg=name)
    assert kept <= max(least, values.element_size())
