"""Probes with a pooler that has branches are trained on ACMIL's losses, alone and in a bank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.head import ProbeHead, load_head, make_head, save_head
from vlattn.probing.head_bank import HeadBank
from vlattn.probing.optim import LARS
from vlattn.probing.poolers.acmil import ACMIL
from vlattn.probing.poolers.acmil_loss import acmil_loss
from vlattn.probing.settings import fast_settings
from vlattn.probing.step_time import step_times
from vlattn.probing.train import train_probe
from vlattn.probing.train_loss import bank_losses, training_losses
from vlattn.probing.train_source import TokenBatches
from vlattn.probing.train_state import load_result

DIM, CLASSES, IMAGES = 16, 4, 48
BOTH = ["acmil:n_masked_patch=3", "acmil_mha:n_masked_patch=3,heads=4"]
SETTINGS = fast_settings(2, lr=(0.01, 0.03), precision="fp32")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(steps: int = 1, several: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shape = (6, CLASSES) if several else (6,)
    return [
        (draw(6, 12, DIM, seed=step) + 0.5, torch.randint(2 if several else CLASSES, shape, generator=generator))
        for step in range(steps)
    ]


def sources() -> tuple[TokenBatches, TokenBatches]:
    tokens, labels = draw(IMAGES, 12, DIM).float(), torch.arange(IMAGES) % CLASSES
    return TokenBatches(tokens, labels, 16, shuffle=True), TokenBatches(tokens, labels, 16)


def reference(head: ProbeHead) -> ACMIL:
    """The whole of ACMIL with a head's weights, and the batch norm of the common probe on the bag alone."""
    pooler: Any = head.pooler
    shared = pooler.branch_losses.share_branch_classifier
    whole = ACMIL(pooler, CLASSES, norm="bn", share_branch_classifier=shared).double().train()
    whole.load_state_dict(head.state_dict())
    return whole


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("more", ["", ",w_branch=0.3,w_div=2", ",share_branch_classifier=true"])
@pytest.mark.parametrize("text", BOTH)
def test_the_losses_are_those_of_acmil_with_the_probes_norm(text: str, more: str, several: bool) -> None:
    head = make_head(text + more, DIM, CLASSES, seed=0).double().train()
    ((tokens, labels),) = data(several=several)
    bank = HeadBank(head, 2)
    found = training_losses(bank.read(tokens), labels, bank.branch_losses)
    losses: Any = head.pooler.branch_losses
    criterion = F.binary_cross_entropy_with_logits if several else F.cross_entropy
    expected = acmil_loss(
        reference(head)(tokens),
        labels.double() if several else labels,
        w_branch=losses.w_branch,
        w_div=losses.w_div,
        criterion=criterion,
    )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].expand(2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("text", BOTH)
def test_a_bank_trains_on_them_as_its_heads_do_one_by_one(text: str) -> None:
    rates, batches = (0.5, 2.0, 12.0), data(3)
    start = make_head(text, DIM, CLASSES, seed=0).double().train()
    bank = HeadBank(start, len(rates))
    optimizer = LARS(bank.parameters(), lr=rates, trust=0.05, stacked=True)
    for tokens, labels in batches:
        optimizer.zero_grad()
        training_losses(bank.read(tokens), labels, bank.branch_losses)["total"].sum().backward()
        optimizer.step()
    for index, rate in enumerate(rates):
        whole = reference(make_head(text, DIM, CLASSES, seed=0).double())
        alone = LARS(whole.parameters(), lr=rate, trust=0.05)
        for tokens, labels in batches:
            alone.zero_grad()
            acmil_loss(whole(tokens), labels)["total"].backward()
            alone.step()
        state = bank.slice_state(index)
        assert state.keys() == whole.state_dict().keys()
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, atol=1e-9, rtol=1e-9)
    assert not torch.equal(state["branch_classifiers.0.weight"], start.state_dict()["branch_classifiers.0.weight"])


def test_weights_of_nought_or_one_branch_leave_the_loss_of_the_bag() -> None:
    ((tokens, labels),) = data()
    for text in ("acmil:w_branch=0,w_div=0", "acmil:n_token=1", "abmil"):
        head = make_head(text, DIM, CLASSES, seed=0).double().train()
        assert head.branch_classifiers is None
        assert head.training_only() == 0
        bank = HeadBank(head, 2)
        found = training_losses(bank.read(tokens), labels, bank.branch_losses)
        assert list(found) == ["total"]
        assert torch.equal(found["total"], bank_losses(HeadBank(head, 2)(tokens), labels))


def test_without_a_weight_branches_have_no_classifiers_but_stay_apart() -> None:
    head = make_head("acmil:w_branch=0", DIM, CLASSES, seed=0).double().train()
    assert head.branch_classifiers is None
    ((tokens, labels),) = data()
    bank = HeadBank(head, 1)
    found = training_losses(bank.read(tokens), labels, bank.branch_losses)
    assert found["div"].item() > 0.5
    assert torch.equal(found["total"], found["bag"] + found["div"])


def test_branch_classifiers_change_no_first_weight_of_the_rest() -> None:
    full, bag = (make_head(text, DIM, CLASSES, seed=3).state_dict() for text in ("acmil", "acmil:w_branch=0,w_div=0"))
    assert set(full) - set(bag) == {f"branch_classifiers.{m}.{part}" for m in range(5) for part in ("weight", "bias")}
    assert all(torch.equal(value, full[name]) for name, value in bag.items())


@pytest.mark.parametrize("text", BOTH)
def test_a_run_tells_the_parts_of_its_loss_and_gives_heads_without_what_training_alone_needs(
    text: str, tmp_path: Path
) -> None:
    result = train_probe(*sources(), text, CLASSES, SETTINGS, device="cpu", out=tmp_path)
    for record in result.epochs:
        assert list(record.parts) == ["bag", "branch", "div"]
        for index, total in enumerate(record.train_loss):
            assert total == pytest.approx(sum(part[index] for part in record.parts.values()), rel=1e-5)
    width = DIM // 2
    assert result.training_only == 5 * CLASSES * (width + 1)
    head = result.head()
    assert head.branch_classifiers is None
    assert head.trainable() == result.trainable - result.training_only
    again = load_result(tmp_path)
    assert (again.training_only, again.epochs, again.trainable) == (
        result.training_only,
        result.epochs,
        result.trainable,
    )
    tokens = sources()[1].tokens
    assert torch.equal(again.head()(tokens), head(tokens))
    assert torch.equal(load_head(tmp_path / "head.safetensors")(tokens), head(tokens))
    told = "; ".join(result.departures)
    assert "loss of the bag + 1 x branch + 1 x diversity" in told
    assert "batch norm in front of the bag's classifier" in told


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("text", BOTH)
def test_half_precision_trains_on_them_too(text: str, precision: Any) -> None:
    settings = replace(SETTINGS, precision=precision)
    exact, half = (train_probe(*sources(), text, CLASSES, one, device="cpu") for one in (SETTINGS, settings))
    assert half.epochs[0].parts.keys() == {"bag", "branch", "div"}
    for name, values in half.epochs[0].parts.items():
        assert values == pytest.approx(exact.epochs[0].parts[name], rel=0.05)


def test_heads_in_a_run_are_those_of_single_runs() -> None:
    both = train_probe(*sources(), BOTH[0], CLASSES, SETTINGS, device="cpu")
    for index, rate in enumerate((0.01, 0.03)):
        alone = train_probe(*sources(), BOTH[0], CLASSES, replace(SETTINGS, lr=rate), device="cpu")
        for name, value in alone.head().state_dict().items():
            torch.testing.assert_close(both.head(index).state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_a_run_from_before_on_the_loss_of_the_bag_is_not_taken_for_one_on_all_losses(tmp_path: Path) -> None:
    def run(text: str, resume: bool) -> Any:
        return train_probe(*sources(), text, CLASSES, SETTINGS, device="cpu", out=tmp_path, resume=resume)

    run("acmil", False)
    file = tmp_path / "result.json"
    old = json.loads(file.read_text())
    assert old["record"].pop("branch_losses") == {"w_branch": 1.0, "w_div": 1.0, "share_branch_classifier": False}
    del old["training_only"]
    for record in old["epochs"]:
        del record["parts"]
    file.write_text(json.dumps(old))
    with pytest.raises(InputError, match=r"begun with other settings \(branch_losses\)"):
        run("acmil", True)
    assert load_result(tmp_path).training_only == 0  # still read, to look at


def test_runs_of_other_poolers_are_recorded_as_before(tmp_path: Path) -> None:
    train_probe(*sources(), "gap", CLASSES, SETTINGS, device="cpu", out=tmp_path)
    kept = json.loads((tmp_path / "result.json").read_text())["record"]
    assert set(kept) == {"pooler", "dim", "classes", "grid", "about", "processes", *vars(SETTINGS)}


def test_a_file_of_a_head_has_no_classifiers_of_branches(tmp_path: Path) -> None:
    head = make_head("acmil", DIM, CLASSES, seed=0).eval()
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert set(head.state_dict()) - set(again.state_dict()) == {
        name for name in head.state_dict() if name.startswith("branch_classifiers.")
    }
    tokens = draw(2, 12, DIM).float()
    assert torch.equal(again(tokens), head(tokens))


def test_a_timed_step_is_one_on_all_losses() -> None:
    tokens, labels = draw(8, 12, DIM).float(), torch.arange(8) % CLASSES
    seen: list[str] = []
    import vlattn.probing.step_time as module

    plain = module.training_losses

    def heard(*arguments: Any) -> dict[str, torch.Tensor]:
        found = plain(*arguments)
        seen.extend(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_losses", heard)
        step_times({"acmil": tokens}, labels, CLASSES, SETTINGS, rounds=1)
    assert {"total", "bag", "branch", "div"} == set(seen)
