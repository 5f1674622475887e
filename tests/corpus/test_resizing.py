"""Pictures resized and cropped, one by one and many at a time."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from noisyclean.corpus import resizing
from noisyclean.corpus.resizing import Fit, fit_all, fit_one

SIDES = st.integers(1, 150)


def picture(height: int, width: int, seed: int) -> Tensor:
    """(3, height, width) uint8, smooth with a little grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 3, 4, generator=generator) * 300 - 20
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth + 10 * torch.randn(3, height, width, generator=generator)).clamp(0, 255).to(torch.uint8)


def off(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6),
    to=st.tuples(st.integers(2, 60), st.integers(2, 60)),
    shorter=st.booleans(),
    kernel=st.sampled_from(["bilinear", "bicubic"]),
)
def test_many_at_a_time_are_as_torchvision_does_one_by_one(
    sizes: list[tuple[int, int]], to: tuple[int, int], shorter: bool, kernel: str
) -> None:
    fit = Fit((to[0], to[0]), to[0], kernel) if shorter else Fit(to, None, kernel)  # type: ignore[arg-type]
    pictures = [picture(height, width, seed) for seed, (height, width) in enumerate([*sizes, sizes[0]])]
    fitted = fit_all(pictures, fit)
    assert fitted.shape == (len(pictures), 3, *fit.size)
    assert fitted.dtype == torch.uint8
    for one, many in zip(pictures, fitted, strict=True):
        # In floats, as bytes are rounded and clipped between the two sides too.
        alone = fit_one(one.float(), fit).round().clamp(0, 255)
        assert off(alone, many) <= 1
        assert (alone - many).abs().mean() < 0.05


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, (32, 32), (40, 24)])
def test_it_is_what_open_clip_does(resize_mode: str, interpolation: str, size: int | tuple[int, int]) -> None:
    cfg = PreprocessCfg(size=size, resize_mode=resize_mode, interpolation=interpolation)  # type: ignore[arg-type]
    transform = image_transform_v2(cfg, is_train=False)
    to = (size, size) if isinstance(size, int) else size
    fit = Fit.of(transform.transforms[0], to)
    if to[0] != to[1] and resize_mode == "shortest":
        assert fit is None
        return
    assert fit is not None
    for height, width in ((57, 91), (130, 48), (20, 30)):
        pixels = picture(height, width, 0)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        for step in transform.transforms[:-2]:
            image = step(image)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        for found in (fit_one(pixels, fit), fit_all([pixels], fit)[0]):
            assert (found.int() - expected.int()).abs().float().mean() < 0.5


def test_of_what_is_cropped_nothing_is_kept() -> None:
    banners = [picture(20, 1000 + k, k) for k in range(4)]
    fitted = resizing._resized(banners[:1], Fit((224, 224), 224, "bicubic"))
    assert fitted.untyped_storage().nbytes() == 4 * 3 * 224 * 224
    assert fit_all(banners, Fit((224, 224), 224, "bicubic")).shape == (4, 3, 224, 224)


@pytest.mark.parametrize(
    ("fit", "height", "width", "suits"),
    [
        (Fit((48, 48), 48, "bicubic"), 1536, 8000, True),
        (Fit((48, 48), 48, "bicubic"), 1537, 1600, False),
        (Fit((48, 48), None, "bicubic"), 1536, 1600, False),
        (Fit((48, 48), None, "bicubic"), 1536, 1536, True),
        (Fit((224, 224), 224, "bilinear"), 1, 1, True),
    ],
)
def test_what_a_gpu_can_resize(fit: Fit, height: int, width: int, suits: bool) -> None:
    assert fit.suits_gpu(height, width) == suits


def test_every_bundled_model_can_be_fitted() -> None:
    for name in ("noisyclean-nano", "noisyclean-tiny", "noisyclean-small", "ViT-B-32"):
        cfg = PreprocessCfg(size=open_clip.get_model_config(name)["vision_cfg"]["image_size"])
        assert Fit.of(image_transform_v2(cfg, is_train=False).transforms[0], (1, 1)) is not None
