"""Tokens: which of them a pooler gets, and what is refused."""

from __future__ import annotations

import pytest
import torch

from vlattn.errors import InputError
from vlattn.probing.tokens import Tokens

PATCHES, CLS, REGISTERS = torch.randn(2, 6, 5), torch.randn(2, 5), torch.randn(2, 3, 5)


def test_patch_gives_the_patches_alone() -> None:
    assert Tokens(PATCHES, CLS, (2, 3), REGISTERS).choose("patch") is PATCHES
    assert torch.equal(Tokens(PATCHES).choose(), PATCHES)


def test_all_puts_cls_in_front_and_leaves_registers_out() -> None:
    chosen = Tokens(PATCHES, CLS, (2, 3), REGISTERS).choose("all")
    assert chosen.shape == (2, 7, 5)
    for b in range(2):
        assert torch.equal(chosen[b, 0], CLS[b])
        for n in range(6):
            assert torch.equal(chosen[b, n + 1], PATCHES[b, n])


def test_cls_is_one_token() -> None:
    chosen = Tokens(PATCHES, CLS).choose("cls")
    assert chosen.shape == (2, 1, 5)
    assert torch.equal(chosen[:, 0], CLS)


def test_all_projects_patches_to_the_width_of_a_projected_cls_and_patch_does_not() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    tokens = Tokens(PATCHES, torch.randn(2, 3), project=lambda patches: patches @ weight)
    chosen = tokens.choose("all")
    assert chosen.shape == (2, 7, 3)
    expected = torch.stack([torch.stack([weight.detach().T @ PATCHES[b, n] for n in range(6)]) for b in range(2)])
    torch.testing.assert_close(chosen[:, 1:], expected)
    assert not chosen.requires_grad
    assert tokens.choose("patch") is PATCHES
    assert tokens.choose("cls").shape == (2, 1, 3)


@pytest.mark.parametrize("kind", ["all", "cls"])
def test_without_cls_what_needs_it_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match=f"{kind!r} needs a CLS token"):
        Tokens(PATCHES).choose(kind)


def test_widths_that_differ_are_refused_with_their_numbers() -> None:
    with pytest.raises(InputError, match="CLS of width 4 and patches of width 5"):
        Tokens(PATCHES, torch.randn(2, 4)).choose("all")
    with pytest.raises(InputError, match="CLS of width 4 and patches of width 2"):
        Tokens(PATCHES, torch.randn(2, 4), project=lambda patches: patches[..., :2]).choose("all")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="'gap'"):
        Tokens(PATCHES).choose("gap")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patches": torch.randn(2, 5)}, r"patches: got shape \[2, 5\]"),
        ({"patches": torch.randn(2, 0, 5)}, "at least one patch"),
        ({"patches": PATCHES, "grid": (2, 2)}, "2 x 2 cells for 6 patches"),
        ({"patches": PATCHES, "cls": torch.randn(2, 1, 5)}, r"cls: got shape \[2, 1, 5\]"),
        ({"patches": PATCHES, "cls": torch.randn(3, 5)}, r"cls: got shape \[3, 5\]"),
        ({"patches": PATCHES, "registers": torch.randn(2, 3, 4)}, r"registers: got shape \[2, 3, 4\]"),
        ({"patches": PATCHES, "registers": torch.randn(2, 5)}, r"registers: got shape \[2, 5\]"),
    ],
)
def test_shapes_that_do_not_fit_together_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tokens(**arguments)
