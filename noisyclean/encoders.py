"""The dual encoder: any open_clip model, made, loaded and saved.

Models travel in open_clip's ``local-dir:`` layout (``open_clip_config.json`` + ``open_clip_model.safetensors``), so
that whatever noisyclean trains, ``open_clip.create_model_and_transforms("local-dir:RUN/fold-0/encoder")`` loads.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize

from noisyclean.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

# No caption fills a context window with more characters than this; what lies beyond is cut before tokenising.
_MAX_CAPTION_CHARACTERS = 4096

open_clip.add_model_config(Path(__file__).parent / "encoder_configs")


@dataclass(frozen=True)
class Preprocessor:
    """What turns a picture and a caption into model input; picklable, so that worker processes can hold it."""

    picture: Any
    tokenizer: Any

    def pixels(self, image: Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """RGB picture → (H, W, 3) uint8, resized and cropped exactly as open_clip's validation transform does."""
        return np.array(self.picture(image), dtype=np.uint8)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Captions → (B, context) int64."""
        return cast(Tensor, self.tokenizer([caption[:_MAX_CAPTION_CHARACTERS] for caption in captions]))


class Encoder(Protocol):
    """What embeds the two sides of pairs, as :class:`DualEncoder` does, or hands on what is embedded."""

    def inference(self) -> AbstractContextManager[None]: ...

    def encode(self, image: Tensor, text: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def fingerprint(self) -> str: ...


class DualEncoder:
    """An open_clip image–text model with its preprocessing.

    Attributes:
        model: the open_clip module.
        config: ``{"model_cfg": …, "preprocess_cfg": …}``, as written to ``open_clip_config.json``.
        preprocessor: picture and caption preparation for this model.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], tokenizer: Any) -> None:
        self.model = model
        self.config = config
        cfg = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])
        transforms = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
        # The last two, to-tensor and normalise, run on the device in batches (encode_image): same arithmetic, but
        # a quarter of the bytes between the worker processes and the model.
        assert isinstance(transforms[-1], Normalize)
        self.preprocessor = Preprocessor(Compose(transforms[:-2]), tokenizer)
        self._mean = torch.tensor(cfg.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(cfg.std).view(1, 3, 1, 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar tensor: the reciprocal of open_clip's ``logit_scale``, differentiable."""
        return cast(Tensor, self.model.logit_scale).exp().reciprocal().reshape(())

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the input picture in pixels."""
        size = self.config["preprocess_cfg"]["size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def to(self, device: torch.device | str) -> DualEncoder:
        """Move to ``device``, convolutions in channels-last layout (measured twice as fast on a CPU)."""
        self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, d) unit-norm float."""
        images = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        normalised = (images.float().div(255) - self._mean) / self._std
        return cast(Tensor, self.model.encode_image(normalised, normalize=True))  # type: ignore[operator]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, context) int → (B, d) unit-norm float."""
        tokens = tokens.to(self.device, non_blocking=True).long()
        return cast(Tensor, self.model.encode_text(tokens, normalize=True))  # type: ignore[operator]

    def encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of B pairs, two (B, d) unit-norm float32."""
        return self.encode_image(pixels).float(), self.encode_text(tokens).float()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)

    def fingerprint(self) -> str:
        """A digest of weights and configuration: equal fingerprints give equal scores."""
        digest = hashlib.blake2b(json.dumps(self.config, sort_keys=True).encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write the ``local-dir:`` layout into ``directory``."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})


class EncoderEnsemble:
    """Several encoders of one preparation as one, whose logits are the mean of theirs. *Ours*.

    The embeddings are concatenated, each scaled by √(τ/(τₖK)) with τ the harmonic mean of the K temperatures τₖ: they
    are of unit norm again, and ⟨image, text⟩/τ is the mean of the ⟨imageₖ, textₖ⟩/τₖ.
    """

    def __init__(self, encoders: Sequence[DualEncoder]) -> None:
        self.encoders = list(encoders)

    @classmethod
    def of(cls, encoders: Sequence[DualEncoder]) -> DualEncoder | EncoderEnsemble:
        """The ensemble, or the encoder itself where there is but one."""
        return encoders[0] if len(encoders) == 1 else cls(encoders)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoders[0].device

    @property
    def preprocessor(self) -> Preprocessor:
        """Picture and caption preparation, the same for all."""
        return self.encoders[0].preprocessor

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar tensor."""
        return torch.stack([one.temperature for one in self.encoders]).reciprocal().mean().reciprocal()

    def encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of B pairs, two (B, K·d) unit-norm float32."""
        images, texts = zip(*(one.encode(pixels, tokens) for one in self.encoders), strict=True)
        temperatures = torch.stack([one.temperature for one in self.encoders])
        scales = (self.temperature / temperatures / len(self.encoders)).sqrt()
        image, text = (
            torch.cat([scale * one for scale, one in zip(scales, side, strict=True)], dim=1) for side in (images, texts)
        )
        return image, text

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        with ExitStack() as stack:
            for one in self.encoders:
                stack.enter_context(one.inference())
            yield

    def fingerprint(self) -> str:
        """A digest of all encoders in their order."""
        digests = [one.fingerprint() for one in self.encoders]
        return hashlib.blake2b(json.dumps(digests).encode(), digest_size=16).hexdigest()


def create_encoder(
    name: str,
    pretrained: str | None = None,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    temperature: float | None = None,
) -> DualEncoder:
    """Make an encoder from an open_clip name, ``local-dir:`` or ``hf-hub:``, with or without pretrained weights.

    Args:
        name: an open_clip model name (``ViT-B-32``), one of noisyclean's own (``noisyclean-tiny``), or a schema.
        pretrained: an open_clip tag, a weights file, or None for random weights (drawn from torch's generator).
        image_size, context_length: override the model's own.
        temperature: override the initial softmax temperature.

    Raises:
        UsageError: unknown name or tag, or weights that cannot be loaded.
    """
    try:
        config = open_clip.get_model_config(name)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:  # the last: JSON, but no mapping
        raise UsageError(f"{name}: cannot read the model's configuration ({error})") from error
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 1)
        hint = f"did you mean {near[0]}?" if near else "open_clip.list_models() lists them"
        raise UsageError(f"{name}: no such model, nor a folder that `noisyclean fit` wrote; {hint}")
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        config["text_cfg"]["context_length"] = context_length
    try:
        with _quiet():
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                force_image_size=image_size,
                force_context_length=context_length,
                pretrained_text=False,
                require_pretrained=pretrained is not None or ":" in name,
            )
            tokenizer = open_clip.get_tokenizer(name, context_length=config["text_cfg"].get("context_length"))
    except Exception as error:  # whatever open_clip, the hub client or torch.load raise: the weights are unusable
        source = f"{name}/{pretrained}" if pretrained else name
        raise UsageError(f"{source}: cannot load the weights ({_first_line(error)})") from error
    if temperature is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(1 / temperature))
    preprocess = {**open_clip.model.get_model_preprocess_cfg(model)}
    return DualEncoder(model, {"model_cfg": config, "preprocess_cfg": preprocess}, tokenizer)


def load_encoder(spec: str) -> DualEncoder:
    """Load a pretrained encoder as ``score -m`` names it.

    ``NAME/TAG`` or ``NAME/PATH`` (``ViT-B-32/laion2b_s34b_b79k``, ``ViT-B-32/weights/epoch_5.pt``), ``local-dir:PATH``,
    a folder in that layout, or ``hf-hub:org/repo``.

    Raises:
        UsageError: no weights are named, or they cannot be loaded.
    """
    if (Path(spec) / CONFIG_FILE).is_file():
        spec = f"local-dir:{spec}"
    if spec.startswith("local-dir:"):
        directory = Path(spec.removeprefix("local-dir:"))
        if not (directory / CONFIG_FILE).is_file():
            raise UsageError(f"{directory}: no {CONFIG_FILE} in it, so not a model that open_clip can load")
        return create_encoder(spec)
    if spec.startswith("hf-hub:"):
        return create_encoder(spec)
    name, _, weights = spec.partition("/")
    if not weights:
        raise UsageError(
            f"{spec}: neither a folder that `noisyclean fit` wrote nor a model with weights; "
            f"name an open_clip tag or a weights file after a slash, such as ViT-B-32/laion2b_s34b_b79k"
        )
    return create_encoder(name, weights)


@contextmanager
def _quiet() -> Iterator[None]:
    # open_clip warns on the root logger that a model made to be trained has random weights.
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
