"""One probe under several seeds: runs that differ by the seed alone, and their mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlattn.probing.train_seeds as module
from vlattn.errors import InputError
from vlattn.probing.intervals import mean_interval
from vlattn.probing.settings import fast_settings
from vlattn.probing.train import train_probe
from vlattn.probing.train_seeds import summarise_seeds, train_seeds
from vlattn.probing.train_source import TokenBatches
from vlattn.probing.train_state import load_result

CLASSES = 4
SETTINGS = fast_settings(2, lr=0.02, precision="fp32")


def sources(seed: int) -> tuple[TokenBatches, TokenBatches]:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(48, 6, 8, generator=generator), torch.arange(48) % CLASSES
    return TokenBatches(tokens, labels, 16, shuffle=True, seed=seed), TokenBatches(tokens, labels, 16)


def run(seeds: Any, out: Path | None = None, **options: Any) -> Any:
    return train_seeds(seeds, sources, "ep:queries=4", CLASSES, SETTINGS, out=out, device="cpu", **options)


def test_each_seed_is_a_run_of_its_own_in_its_folder(tmp_path: Path) -> None:
    found = run((4, 1), tmp_path)
    assert list(found) == [4, 1]
    for seed, result in found.items():
        settings = replace(SETTINGS, seed=seed)
        alone = train_probe(*sources(seed), "ep:queries=4", CLASSES, settings, device="cpu")
        assert result.rates == alone.rates
        assert load_result(tmp_path / f"seed_{seed}").settings.seed == seed
    heads = [result.head().state_dict()["pooler.query"] for result in found.values()]
    assert not torch.equal(*heads)


def test_the_summary_is_the_mean_of_the_runs_with_its_interval(tmp_path: Path) -> None:
    found = run((0, 1, 2), tmp_path)
    told = summarise_seeds(found)
    assert told["seeds"] == [0, 1, 2]
    assert told["value"] == mean_interval([result.best.best for result in found.values()])
    assert (told["pooler"], told["metric"], told["level"]) == ("ep:queries=4", "top1", 0.95)
    assert summarise_seeds(run((0,)))["value"]["low"] is None


def test_resuming_reads_what_is_done_and_trains_what_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    before = run((0, 1), tmp_path)
    with pytest.raises(InputError, match=r"holds result\.json already"):
        run((0, 1, 2), tmp_path)
    (tmp_path / "seed_2").mkdir()
    (tmp_path / "seed_2" / "log.jsonl").write_text("{}\n")  # cut off before its first checkpoint
    asked: list[bool] = []
    plain = module.train_probe

    def heard(*arguments: Any, **options: Any) -> Any:
        asked.append(options["resume"])
        return plain(*arguments, **options)

    monkeypatch.setattr(module, "train_probe", heard)
    after = run((0, 1, 2), tmp_path, resume=True)
    assert asked == [True, True, False]
    assert [after[seed].rates for seed in (0, 1)] == [before[seed].rates for seed in (0, 1)]


@pytest.mark.parametrize(("seeds", "message"), [((), "give at least one"), ((1, 1), "each once"), ((-1,), "got -1")])
def test_seeds_that_cannot_be_are_told(seeds: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"seeds: .*{message}"):
        run(seeds)
