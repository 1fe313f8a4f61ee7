"""Which prompt positions are visual, and which patch of which image each one is."""

from __future__ import annotations

import pytest
import torch

from vlattn.errors import InputError
from vlattn.runtime.tokens import VisualTokens


def mask_of(*rows: str) -> torch.Tensor:
    """`..IIII.` and the like: I for a placeholder."""
    return torch.tensor([[letter == "I" for letter in row] for row in rows])


def test_one_image_counts_its_patches_off_in_raster_order() -> None:
    visual = VisualTokens.from_placeholders(mask_of(".IIIIII.."), (2, 3))
    assert visual.patch.tolist() == [[-1, 0, 1, 2, 3, 4, 5, -1, -1]]
    assert visual.row.tolist() == [[-1, 0, 0, 0, 1, 1, 1, -1, -1]]
    assert visual.column.tolist() == [[-1, 0, 1, 2, 0, 1, 2, -1, -1]]
    assert visual.image.tolist() == [[-1, 0, 0, 0, 0, 0, 0, -1, -1]]
    assert visual.images == 1


def test_images_are_numbered_through_the_batch_whatever_each_sample_has() -> None:
    visual = VisualTokens.from_placeholders(mask_of("..IIII.IIII", "...........", "IIII.......", "IIIIIIII..."), (2, 2))
    assert visual.image.tolist() == [
        [-1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 1],
        [-1] * 11,
        [2] * 4 + [-1] * 7,
        [3] * 4 + [4] * 4 + [-1] * 3,
    ]
    assert visual.patch[0].tolist() == [-1, -1, 0, 1, 2, 3, -1, 0, 1, 2, 3]
    assert visual.patch[3].tolist() == [0, 1, 2, 3] * 2 + [-1] * 3
    assert visual.images == 5


def test_a_leading_cls_is_visual_and_belongs_to_its_image_but_is_no_patch() -> None:
    visual = VisualTokens.from_placeholders(mask_of(".IIIII.IIIII"), (2, 2), leading=1)
    assert visual.mask.sum() == 10
    assert visual.image.tolist() == [[-1] + [0] * 5 + [-1] + [1] * 5]
    assert visual.patch.tolist() == [[-1, -1, 0, 1, 2, 3, -1, -1, 0, 1, 2, 3]]
    assert visual.row.tolist() == [[-1, -1, 0, 0, 1, 1, -1, -1, 0, 0, 1, 1]]
    assert visual.column.tolist() == [[-1, -1, 0, 1, 0, 1, -1, -1, 0, 1, 0, 1]]


def test_a_prompt_without_images_has_none() -> None:
    visual = VisualTokens.from_placeholders(mask_of("...", "..."), (2, 2))
    assert visual.images == 0
    assert not visual.mask.any()
    assert bool((visual.patch == -1).all())


@pytest.mark.parametrize(("row", "leading"), [("III.", 0), (".IIIII", 0), ("IIII.", 1), ("IIIIIIIII", 1)])
def test_placeholders_that_do_not_divide_into_images_are_refused(row: str, leading: int) -> None:
    with pytest.raises(
        InputError, match=f"{row.count('I')} visual placeholders do not divide into images of {4 + leading}"
    ):
        VisualTokens.from_placeholders(mask_of(row), (2, 2), leading=leading)
