"""Encoders: what open_clip computes, to the last bit that matters, and files that open_clip can load."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

import noisyclean
from noisyclean.encoders import CONFIG_FILE, WEIGHTS_FILE, DualEncoder, EncoderEnsemble, create_encoder, load_encoder
from noisyclean.errors import UsageError

CONFIGS = sorted(path.stem for path in (Path(noisyclean.__file__).parent / "encoder_configs").glob("*.json"))
CAPTIONS = ["a dog", "", "Two  red CIRCLES &amp; a square", "日本語 🙂", "word " * 3000]


def picture(mode: str = "RGB", size: tuple[int, int] = (50, 40), seed: int = 0) -> Image.Image:
    """Smooth blobs, so that resizing makes a difference at every pixel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    return buffer.getvalue()


def pixels_of(encoder: DualEncoder | EncoderEnsemble, pictures: list[Image.Image]) -> torch.Tensor:
    exact = replace(encoder.preprocessor, decode="exact")
    return torch.from_numpy(np.stack([exact.pixels(encode(one))[0] for one in pictures]))


def embed(encoder: DualEncoder, pictures: list[Image.Image], captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = pixels_of(encoder, pictures)
    with encoder.inference():
        return encoder.encode_image(pixels), encoder.encode_text(encoder.preprocessor.tokens(captions))


def embed_with_open_clip(
    name: str, pictures: list[Image.Image], captions: list[str], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    model.eval()
    with torch.inference_mode():
        image = model.encode_image(torch.stack([preprocess(one) for one in pictures]), normalize=True)
        return image, model.encode_text(open_clip.get_tokenizer(name)(captions), normalize=True)


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, encoder: DualEncoder) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save(folder)
    return folder


class TestArithmetic:
    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1"])
    @pytest.mark.parametrize("size", [(32, 32), (50, 40), (31, 200), (200, 33), (5, 5), (1, 1)])
    def test_exact_pixels_are_open_clips(self, encoder: DualEncoder, mode: str, size: tuple[int, int]) -> None:
        one = picture(mode, size)
        pixels, its_size = replace(encoder.preprocessor, decode="exact").pixels(encode(one))
        assert its_size == size
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*encoder.image_size, 3) == (32, 32, 3)
        preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=False)
        with encoder.inference():
            expected = encoder.model.encode_image(preprocess(one.convert("RGB"))[None], normalize=True)  # type: ignore[operator]
            found = encoder.encode_image(torch.from_numpy(pixels)[None])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("input_size", [32, [32, 24]])
    @pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    @pytest.mark.parametrize("size", [(32, 32), (50, 40), (31, 200), (200, 33), (5, 5), (1, 1)])
    def test_fast_pixels_are_nearly_those(
        self, encoder: DualEncoder, input_size: Any, resize_mode: str, interpolation: str, size: tuple[int, int]
    ) -> None:
        changed = {"size": input_size, "resize_mode": resize_mode, "interpolation": interpolation}
        config = {**encoder.config, "preprocess_cfg": {**encoder.config["preprocess_cfg"], **changed}}
        made = DualEncoder(encoder.model, config, encoder.preprocessor.tokenizer)
        found = {}
        for decode in ("fast", "exact"):
            made.decode_as(decode)
            found[decode], its_size = made.preprocessor.pixels(encode(picture("RGB", size)))
            assert its_size == size
            assert found[decode].shape == (*made.image_size, 3)
        assert np.abs(found["fast"].astype(int) - found["exact"]).max() <= 2

    def test_embeddings_have_unit_norm(self, encoder: DualEncoder) -> None:
        for one in embed(encoder, [picture(seed=i) for i in range(3)], CAPTIONS):
            torch.testing.assert_close(one.norm(dim=1), torch.ones(len(one)))

    @pytest.mark.parametrize("custom_text", [False, True])
    @pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
    def test_padding_is_left_out_only_where_it_changes_nothing(self, custom_text: bool, text: dict[str, Any]) -> None:
        if text.get("embed_cls") and not custom_text:
            pytest.skip("open_clip has no such model")
        tower = {"context_length": 40, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2, **text}
        vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
        cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": tower, "custom_text": custom_text}
        torch.manual_seed(0)
        made = (CustomTextCLIP if custom_text else CLIP)(32, vision, tower)
        preprocess = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        config = {"model_cfg": cfg, "preprocess_cfg": preprocess, "decode": "fast"}
        encoder = DualEncoder(made, config, open_clip.SimpleTokenizer(context_length=40))
        captions = [*CAPTIONS, "a photo of a red bird that sits on a branch of an old tree", "word " * 36]
        tokens = encoder.preprocessor.tokens(captions)
        with encoder.inference():
            expected = made.encode_text(tokens, normalize=True)
            # All together, and each among those of its length.
            torch.testing.assert_close(encoder.encode_text(tokens), expected, atol=1e-6, rtol=0)
            for at, row in enumerate(tokens):
                torch.testing.assert_close(encoder.encode_text(row[None])[0], expected[at], atol=1e-6, rtol=0)
        lengths = encoder.text_lengths(tokens).tolist()
        assert lengths == ([40] * len(captions) if text else [8, 8, 8, 8, 40, 24, 40])

    def test_padding_left_out_keeps_the_gradient(self, encoder: DualEncoder) -> None:
        tokens = encoder.preprocessor.tokens(["a dog", "two red circles"])
        probe = torch.randn(2, encoder.encode_text(tokens).shape[1], generator=torch.Generator().manual_seed(0))
        side = encoder.model.positional_embedding
        whole = encoder.model.encode_text(tokens, normalize=True)  # type: ignore[operator]
        short = encoder.encode_text(tokens)
        expected, found = (torch.autograd.grad((one * probe).sum(), side) for one in (whole, short))
        assert expected[0].abs().max() > 0.01
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_stays_near(self, encoder: DualEncoder, dtype: torch.dtype) -> None:
        pictures = [picture(seed=i) for i in range(len(CAPTIONS))]
        exact = embed(encoder, pictures, CAPTIONS)
        encoder.dtype = dtype
        try:
            half = embed(encoder, pictures, CAPTIONS)
        finally:
            encoder.dtype = None
        for one, other in zip(half, exact, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.norm(dim=1), torch.ones(len(one)))
            assert not torch.equal(one, other)
            assert (one * other).sum(dim=1).min() > 0.999

    def test_inference_comes_and_goes(self) -> None:
        made = create_encoder("noisyclean-tiny", image_size=32)
        made.model.train()
        pixels = pixels_of(made, [picture(seed=i) for i in range(4)])
        with made.inference():
            assert not made.model.training
            assert not made.encode_image(pixels).requires_grad
        assert made.model.training
        assert made.encode_image(pixels).requires_grad
        assert made.encode_text(made.preprocessor.tokens(CAPTIONS)).requires_grad
        assert made.temperature.requires_grad


class TestFiles:
    def test_open_clip_loads_what_was_saved(self, encoder: DualEncoder, saved: Path) -> None:
        pictures = [picture(mode, seed=i) for i, mode in enumerate(["RGB", "L", "RGBA"])]
        expected = embed_with_open_clip(f"local-dir:{saved}", pictures, CAPTIONS)
        assert_same(embed(encoder, pictures, CAPTIONS), expected)

    def test_round_trip(self, encoder: DualEncoder, saved: Path) -> None:
        for spec in (str(saved), f"local-dir:{saved}"):
            again = load_encoder(spec)
            assert again.fingerprint() == encoder.fingerprint()
            assert json.dumps(again.config) == json.dumps(encoder.config)
            assert again.temperature.item() == pytest.approx(0.05)
            tokens = again.preprocessor.tokens(CAPTIONS)
            assert torch.equal(tokens, encoder.preprocessor.tokens(CAPTIONS))
            assert torch.equal(tokens, open_clip.get_tokenizer(f"local-dir:{saved}")(CAPTIONS))

    @pytest.mark.parametrize(
        "preprocess",
        [
            {"resize_mode": "squash"},
            {"resize_mode": "longest", "fill_color": 128},
            {"interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.125]},
        ],
    )
    def test_preprocessing_of_the_file_is_kept(self, tmp_path: Path, saved: Path, preprocess: dict[str, Any]) -> None:
        config = json.loads((saved / CONFIG_FILE).read_text())
        config["preprocess_cfg"] |= preprocess
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        (tmp_path / WEIGHTS_FILE).hardlink_to(saved / WEIGHTS_FILE)
        loaded = load_encoder(str(tmp_path))
        assert loaded.config["preprocess_cfg"].items() >= preprocess.items()
        pictures = [picture(size=(60, 40)), picture(size=(20, 70))]
        assert_same(
            embed(loaded, pictures, CAPTIONS), embed_with_open_clip(f"local-dir:{tmp_path}", pictures, CAPTIONS)
        )

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_weights_file_of_a_named_architecture(self, tmp_path: Path, suffix: str) -> None:
        made = create_encoder("noisyclean-tiny")
        path = tmp_path / f"epoch_5{suffix}"
        if suffix == ".pt":  # as open_clip's training writes checkpoints
            state = {f"module.{name}": tensor for name, tensor in made.model.state_dict().items()}
            torch.save({"epoch": 5, "state_dict": state}, path)
        else:
            save_file(made.model.state_dict(), path)
        assert load_encoder(f"noisyclean-tiny/{path}").fingerprint() == made.fingerprint()

    def test_weights_file_of_one_of_open_clips_architectures(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        model = open_clip.create_model("ViT-S-32-alt")
        with torch.no_grad():
            model.logit_scale.fill_(4.0)
        save_file(model.state_dict(), path)
        loaded = load_encoder(f"ViT-S-32-alt/{path}")
        assert loaded.temperature.item() == pytest.approx(np.exp(-4.0))
        expected = embed_with_open_clip("ViT-S-32-alt", [picture()], CAPTIONS, pretrained=str(path))
        assert_same(embed(loaded, [picture()], CAPTIONS), expected)
        path.unlink()  # 170 MB, which pytest would keep


class TestFingerprint:
    def test_changes_with_any_weight(self, saved: Path) -> None:
        one = load_encoder(str(saved))
        before = one.fingerprint()
        for parameter in list(one.model.parameters())[::7]:
            with torch.no_grad():
                parameter.view(-1)[-1] += 1e-3
            after = one.fingerprint()
            assert after != before
            before = after

    def test_changes_with_the_configuration(self, encoder: DualEncoder) -> None:
        config = {**encoder.config, "preprocess_cfg": {**encoder.config["preprocess_cfg"], "mean": [0.5, 0.5, 0.5]}}
        other = DualEncoder(encoder.model, config, encoder.preprocessor.tokenizer)
        assert other.fingerprint() != encoder.fingerprint()

    def test_changes_with_the_decoding_which_is_kept_in_the_file(self, saved: Path, tmp_path: Path) -> None:
        one = load_encoder(str(saved))
        before = one.fingerprint()
        one.decode_as("exact")
        assert one.fingerprint() != before
        one.save(tmp_path)
        again = load_encoder(str(tmp_path))
        assert again.preprocessor.decode == "exact"
        assert again.fingerprint() == one.fingerprint()


class TestMaking:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_noisycleans_own_architectures(self, name: str) -> None:
        made = create_encoder(name)
        image, text = embed(made, [picture()], CAPTIONS)
        assert image.shape == (1, made.config["model_cfg"]["embed_dim"])
        assert text.shape == (len(CAPTIONS), image.shape[1])

    def test_seed_decides_the_weights(self) -> None:
        made = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            made.append(create_encoder("noisyclean-tiny", image_size=32).fingerprint())
        assert made[0] == made[1] != made[2]

    def test_overrides_are_kept_in_the_file(self, tmp_path: Path) -> None:
        create_encoder("noisyclean-tiny", image_size=64, context_length=9, temperature=0.2).save(tmp_path)
        again = load_encoder(str(tmp_path))
        assert again.image_size == (64, 64)
        assert again.preprocessor.tokens(["a dog"]).shape == (1, 9)
        assert again.temperature.item() == pytest.approx(0.2)

    def test_making_is_silent(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        create_encoder("noisyclean-tiny", image_size=32)
        assert capfd.readouterr() == ("", "")
        assert not caplog.records


class TestErrors:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("ViT-B-32", r"^ViT-B-32: .* such as ViT-B-32/laion2b_s34b_b79k"),
            (
                "noisyclean-tinny/weights.pt",
                "no such model, nor a folder .*; did you mean noisyclean-tiny",
            ),
            ("noisyclean-tiny/no-such-tag", "noisyclean-tiny/no-such-tag: cannot load the weights"),
            ("noisyclean-tiny/missing/weights.pt", "missing/weights.pt: cannot load the weights"),
            ("local-dir:nowhere", f"nowhere: no {CONFIG_FILE}"),
        ],
    )
    def test_unusable_specs(self, spec: str, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            load_encoder(spec)
        assert "\n" not in str(caught.value)

    def test_unknown_name(self) -> None:
        with pytest.raises(UsageError, match="xyzzy: no such model"):
            create_encoder("xyzzy")

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("what", ["garbage", "of another architecture"])
    def test_unusable_weights(self, tmp_path: Path, suffix: str, what: str) -> None:
        path = tmp_path / f"weights{suffix}"
        state = {"visual.weight": torch.zeros(3)}
        if what == "garbage":
            path.write_bytes(b"garbage")
        elif suffix == ".pt":
            torch.save(state, path)
        else:
            save_file(state, path)
        with pytest.raises(UsageError, match="cannot load the weights") as caught:
            load_encoder(f"noisyclean-tiny/{path}")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("config", ["{", "{}", "[]"])
    def test_broken_config(self, tmp_path: Path, config: str) -> None:
        (tmp_path / CONFIG_FILE).write_text(config)
        with pytest.raises(UsageError, match=tmp_path.name):
            load_encoder(str(tmp_path))

    def test_folder_without_weights(self, tmp_path: Path, saved: Path) -> None:
        (tmp_path / CONFIG_FILE).write_bytes((saved / CONFIG_FILE).read_bytes())
        with pytest.raises(UsageError, match="cannot load the weights"):
            load_encoder(str(tmp_path))


def test_an_ensemble_is_one_encoder_with_the_mean_of_the_logits() -> None:
    encoders = []
    for seed, temperature in enumerate((0.01, 0.05, 0.3)):
        torch.manual_seed(seed)
        encoders.append(create_encoder("pico", temperature=temperature))
    pictures = [picture(seed=seed) for seed in range(5)]
    together = EncoderEnsemble.of(encoders)
    pixels = pixels_of(together, pictures)
    tokens = together.preprocessor.tokens(CAPTIONS)
    with together.inference():
        image, text = together.encode(pixels, tokens)
        alone = [(*one.encode(pixels, tokens), one.temperature) for one in encoders]
    for side in (image, text):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(5))
    logits = torch.stack([one @ other.T / temperature for one, other, temperature in alone]).mean(dim=0)
    torch.testing.assert_close(image @ text.T / together.temperature, logits, rtol=1e-4, atol=1e-4)
    assert together.fingerprint() != EncoderEnsemble.of(encoders[:2]).fingerprint()
    assert EncoderEnsemble.of(encoders[:1]) is encoders[0]


@pytest.mark.parametrize("name", ["noisyclean-nano", "noisyclean-tiny"])
def test_batch_normalisation_is_folded_for_inference_alone(name: str) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(name, image_size=64)
    visual = encoder.model.visual
    for module in visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as a training leaves it
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    encoder.model.eval()
    with torch.no_grad():
        expected = encoder.encode_image(pixels)
    before = encoder.fingerprint()
    with encoder.inference():
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in visual.modules())
        torch.testing.assert_close(encoder.encode_image(pixels), expected, rtol=0, atol=2e-6)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in visual.modules())
    assert encoder.fingerprint() == before
