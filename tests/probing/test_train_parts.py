"""Parts of training: best epochs, scaled losses, seeds, and several processes."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlattn.probing.head import make_head
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.metrics import mean_average_precision
from vlattn.probing.optim import SGD
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train_loss import bank_losses
from vlattn.probing.train_progress import Heard
from vlattn.probing.train_run import ProbeRun
from vlattn.probing.train_scale import LossScaler
from vlattn.probing.train_seed import seeded
from vlattn.probing.train_source import TokenBatches, read_batches
from vlattn.probing.train_stop import BestEpochs
from vlattn.probing.train_world import join_world

ROOT = Path(__file__).parents[2]


def course(values: list[float], **settings: object) -> BestEpochs:
    """One head that is seen with these values, epoch by epoch."""
    best = BestEpochs(1, **settings)  # type: ignore[arg-type]
    for epoch, value in enumerate(values):
        best.see(epoch, [value], [True])
    return best


# Best epochs ----------------------------------------------------------------------------------------------------------


def test_the_first_of_equally_good_epochs_is_the_best() -> None:
    head = course([50, 70, 60, 70]).heads[0]
    assert (head.value, head.epoch, head.stopped) == (70, 1, None)


def test_gains_below_the_least_one_count_for_the_best_but_not_against_patience() -> None:
    head = course([70, 70.05, 70.09, 70.2, 70.25], patience=2, min_delta=0.1, stop_from=0).heads[0]
    # 70.05 and 70.09 are no gain over 70, though each is the best so far
    assert (head.stopped, head.value, head.epoch) == (2, 70.09, 2)


def test_a_gain_is_measured_from_the_last_gain_so_slow_progress_goes_on() -> None:
    head = course([70, 70.06, 70.12, 70.18, 70.24, 70.3], patience=2, min_delta=0.1, stop_from=0).heads[0]
    assert (head.stopped, head.value) == (None, 70.3)


def test_no_head_stops_before_the_first_epoch_that_may_be_the_last() -> None:
    assert course([9.0] * 20, patience=3, stop_from=15).heads[0].stopped == 15
    assert course([9.0] * 20, patience=18, stop_from=15).heads[0].stopped == 18
    assert course([9.0] * 15, patience=3, stop_from=15).heads[0].stopped is None
    assert course([9.0] * 50).heads[0].stopped is None


def test_what_a_head_does_after_it_stopped_does_not_count() -> None:
    head = course([9.0, 9.0, 50.0], patience=1, stop_from=0).heads[0]
    assert (head.value, head.epoch, head.stopped) == (9, 0, 1)


def test_heads_are_told_apart_and_all_must_stop() -> None:
    best = BestEpochs(3, patience=1, stop_from=0)
    assert best.see(0, [1.0, 5.0, 2.0], [True] * 3) == [0, 1, 2]
    assert best.see(1, [1.0, 6.0, 3.0], [True, True, False]) == [1, 2]
    assert [head.stopped for head in best.heads] == [1, None, 1]
    assert [head.diverged for head in best.heads] == [False, False, True]
    assert not best.done
    assert best.see(2, [99.0, 6.0, 99.0], [True] * 3) == []
    assert best.done
    restored = BestEpochs(3)
    restored.load_state_dict(best.state_dict())
    assert restored.heads == best.heads


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    head = course([float("nan"), 3.0, float("nan")]).heads[0]
    assert (head.value, head.epoch) == (3, 1)
    assert course([float("nan")]).heads[0].epoch == -1


# Scaled losses --------------------------------------------------------------------------------------------------------


def test_one_head_is_scaled_as_by_the_scaler_of_torch() -> None:
    ours, theirs = torch.nn.Parameter(torch.ones(1, 3)), torch.nn.Parameter(torch.ones(1, 3))
    mine = LossScaler(1, True, start=1024.0, growth_interval=3)
    reference = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    optimizers = SGD([ours], lr=[0.1], momentum=0.9, stacked=True), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    factors = [1.0, 2.0, float("inf"), 1.0, -1.0, 0.5, 3.0, float("nan"), float("inf"), 1.0]
    for factor in factors:
        for optimizer in optimizers:
            optimizer.zero_grad()
        mine.total((ours * factor).sum(1)).backward()
        mine.step(optimizers[0], [ours])
        reference.scale((theirs * factor).sum()).backward()
        reference.step(optimizers[1])
        reference.update()
        assert float(mine.scale) == reference.get_scale()
        assert torch.equal(ours, theirs)
    assert float(mine.scale) == 1024 * 2 / 2 / 4


def test_an_overflow_costs_the_head_it_happens_to_its_step_and_no_other() -> None:
    p = torch.nn.Parameter(torch.ones(2, 3))
    scaler, optimizer = LossScaler(2, True, start=8.0), SGD([p], lr=[0.5, 0.5], stacked=True)
    scaler.total((p * torch.tensor([[1.0], [float("inf")]])).sum(1)).backward()
    scaler.step(optimizer, [p])
    assert p.tolist() == [[0.5] * 3, [1.0] * 3]
    assert scaler.scale.tolist() == [8.0, 4.0]


def test_without_scaling_losses_and_gradients_stay() -> None:
    p = torch.nn.Parameter(torch.ones(2, 3))
    scaler = LossScaler(2, False)
    total = scaler.total(p.sum(1))
    assert total.item() == 6
    total.backward()
    scaler.step(SGD([p], lr=0.5), [p])
    assert torch.equal(p.detach(), torch.full((2, 3), 0.5))


def test_a_batch_whose_partner_is_not_full_leaves_no_gradient_behind() -> None:
    source = TokenBatches(torch.randn(14, 3, 4), torch.arange(14) % 2, 4)  # 4, 4; 4 and 2
    settings = ProbeSettings(epochs=2, warmup_epochs=0, accumulate=2, precision="fp32")
    run = ProbeRun(source, source, HeadBank(make_head("gap", 4, 2), 1), "patch", 2, settings, join_world("cpu"))
    run.epoch(Heard())
    assert all(p.grad is None for p in run.parameters)


def test_scales_are_part_of_what_a_run_goes_on_from() -> None:
    def run() -> ProbeRun:
        source = TokenBatches(torch.randn(8, 3, 4), torch.arange(8) % 2, 4)
        bank = HeadBank(make_head("gap", 4, 2, seed=0), 2)
        settings = ProbeSettings(epochs=2, warmup_epochs=0, blr=(0.1, 0.2), precision="fp16")
        return ProbeRun(source, source, bank, "patch", 2, settings, join_world("cpu"))

    first, second = run(), run()
    first.epoch(Heard())
    first.scaler.scale.copy_(torch.tensor([8.0, 32.0]))
    first.scaler.good.fill_(7)
    second.load_state_dict(first.state_dict())
    assert second.scaler.scale.tolist() == [8, 32]
    assert second.scaler.good.tolist() == [7, 7]


@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_of_the_dtype_of_autocast_stay_and_others_become_fp32(
    kept: torch.dtype, half: torch.dtype | None
) -> None:
    batch = [(torch.ones(2, 3, 4, dtype=kept, requires_grad=True), torch.tensor([0, 1]))]
    ((tokens, labels),) = read_batches(batch, 0, "patch", 2, torch.device("cpu"), half)
    assert tokens.dtype == (half if kept == half else torch.float32)
    assert not tokens.requires_grad
    assert labels.dtype == torch.int64


def test_losses_of_a_bank_are_those_of_its_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (6,), generator=generator)
    several = torch.randint(2, (6, 4), generator=generator)
    for head in range(3):
        one = [-float(logits[head, b].log_softmax(0)[labels[b]]) for b in range(6)]
        assert float(bank_losses(logits, labels)[head]) == pytest.approx(sum(one) / 6)
        p = logits[head].sigmoid()
        both = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
        assert float(bank_losses(logits, several)[head]) == pytest.approx(float(both))
    assert bank_losses(logits.bfloat16(), labels).dtype == torch.float32


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_draws_within_a_seed_depend_on_seed_purpose_and_epoch_alone() -> None:
    def draw(*of: object) -> tuple[float, float, float]:
        with seeded(*of):  # type: ignore[arg-type]
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(0, "train", 3)
    torch.manual_seed(5)
    assert draw(0, "train", 3) == first
    others = [draw(0, "train", 4), draw(1, "train", 3), draw(0, "val", 3)]
    assert all(a != b for other in others for a, b in zip(other, first, strict=True))


def test_draws_outside_go_on_as_if_nothing_had_been_drawn_also_after_an_error() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def set_all() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    set_all()
    expected = draw()
    set_all()

    def fail() -> None:
        with seeded(0, "train", 0):
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draw() == expected


# Several processes ----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.train import train_probe
from vlattn.probing.train_source import TokenBatches, read_batches
from vlattn.probing.train_world import join_world

world = join_world("cpu")
generator = torch.Generator().manual_seed(0)
tokens, labels = torch.randn(48, 5, 8, generator=generator), torch.randint(3, (48,), generator=generator)
share = (world.rank, world.size)
train = TokenBatches(tokens, labels, 8, shuffle=True, share=share)
val = TokenBatches(tokens[:30], labels[:30], 4, share=share)
settings = ProbeSettings(epochs=2, warmup_epochs=1, blr=(5.0, 20.0), precision="fp32")
result = train_probe(train, val, "ep:queries=4", 3, settings, device="cpu", out=sys.argv[1])
multi = torch.nn.functional.one_hot(labels, 3)
several = TokenBatches(tokens, multi, 8, share=share), TokenBatches(tokens[:30], multi[:30], 4, share=share)
scored = train_probe(*several, "gap", 3, ProbeSettings(epochs=1, warmup_epochs=0, precision="fp32"), device="cpu")
torch.save({"states": dict(result.states), "batch": result.batch, "top1": result.epochs[-1].val["top1"],
            "map": scored.best.best, "scored": dict(scored.states), "loss": result.epochs[-1].train_loss},
           f"{sys.argv[1]}/rank{world.rank}.pt")
"""


def check_scores(found: dict[str, Any]) -> None:
    """Average precision over the images of both processes is that of one who sees them all."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(48, 5, 8, generator=generator), torch.randint(3, (48,), generator=generator)
    head = make_head("gap", 8, 3)
    head.load_state_dict({name: value[0] for name, value in found["scored"].items()})
    with torch.no_grad():
        expected = mean_average_precision(head.eval()(tokens[:30]), torch.nn.functional.one_hot(labels[:30], 3))
    assert found["map"] == pytest.approx(100 * float(expected), abs=1e-4)


@pytest.mark.slow
def test_two_processes_step_as_one_that_accumulates_over_both_shares(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "out")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    found = [torch.load(tmp_path / "out" / f"rank{rank}.pt") for rank in range(2)]
    for key in ("batch", "top1", "map", "loss"):
        assert found[0][key] == found[1][key]
    assert found[0]["batch"] == 16
    check_scores(found[0])

    # One process that takes the two shares in turn, and an update after every two batches.
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(48, 5, 8, generator=generator), torch.randint(3, (48,), generator=generator)
    shares = [TokenBatches(tokens, labels, 8, shuffle=True, share=(rank, 2)) for rank in range(2)]

    class Both:
        def set_epoch(self, epoch: int) -> None:
            for share in shares:
                share.set_epoch(epoch)

        def __len__(self) -> int:
            return 6

        def __iter__(self):  # type: ignore[no-untyped-def]
            for pair in zip(*shares, strict=True):
                yield from pair

    settings = ProbeSettings(epochs=2, warmup_epochs=1, blr=(5.0, 20.0), precision="fp32", accumulate=2)
    bank = HeadBank(make_head("ep:queries=4", 8, 3, seed=0), 2)
    val = TokenBatches(tokens[:30], labels[:30], 30)
    run = ProbeRun(Both(), val, bank, "patch", 3, settings, join_world("cpu"))
    states = []
    while not run.done:
        run.epoch(Heard())
        states.append({name: value.clone() for name, value in bank.stacked.state_dict().items()})
    best = found[0]["states"]
    assert all(torch.equal(best[name], found[1]["states"][name]) for name in best)
    matched = 0
    for epoch in range(2):  # whichever epoch was the best of each head there
        for head in range(2):
            close = [
                torch.allclose(best[name][head], states[epoch][name][head], atol=1e-5)
                for name in ("pooler.query", "pooler.value.weight", "classifier.weight", "classifier.bias")
            ]
            matched += all(close)
    assert matched == 2
    assert (tmp_path / "out" / "result.json").is_file()
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2


def test_alone_nothing_is_sent() -> None:
    world = join_world("cpu")
    assert (world.rank, world.size) == (0, 1)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    world.mean_gradients([p])
    assert p.grad.tolist() == [3, 3]
    assert world.add(torch.tensor(2.0)) == 2
    assert world.join(torch.arange(3)).tolist() == [0, 1, 2]
