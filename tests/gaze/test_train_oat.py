"""Training: it learns, the best epoch is what is tested, and a run that was cut off becomes what it would have been."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.gaze.decode import Decoding, generate
from vlattn.gaze.oat import OAT
from vlattn.gaze.oat_batch import OATData, Search
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.oat_file import load_oat, make_looks, save_oat
from vlattn.gaze.splits import GazeSplit
from vlattn.gaze.train import OATResult, train_oat
from vlattn.gaze.train_behaviour import delta, mean_behaviour
from vlattn.gaze.train_run import OATRun, batch_loss
from vlattn.gaze.train_settings import OATTraining
from vlattn.gaze.trial import Fixation, GazeSet, Scene, Trial


class Cut(Exception):
    """A run that ends in the middle."""


@pytest.fixture
def split(oat: Any, tmp_path: Path) -> GazeSplit:
    """Pictures of shelves in which people go from the first object straight to the target, one by one."""
    rng = np.random.default_rng(0)
    scenes, parts = {}, []
    for part in range(3):
        trials = []
        for n in range(5):
            name = f"{part}-{n}"
            scene = oat.shelf(name, 2, 3 + n % 2)
            Image.fromarray(rng.integers(0, 256, (40, scene.width, 3)).astype(np.uint8)).save(tmp_path / f"{name}.png")
            scenes[name] = Scene(name, scene.width, scene.height, scene.objects, f"{name}.png")
            target = int(rng.integers(1, 6))
            path = tuple(range(target + 1))
            fixations = tuple(Fixation(float(x), float(y)) for x, y in scene.centers()[list(path)])
            trials.append(Trial(name, name, str(target), "p", fixations, path, target_object=target))
        parts.append(tuple(trials))
    return GazeSplit(*(GazeSet(scenes, trials, tmp_path) for trials in parts))


def config(oat: Any, **changes: Any) -> Any:
    return oat.small(appearance="cnn", features=None, crop=(29, 29), dropout=0.1, **changes)


def train(oat: Any, split: GazeSplit, out: Path | None = None, epochs: int = 3, **settings: Any) -> OATResult:
    asked = {name: settings.pop(name) for name in ("resume", "heard") if name in settings}
    training = OATTraining(batch=3, lr=1e-3, epochs=epochs, **settings)
    return train_oat(split, config(oat), training, out=out, **asked)


def test_eight_searches_are_learned_by_heart(oat: Any) -> None:
    data = oat.shelves(*[(2, 6), (3, 4)] * 4)
    known = [oat.search(data, n, 3 + n % 4) for n in range(8)]
    model = oat.model(longest=9)
    run = OATRun(model, data, known, known, OATTraining(batch=8, lr=1e-3, epochs=300))
    for _ in range(6):
        for _ in range(25):
            run._train(0, lambda share, record: None)
        found = [paths[0].objects for paths in generate(model, data, known)]
        if found == [one.path for one in known]:
            break
    assert found == [one.path for one in known]


def test_training_lowers_the_loss_and_writes_what_came_of_it(oat: Any, split: GazeSplit, tmp_path: Path) -> None:
    heard: list[tuple[float, bool]] = []
    result = train(
        oat, split, tmp_path / "run", 6, heard=lambda share, record: heard.append((share, record is not None))
    )
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(6))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert result.record["trials"] == {"train": 5, "val": 5, "test": 5}
    assert result.record["val"]["delta"] == min(line["val"]["delta"] for line in lines)
    assert result.model.config.longest == max(len(trial.fixations) for trial in split.train.trials)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "log.jsonl",
        "model.safetensors",
        "result.json",
    ]
    assert [share for share, ended in heard if ended] == list(range(1, 7))
    assert [share for share, _ in heard] == sorted(share for share, _ in heard)


def test_the_best_epoch_is_what_is_tested_and_kept(oat: Any, split: GazeSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.2, 0.9, 0.4, 7.0, 8.0])
    seen: list[torch.Tensor] = []

    def fake(model: OAT, data: Any, searches: Any) -> dict[str, float]:
        seen.append(model.head.readout.weight.detach().clone())  # type: ignore[union-attr]
        return {"delta": next(scores), "loss": 1.0}

    monkeypatch.setattr("vlattn.gaze.train_run.evaluate_oat", fake)
    monkeypatch.setattr("vlattn.gaze.train.evaluate_oat", fake)
    result = train(oat, split, None, 4)
    assert result.record["best_epoch"] == 1
    assert torch.equal(seen[4], seen[1])
    assert torch.equal(result.model.head.readout.weight, seen[1])  # type: ignore[union-attr]


def test_the_defect_of_testing_the_last_weights_is_a_switch(
    oat: Any, split: GazeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, seen = iter([0.2, 0.5, 0.9]), []

    def fake(model: OAT, data: Any, searches: Any) -> dict[str, float]:
        seen.append(model.head.readout.weight.detach().clone())  # type: ignore[union-attr]
        return {"delta": next(scores)}

    monkeypatch.setattr("vlattn.gaze.train_run.evaluate_oat", fake)
    monkeypatch.setattr("vlattn.gaze.train.evaluate_oat", fake)
    result = train(oat, split, None, 2, test_last=True)
    assert torch.equal(seen[2], seen[1])
    assert torch.equal(result.model.head.readout.weight, seen[0])  # type: ignore[union-attr]
    assert result.record["tested"] == "last"


def test_training_stops_when_patience_is_over(oat: Any, split: GazeSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.4, 0.6, float("nan"), 0.7])
    monkeypatch.setattr("vlattn.gaze.train_run.evaluate_oat", lambda *given: {"delta": next(scores)})
    monkeypatch.setattr("vlattn.gaze.train.evaluate_oat", lambda *given: {})
    result = train(oat, split, None, 9, patience=2)
    assert (result.record["epochs"], result.record["best_epoch"]) == (4, 1)


@pytest.mark.parametrize(("cut", "save_every"), [(1.5, 1), (2.0, 1), (1.5, 2), (2.2, 2)])
def test_a_resumed_run_has_the_weights_of_a_whole_one(
    oat: Any, split: GazeSplit, tmp_path: Path, cut: float, save_every: int
) -> None:
    whole = train(oat, split, tmp_path / "whole", save_every=save_every)

    def stop(share: float, record: Any) -> None:
        if share > cut:
            raise Cut

    with pytest.raises(Cut):
        train(oat, split, tmp_path / "cut", save_every=save_every, heard=stop)
    torch.manual_seed(99)
    resumed = train(oat, split, tmp_path / "cut", save_every=save_every, resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert whole.record["test"] == resumed.record["test"]


class Colours:
    """A backbone whose two tokens are the mean colours of an upper and a lower half."""

    name, dim = "colours", 3

    def transform(self, train: bool) -> Any:
        return lambda image: torch.from_numpy(np.asarray(image.resize((4, 4)), np.float32)).permute(2, 0, 1)

    def __call__(self, pixels: torch.Tensor) -> Any:
        return SimpleNamespace(patches=pixels.unflatten(2, (2, 2)).mean((3, 4)).transpose(1, 2))


def test_a_backbones_features_can_take_the_place_of_the_convolutions(split: GazeSplit, tmp_path: Path) -> None:
    config = OATConfig.small(encoder_layers=1, decoder_layers=1)
    result = train_oat(split, config, OATTraining(epochs=1), out=tmp_path, backbone=Colours())
    again, about = load_oat(tmp_path)
    assert (again.config.appearance, again.config.features) == ("features", 3)
    assert about["looks"] == {"looks": "features", "backbone": "colours", "dim": 3}
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    data = OATData(split.test, make_looks(split.test, again.config, Colours()))
    searches = [Search(trial.scene, 1) for trial in split.test.trials]
    assert generate(again, data, searches) == generate(result.model, data, searches)


def test_a_finished_run_is_read_and_not_run_again(oat: Any, split: GazeSplit, tmp_path: Path) -> None:
    first = train(oat, split, tmp_path / "run")
    again = train(oat, split, tmp_path / "run", resume=True, heard=lambda share, record: pytest.fail("trains"))
    assert again.record["test"] == pytest.approx(first.record["test"])
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_other_settings_or_data_are_not_resumed(oat: Any, split: GazeSplit, tmp_path: Path) -> None:
    train(oat, split, tmp_path / "run")
    with pytest.raises(InputError, match=r"out: .* holds result.json already"):
        train(oat, split, tmp_path / "run")
    with pytest.raises(InputError, match=r"resume: .* was begun with another training"):
        train(oat, split, tmp_path / "run", resume=True, seed=1)
    fewer = GazeSplit(GazeSet(split.train.scenes, split.train.trials[1:], split.train.root), split.val, split.test)
    with pytest.raises(InputError, match=r"was begun with another .*data"):
        train(oat, fewer, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"resume: .* holds no run"):
        train(oat, split, tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="resume: there is no folder"):
        train(oat, split, resume=True)


def test_seeds_decide_the_weights(oat: Any, split: GazeSplit) -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        weights.append(train(oat, split, None, 1, seed=seed).model.head.readout.weight)  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_part_without_usable_trials_is_refused(oat: Any, split: GazeSplit) -> None:
    with pytest.raises(InputError, match="split: val has no trial"):
        train(oat, GazeSplit(split.train, GazeSet(split.val.scenes, (), split.val.root), split.test))


def test_a_diverging_run_says_so(oat: Any, split: GazeSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OATRun, "_train", lambda *given: float("nan"))
    with pytest.raises(InputError, match=r"lr: the loss of epoch 0 is nan; give a smaller one than 0.001"):
        train(oat, split)


def test_for_parity_the_losses_of_scenes_of_each_size_are_added(oat: Any) -> None:
    model, data = oat.model(), oat.shelves((2, 3), (2, 4))
    searches = [oat.search(data, 0, 3), oat.search(data, 1, 5), oat.search(data, 0, 2)]
    batch = data.batch(searches)
    with torch.no_grad():
        losses, counted = model.token_losses(batch)
        first, second = (model.loss(data.batch(part)) for part in ([searches[0], searches[2]], [searches[1]]))
    assert float(batch_loss(losses, counted, batch, True)) == pytest.approx(float(first + second), abs=1e-5)
    assert float(batch_loss(losses, counted, batch, False)) == pytest.approx(float(losses.sum() / counted.sum()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 0.0}, "lr: got 0"), ({"select": "ss"}, "select: got 'ss'"), ({"batch": 0}, "batch: got 0")],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OATTraining(**settings)


# Files and behaviour --------------------------------------------------------------------------------------------------
def test_a_saved_model_predicts_the_same(oat: Any, tmp_path: Path) -> None:
    model, data = oat.model(longest=5), oat.shelves((2, 4))
    model.appearance.first.fill_(0.7)
    save_oat(model, tmp_path / "m.safetensors", {"backbone": "x"})
    again, about = load_oat(tmp_path / "m.safetensors")
    assert about == {"backbone": "x"}
    asked = [Search("0", 2)]
    assert generate(again, data, asked, Decoding("sample", 9)) == generate(model, data, asked, Decoding("sample", 9))
    assert (again.config, again.training) == (model.config, False)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(InputError, match=r"model: .* cannot be read"):
        load_oat(tmp_path)
    save_file({"a": torch.zeros(1)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="holds no OAT"):
        load_oat(tmp_path)


def test_behaviour_is_that_of_the_example() -> None:
    found = mean_behaviour([Search("s", 7)], [(4, 4, 2, 4, 7)])
    assert found == pytest.approx({"correct": 1, "length": 5, "search": 0.6, "refix": 0.2, "revisit": 0.2})
    assert delta(found, found) == 0
    assert mean_behaviour([Search("s", 0)], [(3,)]) == {
        "correct": 0,
        "length": 1,
        "search": 1,
        "refix": 0,
        "revisit": 0,
    }


def test_shares_of_a_path_add_up() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        found = mean_behaviour([Search("s", 0)], [tuple(rng.integers(0, 4, rng.integers(1, 12)).tolist())])
        assert found["search"] + found["refix"] + found["revisit"] == pytest.approx(1)
