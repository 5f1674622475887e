"""Training two linear maps on top of a pretrained encoder whose towers stay as they are, and so run once a pair.

With W a trained map and f an embedding before normalisation, normalise(W f/|f|) = normalise(W f): trained on unit-norm
embeddings, the map can be multiplied into the last linear layer of its tower, and the result is an open_clip model like
any other. *Ours*.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from noisyclean.corpus.source import Batch, PairSource, in_batches
from noisyclean.device import moved
from noisyclean.encoders import DualEncoder, last_projections
from noisyclean.errors import NoisycleanError
from noisyclean.files import replacing
from noisyclean.progress import SILENT, Progress
from noisyclean.training.distributed import ALONE, World

_EMBEDDING_BATCH = 256


class _Maps(nn.Module):
    """All that is trained.

    Attributes:
        image, text: (d, d) float32, what each map has beyond the identity: decayed, the maps go back to that.
        logit_scale: as open_clip has it.
    """

    def __init__(self, width: int, logit_scale: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(width, width, device=logit_scale.device))
        self.text = nn.Parameter(torch.zeros(width, width, device=logit_scale.device))
        self.logit_scale = nn.Parameter(logit_scale.detach().clone())


class FrozenEncoder(DualEncoder):
    """An encoder of which two linear maps behind the towers, and the temperature, are trained.

    It takes pixels and tokens as any other does, and in their place what :class:`EmbeddedPairs` has of them, which are
    floats.

    Attributes:
        base: the encoder whose towers are used; several may share it.
        maps: what is trained, also as ``model``.
    """

    def __init__(self, base: DualEncoder) -> None:
        """Start as ``base`` is.

        Raises:
            UsageError: one of its towers does not end in a linear layer.
        """
        last_projections(base)  # told now, and not when all is trained
        base.model.eval()
        self.base = base
        self.maps = _Maps(base.config["model_cfg"]["embed_dim"], cast(Tensor, base.model.logit_scale))
        super().__init__(self.maps, base.config, base.preprocessor.tokenizer)

    def to(self, device: torch.device | str) -> DualEncoder:
        """Move to ``device``, with the base."""
        self.base.to(device)
        return super().to(device)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) uint8, or (B, d) float embeddings by the base → (B, d) unit-norm float32."""
        if not image.is_floating_point():
            with torch.no_grad():
                image = self.base.encode_image(image)
        return self._mapped(image, self.maps.image)

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, context) int, or (B, d) float embeddings by the base → (B, d) unit-norm float32."""
        if not text.is_floating_point():
            with torch.no_grad():
                text = self.base.encode_text(text)
        return self._mapped(text, self.maps.text)

    def _mapped(self, embeddings: Tensor, beyond_identity: Tensor) -> Tensor:
        embeddings = moved(embeddings, self.device).float()
        return functional.normalize(embeddings + embeddings @ beyond_identity.T, dim=-1)

    def folded(self) -> DualEncoder:
        """The base with the maps in its last layers: of the same embeddings, but for rounding, and nothing behind."""
        whole = copy.deepcopy(self.base)
        with torch.no_grad():
            for layer, beyond_identity in zip(last_projections(whole), (self.maps.image, self.maps.text), strict=True):
                for part in layer:
                    part.add_(beyond_identity @ part)
            cast(Tensor, whole.model.logit_scale).copy_(self.maps.logit_scale)
        return whole

    def fingerprint(self) -> str:
        """That of the model it is saved as."""
        return self.folded().fingerprint()

    def save(self, directory: Path) -> None:
        """Write what it is when :meth:`folded`."""
        self.folded().save(directory)


class EmbeddedPairs:
    """Pairs as an encoder has embedded them, once and for all: a source of batches of embeddings.

    They lie in a file, 4·d bytes a pair, of which the system keeps in memory what it has room for; an interrupted fit
    finds them again. In the batches, ``pixels`` and ``tokens`` are (B, d) half precision. Several processes embed a
    part of the pairs each; the first writes the file, and all read it.
    """

    def __init__(
        self,
        source: PairSource,
        encoder: DualEncoder,
        folder: Path,
        *,
        progress: Progress = SILENT,
        world: World = ALONE,
    ) -> None:
        """Embed all usable pairs, unless the file of a former call for the same pairs and encoder is in ``folder``.

        Raises:
            NoisycleanError: there is no room for the file.
        """
        self.index = source.index
        self._world = world
        key = f"{self.index.fingerprint()} {encoder.fingerprint()}"
        path = folder / f"embeddings-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.npy"
        if not world.once(path.is_file):
            _write_embeddings(path, source, encoder, progress, world)
            world.everyone(None)  # the file is whole before any of them reads it
        self._pairs: NDArray[np.float16] = np.load(path, mmap_mode="r")
        # No embedding is all zeros: these pairs could not be decoded.
        self._known = self._pairs[:, 0].any(axis=1)

    def batches(self, rows: NDArray[np.int64], batch_size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        wanted = np.sort(rows)
        for part in in_batches(torch.from_numpy(wanted[self._known[wanted]]), batch_size, shuffle):
            own = part[self._world.share(len(part))]
            image, text = torch.from_numpy(self._pairs[own.numpy()]).unbind(1)
            yield Batch(own, image, text)


def _write_embeddings(path: Path, source: PairSource, encoder: DualEncoder, progress: Progress, world: World) -> None:
    """Write ``[rows of the index, 2, d]`` float16, images first; zeros where there is nothing to embed."""
    usable = np.flatnonzero(source.index.usable)
    shape = (len(source.index), 2, encoder.config["model_cfg"]["embed_dim"])
    with (
        _new_file(path, shape) if world.rank == 0 else nullcontext() as pairs,
        progress.task("embedding the pairs", len(usable), "pairs") as task,
        encoder.inference(),
    ):
        for batch, parts in world.in_step(source.batches(usable, _EMBEDDING_BATCH * world.size)):
            image, text, _ = world.embed(encoder, batch, parts)
            rows = world.gather(batch.rows, parts)
            if pairs is not None:
                pairs[rows.numpy()] = torch.stack([image, text], dim=1).half().numpy(force=True)
            task.advance(parts.total)


@contextmanager
def _new_file(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float16]]:
    """A file of zeros to be filled, in place of any that other pairs or another encoder have left beside it."""
    remove_embeddings(path.parent)
    needed, free = 2 * np.prod(shape), shutil.disk_usage(path.parent).free
    # Beyond the end of a disk a mapped file does not raise an error: it ends the process.
    if needed > free:
        raise NoisycleanError(
            f"{path.parent}: {free / 1e9:.1f} GB are free, and the embeddings of all pairs take {needed / 1e9:.1f} GB; "
            "give a folder on another disk with -o"
        )
    with replacing(path) as temporary:
        pairs = open_memmap(temporary, "w+", np.float16, shape)
        yield pairs
        pairs.flush()


def remove_embeddings(folder: Path) -> None:
    """Remove what :class:`EmbeddedPairs` has left in ``folder``."""
    for path in folder.glob("embeddings-*.npy"):
        path.unlink()
