"""The floor of a time: the slower of operations and bytes, from rates that were measured here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.eval.bench_shapes import random_model
from vlattn.eval.bench_work import decode_load, prefill_load
from vlattn.eval.cost import decode_macs, kv_bytes_formula
from vlattn.eval.model_cost import Parts, prefill_parts
from vlattn.eval.roofline import Bound, Roofline, measure_roofline
from vlattn.models.registry import adapter_for

MACHINE = Roofline("cpu", "float32", 1, {256: 1e11, 512: 2e11}, {"copy": 1e10, "read": 8e9})


def test_the_slower_of_the_two_sets_the_bound() -> None:
    assert MACHINE.bound(4e11, 1e9) == Bound(2.0, "compute")
    assert MACHINE.bound(2e10, 5e9) == Bound(0.5, "memory")
    assert MACHINE.bound(2e11, 1e10) == Bound(1.0, "compute")


def test_the_best_size_and_the_best_pass_count() -> None:
    assert (MACHINE.flops_per_second, MACHINE.bytes_per_second) == (2e11, 1e10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_is_measured(dtype: torch.dtype) -> None:
    found = measure_roofline("cpu", dtype, sizes=[8, 16], buffer_bytes=1 << 16, seconds=0.05)
    assert set(found.matmul) == {8, 16}
    assert set(found.bandwidth) == {"copy", "read"}
    assert min(*found.matmul.values(), *found.bandwidth.values()) > 0
    assert (found.device, found.dtype) == ("cpu", str(dtype).removeprefix("torch."))
    assert found.threads == torch.get_num_threads()
    assert json.loads(json.dumps(found.as_dict()))["matmul"]["16"] == found.matmul[16]


def test_sizes_too_slow_for_the_time_are_left_out() -> None:
    assert set(measure_roofline("cpu", sizes=[16, 4096], buffer_bytes=64, seconds=1e-6).matmul) == {16}


def test_senseless_requests_are_refused() -> None:
    wrong: tuple[Callable[[], Any], ...] = (
        lambda: measure_roofline("cpu", torch.int64),
        lambda: measure_roofline(sizes=[]),
        lambda: measure_roofline(sizes=[0]),
        lambda: measure_roofline(buffer_bytes=4),
        lambda: measure_roofline(seconds=0),
    )
    for call in wrong:
        with pytest.raises(InputError):
            call()


# Loads ----------------------------------------------------------------------------------------------------------------


def test_a_prefill_reads_every_weight_once_and_writes_the_cache(llava: Callable[..., Any]) -> None:
    model = llava(dtype=torch.float32)
    adapter = adapter_for(model)
    parts = prefill_parts(adapter, 42)
    operations, moved = prefill_load(adapter, parts)
    table = model.get_input_embeddings().weight  # of which only the prompt's rows are read
    read = sum(p.numel() for p in model.parameters() if p is not table) * 4
    assert moved == read + kv_bytes_formula(1, [42, 42], 2, 8, 4)
    assert operations == 2 * (parts.total + 32 * 64)


def test_decode_steps_each_read_the_decoder_its_head_and_what_is_cached(llava: Callable[..., Any]) -> None:
    model = llava(dtype=torch.float32)
    adapter = adapter_for(model)
    parts = Parts((), (42, 15), 0, 0, 0, batch=3)
    weights = sum(p.numel() for layer in model.model.language_model.layers for p in layer.parameters())
    weights += model.model.language_model.norm.weight.numel() + model.lm_head.weight.numel()
    moved, macs = 0, 3 * decode_macs([42, 15], 5, 32, 48, 16)
    for step in range(1, 6):
        moved += 4 * weights + kv_bytes_formula(3, [42 + step, 15 + step], 2, 8, 4)
        macs += 3 * 32 * 64
    assert decode_load(adapter, parts, 5) == (2 * macs, moved)


def test_a_tied_head_is_read_as_a_head(llava: Callable[..., Any]) -> None:
    model = llava(dtype=torch.float32)
    adapter, parts = adapter_for(model), Parts((), (1, 1), 0, 0, 0)
    before = prefill_load(adapter, parts)[1], decode_load(adapter, parts, 1)[1]
    model.lm_head.weight = model.get_input_embeddings().weight
    assert (prefill_load(adapter, parts)[1], decode_load(adapter, parts, 1)[1]) == before


def test_dropping_nine_tenths_of_the_image_hardly_moves_the_floor_of_decoding_at_batch_1() -> None:
    """LLaVA-1.5-7B in fp16 on a card of 1e15 operations and 3.35e12 bytes a second: weights of 13 GB against 0.3 GB."""
    adapter = adapter_for(random_model("llava-1.5-7b", device="meta", dtype=torch.float16))
    card = Roofline("cuda", "float16", 1, {8192: 1e15}, {"copy": 3.35e12})
    full, pruned = prefill_parts(adapter, 576 + 60), prefill_parts(adapter, 64 + 60, kept=64)
    decode = [card.bound(*decode_load(adapter, parts, 100)) for parts in (full, pruned)]
    prefill = [card.bound(*prefill_load(adapter, parts)) for parts in (full, pruned)]
    assert [bound.by for bound in decode] == ["memory", "memory"]
    assert 0.97 < decode[1].seconds / decode[0].seconds < 0.99
    assert prefill[0].by == "compute"
    assert prefill[1].seconds / prefill[0].seconds < 0.5


def test_a_batch_makes_the_cache_a_larger_part_of_decoding() -> None:
    adapter = adapter_for(random_model("llava-1.5-7b", device="meta", dtype=torch.float16))
    shares = []
    for batch in (1, 16):
        full, pruned = (Parts((), (n,) * 32, 0, 0, 0, batch) for n in (636, 124))
        shares.append(decode_load(adapter, pruned, 100)[1] / decode_load(adapter, full, 100)[1])
    assert shares[0] > 0.97
    assert shares[1] < 0.8
