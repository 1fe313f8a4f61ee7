"""`vlattn probe`, from data and backbone to runs, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vlattn.cli import app
from vlattn.errors import InputError
from vlattn.probing.knn import features_of
from vlattn.probing.knn import knn as nearest
from vlattn.probing.train_state import load_result

runner = CliRunner()
COMMON = ("--backbone", "digits-mim:2", "--data", "digits")
SHORT = ("--epochs", 1, "--rates", "0.001,0.01", "--batch-size", 128)


def probe(*words: object) -> Any:
    return runner.invoke(app, ["probe", *map(str, words)], catch_exceptions=False, env={"COLUMNS": "140"})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "ep"
    result = probe("train", *COMMON, *SHORT, "--pooler", "ep_all:queries=4", "--out", out, "--work", work)
    assert result.exit_code == 0
    return out


def test_train_keeps_a_run_that_says_what_it_was_made_from(run: Path) -> None:
    result = load_result(run)
    assert [rate.rate for rate in result.rates] == [0.001, 0.01]
    assert (result.pooler, result.dim, result.classes, result.grid) == ("ep_all:queries=4", 96, 10, (8, 8))
    assert result.about["backbone"]["name"] == "digits-mim:2"
    assert result.about["data"] == "digits:32"
    assert "optimizer adamw instead of lars" in result.departures


def test_a_run_is_not_overwritten_but_resumed(run: Path, work: Path) -> None:
    words = ("train", *COMMON, *SHORT, "--pooler", "ep_all:queries=4", "--out", run, "--work", work)
    with pytest.raises(InputError, match="holds result"):
        probe(*words)
    result = probe(*words, "--resume")
    assert f"top1 {load_result(run).best.best:.2f}" in result.output


def test_several_seeds_are_runs_with_a_mean_and_its_interval_and_go_on(work: Path, tmp_path: Path) -> None:
    words = ("train", *COMMON, *SHORT, "--pooler", "gap", "--out", tmp_path, "--work", work)
    output = probe(*words, "--seeds", 2).output
    told = json.loads((tmp_path / "seeds.json").read_text())
    runs = [load_result(tmp_path / f"seed_{seed}") for seed in (0, 1)]
    assert told["value"]["values"] == [run.best.best for run in runs]
    value = told["value"]
    assert f"mean: top1 {value['mean']:.2f} ({value['low']:.2f} {value['high']:.2f}), 95% t interval" in output
    with pytest.raises(InputError, match="resume that run"):
        probe(*words, "--seeds", "0,1,5")
    probe(*words, "--seeds", "0,1,5", "--resume")
    assert json.loads((tmp_path / "seeds.json").read_text())["seeds"] == [0, 1, 5]
    assert load_result(tmp_path / "seed_5").settings.seed == 5
    assert load_result(tmp_path / "seed_0").about["asked"] == {
        "backbone": "digits-mim:2",
        "data": "digits",
        "val": None,
        "layer": None,
    }


@pytest.mark.parametrize("text", ["", "0", "one", "1,1", "0,-1", "3,"])
def test_seeds_that_cannot_be_read_are_told(text: str, work: Path, tmp_path: Path) -> None:
    for command in ("train", "layers"):
        with pytest.raises(InputError, match=r"seeds: got .*; give how many, such as 3, or a list, such as 0,1,2"):
            probe(command, *COMMON, "--seeds", text, "--out", tmp_path / "run", "--work", work)


def test_seed_and_seeds_together_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed, seeds: got 1 and '2'; give one of them"):
        probe("train", *COMMON, "--seed", 1, "--seeds", 2, "--out", tmp_path / "run", "--work", work)


def test_few_shots_are_recorded_with_the_run(work: Path, tmp_path: Path) -> None:
    words = ("train", *COMMON, *SHORT, "--pooler", "gap", "--shots", 3, "--seed", 2, "--out", tmp_path, "--work", work)
    output = probe(*words).output
    result = load_result(tmp_path)
    assert result.about["shots"] == 3
    assert result.batch == 30
    assert result.settings.seed == 2
    assert result.settings.epochs == 1442 // 128
    assert "not the published protocol: 3 images of each class, 30 of 1442" in output


def test_the_final_norm_is_recorded_changes_the_tokens_and_is_found_again(work: Path, tmp_path: Path) -> None:
    values = {}
    for norm in ("on", "off", "auto"):
        out = tmp_path / norm
        probe("train", *COMMON, *SHORT, "--pooler", "ep:queries=4", "--final-norm", norm, "--out", out, "--work", work)
        result = load_result(out)
        assert result.about["backbone"]["final_norm"] is (norm != "off")
        assert result.about["asked"].get("final_norm", "auto") == norm
        values[norm] = [record.train_loss for record in result.epochs]
    assert values["on"] == values["auto"] != values["off"]
    assert probe("show", tmp_path / "off", "--out", tmp_path / "maps.png", "--work", work).exit_code == 0
    outputs = {n: probe("knn", *COMMON, "--final-norm", n, "--work", work).output for n in ("on", "off", "auto")}
    assert outputs["on"] == outputs["auto"]


def test_what_training_alone_needs_is_told_apart(work: Path, tmp_path: Path) -> None:
    output = probe("train", *COMMON, *SHORT, "--pooler", "acmil", "--out", tmp_path, "--work", work).output
    assert f"{load_result(tmp_path).trainable} parameters, 2450 of them for training only" in output


def test_show_draws_maps_and_prints_their_numbers(run: Path, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps.png"
    result = probe("show", run, "--out", out, "--images", 3, "--work", work)
    assert Image.open(out).size == (3 * 224, 2 * 224)
    from vlattn.probing.data.named import named_data
    from vlattn.probing.named_backbone import named_backbone

    backbone = named_backbone("digits-mim:2", work)
    images = named_data("digits").val.with_transform(backbone.transform(train=False))
    tokens = backbone(torch.stack([images[i][0] for i in range(3)])).choose("all")  # [3, 65, 96]
    query = load_result(run).head().state_dict()["pooler.query"]
    maps = (tokens @ query.T / 96**0.5).softmax(1)  # [3, 65, 4]
    assert f"attention mass on CLS: {float(maps[:, 0].mean()):.1%}" in result.output
    patches = maps[:, 1:] / maps[:, 1:].sum(1, keepdim=True)
    entropy = float(-(patches * patches.log()).sum(1).mean())
    assert f"4 queries: entropy {entropy:.3f} nats" in result.output


def test_show_refuses_a_backbone_with_other_weights(run: Path, tmp_path: Path) -> None:
    from vlattn.probing.digits_backbone import digits_backbone

    digits_backbone(tmp_path / "backbones" / "digits-mim-2.safetensors", steps=2, seed=5)
    with pytest.raises(InputError, match="trained on a backbone with other weights"):
        probe("show", run, "--work", tmp_path, "--out", tmp_path / "maps.png")


def test_show_refuses_a_head_without_maps(work: Path, tmp_path: Path) -> None:
    probe("train", *COMMON, *SHORT, "--pooler", "gap", "--out", tmp_path / "gap", "--work", work)
    with pytest.raises(InputError, match="gap has no attention maps"):
        probe("show", tmp_path / "gap", "--work", work, "--out", tmp_path / "maps.png")


def test_knn_prints_what_the_function_gives(work: Path) -> None:
    from vlattn.probing.data.named import named_data
    from vlattn.probing.named_backbone import named_backbone
    from vlattn.probing.sources import TokenSources

    output = probe("knn", *COMMON, "--features", "gap", "--work", work).output
    sources = TokenSources(named_backbone("digits-mim:2", work), named_data("digits"), work / "tokens")
    parts = [features_of(sources.cache(part).batches(64), "gap") for part in ("train", "val")]  # type: ignore[arg-type]
    found = nearest(*parts[0], *parts[1])
    assert f"top1 {found.top1[found.best]:.2f}, top5 {found.top5[found.best]:.2f}" in output


def test_layers_probe_the_blocks_that_are_named(work: Path, tmp_path: Path) -> None:
    words = ("layers", *COMMON, *SHORT, "--layers", "0,2", "--poolers", "gap cls", "--seeds", 2, "--work", work)
    output = probe(*words, "--out", tmp_path).output
    results = json.loads((tmp_path / "layers.json").read_text())
    assert {name: [p["layer"] for p in line] for name, line in results["lines"].items()} == {
        "gap": [0, 2],
        "cls": [0, 2],
    }
    one = results["lines"]["gap"][1]
    runs = [load_result(tmp_path / "runs" / "layer_2" / "gap" / f"seed_{seed}") for seed in (0, 1)]
    assert one["values"] == [run.best.best for run in runs]
    assert [run.about["backbone"]["layer"] for run in runs] == [2, 2]
    assert f"layer 2, gap: top1 {one['mean']:.2f}" in output
    assert Image.open(tmp_path / "layers.png").format == "PNG"


def test_a_block_that_is_not_there_is_told(work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this backbone has blocks 0 to 3"):
        probe("layers", *COMMON, "--layers", "4", "--work", work, "--out", tmp_path)


def test_a_sweep_writes_results_table_and_figure(work: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "subjects: [{backbone: 'digits-mim:2', data: digits}]\npoolers: ['ep:queries=4']\n"
        "seeds: [0, 1]\nepochs: 1\nbatch_size: 128\nstep_rounds: 1\n"
    )
    output = probe("sweep", config, "--out", tmp_path / "out", "--work", work).output
    (subject,) = json.loads((tmp_path / "out" / "probe.json").read_text())["subjects"]
    for arm in subject["arms"]:
        row = next(line for line in output.splitlines() if line.split()[:1] == [arm["pooler"]])
        assert f"{arm['value']['mean']:.2f}" in row
        assert f"{arm['parameters']:,}" in row
    figure = tmp_path / "out" / f"probe_{subject['name']}" / "pareto.png"
    assert Image.open(figure).format == "PNG"


def test_rates_that_are_no_numbers_are_told(work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rates: got 'fast'"):
        probe("train", *COMMON, "--rates", "fast", "--out", tmp_path / "run", "--work", work)
