"""A bank of heads against as many heads that are trained one by one."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.head import ProbeHead, make_head
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.optim import LARS
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.registry import POOLERS
from vlattn.probing.train_loss import bank_losses

RATES = (0.5, 2.0, 12.0)
GRID = (3, 4)


class Homemade(Pooler):
    """Layers of every kind: linear, affine batch norm with running statistics, a buffer, a scalar, softmax."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim // 2)
        self.norm = nn.BatchNorm1d(dim)
        self.score = nn.Linear(dim, 1)
        self.value = nn.Linear(dim, dim // 2)
        self.power = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, dim // 2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.check(tokens)
        normed = self.norm(tokens.transpose(1, 2)).transpose(1, 2)
        weight = (self.power * self.score(normed)).softmax(1)
        return (weight * self.value(normed)).sum(1) + self.shift

    def macs(self, tokens: int) -> int:
        return 0


def data(steps: int = 3, dim: int = 16, count: int = 12, dtype: torch.dtype = torch.float64) -> list:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, count, dim, generator=generator).to(dtype) + 0.5, torch.randint(5, (6,), generator=generator))
        for _ in range(steps)
    ]


def head_with(name: str) -> ProbeHead:
    """A small head; some poolers need heads that divide 16."""
    if name == "homemade":
        torch.manual_seed(0)
        return ProbeHead(Homemade(16), 5)
    short = {
        "aim": "aim:heads=4",
        "ep": "ep:queries=4",
        "ep_direct": "ep:queries=4,form=direct",
        "ep_d": "ep:queries=4,d=2",
    }
    return make_head(short.get(name, name if "_" in name else small(name)), 16, 5, grid=GRID, seed=0)


def small(name: str) -> str:
    """The pooler with 4 heads where it has heads."""
    return f"{name}:heads=4" if "heads" in inspect.signature(POOLERS[name]).parameters else name


def train_alone(head: ProbeHead, rate: float, batches: list) -> ProbeHead:
    head = copy.deepcopy(head).train()
    optimizer = LARS(head.parameters(), lr=rate, trust=0.05)
    for tokens, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(head(tokens), labels).backward()
        optimizer.step()
    return head.eval()


def train_bank(head: ProbeHead, rates: tuple[float, ...], batches: list, vmap: bool | None = None) -> HeadBank:
    bank = HeadBank(head, len(rates), vmap).train()
    optimizer = LARS(bank.parameters(), lr=rates, trust=0.05, stacked=True)
    for tokens, labels in batches:
        optimizer.zero_grad()
        bank_losses(bank(tokens), labels).sum().backward()
        optimizer.step()
    return bank.eval()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("name", ["homemade", "ep_direct", "ep_d", *POOLERS])
def test_a_bank_trains_as_its_heads_do_one_by_one(name: str, vmap: bool) -> None:
    head = head_with(name).double()
    batches = data(count=1 if name == "cls" else 12)
    bank = train_bank(head, RATES, batches, vmap)
    logits = bank(batches[0][0]).detach()
    assert logits.shape == (3, 6, 5)
    for index, rate in enumerate(RATES):
        alone = train_alone(head, rate, batches)
        torch.testing.assert_close(logits[index], alone(batches[0][0]), atol=1e-9, rtol=1e-9)
        mine, state = bank.slice_state(index), alone.state_dict()
        assert mine.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(mine[key], value, atol=1e-9, rtol=1e-9, msg=lambda text, k=key: f"{k}: {text}")
    assert float((logits[0] - logits[2]).abs().max()) > 1e-3  # rates that differ lead apart


@pytest.mark.parametrize("name", ["homemade", "ep", "gap", "aim"])
def test_in_fp32_the_difference_is_rounding(name: str) -> None:
    head = head_with(name)
    batches = data(dtype=torch.float32)
    bank = train_bank(head, RATES[:2], batches)
    for index, rate in enumerate(RATES[:2]):
        alone = train_alone(head, rate, batches)
        torch.testing.assert_close(bank(batches[0][0])[index], alone(batches[0][0]), atol=2e-4, rtol=2e-4)


def test_all_heads_begin_as_the_one_given_which_stays_as_it_is() -> None:
    head = head_with("ep").eval()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    bank = HeadBank(head, 4)
    tokens = data(1, dtype=torch.float32)[0][0]
    assert not bank.training
    torch.testing.assert_close(bank(tokens), head(tokens).expand(4, -1, -1))
    train_bank(head, RATES, data(1, dtype=torch.float32))
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])
    for name, parameter in bank.stacked.named_parameters():
        assert parameter.shape == (4, *before[name].shape)
        assert parameter.is_leaf


def test_a_head_that_diverges_leaves_the_others_as_they_were() -> None:
    head, batches = head_with("ep").double(), data(4)
    bank = train_bank(head, (0.5, 1e200, 2.0), batches)
    assert not bank(batches[0][0])[1].isfinite().all()
    calm = train_bank(head, (0.5, 2.0), batches)
    torch.testing.assert_close(bank(batches[0][0])[[0, 2]], calm(batches[0][0]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["homemade", "ep"])
def test_a_slice_is_a_head_of_its_own(name: str) -> None:
    batches = data(2)
    bank = train_bank(head_with(name).double(), RATES, batches)
    alone = bank.head(1)
    torch.testing.assert_close(alone(batches[0][0]), bank(batches[0][0])[1], atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        alone.classifier.weight.zero_()
    assert bank.slice_state(1)["classifier.weight"].abs().max() > 0
    with pytest.raises(InputError, match="index: got 3; this bank has heads 0 to 2"):
        bank.slice_state(3)


@pytest.mark.parametrize("name", ["homemade", "ep", "gap", "aim", "vjepa"])
def test_under_autocast_a_bank_computes_as_a_head_does(name: str) -> None:
    head = head_with(name).train()
    tokens = data(1, dtype=torch.float32)[0][0]
    bank = HeadBank(head, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = bank(tokens), head(tokens)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs.expand(2, -1, -1), atol=0.06, rtol=0.02)


def test_heads_that_draw_go_on_drawing_from_where_they_were() -> None:
    """ACMIL hides instances at random in training, by a generator that its state dict does not hold."""
    batches = data(2)
    bank = train_bank(head_with("acmil").double(), RATES, batches).train()
    weights, draws = copy.deepcopy(bank.state_dict()), bank.draws()
    assert len(draws) == 3
    first = bank(batches[0][0])
    assert not torch.equal(bank(batches[0][0]), first)
    bank.load_state_dict(weights)
    bank.load_draws(draws)
    assert torch.equal(bank(batches[0][0]), first)
    assert HeadBank(head_with("ep"), 3).draws() == []


def test_efficient_probing_runs_its_heads_as_one_and_others_run_in_turn() -> None:
    assert HeadBank(head_with("ep"), 2).vmap
    assert not HeadBank(head_with("ep"), 1).vmap
    assert not HeadBank(head_with("mhca"), 2).vmap


def test_the_state_dict_restores_a_bank() -> None:
    batches = data(2)
    head = head_with("homemade").double()
    bank = train_bank(head, RATES, batches)
    other = HeadBank(head, 3).eval()
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other(batches[0][0]), bank(batches[0][0]))


def test_no_copies_and_single_images_in_training_are_refused() -> None:
    with pytest.raises(InputError, match="copies: got 0"):
        HeadBank(head_with("gap"), 0)
    with pytest.raises(InputError, match="batch of 1 in training mode"):
        HeadBank(head_with("gap"), 2).train()(torch.zeros(1, 3, 16))
