"""The demo on a small configuration: every figure has a file behind it, and the page shows them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vlattn.eval.demo import Demo, arms, settings
from vlattn.eval.records import read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    config = settings() | {"images": 6, "budgets": [36, 9], "examples": 3, "batch_size": 18}
    config["timing"] = {"batch": 2, "new_tokens": 3, "repeats": 2, "warmup": 1}
    job = Demo(out, config)
    done: list[int] = []
    results = job.run(lambda what, n: done.append(n))
    return job, results, sum(done)


def test_progress_reaches_exactly_the_announced_number_of_steps(small):
    job, _, done = small
    assert done == job.steps


def test_vanilla_costs_one_and_pruning_shortens_cache_and_flops_in_order(small):
    _, results, _ = small
    cost = {arm["name"]: arm["cost"] for arm in results["arms"]}
    assert cost["vanilla"]["kv_ratio"] == cost["vanilla"]["flops_ratio"] == 1
    assert cost["vanilla"]["prefill_ratio"]["median"] == 1
    for family in ("FlowCut", "Random"):
        assert 1 > cost[f"{family} 36"]["kv_ratio"] > cost[f"{family} 9"]["kv_ratio"] > 0
        assert 1 > cost[f"{family} 36"]["flops_ratio"] > cost[f"{family} 9"]["flops_ratio"] > 0
    # FlowCut shortens the tower too, random pruning only what follows it.
    assert cost["FlowCut 9"]["flops_ratio"] < cost["Random 9"]["flops_ratio"]


def test_measured_cache_bytes_equal_a_count_by_hand(small):
    job, results, _ = small
    text = job.model.config.text_config
    prompt = job.inputs(job.chair[:2])["input_ids"].shape[1]
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4  # fp32
    by_name = {arm["name"]: arm["cost"]["kv_bytes"] for arm in results["arms"]}
    assert by_name["vanilla"] == 2 * prompt * per_token
    assert by_name["FlowCut 36"] == 2 * (prompt - 144 + 36) * per_token


def test_each_score_can_be_recomputed_from_the_records_left_behind(small):
    job, results, _ = small
    for arm, shown in zip(job.arms, results["arms"], strict=True):
        by_split: dict[str, list[bool]] = {}
        for record in read_records(job.records("pope", arm)):
            says_no = bool({"No", "not", "no"} & set(record.raw.split(".")[0].replace(",", "").split(" ")))
            by_split.setdefault(record.meta["split"], []).append(says_no == (record.label == "no"))
        accuracy = sum(sum(right) / len(right) for right in by_split.values()) / 3
        assert shown["pope"]["mean_accuracy"]["value"] == pytest.approx(accuracy)


def test_examples_light_as_many_patches_as_the_arm_keeps(small):
    job, _, _ = small
    for example in job.examples():
        for arm in job.arms:
            kept = example["arms"][arm.name]["kept"]
            assert (kept is None) == (arm.family == "vanilla")
            assert kept is None or (len(kept) == arm.visual_tokens and kept == sorted(set(kept)))


def test_arms_are_vanilla_then_both_methods_at_the_same_budgets():
    assert [(a.family, a.visual_tokens) for a in arms([72, 18], 144)] == [
        ("vanilla", 144),
        ("flowcut", 72),
        ("flowcut", 18),
        ("random", 72),
        ("random", 18),
    ]


def test_the_command_leaves_results_records_and_a_page(tmp_path, monkeypatch):
    import vlattn.eval.demo as module
    from vlattn.cli import app

    config = settings() | {"images": 4, "budgets": [36, 18], "examples": 2}
    config["timing"] = {"batch": 1, "new_tokens": 2, "repeats": 1, "warmup": 0}
    monkeypatch.setattr(module, "settings", lambda: config)
    ran = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)], catch_exceptions=False)
    assert ran.exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["vanilla", "FlowCut 36", "FlowCut 18", "Random 36", "Random 18"]
    page = (tmp_path / "index.html").read_text()
    assert "FlowCut" in page
    assert "data:image" in page
    assert len(list((tmp_path / "records").glob("*.jsonl"))) == 10
