"""What objects look like: crops as boxes say, resized as OpenCV does, and what the two encoders make of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.gaze.crops import CropLooks, FeatureLooks, cut_objects, resize_crop
from vlattn.gaze.oat_appearance import CropCNN, FeatureLinear, pyramid, scale_crops
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.oat_file import make_looks
from vlattn.gaze.trial import GazeSet, Scene, SceneObject


def pictured(folder: Path, *boxes: tuple[float, ...], screen: tuple[int, int] = (40, 30)) -> GazeSet:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "s.png")
    scene = Scene("s", *screen, tuple(SceneObject("o", box) for box in boxes), "s.png")  # type: ignore[arg-type]
    return GazeSet({"s": scene}, (), folder)


def pixels_of(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "s.png"))


def test_a_crop_is_the_box_cut_at_the_edges(tmp_path: Path) -> None:
    gaze = pictured(tmp_path, (4, 6, 10, 5), (-5, -5, 10, 10), (35.4, 20, 50, 50), (3.2, 3.2, 0.1, 0.1))
    found = cut_objects(gaze, gaze.scenes["s"])
    whole = pixels_of(tmp_path)
    expected = [whole[6:11, 4:14], whole[:5, :5], whole[20:30, 35:40], whole[3:4, 3:4]]
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_picture_smaller_than_the_screen_fills_it(tmp_path: Path) -> None:
    gaze = pictured(tmp_path, (8, 12, 20, 10), screen=(80, 60))
    np.testing.assert_array_equal(cut_objects(gaze, gaze.scenes["s"])[0], pixels_of(tmp_path)[6:11, 4:14])


@pytest.mark.parametrize("box", [(41.0, 0.0, 5.0, 5.0), (0.0, 31.0, 5.0, 5.0), (-9.0, 0.0, 5.0, 5.0)])
def test_a_box_outside_the_picture_is_refused(tmp_path: Path, box: tuple[float, ...]) -> None:
    gaze = pictured(tmp_path, (0, 0, 5, 5), box)
    with pytest.raises(InputError, match=r"box: scene 's', object 1: .* lies outside its picture of 40 x 30"):
        CropLooks(gaze).of(gaze.scenes["s"])


def test_resizing_is_bilinear_between_pixel_centres() -> None:
    crop = np.random.default_rng(1).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    found = resize_crop(crop, (11, 9)).numpy()
    for row in range(11):
        for column in range(9):
            y, x = np.clip((row + 0.5) * 7 / 11 - 0.5, 0, 6), np.clip((column + 0.5) * 5 / 9 - 0.5, 0, 4)
            top, left = int(y), int(x)
            low, right = min(top + 1, 6), min(left + 1, 4)
            a, b = y - top, x - left
            mixed = (1 - a) * ((1 - b) * crop[top, left] + b * crop[top, right].astype(float))
            mixed += a * ((1 - b) * crop[low, left] + b * crop[low, right].astype(float))
            assert np.abs(found[:, row, column] - mixed).max() <= 0.51


def test_looks_are_made_once_and_their_channels_can_be_turned(tmp_path: Path) -> None:
    gaze = pictured(tmp_path, (0, 0, 10, 10), (10, 10, 20, 20))
    looks, turned = CropLooks(gaze), CropLooks(gaze, order="bgr")
    scene = gaze.scenes["s"]
    found = looks.of(scene)
    assert (found.shape, found.dtype, looks.shape) == ((2, 3, 150, 93), torch.uint8, (3, 150, 93))
    assert looks.of(scene) is found
    assert torch.equal(turned.of(scene), found.flip(1))


def test_crops_are_scaled_one_by_one() -> None:
    crops = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8)
    crops[1] = 255
    found = scale_crops(crops)
    for index in (0, 2):
        low, high = int(crops[index].min()), int(crops[index].max())
        torch.testing.assert_close(found[index], (crops[index].float() - low) / (high - low))
    assert bool((found[1] == 1).all())
    ones = torch.ones(1, 3, 4, 5)
    assert torch.equal(scale_crops(ones), ones)


def test_the_cnn_is_that_of_the_paper() -> None:
    cnn = CropCNN()
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(5), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(),
        nn.Linear(1440, 256),
    )  # fmt: skip
    plain.load_state_dict(dict(zip(plain.state_dict(), cnn.state_dict().values(), strict=True)))
    crops = torch.randint(0, 256, (3, 3, 150, 93), dtype=torch.uint8)
    torch.testing.assert_close(cnn(crops), plain(scale_crops(crops)), atol=1e-5, rtol=0)
    assert sum(p.numel() for p in cnn.parameters()) == 374_752
    cnn.scaling = "none"
    torch.testing.assert_close(cnn(crops), plain(crops.float()), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("levels", "features"), [(2, 160), (3, 672), (4, 2720)])
def test_a_pyramid_has_its_bins_whatever_the_size(levels: int, features: int) -> None:
    maps = torch.rand(2, 32, 5, 13)
    assert pyramid(maps, levels).shape == (2, features)
    assert CropCNN(8, (40, 77), levels)(torch.rand(2, 3, 40, 77)).shape == (2, 8)


def test_bins_of_a_pyramid_hold_their_maxima() -> None:
    maps = torch.rand(1, 1, 3, 4)
    padded = F.pad(maps, (0, 0, 0, 1))[0, 0]
    expected = [maps.max()] + [padded[r : r + 2, c : c + 2].max() for r in (0, 2) for c in (0, 2)]
    assert torch.equal(pyramid(maps, 2)[0], torch.stack(expected))


def test_a_crop_too_small_for_the_convolutions_is_refused() -> None:
    with pytest.raises(InputError, match=r"crop: got \[28, 40\], too small"):
        CropCNN(8, (28, 40))
    assert CropCNN(8, (29, 29))(torch.rand(1, 3, 29, 29)).shape == (1, 8)


class MeanColour:
    """A backbone of two patches whose tokens are the colours of the upper and the lower half."""

    name, dim = "mean-colour", 3

    def transform(self, train: bool) -> Any:
        assert not train
        return lambda image: torch.from_numpy(np.asarray(image.resize((4, 4)), np.float32) / 255).permute(2, 0, 1)

    def __call__(self, pixels: torch.Tensor) -> SimpleNamespace:
        halves = pixels.unflatten(2, (2, 2)).mean((3, 4))  # [B, 3, 2]
        return SimpleNamespace(patches=halves.transpose(1, 2))


def test_features_are_the_mean_patch_and_the_start_is_white(tmp_path: Path) -> None:
    gaze = pictured(tmp_path, (0, 0, 4, 4), (10, 10, 4, 4), (20, 10, 4, 4))
    looks = FeatureLooks(gaze, MeanColour(), batch=2)
    expected = [crop.reshape(-1, 3).mean(0) / 255 for crop in cut_objects(gaze, gaze.scenes["s"])]
    np.testing.assert_allclose(looks.of(gaze.scenes["s"]).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(looks.start(), torch.ones(3))
    assert looks.shape == (3,)


def test_a_linear_encoder_keeps_its_start() -> None:
    encoder, again = FeatureLinear(3, 5), FeatureLinear(3, 5)
    encoder.fit(torch.tensor([1.0, 2.0, 3.0]), torch.randn(9, 3))
    again.load_state_dict(encoder.state_dict())
    assert again.start().tolist() == [[1.0, 2.0, 3.0]]
    with pytest.raises(InputError, match=r"start: got shape \[2\]"):
        again.fit(torch.zeros(2), torch.zeros(4, 3))


@torch.no_grad()
def test_features_have_mean_0_and_variance_1_before_the_linear_map() -> None:
    encoder, sample = FeatureLinear(3, 5), torch.randn(50, 3) * torch.tensor([30.0, 0.1, 1.0]) + 7
    sample[:, 2] = 4.0
    encoder.fit(torch.zeros(3), sample)
    scaled = (sample[:, :2] - sample[:, :2].mean(0)) / sample[:, :2].std(0, correction=0)
    expected = scaled @ encoder.out.weight[:, :2].T + encoder.out.bias  # what never changes says nothing
    torch.testing.assert_close(encoder(sample), expected, atol=1e-4, rtol=0)


def test_a_model_of_features_asks_for_its_backbone(tmp_path: Path) -> None:
    gaze = pictured(tmp_path, (0, 0, 4, 4))
    config = OATConfig(appearance="features", features=7)
    with pytest.raises(InputError, match="backbone: got None"):
        make_looks(gaze, config)
    with pytest.raises(InputError, match="backbone: mean-colour has features of width 3, the model takes 7"):
        make_looks(gaze, config, MeanColour())
