"""Sweeps of poolers: what they gather, how they go on, and what they refuse before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import vlattn.probing.sweep as sweep_module
from vlattn.errors import InputError
from vlattn.probing.poolers.registry import POOLERS
from vlattn.probing.settings import BLR_GRID, ProbeSettings, fast_settings
from vlattn.probing.step_time import step_times
from vlattn.probing.sweep import ProbeSweep, begun
from vlattn.probing.sweep_config import ProbeSweepConfig, file_name
from vlattn.probing.train_state import load_result

SUBJECT = {"backbone": "digits-mim:0", "data": "digits"}
SMALL = ProbeSweepConfig([SUBJECT], ["ep:queries=4"], seeds=(0, 1), epochs=1, rates=(1e-3, 1e-2), step_rounds=2)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, work: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sweep")
    return out, ProbeSweep(SMALL, out, work).run()


def test_arms_hold_what_their_runs_gave(swept: tuple[Path, dict[str, Any]]) -> None:
    out, results = swept
    (subject,) = results["subjects"]
    arms = {arm["pooler"]: arm for arm in subject["arms"]}
    assert list(arms) == ["cls", "gap", "ep:queries=4"]
    values = {
        name: [
            load_result(out / "runs" / subject["name"] / file_name(name) / f"seed_{seed}").best.best for seed in (0, 1)
        ]
        for name in arms
    }
    for name, arm in arms.items():
        assert arm["value"]["values"] == values[name]
        assert arm["value"]["mean"] == pytest.approx(sum(values[name]) / 2)
    linear = max(("cls", "gap"), key=lambda name: sum(values[name]))
    assert subject["linear"] == linear
    assert arms[linear]["difference"] is None
    differences = [a - b for a, b in zip(values["ep:queries=4"], values[linear], strict=True)]
    found = arms["ep:queries=4"]["difference"]
    assert found["values"] == pytest.approx(differences)
    half = stats.t.ppf(0.975, 1) * abs(differences[0] - differences[1]) / 2
    assert found["high"] - found["mean"] == pytest.approx(half)
    assert json.loads(json.dumps(results)) == json.loads(json.dumps(results, allow_nan=False))


def test_costs_are_those_of_the_published_formulas(swept: tuple[Path, dict[str, Any]]) -> None:
    arms = {arm["pooler"]: arm for arm in swept[1]["subjects"][0]["arms"]}
    width, patches, classes, queries = 96, 64, 10, 4
    assert arms["ep:queries=4"]["pooler_parameters"] == queries * width + width**2
    assert arms["ep:queries=4"]["parameters"] == queries * width + width**2 + classes * (width + 1)
    assert arms["ep:queries=4"]["macs"] == 2 * queries * patches * width + width**2 + width * classes
    assert arms["cls"]["macs"] == width * classes
    assert arms["gap"]["parameters"] == classes * (width + 1)
    assert all(arm["step"]["lower"] <= arm["step"]["median"] <= arm["step"]["upper"] for arm in arms.values())


def test_a_second_call_trains_only_what_was_added(
    swept: tuple[Path, dict[str, Any]], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = swept
    trained: list[tuple[str, bool]] = []
    train = sweep_module.train_probe

    def heard(*arguments: Any, **options: Any) -> Any:
        trained.append((arguments[2], options["resume"]))
        return train(*arguments, **options)

    monkeypatch.setattr(sweep_module, "train_probe", heard)
    after = ProbeSweep(replace(SMALL, poolers=["ep:queries=4", "gem"], seeds=(0, 1)), out, work).run()
    assert [name for name, resumed in trained if not resumed] == ["gem", "gem"]
    for old, new in zip(before["subjects"][0]["arms"], after["subjects"][0]["arms"][:3], strict=True):
        assert old["value"] == new["value"]


def test_other_settings_in_the_same_folder_are_refused(swept: tuple[Path, dict[str, Any]], work: Path) -> None:
    with pytest.raises(InputError, match=r"begun with other settings \(.*epochs"):
        ProbeSweep(replace(SMALL, epochs=2), swept[0], work).run()


def test_few_shots_are_asked_for_in_the_file_and_told_with_the_results(tmp_path: Path, work: Path) -> None:
    config = replace(SMALL, linear=["gap"], poolers=["gem"], shots=2, rates=(1e-2,))
    results = ProbeSweep(config, tmp_path, work).run()
    (subject,) = results["subjects"]
    assert results["config"]["shots"] == subject["shots"] == 2
    assert subject["images"]["train"] == 20
    assert "weights, order and training images" in results["interval"]
    assert "2 images of each class, 20 of 1442, with epochs to match" in subject["departures"]
    one = load_result(tmp_path / "runs" / subject["name"] / "gem" / "seed_1")
    assert one.settings.epochs == 5  # one update in each, as 1442 images make in batches of 256
    assert one.batch == 20
    with pytest.raises(InputError, match="begun with other settings"):
        ProbeSweep(replace(config, shots=3), tmp_path, work).run()


def test_a_configuration_without_shots_makes_the_runs_it_always_made(
    swept: tuple[Path, dict[str, Any]], work: Path
) -> None:
    out, results = swept
    kept = json.loads(next(out.glob("runs/*/gap/seed_0/result.json")).read_text())
    assert set(kept["record"]["about"]) == {"backbone", "data", "classes", "augment", "asked"}
    assert set(kept["record"]["about"]["asked"]) == {"backbone", "data", "val", "layer"}
    assert results["config"]["shots"] is None
    assert json.loads(next(out.glob("times/*.json")).read_text())["asked"].keys() == {
        "poolers",
        "machine",
        "rounds",
        "batch_size",
    }


def test_departures_of_one_pooler_are_told_with_its_arm_and_times_with_its_losses(tmp_path: Path, work: Path) -> None:
    config = replace(SMALL, linear=["gap"], poolers=["acmil"], seeds=(0,))
    (subject,) = ProbeSweep(config, tmp_path, work).run()["subjects"]
    gap, acmil = subject["arms"]
    assert gap["departures"] == []
    assert any("branch" in text for text in acmil["departures"])
    assert "optimizer adamw instead of lars" in subject["departures"]
    assert not set(subject["departures"]) & set(acmil["departures"])
    assert (gap["training_only"], acmil["training_only"]) == (0, 5 * 10 * 49)
    assert json.loads(next(tmp_path.glob("times/*.json")).read_text())["asked"]["branch_losses"] == ["acmil"]


def test_a_log_without_checkpoint_does_not_stop_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("{}\n")
    assert not begun(tmp_path)
    assert not (tmp_path / "log.jsonl").exists()
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    assert begun(tmp_path)


def test_all_poolers_are_tried_before_any_is_trained(
    tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "train_probe", lambda *a, **o: pytest.fail("a probe was trained"))
    with pytest.raises(InputError, match="queries: got 5, which does not divide"):
        ProbeSweep(replace(SMALL, poolers=["ep:queries=5"]), tmp_path, work).run()


def test_cls_in_front_needs_a_backbone_that_has_it(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlattn.probing.backbones.load import load_backbone

    backbone = load_backbone("timm/vit_base_patch16_siglip_224", pretrained=False, image_size=32)
    monkeypatch.setattr(sweep_module, "named_backbone", lambda *a, **o: backbone)
    with pytest.raises(InputError, match="'all' needs a CLS token"):
        ProbeSweep(replace(SMALL, linear=["gap"], poolers=["ep_all:queries=4"]), tmp_path, work).run()


def test_a_step_that_does_more_takes_longer_and_training_leaves_no_trace() -> None:
    tokens, labels = torch.randn(16, 64, 96), torch.randint(10, (16,))
    found = step_times({"gap": tokens, "dinovit": tokens}, labels, 10, fast_settings(), grid=(8, 8), rounds=5)
    assert found["dinovit"]["median"] > 2 * found["gap"]["median"]
    assert found["gap"]["batch"] == 16
    assert found["gap"]["rounds"] == 5
    assert tokens.grad is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["probe_digits", "probe_tiny_coco"])
def test_shipped_configurations_name_every_pooler_but_the_baselines_of_bags(name: str) -> None:
    config = ProbeSweepConfig.read(name)
    named = {pooler.partition(":")[0].removesuffix("_all") for pooler in config.all_poolers}
    assert named >= set(POOLERS) - {"acmil_mha", "bag_max", "bag_mean", "bag_mha"}
    assert list(config.seeds) == [0, 1, 2]


def test_recipes_are_the_fast_and_the_published_settings() -> None:
    assert replace(SMALL, epochs=None, rates=None).settings(3) == fast_settings(seed=3)
    published = replace(SMALL, recipe="published", epochs=None, rates=BLR_GRID)
    assert published.settings(0) == ProbeSettings(blr=BLR_GRID)
    assert published.augmented
    assert not SMALL.augmented
    assert not replace(published, augment=False).augmented


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poolers: [ep]", "lacks the key 'subjects'"),
        ("subjects: [{backbone: a, data: b}]\npoolers: [ep]\ncolour: red", "unknown key 'colour'"),
        ("subjects: [{backbone: a}]\npoolers: [ep]", "write backbone and data"),
        ("subjects: [{backbone: a, data: b}]\npoolers: [nope]", "'nope' is unknown"),
        ("subjects: [{backbone: a, data: b}]\npoolers: [ep, ep]", "'ep' is listed twice"),
        ("subjects: [{backbone: a, data: b}]\npoolers: ep", "write a list"),
        ("subjects: [{backbone: a, data: b}]\npoolers: [ep]\nshots: 0", "shots: got 0"),
        ("subjects: [{backbone: a, data: b}]\npoolers: [ep]\nseeds: [-1]", "seeds: got -1"),
        ("subjects: [{backbone: a, data: b}]\npoolers: [ep]\nrecipe: slow", "recipe: got 'slow'"),
        ("subjects: [{backbone: a, data: b}]\npoolers: [ep]\nrates: [0]", "give positive numbers"),
        ("[1, 2", "is not YAML"),
        ("- 1", "holds no keys"),
    ],
)
def test_configurations_that_cannot_be_are_told(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        ProbeSweepConfig.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        ProbeSweepConfig.read(tmp_path / "none.yaml")
