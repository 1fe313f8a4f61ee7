"""A shortened cache layer holds the rows of the index, bit for bit, in new memory or in its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vlattn import ops
from vlattn.errors import InputError

BACKENDS = ["reference", "triton"]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*x.shape[:2], index.shape[1], x.shape[3], dtype=x.dtype)
    for b in range(len(index)):
        for k, place in enumerate(index[b].tolist()):
            if place >= 0:
                out[b, :, k] = x[b, :, place]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64], ids=str)
def test_kept_rows_are_those_of_the_index(dtype: torch.dtype, in_place: bool, backend: ops.Backend) -> None:
    key, value = (draw(1, 2, 3, 65, 17) * 9).to(dtype), (draw(2, 2, 3, 65, 70) * 9).to(dtype)
    index = torch.tensor([[0, 3, 5, 64], [2, 7, -1, -1]])
    expected = naive(key, index), naive(value, index)
    behind = key[:, :, 4:].clone()
    found = ops.gather_kv(key, value, index, in_place=in_place, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(key[:, :, 4:], behind)
    assert (found[0].data_ptr() == key.data_ptr()) == in_place
    assert (found[1].data_ptr() == value.data_ptr()) == in_place


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_in_place_gives_what_new_memory_gives_for_any_ascending_rows(data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([1, 17, 63, 64, 65, 150]))
    kept = data.draw(st.integers(1, tokens))
    rows = []
    for _ in range(2):
        some = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=kept)))
        rows.append(some + [-1] * (kept - len(some)))
    index = torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    key, value = draw(3, 2, 2, tokens, 5), draw(4, 2, 2, tokens, 5)
    expected = naive(key, index), naive(value, index)
    for in_place in (False, True):
        found = ops.gather_kv(key, value, index, in_place=in_place, backend="triton")
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_memory_takes_any_order_and_padding_anywhere(backend: ops.Backend) -> None:
    key, value, index = draw(5, 1, 2, 9, 4), draw(6, 1, 2, 9, 4), torch.tensor([[-1, 8, 2, 2, -1, 0]])
    found = ops.gather_kv(key, value, index, backend=backend)
    assert torch.equal(found[0], naive(key, index))
    assert torch.equal(found[1], naive(value, index))


@pytest.mark.parametrize("in_place", [False, True])
def test_strided_caches_are_read_and_written_where_they_lie(in_place: bool) -> None:
    wide, index = draw(7, 2, 20, 3, 16), torch.tensor([[1, 4, 19], [0, 2, -1]])
    key, value = wide[..., :8].transpose(1, 2), wide[..., 8::2].transpose(1, 2)  # [2, 3, 20, D] views of one projection
    expected = naive(key, index), naive(value, index)
    untouched = wide[:, :, :, 9::2].clone()
    found = ops.gather_kv(key, value, index, in_place=in_place, backend="triton")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(wide[:, :, :, 9::2], untouched)


def test_nothing_kept_and_empty_batches_give_empty_layers() -> None:
    key = draw(8, 2, 3, 5, 4)
    for in_place in (False, True):
        index = torch.zeros(2, 0, dtype=torch.int64)
        assert ops.gather_kv(key, key.clone(), index, in_place=in_place, backend="triton")[0].shape == (2, 3, 0, 4)
        none = key[:0]
        assert ops.gather_kv(none, none, index[:0], in_place=in_place, backend="triton")[1].shape == (0, 3, 0, 4)


def test_gradients_come_from_the_reference_and_are_refused_of_triton() -> None:
    key, value = draw(9, 1, 2, 5, 3).requires_grad_(), draw(10, 1, 2, 5, 3)
    index = torch.tensor([[1, 3, -1]])
    ops.gather_kv(key, value, index)[0].sum().backward()
    assert key.grad is not None
    assert key.grad.sum((0, 1, 3)).tolist() == [0, 6, 0, 6, 0]
    with pytest.raises(InputError, match="backend: the Triton kernel has no gradients"):
        ops.gather_kv(key, value, index, backend="triton")


def test_compiled_functions_are_one_graph_and_give_the_same() -> None:
    def shorten(key: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new = ops.gather_kv(key, value, index, backend="triton")
        old = ops.gather_kv(key, value, index, in_place=True, backend="triton")
        return new[0] + 1, new[1] + 1, old[0] + 2, old[1] + 2

    key, value, index = draw(11, 2, 2, 9, 4), draw(12, 2, 2, 9, 4), torch.tensor([[0, 5], [7, 8]])
    expected = shorten(key.clone(), value.clone(), index)
    for a, b in zip(
        torch.compile(shorten, fullgraph=True, backend="aot_eager")(key, value, index), expected, strict=True
    ):
        assert torch.equal(a, b)


def test_the_operators_are_registered_as_pytorch_wants_them() -> None:
    key, value, index = draw(13, 2, 2, 9, 4), draw(14, 2, 2, 9, 4), torch.tensor([[0, 5], [7, -1]])
    ops.gather_kv(key, value, index, backend="triton")
    torch.library.opcheck(torch.ops.vlattn.gather_kv, (key, value, index))
    torch.library.opcheck(torch.ops.vlattn.gather_kv_, (key, value, index))


def test_no_floating_point_operation_is_counted() -> None:
    key, index = draw(15, 2, 2, 9, 4), torch.tensor([[0, 5], [7, -1]])
    with FlopCounterMode(display=False) as counter:
        for in_place in (False, True):
            ops.gather_kv(key, key.clone(), index, in_place=in_place, backend="triton")
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("index", "in_place", "message"),
    [
        (torch.tensor([[0.0]]), False, r"index: got torch.float32 \(1, 1\); give int64 \(1, K\)"),
        (torch.tensor([0]), False, r"index: got torch.int64 \(1,\)"),
        (torch.tensor([[0], [1]]), False, r"index: got torch.int64 \(2, 1\); give int64 \(1, K\)"),
        (torch.tensor([[0, 4]]), False, "index: got 0 to 4 for 4 positions; give 0 to 3, or -1"),
        (torch.tensor([[-2, 1]]), False, "index: got -2 to 1 for 4 positions"),
        (torch.tensor([[1, 0]]), True, "index: in place, each row has to be ascending"),
        (torch.tensor([[1, 1]]), True, "index: in place, each row has to be ascending"),
        (torch.tensor([[-1, 1]]), True, "index: in place, each row has to be ascending"),
        (torch.tensor([[0, 1, 2, 3, -1]]), True, "index: 5 positions do not fit into 4 places"),
    ],
)
def test_positions_that_do_not_fit_are_refused(index: torch.Tensor, in_place: bool, message: str) -> None:
    layer = torch.zeros(1, 2, 4, 3)
    with pytest.raises(InputError, match=message):
        ops.gather_kv(layer, layer.clone(), index, in_place=in_place)


def test_layers_that_do_not_belong_together_are_refused() -> None:
    index = torch.tensor([[0]])
    with pytest.raises(InputError, match=r"key and value: expected \[B, Hkv, T, D\]"):
        ops.gather_kv(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 5, 3), index)
    wide = torch.zeros(1, 1, 4, 3, dtype=torch.complex128)
    with pytest.raises(InputError, match="copies numbers of at most 8 bytes"):
        ops.gather_kv(wide, wide, index, backend="triton")
