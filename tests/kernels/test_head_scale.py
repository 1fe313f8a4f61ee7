"""Factors of heads, alone and behind attention."""

from __future__ import annotations

import pytest
import torch

from vlattn import ops
from vlattn.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 17, 3, 5), (3, 1, 4, 8)], ids=str)
def test_every_channel_of_a_head_is_multiplied_by_its_factor(size: tuple[int, ...], dtype: torch.dtype) -> None:
    b, t, h, d = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, t, h * d, generator=generator, dtype=torch.float64).to(dtype)
    scale = torch.randn(b, h, generator=generator, dtype=torch.float64).to(dtype)
    found = ops.head_scale(x, scale)
    assert found.dtype == dtype
    for i in range(b):
        for head in range(h):
            here = slice(head * d, (head + 1) * d)
            assert torch.equal(found[i, :, here], x[i, :, here] * scale[i, head])


def test_factors_take_the_dtype_of_what_they_multiply() -> None:
    x = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    assert ops.head_scale(x, torch.tensor([[2.0, 3.0]])).tolist() == [[[2, 2, 3, 3]] * 2]


def test_views_with_any_strides_give_what_their_copies_give() -> None:
    x, scale = torch.randn(5, 2, 12).transpose(0, 1)[..., ::2], torch.randn(3, 2).t()
    assert torch.equal(ops.head_scale(x, scale), ops.head_scale(x.contiguous(), scale.contiguous()))


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.head_scale, (x, scale))


def test_a_compiled_function_gives_what_it_gives_without_compilation() -> None:
    x, scale = torch.randn(2, 3, 8), torch.randn(2, 4)
    compiled = torch.compile(lambda x: ops.head_scale(x + 1, scale), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.head_scale(x + 1, scale))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_scaling_inside_attention_is_scaling_behind_it(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    groups, scale = torch.zeros(2, 6, dtype=torch.uint8), torch.randn(2, 4, generator=generator)
    options = {"scale": 0.3, "causal": True, "backend": backend}
    plain = ops.grouped_attention(q, k, v, groups, **options)  # type: ignore[arg-type]
    fused = ops.grouped_attention(q, k, v, groups, head_scale=scale, **options)  # type: ignore[arg-type]
    behind = ops.head_scale(plain.output.transpose(1, 2).flatten(2), scale)
    torch.testing.assert_close(fused.output.transpose(1, 2).flatten(2), behind, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "scale"), [((2, 3, 8), (2, 3)), ((2, 8), (2, 4)), ((2, 3, 8), (1, 4)), ((2, 3, 8), (2, 0))]
)
def test_shapes_that_do_not_belong_together_are_refused(x: tuple[int, ...], scale: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"x and scale: expected \[B, T, H \* D\] and \[B, H\]"):
        ops.head_scale(torch.zeros(x), torch.zeros(scale))
