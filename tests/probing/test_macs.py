"""What every pooler says it costs, against what torch counts."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlattn.probing.poolers.registry import POOLERS, make_pooler

DIM = 32
SUMS = {"dolg": 1, "gap": 1, "gem": 1, "lse": 1, "bag_mean": 0.5}
"""Sums over all tokens, in widths, that these make without a matrix product."""


def small(name: str, tokens: int) -> nn.Module:
    settings = {"heads": 4} if "heads" in inspect.signature(POOLERS[name]).parameters else {}
    side = int(tokens**0.5)
    queries = {"queries": 4} if name == "ep" else {}
    return make_pooler(name, DIM, grid=(side, side), **settings, **queries).eval()


@pytest.mark.parametrize("tokens", [9, 16])
@pytest.mark.parametrize("name", sorted(set(POOLERS) - {"cls", "gmp"}))
def test_macs_are_what_torch_counts_in_a_forward_and_the_sums_that_it_does_not(name: str, tokens: int) -> None:
    pooler = small(name, tokens)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pooler(torch.randn(1, tokens, DIM))
    assert pooler.macs(tokens) == counter.get_total_flops() // 2 + SUMS.get(name, 0) * tokens * DIM  # type: ignore[operator]


@pytest.mark.parametrize("form", ["direct", "reassociated"])
def test_forms_of_efficient_probing_count_what_they_compute(form: str) -> None:
    pooler = make_pooler("ep", DIM, queries=4, d=2, form=form)
    with FlopCounterMode(display=False) as counter:
        pooler(torch.randn(1, 50, DIM))
    assert counter.get_total_flops() == 2 * pooler.macs(50)


@pytest.mark.parametrize("name", sorted(POOLERS))
def test_what_is_built_costs_at_least_what_is_used(name: str) -> None:
    pooler = small(name, 16)
    if hasattr(pooler, "built_macs"):
        assert pooler.built_macs(16) > pooler.macs(16)  # type: ignore[operator]
    else:
        assert name not in ("clip", "coca", "vit")
