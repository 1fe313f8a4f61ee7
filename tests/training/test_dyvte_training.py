"""Training DyVTE's gates: what learns, what stays, and runs that go on after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn
from vlattn.errors import InputError
from vlattn.interventions.dyvte_gates import DyVTEGates, ModelPrint, load_gates
from vlattn.models.registry import adapter_for
from vlattn.training.dyvte import DyVTETrainer, DyVTETraining, Step
from vlattn.training.dyvte_branches import Branches, answered_prompts
from vlattn.training.dyvte_tasks import collect_tasks
from vlattn.training.examples import Example
from vlattn.training.tiny_examples import tiny_examples

SMALL = DyVTETraining(gate_hidden=8, steps=4, lr=1e-2, batch_size=2, layers_per_step=2, save_every=1)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return vlattn.load("tiny")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return tiny_examples()[:6]


def weights(gates: DyVTEGates) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in gates.state_dict().items()}


def test_a_step_changes_the_gates_of_the_layers_drawn_and_nothing_else(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    trainer = DyVTETrainer(model, processor, examples, tmp_path, SMALL)
    before, frozen = weights(trainer.gates), {n: w.detach().clone() for n, w in model.named_parameters()}
    trainer.step(0)
    drawn = trainer.drawn_layers(0)
    assert len(drawn) == 2
    for layer, gate in enumerate(trainer.gates.layers):
        for name, weight in gate.named_parameters():
            assert (weight.grad is not None) == (layer in drawn)
            assert torch.equal(weight, before[f"layers.{layer}.{name}"]) == (layer not in drawn)
    for name, weight in model.named_parameters():
        assert weight.grad is None
        assert torch.equal(weight, frozen[name])
    assert not model.training


def test_a_gate_learns_the_same_whatever_others_share_its_step(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    trainers = [
        DyVTETrainer(model, processor, examples, tmp_path, DyVTETraining(8, steps=2, batch_size=2, layers_per_step=n))
        for n in (1, 6)
    ]
    for trainer in trainers:
        trainer.step(0)
    layer = trainers[0].drawn_layers(0)[0]
    alone, together = (trainer.gates.gate(layer).w1 for trainer in trainers)
    torch.testing.assert_close(alone, together, atol=1e-7, rtol=0)


def test_a_run_cut_off_and_resumed_ends_with_the_weights_of_an_uninterrupted_one(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    whole = DyVTETrainer(model, processor, examples, tmp_path / "whole", SMALL).run()
    first = DyVTETrainer(model, processor, examples, tmp_path / "parts", SMALL)
    first.run(until=2)
    # A kill after the third step was logged and before its checkpoint:
    log = tmp_path / "parts" / "training_log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": 99}\n')
    second = DyVTETrainer(model, processor, examples, tmp_path / "parts", SMALL, resume=True)
    assert second.first == 2
    parts = second.run()
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name])
    logs = [
        [
            {**json.loads(line), "seconds": 0}
            for line in (tmp_path / run / "training_log.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    assert load_gates(tmp_path / "parts").training_record == load_gates(tmp_path / "whole").training_record
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_what_is_written_at_the_end_are_the_trained_gates_and_how_they_came_about(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    heard: list[Step] = []
    trainer = DyVTETrainer(model, processor, examples, tmp_path, SMALL, name="tiny", data="six")
    gates = trainer.run(heard.append)
    saved = load_gates(tmp_path)
    for name, weight in weights(gates).items():
        assert torch.equal(weight, saved.state_dict()[name])
    record = saved.training_record
    assert (record["data"], record["examples"], record["steps"], record["lr"]) == ("six", 6, 4, 1e-2)
    assert saved.made_for.name == "tiny"
    drawn = [sum(layer in step.share for step in heard) * 2 for layer in range(6)]
    assert record["labels"]["examples"] == drawn
    exits = [round(sum(2 * step.share.get(layer, 0) for step in heard)) for layer in range(6)]
    assert record["labels"]["exits"] == exits


def test_after_the_last_layer_every_label_is_exit(loaded: Any, examples: list[Example], tmp_path: Path) -> None:
    model, processor = loaded
    settings = DyVTETraining(gate_hidden=4, steps=1, batch_size=6, layers_per_step=6)
    step = DyVTETrainer(model, processor, examples, tmp_path, settings).step(0)
    assert step.share[5] == 1
    assert step.share[0] < 1


def test_each_epoch_takes_every_example_once_in_an_order_of_its_own(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    settings = DyVTETraining(gate_hidden=4, epochs=2, batch_size=4)
    trainer = DyVTETrainer(model, processor, examples, tmp_path, settings)
    assert trainer.steps == 4
    epochs = [
        trainer.drawn_examples(0) + trainer.drawn_examples(1),
        trainer.drawn_examples(2) + trainer.drawn_examples(3),
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 2
    assert epochs[0] != epochs[1]
    assert {trainer.drawn_layers(step)[0] for step in range(60)} == set(range(6))


def test_gates_of_a_bf16_model_are_trained_in_fp32(examples: list[Example], tmp_path: Path) -> None:
    model, processor = vlattn.load("tiny", dtype="bfloat16")
    trainer = DyVTETrainer(model, processor, examples, tmp_path, SMALL)
    trainer.step(0)
    assert {weight.dtype for weight in trainer.gates.parameters()} == {torch.float32}


# Tasks that are kept --------------------------------------------------------------------------------------------------


def test_kept_tasks_are_what_the_model_says_and_are_made_once(
    loaded: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    branches = Branches(model)
    done: list[int] = []
    tasks = collect_tasks(branches, processor, examples, tmp_path, 4, done.append)
    assert done == [4, 2]
    assert (tasks.u.shape, tasks.y.shape) == ((6, 6, 384), (6, 6))
    direct = branches.run(answered_prompts(processor, examples[4:], model.device), [1, 3])
    taken = tasks.take([5, 4], [1, 3], model.device)
    for layer in (1, 3):
        assert torch.equal(taken[layer].u, direct[layer].u.flip(0))
        assert torch.equal(taken[layer].y, direct[layer].y.flip(0))
    monkeypatch.setattr(Branches, "run", None)
    again = collect_tasks(branches, processor, examples, tmp_path, 4)
    assert torch.equal(again.u, tasks.u)
    assert torch.equal(again.y, tasks.y)


def test_tasks_of_other_examples_labels_or_weights_are_refused(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    collect_tasks(Branches(model), processor, examples[:2], tmp_path, 2)
    with pytest.raises(InputError, match="made with other examples"):
        collect_tasks(Branches(model), processor, examples[1:3], tmp_path, 2)
    with pytest.raises(InputError, match="made with other batch_size, loss_ratio"):
        collect_tasks(Branches(model, loss_ratio=2.0), processor, examples[:2], tmp_path, 1)
    bfloat, _ = vlattn.load("tiny")
    with torch.no_grad():
        bfloat.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(InputError, match="made with other weights"):
        collect_tasks(Branches(bfloat), processor, examples[:2], tmp_path, 2)


def test_gates_learn_what_kept_tasks_say(loaded: Any, tmp_path: Path) -> None:
    model, processor = loaded
    some = tiny_examples()[:28]
    settings = DyVTETraining(gate_hidden=32, steps=150, lr=3e-3, batch_size=14, layers_per_step=6)
    trainer = DyVTETrainer(model, processor, some, tmp_path / "gates", settings)
    trainer.collect(tmp_path / "tasks")
    heard: list[Step] = []
    trainer.run(heard.append)
    assert trainer.tasks is not None
    for layer in range(1, 5):  # both labels occur there
        y = trainer.tasks.y[layer]
        assert 0 < int(y.sum()) < len(y)
        logits = trainer.gates(layer, trainer.tasks.u[layer])
        majority = max(float(y.float().mean()), 1 - float(y.float().mean()))
        assert float(((logits[:, 1] > logits[:, 0]) == y).float().mean()) > majority
    assert heard[-1].loss < heard[0].loss / 2


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_folder_with_gates_or_an_unfinished_run_is_not_overwritten(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    DyVTETrainer(model, processor, examples, tmp_path / "cut", SMALL).run(until=1)
    with pytest.raises(InputError, match="holds an unfinished run"):
        DyVTETrainer(model, processor, examples, tmp_path / "cut", SMALL)
    DyVTEGates(ModelPrint.of(adapter_for(model)), 4).save(tmp_path / "done")
    with pytest.raises(InputError, match="holds gates already"):
        DyVTETrainer(model, processor, examples, tmp_path / "done", SMALL)


def test_resuming_needs_a_checkpoint_and_the_same_settings(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    with pytest.raises(InputError, match="holds no checkpoint"):
        DyVTETrainer(model, processor, examples, tmp_path / "none", SMALL, resume=True)
    DyVTETrainer(model, processor, examples, tmp_path / "cut", SMALL).run(until=1)
    other = DyVTETraining(gate_hidden=8, steps=4, lr=2e-2, batch_size=2, layers_per_step=3)
    with pytest.raises(InputError, match=r"other settings \(layers_per_step, lr\)"):
        DyVTETrainer(model, processor, examples, tmp_path / "cut", other, resume=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("batch_size", 0), ("epochs", 0), ("steps", 0), ("lr", 0.0), ("warmup", 1.0), ("gate_hidden", 0)],
)
def test_settings_out_of_range_are_named(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting}: got {value}"):
        DyVTETraining(**{setting: value})  # type: ignore[arg-type]


def test_more_layers_than_there_are_no_examples_and_training_mode_are_refused(
    loaded: Any, examples: list[Example], tmp_path: Path
) -> None:
    model, processor = loaded
    with pytest.raises(InputError, match="has 6 decoder layers"):
        DyVTETrainer(model, processor, examples, tmp_path, DyVTETraining(layers_per_step=7))
    with pytest.raises(InputError, match="examples: got none"):
        DyVTETrainer(model, processor, [], tmp_path, SMALL)
    model.train()
    try:
        with pytest.raises(InputError, match=r"call model\.eval"):
            DyVTETrainer(model, processor, examples, tmp_path, SMALL)
    finally:
        model.eval()
