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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import Compose, Normalize

from noisyclean.corpus.decoding import (
    Decode,
    Encoded,
    UndecodableError,
    decode_apart,
    decode_image,
    decode_reduced,
    whole_jpeg,
)
from noisyclean.corpus.device_decoding import decode_jpegs
from noisyclean.corpus.resizing import Fit, fit_all, fit_one
from noisyclean.device import beside, choose_dtype, left_to_model, moved
from noisyclean.errors import UsageError
from noisyclean.files import replacing, write_json

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

# Lengths of texts are rounded up to multiples of this: few enough kinds of passes, and little padding.
_LENGTH_STEP = 8
# A JPEG decoded at a smaller scale, but this many times as large as is needed, changes hardly a score once resized; one
# just as large as needed moves one pair in seventy to another split (measured by benchmarks/decoding.py).
_OVERSAMPLING = 2
# Where open_clip's kinds of towers have their last layer; of several that are there, the first lies behind the others.
_PICTURE_LAST = (
    "visual.proj",
    "visual.attnpool.c_proj",
    "visual.head.proj",
    "visual.head.mlp.fc2",
    "visual.trunk.head",
    "visual.trunk.head.fc",
)
_CAPTION_LAST = ("text_projection", "text.text_projection")
# No caption fills a context window with more characters than this; what lies beyond is cut before tokenising.
_MAX_CAPTION_CHARACTERS = 4096

open_clip.add_model_config(Path(__file__).parent / "encoder_configs")


@dataclass(frozen=True)
class Preprocessor:
    """What turns a picture and a caption into model input; picklable, so that worker processes can hold it.

    These :meth:`prepare`; what they leave is for the process with the model to :meth:`finish`.

    Attributes:
        picture: open_clip's validation transform, as far as pixels that are bytes.
        tokenizer: open_clip's.
        size: (height, width) of the model's input in pixels.
        decode: ``exact``: pixels are those of ``picture``, which resizes with Pillow. ``fast``: torch resizes, in the
            same way but for rounding, and a JPEG four times as large as ``size`` or more is decoded at a smaller scale.
            ``gpu``: as ``fast``, but JPEGs are decoded, at full scale, and resized on ``device``. (Models for which
            open_clip resizes in its own ways have all their pictures decoded as ``fast``.)
        device: where the model is; only :meth:`finish` uses it.
    """

    picture: Compose
    tokenizer: Any
    size: tuple[int, int]
    decode: Decode
    device: torch.device

    def prepare(self, data: bytes) -> tuple[NDArray[np.uint8], tuple[int, int]] | Encoded:
        """The bytes of a picture → its :meth:`pixels`, or, if these are made on the device, a JPEG for :meth:`finish`.

        Raises:
            UndecodableError: as :meth:`pixels`; but a JPEG that is left to :meth:`finish` may still be broken.
        """
        fit = self._fit if self.decode == "gpu" else None
        jpeg = None if fit is None else whole_jpeg(data)
        if fit is None or jpeg is None or not fit.suits_gpu(jpeg.size[1], jpeg.size[0]):
            return self.pixels(data)
        return jpeg

    def finish(self, pixels: Tensor, jpegs: Mapping[int, Encoded]) -> tuple[Tensor, dict[int, str]]:
        """What was prepared → R pictures, (R, H, W, 3) uint8, and by their places why some of them cannot be decoded.

        Where JPEGs are decoded on the device, the pictures lie there. What its decoder refuses is decoded as ``fast``.

        Args:
            pixels: (D, H, W, 3) uint8, those that are decoded, in order.
            jpegs: the others, by their places among the R.

        Raises:
            UsageError: the device has no decoder.
        """
        if self.decode != "gpu":
            return pixels, {}
        with beside(self.device):
            image, faults = self._finished(pixels, jpegs)
            return left_to_model(image), faults

    def _finished(self, pixels: Tensor, jpegs: Mapping[int, Encoded]) -> tuple[Tensor, dict[int, str]]:
        fit = cast(Fit, self._fit)  # without which no JPEG is left undecoded
        image = torch.empty((len(pixels) + len(jpegs), *self.size, 3), dtype=torch.uint8, device=self.device)
        if len(pixels):
            image[[place for place in range(len(image)) if place not in jpegs]] = pixels.to(image.device)
        refused = dict(jpegs)
        for places, decoded in decode_jpegs(jpegs, image.device):
            fitted = fit_all(decoded, fit) if image.is_cuda else torch.stack([fit_one(one, fit) for one in decoded])
            image[places] = fitted.permute(0, 2, 3, 1)
            for place in places:
                del refused[place]
        faults = {}
        for place, jpeg in refused.items():
            try:
                # Without torch, which in a forked process would wait for threads that are not there.
                whole, _ = decode_apart(self._decoded, jpeg.data.tobytes())
                image[place] = fit_one(torch.from_numpy(whole).permute(2, 0, 1), fit).permute(1, 2, 0)
            except UndecodableError as error:
                faults[place] = str(error)
        return image, faults

    def pixels(self, data: bytes) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """The bytes of a picture → (H, W, 3) uint8, and the (width, height) that it has itself.

        Raises:
            UndecodableError: as :func:`noisyclean.corpus.decoding.decode_image`; the same pictures, however decoded.
        """
        if self.decode == "exact":
            picture = decode_image(data)
            return np.array(self.picture(picture)), picture.size
        decoded, size = self._decoded(data)
        if self._fit is None:
            return np.array(self.picture(Image.fromarray(decoded))), size
        return fit_one(torch.from_numpy(decoded).permute(2, 0, 1), self._fit).permute(1, 2, 0).numpy(), size

    def _decoded(self, data: bytes) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        height, width = self.size
        return decode_reduced(data, (_OVERSAMPLING * height, _OVERSAMPLING * width))

    @property
    def _fit(self) -> Fit | None:
        """How torch can resize; None: open_clip's own kinds of resizing take pictures only."""
        return Fit.of(self.picture.transforms[0], self.size)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Captions → (B, context) int64."""
        return cast(Tensor, self.tokenizer([caption[:_MAX_CAPTION_CHARACTERS] for caption in captions]))


class Encoder(Protocol):
    """What embeds the two sides of pairs, as :class:`DualEncoder` does, or hands on what is embedded."""

    def inference(self) -> AbstractContextManager[None]: ...

    def encode_image(self, image: Tensor, /) -> Tensor: ...

    def encode_text(self, text: Tensor, /) -> Tensor: ...

    def text_lengths(self, text: Tensor, /) -> NDArray[np.int64]: ...

    def fingerprint(self) -> str: ...


class _TextTower(nn.Module):
    """An open_clip model's text side as a module of its own, for which tensors of it can be replaced in a call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.model.encode_text(tokens))  # type: ignore[operator]


class DualEncoder:
    """An open_clip image–text model with its preprocessing.

    Attributes:
        model: the open_clip module.
        config: ``{"model_cfg": …, "preprocess_cfg": …, "decode": …}``, as written to ``open_clip_config.json``; of
            the last, which open_clip does not know, :class:`Preprocessor` tells.
        dtype: what autocast computes the towers in; None: float32. The embeddings are float32 in any case.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], tokenizer: Any) -> None:
        self.model = model
        self.config = config
        self.dtype: torch.dtype | None = None
        self._text = _TextTower(model)
        self._causal = _causal_text(model)
        cfg = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])
        transforms = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
        # The last two, to-tensor and normalise, run on the device in batches (encode_image): same arithmetic, but
        # a quarter of the bytes between the worker processes and the model.
        assert isinstance(transforms[-1], Normalize)
        self._picture = Compose(transforms[:-2])
        self._tokenizer = tokenizer
        self._mean = torch.tensor(cfg.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(cfg.std).view(1, 3, 1, 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def preprocessor(self) -> Preprocessor:
        """Picture and caption preparation for this model, where it is now."""
        return Preprocessor(self._picture, self._tokenizer, self.image_size, self.config["decode"], self.device)

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
        """Move to ``device``, convolutions in channels-last layout (measured twice as fast on a CPU).

        The precision becomes the one that suits the device.
        """
        self.dtype = choose_dtype("auto", torch.device(device))
        self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def decode_as(self, decode: Decode) -> None:
        """Have pictures decoded so from now on. It is part of the fingerprint, and saved with the model."""
        self.config = {**self.config, "decode": decode}

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, d) unit-norm float32."""
        images = moved(pixels, self.device).permute(0, 3, 1, 2)
        normalised = images.float().div_(255).sub_(self._mean).div_(self._std)
        with self._autocast():
            features = cast(Tensor, self.model.encode_image(normalised))  # type: ignore[operator]
        return functional.normalize(features.float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, context) int → (B, d) unit-norm float32.

        No more of the context is computed than the longest caption fills, as :meth:`text_lengths` has it.
        """
        replaced = {}
        if self._causal is not None:
            length = int(self.text_lengths(tokens).max(initial=1))
            tokens = tokens[:, :length]
            text = cast(Any, self.model.get_submodule(self._causal))
            prefix = f"model.{self._causal}.".replace("..", ".")
            replaced = {
                f"{prefix}positional_embedding": text.positional_embedding[:length],
                f"{prefix}attn_mask": text.attn_mask[:length, :length],
            }
        with self._autocast():
            features = functional_call(self._text, replaced, moved(tokens, self.device).long(), tie_weights=False)
        return functional.normalize(cast(Tensor, features).float(), dim=-1)

    def text_lengths(self, tokens: Tensor) -> NDArray[np.int64]:
        """(B, context) int → (B,) how much of the context a caption needs, rounded up; all of it if that is not known.

        Texts of one length, encoded together, give the same embeddings whatever else is encoded.
        """
        context = tokens.shape[1]
        if self._causal is None:
            return np.full(len(tokens), context)
        needed = tokens.numpy(force=True).argmax(axis=1).astype(np.int64) + 1
        lengths: NDArray[np.int64] = np.minimum(-(-needed // _LENGTH_STEP) * _LENGTH_STEP, context)
        return lengths

    def encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of B pairs, two (B, d) unit-norm float32."""
        return self.encode_image(pixels), self.encode_text(tokens)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients. Meanwhile the model's weights are not to be looked at or changed."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), _normalisation_folded(self.model):
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
        write_json(directory / CONFIG_FILE, self.config)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        with replacing(directory / WEIGHTS_FILE) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})


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

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, K·d) unit-norm float32."""
        return self._joined([one.encode_image(pixels) for one in self.encoders])

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, context) int → (B, K·d) unit-norm float32."""
        return self._joined([one.encode_text(tokens) for one in self.encoders])

    def text_lengths(self, tokens: Tensor) -> NDArray[np.int64]:
        """As :meth:`DualEncoder.text_lengths`; the encoders are of one kind."""
        return self.encoders[0].text_lengths(tokens)

    def encode(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of B pairs, two (B, K·d) unit-norm float32."""
        return self.encode_image(pixels), self.encode_text(tokens)

    def _joined(self, sides: Sequence[Tensor]) -> Tensor:
        temperatures = torch.stack([one.temperature for one in self.encoders])
        scales = (self.temperature / temperatures / len(self.encoders)).sqrt()
        return torch.cat([scale * one for scale, one in zip(scales, sides, strict=True)], dim=1)

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


@contextmanager
def _normalisation_folded(model: nn.Module) -> Iterator[None]:
    """Have the convolutions of CLIP's ResNets do the batch normalisation too, which in evaluation is but a factor.

    On a CPU their picture tower takes a fifth less time by it.
    """
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent, convolution, normalisation in _normalised_convolutions(model):
            pair = [cast(Any, parent.get_submodule(name)) for name in (convolution, normalisation)]
            before += [(parent, convolution, pair[0]), (parent, normalisation, pair[1])]
            setattr(parent, convolution, fuse_conv_bn_eval(*pair))
            setattr(parent, normalisation, nn.Identity())
        yield
    finally:
        for parent, name, old in before:
            setattr(parent, name, old)


def _normalised_convolutions(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Where a convolution is followed by a batch normalisation: the module that has both, and their names in it."""
    found: list[tuple[nn.Module, str, str]] = []
    for module in model.modules():
        if isinstance(module, ModifiedResNet | Bottleneck):
            found += [(module, f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
        if isinstance(module, Bottleneck) and module.downsample is not None:
            found.append((module.downsample, "0", "1"))
    return [one for one in found if isinstance(one[0].get_submodule(one[2]), nn.BatchNorm2d)]


def _causal_text(model: nn.Module) -> str | None:
    """The name of the submodule with the text side ("": the model itself), if padding can be left out; else None.

    Where a text attends only to what comes before, and is read off at its end mark, the padding behind that mark
    changes nothing.
    """
    name = "" if hasattr(model, "positional_embedding") else "text"
    text = getattr(model, name, model)
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    return name if pool == "argmax" and causal else None


def last_projections(encoder: DualEncoder) -> tuple[list[Tensor], list[Tensor]]:
    """The last linear layers of the picture's and the caption's tower: weights (d, width), and a bias (d,) if any.

    These are views of the model's parameters: with each of them multiplied by W, (d, d), in place, so are the
    embeddings before normalisation.

    Raises:
        UsageError: a tower ends in something else.
    """
    model = encoder.model
    return _last_projection(model, "picture", _PICTURE_LAST), _last_projection(model, "caption", _CAPTION_LAST)


def _last_projection(model: nn.Module, side: str, names: Sequence[str]) -> list[Tensor]:
    for name in names:
        try:
            layer = attrgetter(name)(model)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return [layer.weight.detach()] if layer.bias is None else [layer.weight.detach(), layer.bias.detach()]
        if isinstance(layer, nn.Parameter):
            return [layer.detach().T]
    raise UsageError(
        f"encoder.frozen needs towers that end in a linear layer, and this model's {side} tower does not; "
        "fit it without encoder.frozen, or name another"
    )


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
    return DualEncoder(
        model, {"model_cfg": config, "preprocess_cfg": preprocess, "decode": _recorded_decode(name)}, tokenizer
    )


def _recorded_decode(name: str) -> Decode:
    """How a model that noisyclean saved had its pictures decoded."""
    path = Path(name.removeprefix("local-dir:")) / CONFIG_FILE
    recorded = json.loads(path.read_text(encoding="utf-8")).get("decode") if name.startswith("local-dir:") else None
    return cast(Decode, recorded) if recorded in get_args(Decode) else "fast"


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
