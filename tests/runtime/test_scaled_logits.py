"""Logits of a few rows, whose keys are widened a few heads at a time."""

from __future__ import annotations

import pytest
import torch

from vlattn.runtime import routing
from vlattn.runtime.routing import scaled_logits


def operands(dtype: torch.dtype, kv_heads: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, rows, 8, generator=generator, dtype=torch.float64).to(dtype)
    key = torch.randn(3, kv_heads, 40, 8, generator=generator, dtype=torch.float64).to(dtype)
    return query, key[:, :, :33]  # as of a static cache


@pytest.mark.parametrize("block", [1, 33 * 8 * 4, 5 * 33 * 8 * 4, 2**20], ids=["less than one", "one", "five", "all"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_blocks_of_any_size_give_the_products_in_single_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kv_heads: int, rows: int, block: int
) -> None:
    monkeypatch.setattr(routing, "_BLOCK", block)
    query, key = operands(dtype, kv_heads, rows)
    found = scaled_logits(query, key, 0.3)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = 0.3 * torch.einsum("bhrd,bhkd->bhrk", query.double(), key.double().repeat_interleave(6 // kv_heads, 1))
    assert float((found - expected).abs().max()) < 1e-5


def test_wanted_gradients_pass_through() -> None:
    query, key = operands(torch.bfloat16, 2, 4)
    query.requires_grad_()
    scaled_logits(query, key, None).sum().backward()
    assert query.grad is not None
    expected = key.float().sum(2).repeat_interleave(3, 1) * 8**-0.5
    torch.testing.assert_close(query.grad.float(), expected[:, :, None].expand(-1, -1, 4, -1), rtol=1e-2, atol=1e-2)
