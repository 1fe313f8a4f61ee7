"""VCD's noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.interventions.vcd import VCD, diffuse, noise_schedule, noised


@pytest.mark.parametrize(
    ("step", "b", "amplitude", "deviation"),
    [
        (0, 2.23383896e-5, 0.99998883, 0.00472635),
        (100, 5.07797858e-5, 0.99829292, 0.05840582),
        (250, 2.47333000e-4, 0.98913381, 0.14701806),
        (500, 2.51249247e-3, 0.86301711, 0.50517470),
        (700, 4.58815656e-3, 0.59267733, 0.80543999),
        (999, 4.98766161e-3, 0.28504244, 0.95851490),
    ],
)
def test_the_schedule_is_the_published_one(step: int, b: float, amplitude: float, deviation: float) -> None:
    found_b, kept = noise_schedule()
    assert found_b[step].item() == pytest.approx(b, rel=1e-8)
    assert kept[step].sqrt().item() == pytest.approx(amplitude, abs=1e-8)
    assert (1 - kept[step]).sqrt().item() == pytest.approx(deviation, abs=1e-8)


def test_what_is_kept_of_the_image_falls_strictly_over_the_thousand_steps() -> None:
    kept = noise_schedule()[1]
    assert kept.shape == (1000,)
    assert bool((kept.diff() < 0).all())
    assert 0 < kept[-1].item() < kept[0].item() < 1


def test_diffusion_meets_the_published_vector(formula: Callable[..., torch.Tensor], numbers: Any) -> None:
    found = diffuse(formula(4, 3), formula(5, 3), 500)
    torch.testing.assert_close(found, numbers(".10690748 -.16288039 -.24514543"), atol=1e-8, rtol=0)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_of(image: torch.Tensor, after: torch.Tensor, step: int = 500) -> torch.Tensor:
    kept = noise_schedule()[1][step]
    return (after.double() - kept.sqrt() * image.double()) / (1 - kept).sqrt()


def test_noise_is_standard_normal_and_differs_between_images_and_seeds() -> None:
    images = pixels(2, 3, 64, 64)
    draws = [noise_of(images, noised({"pixel_values": images}, 500, seed)["pixel_values"]) for seed in (0, 1)]
    for draw in draws:
        assert draw.mean().item() == pytest.approx(0, abs=0.02)
        assert draw.std().item() == pytest.approx(1, abs=0.02)
    for one, other in ((draws[0][0], draws[0][1]), (draws[0][0], draws[1][0])):
        assert abs((one * other).mean().item()) < 0.05
    assert abs((draws[0] * images).mean().item()) < 0.05


def test_an_image_gets_the_same_noise_alone_in_a_batch_and_among_the_tiles_of_another_shape() -> None:
    images = pixels(4, 3, 8, 8)
    together = noised({"pixel_values": images}, 500, 3)["pixel_values"]
    for i in range(4):
        assert torch.equal(noised({"pixel_values": images[i : i + 1]}, 500, 3)["pixel_values"][0], together[i])
    tiles = noised({"pixel_values": images.view(2, 2, 3, 8, 8)}, 500, 3)["pixel_values"]
    assert torch.equal(tiles.view_as(images), together)


def test_rows_of_patches_get_the_noise_of_the_image_they_belong_to() -> None:
    rows = pixels(6 * 8 + 4 * 4, 96)
    grids = torch.tensor([[1, 6, 8], [1, 4, 4]])
    found = noised({"pixel_values": rows, "image_grid_thw": grids}, 500, 0)["pixel_values"]
    alone = noised({"pixel_values": rows[48:], "image_grid_thw": grids[1:]}, 500, 0)["pixel_values"]
    assert torch.equal(found[48:], alone)


def test_images_and_videos_are_both_noised_and_the_rest_of_the_call_is_handed_on() -> None:
    call: dict[str, Any] = {
        "pixel_values": pixels(1, 3, 8, 8),
        "pixel_values_videos": pixels(1, 2, 3, 8, 8, seed=1),
        "image_sizes": 5,
    }
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    found = noised(call, 500, 0)
    assert found["image_sizes"] == 5
    for name, value in before.items():
        assert torch.equal(call[name], value)  # the user's pixels are theirs
        assert found[name].shape == value.shape
        assert not bool((found[name] == value).any())


def test_tiles_of_zeros_are_padding_and_stay() -> None:
    tiles = torch.cat([pixels(1, 1, 3, 8, 8), torch.zeros(1, 1, 3, 8, 8)], 1)
    found = noised({"pixel_values": tiles}, 500, 0)["pixel_values"]
    assert not bool(found[0, 1].any())
    assert bool((found[0, 0] != tiles[0, 0]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_is_added_in_single_precision_at_least_and_the_pixels_keep_their_dtype(dtype: torch.dtype) -> None:
    image, noise = pixels(3, 8, 8).to(dtype), pixels(3, 8, 8, seed=1)
    found = diffuse(image, noise, 999)
    kept = noise_schedule()[1][999].item()
    exact = kept**0.5 * image.double() + (1 - kept) ** 0.5 * noise.double()
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, exact.to(dtype), rtol=1e-6 if dtype.itemsize > 2 else 0, atol=0 if dtype.itemsize < 4 else 1e-7
    )


def test_nobody_elses_random_numbers_are_touched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    noised({"pixel_values": pixels(1, 3, 8, 8)}, 500, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha: got -0.1; give a number of at least 0"),
        ({"beta": 1.1}, "beta: got 1.1; give a number from 0 to 1"),
        ({"noise_step": 1000}, "noise_step: got 1000; the schedule has steps 0 to 999"),
        ({"noise_step": 2.5}, "noise_step: got 2.5; give an integer"),
        ({"seed": 2**31}, "seed: got 2147483648; give an integer from 0 to 2147483647"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_to_give(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VCD(**settings)
