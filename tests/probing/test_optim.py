"""Optimisers of probes: LARS step by step, and slices of stacked parameters that step as they would alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlattn.errors import InputError
from vlattn.probing.optim import LARS, SGD, AdamW, SliceOptimizer

SHAPES = [(4, 3), (5,), (1, 2, 3), ()]


def parameter(*values: object) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values[0], dtype=torch.float64))


def step(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, grad: Any) -> None:
    p.grad = torch.as_tensor(grad, dtype=p.dtype).reshape(p.shape).clone()
    optimizer.step()


def test_two_steps_of_lars_are_those_computed_by_hand() -> None:
    p = parameter([[3.0, 4.0]])  # norm 5
    lars = LARS([p], lr=2.0)
    step(lars, p, [[0.6, 0.8]])  # norm 1: factor 0.001 * 5 = 0.005, mu = (0.003, 0.004)
    assert p[0].tolist() == pytest.approx([3 - 2 * 0.003, 4 - 2 * 0.004], abs=1e-12)
    step(lars, p, [[0.6, 0.8]])  # norm of p 4.99: mu = 0.9 (0.003, 0.004) + 0.00499 (0.6, 0.8)
    assert p[0].tolist() == pytest.approx([2.994 - 2 * 0.005694, 3.992 - 2 * 0.007592], abs=1e-12)


def test_weight_decay_of_lars_joins_the_gradient_before_its_norm_is_taken() -> None:
    p = parameter([[3.0, 4.0]])
    step(LARS([p], lr=1.0, weight_decay=0.2), p, [[0.0, -0.8]])  # g = (0.6, 0): factor 0.005 / 0.6
    assert p[0].tolist() == pytest.approx([3 - 0.005, 4.0], abs=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_steps_one_dimensional_tensors_as_plain_momentum_without_weight_decay(momentum: float) -> None:
    ours, theirs = parameter([1.0, -2.0, 0.5]), parameter([1.0, -2.0, 0.5])
    lars = LARS([ours], lr=0.3, momentum=momentum, weight_decay=0.7)
    sgd = torch.optim.SGD([theirs], lr=0.3, momentum=momentum)
    for seed in range(4):
        grad = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step(lars, ours, grad)
        step(sgd, theirs, grad)
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


def test_a_tensor_or_gradient_of_norm_zero_has_factor_one() -> None:
    zero = parameter([[[0.0, 0.0]]])  # as a query that starts at zero
    step(LARS([zero], lr=0.5), zero, [[[3.0, -4.0]]])
    assert zero.flatten().tolist() == [-1.5, 2.0]
    still = parameter([[3.0, 4.0]])
    lars = LARS([still], lr=0.5)
    step(lars, still, [[0.0, 0.0]])
    assert still[0].tolist() == [3.0, 4.0]
    assert lars.state[still]["mu"].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (1, 2, 3), (2, 3)])
def test_every_tensor_of_more_than_one_dimension_moves_by_lr_trust_and_its_norm(shape: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.arange(1.0, 7.0, dtype=torch.float64).reshape(shape))
    before = p.detach().clone()
    step(LARS([p], lr=0.7, trust=0.01), p, torch.linspace(-3, 5, 6))
    assert float((p.detach() - before).norm()) == pytest.approx(0.7 * 0.01 * float(before.norm()), rel=1e-12)


MAKERS: dict[str, tuple[Callable[..., SliceOptimizer], Callable[..., torch.optim.Optimizer]]] = {
    "lars": (lambda p, **k: LARS(p, weight_decay=0.1, **k), lambda p, lr: LARS(p, lr, weight_decay=0.1)),
    "sgd": (SGD, torch.optim.SGD),
    "momentum": (
        lambda p, **k: SGD(p, momentum=0.9, weight_decay=0.1, **k),
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
    ),
    "adamw": (AdamW, torch.optim.AdamW),
}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_sgd_and_adamw_step_as_those_of_torch(name: str) -> None:
    ours_of, theirs_of = MAKERS[name]
    ours = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = (ours_of([ours], lr=0.1), theirs_of([theirs], lr=0.1))
    for seed in range(5):
        grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step(optimizers[0], ours, grad)
        step(optimizers[1], theirs, grad)
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_of_a_stacked_parameter_step_as_parameters_of_their_own(name: str, shape: tuple[int, ...]) -> None:
    ours_of, theirs_of = MAKERS[name]
    generator = torch.Generator().manual_seed(0)
    rates = [0.0, 0.05, 1.5]
    stacked = torch.nn.Parameter(torch.randn(3, *shape, generator=generator, dtype=torch.float64))
    alone = [torch.nn.Parameter(stacked[r].detach().clone()) for r in range(3)]
    together = ours_of([stacked], lr=rates, stacked=True)
    separate = [theirs_of([p], lr=rate) for p, rate in zip(alone, rates, strict=True)]
    for _ in range(4):
        grad = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        step(together, stacked, grad)
        for p, optimizer, part in zip(alone, separate, grad, strict=True):
            step(optimizer, p, part)
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in alone]), atol=1e-13, rtol=0)
    assert not torch.equal(stacked[1], stacked[2])


@pytest.mark.parametrize("name", MAKERS)
def test_a_slice_that_is_not_live_is_as_if_that_step_had_never_been(name: str) -> None:
    ours_of, theirs_of = MAKERS[name]
    generator = torch.Generator().manual_seed(1)
    stacked = torch.nn.Parameter(torch.randn(2, 3, 2, generator=generator, dtype=torch.float64))
    alone = [torch.nn.Parameter(stacked[r].detach().clone()) for r in range(2)]
    together = ours_of([stacked], lr=[0.1, 0.2], stacked=True)
    separate = [theirs_of([alone[0]], lr=0.1), theirs_of([alone[1]], lr=0.2)]
    for number in range(4):
        grad = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
        live = torch.tensor([True, number not in (0, 2)])
        for r in range(2):
            if live[r]:
                step(separate[r], alone[r], grad[r])
        stacked.grad = torch.where(live[:, None, None], grad, torch.full_like(grad, float("inf")))
        together.step(live=live)
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in alone]), atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_optimiser_goes_on_bit_for_bit(name: str, tmp_path: Any) -> None:
    make = MAKERS[name][0]
    grads = torch.randn(6, 2, 3, 2, generator=torch.Generator().manual_seed(2))
    whole = torch.nn.Parameter(torch.ones(2, 3, 2))
    optimizer = make([whole], lr=[0.1, 0.2], stacked=True)
    for number, grad in enumerate(grads):
        if number == 3:
            torch.save({"weights": whole.detach().clone(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        step(optimizer, whole, grad)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    parts = torch.nn.Parameter(state["weights"])
    resumed = make([parts], lr=0.0, stacked=True)
    resumed.load_state_dict(state["optimizer"])
    for grad in grads[3:]:
        step(resumed, parts, grad)
    assert torch.equal(whole, parts)


def test_parameters_without_a_gradient_stay_and_a_closure_is_called() -> None:
    moved, still = parameter([1.0, 2.0]), parameter([1.0, 2.0])
    optimizer = SGD([moved, still], lr=0.5)

    def closure() -> torch.Tensor:
        loss = (moved**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5
    assert moved.tolist() == [0.0, 0.0]
    assert still.tolist() == [1.0, 2.0]


def test_rates_that_do_not_fit_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(InputError, match="lr: got 3 numbers"):
        LARS([p], lr=[0.1, 0.2, 0.3], stacked=True)
    with pytest.raises(InputError, match="give one, or stacked=True"):
        LARS([p], lr=[0.1, 0.2])
    with pytest.raises(InputError, match="lr: got -1"):
        SGD([p], lr=-1.0)
    with pytest.raises(InputError, match="weight_decay: got -1"):
        AdamW([p], lr=1.0, weight_decay=-1.0)
