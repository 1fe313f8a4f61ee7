"""The masked-image model of digits: its loss, its seed, its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.digits_backbone import DIM, PATCH, digits_backbone, digits_vit, draw_masks, masked_loss
from vlattn.probing.named_backbone import named_backbone


def test_half_of_the_patches_are_hidden_and_not_the_same_in_each_image() -> None:
    masks = draw_masks(50, 64)
    assert masks.sum(1).tolist() == [32] * 50
    assert len({tuple(mask.tolist()) for mask in masks}) == 50


def test_the_loss_sees_nothing_of_hidden_patches_but_their_target() -> None:
    torch.manual_seed(0)
    model, token, decoder = digits_vit().eval(), torch.randn(DIM), nn.Linear(DIM, 3 * PATCH * PATCH)
    pixels, mask = torch.randn(1, 3, 32, 32), torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 9] = True  # row 1, column 1 of the 8 x 8 patches
    hidden = (..., slice(4, 8), slice(4, 8))
    with torch.no_grad():
        decoder.weight.zero_()
        expected = (decoder.bias.view(3, PATCH, PATCH) - pixels[0][hidden]).abs().mean()
        assert torch.allclose(masked_loss(model, token, decoder, pixels, mask), expected)
        decoder.reset_parameters()
        decoder.bias.fill_(100.0)  # every guess is above: the loss is the guess minus the target
        other = pixels.clone()
        other[hidden] += 1.0
        before, after = (masked_loss(model, token, decoder, p, mask) for p in (pixels, other))
        assert torch.allclose(before - after, torch.tensor(1.0), atol=1e-4)


def test_training_lowers_the_loss_and_the_seed_decides_the_weights(tmp_path: Path) -> None:
    losses: list[float] = []
    state = torch.random.get_rng_state()
    first = digits_backbone(tmp_path / "a.safetensors", steps=12, progress=lambda step, loss: losses.append(loss))
    assert torch.equal(state, torch.random.get_rng_state())
    assert losses[-1] < losses[0]
    again = digits_backbone(tmp_path / "b.safetensors", steps=12)
    other = digits_backbone(tmp_path / "c.safetensors", steps=12, seed=1)
    assert torch.equal(first.pos_embed, again.pos_embed)
    assert not torch.equal(first.pos_embed, other.pos_embed)


def test_a_name_trains_once_and_loads_the_file_afterwards(tmp_path: Path) -> None:
    heard: list[int] = []
    first = named_backbone("digits-mim:2", tmp_path, progress=lambda step, loss: heard.append(step))
    second = named_backbone("digits-mim:2", tmp_path, layer=1, progress=lambda step, loss: heard.append(step))
    assert heard == [1, 2]
    assert (first.name, first.grid, first.dim, first.has_cls, first.depth) == ("digits-mim:2", (8, 8), 96, True, 4)
    assert second.layer == 1
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(pixels).patches, named_backbone("digits-mim:2", tmp_path)(pixels).patches)


def test_bad_names_and_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="digits-mim:STEPS"):
        named_backbone("digits-mim:x", tmp_path)
    with pytest.raises(InputError, match="what: got 'nothing'"):
        named_backbone("nothing", tmp_path)
    file = tmp_path / "backbones" / "digits-mim-3.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"no weights")
    with pytest.raises(InputError, match="holds no digits backbone"):
        named_backbone("digits-mim:3", tmp_path)
