"""One training in several processes, which ``torchrun`` starts: what they tell one another, and who does what.

All of them run the same ``fit``. Each embeds its own pairs of a batch; the embeddings are gathered, and each comes to
the loss of the whole batch, though it holds the logits of its own pairs only (:class:`noisyclean.srem.PairMatrix`).
What is gathered takes its gradient from all processes. As each of these has the whole loss, W of them bring back W
times the gradient; the mean over the processes is that of one process with the whole batch, but for rounding.

Alone, every method of :class:`World` is the identity.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

from noisyclean.corpus.source import Batch
from noisyclean.encoders import DualEncoder
from noisyclean.errors import NoisycleanError, UsageError
from noisyclean.scoring.reference import Embedded
from noisyclean.srem import PairMatrix

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for another, which may be reading the corpus or embedding it. A dead one is not waited for:
its connections close, and torchrun ends all."""
GRACE = 2.0
"""Seconds that a process which fails after another waits before it ends; mostly it is ended before."""
_FAILED = "failed"
_PIXELS, _CHANNELS = (0, 2, 3), (1, -1, 1, 1)
_trainings = itertools.count()
_OF_THIS_PROCESS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class FailedElsewhereError(NoisycleanError):
    """Another process of the training has failed before this one, and says why."""


@dataclass(frozen=True)
class Parts:
    """How many pairs of a batch each process has, in the order of the processes.

    Attributes:
        sizes: one number a process; 0 where one has none.
        rank: which of them this process is.
    """

    sizes: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """The pairs of the whole batch."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        """Where this process's pairs are in the whole batch."""
        first = sum(self.sizes[: self.rank])
        return slice(first, first + self.sizes[self.rank])


@dataclass(frozen=True)
class World:
    """The processes of a training. What they call, they must all call, in the same order.

    Attributes:
        rank: which of them this is, from 0; the first is the one that writes files and talks.
        size: how many there are.
        local_size: how many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1

    def share(self, count: int) -> slice:
        """Which of ``count`` things in a row are this process's: as many as any other's, or one more."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def everyone(self, value: T) -> list[T]:
        """The ``value`` of every process, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _reaching_the_others():
            dist.all_gather_object(values, value)
        return values

    def once(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises in the first process, which alone does it, for all of them."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told = [work(), None]
            except Exception as error:
                told = [None, error]
        with _reaching_the_others():
            dist.broadcast_object_list(told, src=0)
        value, failure = told
        if failure is not None:
            raise failure
        return cast(T, value)

    def spread(self, state: T) -> T:
        """The first process's ``state`` of dicts, lists and tuples, for all of them; its tensors travel one by one."""
        if self.size == 1:
            return state
        own: list[Tensor] = []

        def outline(tensor: Tensor) -> Tensor:
            own.append(tensor)
            return tensor.to("meta")

        outlined = self.once(lambda: _map_tensors(state, outline))
        to_send = iter(own)

        def fill(like: Tensor) -> Tensor:
            tensor = next(to_send).contiguous() if self.rank == 0 else torch.empty(like.shape, dtype=like.dtype)
            if tensor.numel():
                with _reaching_the_others():
                    dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0)  # gloo does not know every dtype
            return tensor

        return cast(T, _map_tensors(outlined, fill))

    def parts(self, count: int) -> Parts:
        """The parts of a batch of which this process has ``count`` pairs."""
        if self.size == 1:
            return Parts((count,), 0)
        return Parts(tuple(map(int, _everyones(torch.tensor([count])))), self.rank)

    def gather(self, own: Tensor, parts: Parts) -> Tensor:
        """Rows of a batch from every process, in their order: ``[b, …]`` each → ``[B, …]``; differentiable."""
        return own if self.size == 1 else cast(Tensor, _Gather.apply(own, parts))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by their means over the processes; the same parameters have one in all of them."""
        if self.size == 1:
            return
        gradients = [one.grad for one in parameters if one.grad is not None]
        # In one piece after the whole backward pass: the order of collectives is then the same everywhere.
        flat = torch.cat([one.reshape(-1) for one in gradients])
        with _reaching_the_others():
            dist.all_reduce(flat)
        means = torch.split(flat.div_(self.size), [one.numel() for one in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def in_step(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Parts]]:
        """This process's part of every batch, with all parts' sizes, until no process has any more.

        A process that is through before the others, as where its shards are broken, goes on with empty parts.
        """
        left = iter(batches)
        while True:
            batch = next(left, None)
            parts = self.parts(0 if batch is None else len(batch))
            if not parts.total:
                return
            yield batch or _NO_PAIRS, parts

    def embed(self, encoder: DualEncoder, batch: Batch, parts: Parts) -> tuple[Tensor, Tensor, PairMatrix]:
        """Embed this process's part of a batch.

        Returns:
            Both sides of the whole batch, two (B, d) unit-norm float32, and their [B, B] similarities.
        """
        gather = partial(self.gather, parts=parts)
        sides = encoder.encode(batch.pixels, batch.tokens) if len(batch) else _embed_nothing(encoder)
        image, text = map(gather, sides)
        similarity = PairMatrix.shared(lambda i, j: image[i] @ text[j].T, parts.total, parts.own, gather)
        return image, text, similarity

    def for_all(self, count: Callable[[int], None] | None) -> Callable[[int], None] | None:
        """``count``, told what this process has done, as if the others were as far."""
        return count if count is None or self.size == 1 else lambda amount: count(amount * self.size)

    def joined(self, embedded: Embedded) -> Embedded:
        """The rows and embeddings of every process."""
        if self.size == 1:
            return embedded
        rows, image, text = embedded
        found = [one for one in self.everyone((rows, image.cpu(), text.cpu())) if len(one[0])]
        if not found:
            return embedded
        everyones, *sides = zip(*found, strict=True)
        image, text = (torch.cat(side).to(image.device) for side in sides)
        return np.concatenate(everyones), image, text


ALONE = World()
_NO_PAIRS = Batch(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))


def leads() -> bool:
    """Whether this process is the one to talk: the first, or the only one."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


@contextmanager
def joined_world() -> Iterator[World]:
    """The processes that ``torchrun`` started, of which this is one; without it, this process alone.

    CPU tensors travel by gloo, CUDA tensors by NCCL.

    Raises:
        FailedElsewhereError: in place of what is raised inside, where another process has raised before.
    """
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if size == 1:
        yield ALONE
        return
    with _reaching_the_others():
        everyones, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
        # torchrun's store outlives the processes, and knows those of former trainings, which do not answer any more.
        store = PrefixStore(f"noisyclean/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{next(_trainings)}", everyones)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(rank, size, int(os.environ["LOCAL_WORLD_SIZE"]))
    except BaseException as error:
        # What ends one ends the others soon after, with errors of their own that explain nothing. And as one has ended,
        # torchrun ends them all: not before the first has said what it has to say.
        if store.add(_FAILED, 1) > 1:
            time.sleep(GRACE)
            raise FailedElsewhereError("another process of this training has failed; it says why") from error
        raise  # leaving the group would wait for the others, who may wait for this one
    dist.destroy_process_group()


def own_device(device: torch.device, world: World) -> torch.device:
    """The device of this process: where ``device`` is CUDA without a number, one a process of a machine.

    Raises:
        UsageError: there are fewer than that, or not all processes have one.
    """
    if len(kinds := set(world.everyone(device.type))) > 1:
        raise UsageError(f"--device: some processes have {' and some '.join(sorted(kinds))}; name one that all have")
    if world.size == 1 or device.type != "cuda":
        return device
    if device == torch.device("cuda"):  # any of them
        there = torch.cuda.device_count()
        if there < world.local_size:
            raise UsageError(
                f"{world.local_size} processes on a machine with {there} CUDA devices; "
                f"start torchrun with --nproc-per-node {there}, or fit with --device cpu"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    elif world.local_size > 1:
        raise UsageError(f"--device {device}: {world.local_size} processes take a GPU each; give --device cuda")
    torch.cuda.set_device(device)
    return device


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the whole batch, of which each process has a part.

    As torch's ``SyncBatchNorm``, which does not run on a CPU. In evaluation it is what it replaces.

    Attributes:
        counts: whether what comes is of the batch.
    """

    counts = True

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        output, mean, unbiased = _Normalise.apply(input, self.weight, self.bias, self.eps, self.counts)
        cast(Tensor, self.num_batches_tracked).add_(1)
        for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            cast(Tensor, running).lerp_(now, cast(float, self.momentum))
        return cast(Tensor, output)


def share_batch_norm(model: nn.Module, world: World) -> None:
    """Have the batch normalisations inside ``model`` use the statistics of the whole batch; weights stay as they are.

    Raises:
        UsageError: it has some of a kind that cannot be shared.
    """
    if world.size == 1:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, _BatchNorm) or isinstance(child, SharedBatchNorm):
                continue
            if type(child) is not nn.BatchNorm2d:
                raise UsageError(
                    f"encoder.name: this encoder normalises by {type(child).__name__}, whose statistics several "
                    "processes cannot share; fit it without torchrun"
                )
            shared = SharedBatchNorm(child.num_features, child.eps, child.momentum)
            shared.weight, shared.bias = child.weight, child.bias
            for buffer, tensor in child.named_buffers():
                setattr(shared, buffer, tensor)
            shared.train(child.training)
            setattr(parent, name, shared)


def _embed_nothing(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    """Two (0, d), with the graph behind them that the other processes have: its collectives are waited for."""
    norms = [one for one in encoder.model.modules() if isinstance(one, SharedBatchNorm)]
    blank = torch.zeros(1, *encoder.image_size, 3, dtype=torch.uint8)
    for norm in norms:
        norm.counts = False
    try:
        # Not every encoder takes an empty batch.
        image, text = encoder.encode(blank, encoder.preprocessor.tokens([""]))
    finally:
        for norm in norms:
            norm.counts = True
    return image[:0], text[:0]


class _Normalise(torch.autograd.Function):
    """Batch normalisation with sums over the processes. Of the input, no more is kept than torch's own keeps."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, counts: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = input.float()
        total, mean, variance = _moments(values if counts else values[:0])
        scale = (variance + eps).rsqrt()
        ctx.counts = counts
        ctx.save_for_backward(input, weight, mean, scale, total)
        unbiased = variance * total / (total - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        normalised = (values - mean.view(_CHANNELS)) * scale.view(_CHANNELS)
        return (normalised * weight.view(_CHANNELS) + bias.view(_CHANNELS)).to(input.dtype), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        input, weight, mean, scale, total = ctx.saved_tensors
        gradient = gradient.float()
        normalised = (input.float() - mean.view(_CHANNELS)) * scale.view(_CHANNELS)
        own = torch.stack([gradient.sum(_PIXELS), (gradient * normalised).sum(_PIXELS)])
        to_input = gradient
        everyones = _sum(own if ctx.counts else torch.zeros_like(own)) / total
        if ctx.counts:  # else neither mean nor variance depends on this input
            of_mean, of_variance = (one.view(_CHANNELS) for one in everyones)
            to_input = gradient - of_mean - normalised * of_variance
        to_input = to_input * (weight * scale).view(_CHANNELS)
        return to_input.to(input.dtype), own[1], own[0], None, None


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(one, function) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(one, function) for one in value)
    return value


def _moments(own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of what all processes have, (n, C, …) each: the count of a channel, its mean and its variance, (C,) each."""
    size = own.numel() // own.shape[1]
    mean = own.sum(_PIXELS) / max(size, 1)
    # About means of their own, so that a difference of large sums does not lose them in rounding.
    squares = (own - mean.view(_CHANNELS)).square().sum(_PIXELS)
    everyones = _everyones(torch.stack([torch.full_like(mean, size), mean, squares]))
    sizes, means, squares = torch.stack(everyones, dim=1)
    total = sizes.sum(0)
    mean = (sizes * means).sum(0) / total
    return total, mean, (squares + sizes * (means - mean).square()).sum(0) / total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        longest = max(parts.sizes)
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: len(own)] = own
        return torch.cat([one[:size] for one, size in zip(_everyones(padded), parts.sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient)[ctx.parts.own], None


def _everyones(own: Tensor) -> list[Tensor]:
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with _reaching_the_others():
        dist.all_gather(found, own)
    return found


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    with _reaching_the_others():
        dist.all_reduce(total)
    return total


@contextmanager
def _reaching_the_others() -> Iterator[None]:
    try:
        yield
    except _OF_THIS_PROCESS:
        raise
    except RuntimeError as error:  # of whichever of torch's kinds
        raise NoisycleanError(
            "another process of this training has ended, or cannot be reached; repeat the same command to go on "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
