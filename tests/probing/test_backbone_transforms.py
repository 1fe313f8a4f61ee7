"""Crops and augmentations of training, and the view of evaluation, against PIL, NumPy and distributions."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from vlattn.errors import InputError
from vlattn.probing.backbones.transforms import (
    CLIP,
    HALF,
    IMAGENET,
    ImageSettings,
    draw_crop,
    eval_transform,
    train_transform,
)

SETTINGS = ImageSettings((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def normalised(image: Image.Image) -> torch.Tensor:
    values = np.asarray(image, dtype=np.float32) / 255
    mean, std = np.float32(SETTINGS.mean), np.float32(SETTINGS.std)
    return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1))


# The crop -------------------------------------------------------------------------------------------------------------
def test_a_crop_follows_the_formula_with_one_draw() -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        share, position = torch.rand(2, dtype=torch.float64).tolist()
        area = 60 * 100 * (0.08 + 0.92 * share)
        aspect = (3 / 4) ** (1 - position) * (4 / 3) ** position
        height, width = min(round((area / aspect) ** 0.5), 60), min(round((area * aspect) ** 0.5), 100)
        torch.manual_seed(seed)
        assert draw_crop(60, 100)[2:] == (height, width)


def test_area_is_uniform_and_aspect_log_uniform() -> None:
    torch.manual_seed(0)
    # Areas of at most half the image always fit: nothing is cut.
    crops = np.array([draw_crop(3000, 3000, scale=(0.08, 0.5))[2:] for _ in range(2000)], dtype=float)
    areas, aspects = crops.prod(1) / 3000**2, np.log(crops[:, 1] / crops[:, 0])
    assert stats.kstest(areas, "uniform", (0.08, 0.42)).pvalue > 0.01
    assert stats.kstest(aspects, "uniform", (math.log(3 / 4), math.log(16 / 9))).pvalue > 0.01


def test_places_are_uniform_over_all_that_fit() -> None:
    torch.manual_seed(0)
    crops = [draw_crop(8, 8, scale=(0.25, 0.25), ratio=(1, 1)) for _ in range(2500)]
    assert {crop[2:] for crop in crops} == {(4, 4)}
    tops, lefts = (np.bincount([crop[i] for crop in crops], minlength=5) for i in (0, 1))
    assert len(tops) == len(lefts) == 5
    assert stats.chisquare(tops).pvalue > 0.01
    assert stats.chisquare(lefts).pvalue > 0.01


def test_what_exceeds_the_image_is_cut_and_not_drawn_anew() -> None:
    torch.manual_seed(0)
    crops = [draw_crop(20, 2000) for _ in range(300)]
    # Sides of sqrt(area) exceed the 20 px of height in nearly every draw: the height is cut, the width stays.
    assert sum(crop[2] == 20 for crop in crops) > 290
    widths = [crop[3] for crop in crops]
    assert min(widths) >= 40
    assert np.std(widths) > 20


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (2, 3), (64, 48)])
def test_a_crop_lies_inside_the_image_however_small(height: int, width: int) -> None:
    torch.manual_seed(0)
    for _ in range(300):
        top, left, h, w = draw_crop(height, width)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) >= 1


def test_a_seed_decides_the_crop_and_crops_differ() -> None:
    torch.manual_seed(3)
    first = [draw_crop(100, 80) for _ in range(20)]
    torch.manual_seed(3)
    assert [draw_crop(100, 80) for _ in range(20)] == first
    assert len(set(first)) == 20


# Training -------------------------------------------------------------------------------------------------------------
def test_a_training_view_is_the_crop_resized_bicubic_flipped_and_normalised() -> None:
    image, transform, flipped = picture(50, 70), train_transform(SETTINGS), 0
    for seed in range(30):
        torch.manual_seed(seed)
        top, left, h, w = draw_crop(50, 70)
        view = image.crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BICUBIC)
        straight, mirrored = normalised(view), normalised(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        torch.manual_seed(seed)
        got = transform(image)
        is_mirrored = torch.allclose(got, mirrored, atol=1e-5)
        assert is_mirrored or torch.allclose(got, straight, atol=1e-5)
        flipped += is_mirrored
    assert 5 < flipped < 25


def test_aimv2_changes_brightness_and_more_and_its_crop_has_its_own_ratio() -> None:
    transform = train_transform(SETTINGS, "aimv2")
    kinds = [type(step) for step in transform.transforms]
    assert kinds.index(v2.RandomHorizontalFlip) < kinds.index(v2.ColorJitter) < kinds.index(v2.AutoAugment)
    steps = dict(zip(kinds, transform.transforms, strict=True))
    assert steps[v2.ColorJitter].brightness == (0.7, 1.3)
    assert steps[v2.ColorJitter].contrast is None
    assert steps[v2.AutoAugment].policy is v2.AutoAugmentPolicy.IMAGENET
    crop = transform.transforms[1]
    assert tuple(crop.ratio) == (0.75, 1.33)
    assert tuple(crop.scale) == (0.08, 1.0)
    assert crop.interpolation is v2.InterpolationMode.BICUBIC
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    values = set()
    for seed in range(20):
        torch.manual_seed(seed)
        values.add(round(float(transform(grey)[0].mean()), 4))
    assert len(values) > 5
    assert len({round(float(train_transform(SETTINGS)(grey)[0].mean()), 4) for _ in range(20)}) == 1


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(InputError, match="augment: got 'mixup'"):
        train_transform(SETTINGS, "mixup")  # type: ignore[arg-type]


# Evaluation -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("height", "width"), [(50, 70), (90, 40), (36, 36), (20, 300)])
def test_an_evaluation_view_is_resized_and_cut_from_the_centre(height: int, width: int) -> None:
    image = picture(height, width)
    shorter = int(256 / 224 * 32)
    scale = shorter / min(height, width)
    size = [
        shorter if side == min(height, width) else int(shorter * side / min(height, width)) for side in (height, width)
    ]
    assert scale > 0
    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    expected = normalised(resized.crop((left, top, left + 32, top + 32)))
    transform = eval_transform(SETTINGS)
    torch.testing.assert_close(transform(image), expected, atol=1e-5, rtol=0)
    assert torch.equal(transform(image), transform(image))


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (336, 384), (448, 512), (518, 592), (96, 109)])
def test_the_shorter_side_is_256_224ths_of_the_size(size: int, shorter: int) -> None:
    resize = eval_transform(ImageSettings((size, size))).transforms[1]
    assert list(resize.size) == [shorter]


def test_a_view_of_a_rectangle_has_its_size() -> None:
    settings = ImageSettings((24, 40))
    assert eval_transform(settings)(picture(100, 50)).shape == (3, 24, 40)
    assert train_transform(settings)(picture(100, 50)).shape == (3, 24, 40)


# Images of all kinds --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("make", [eval_transform, train_transform, lambda settings: train_transform(settings, "aimv2")])
def test_images_of_any_mode_become_three_plain_channels(mode: str, make: Any) -> None:
    image = picture(40, 50).convert("RGBA").convert(mode) if mode != "LA" else picture(40, 50, "L").convert("LA")
    pixels = make(SETTINGS)(image)
    assert type(pixels) is torch.Tensor
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 32, 32)


def test_transforms_go_to_worker_processes() -> None:
    image = picture(40, 50)
    for transform in (eval_transform(SETTINGS), train_transform(SETTINGS), train_transform(SETTINGS, "aimv2")):
        copy = pickle.loads(pickle.dumps(transform))
        torch.manual_seed(0)
        expected = transform(image)
        torch.manual_seed(0)
        assert torch.equal(copy(image), expected)


def test_the_statistics_are_those_of_the_libraries() -> None:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN

    assert IMAGENET == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert CLIP == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    assert HALF[0] == IMAGENET_INCEPTION_MEAN
