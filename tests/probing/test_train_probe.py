"""Training probes: against a plain loop, sweeps against single runs, and runs that go on after a cut."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.cache import TokenCache
from vlattn.probing.head import ProbeHead, load_head, make_head
from vlattn.probing.lowshot import comparable_settings, shots_subset
from vlattn.probing.optim import LARS
from vlattn.probing.poolers.linear import CLS, GAP
from vlattn.probing.poolers.registry import parse_pooler
from vlattn.probing.settings import BLR_GRID, ProbeSettings, fast_settings
from vlattn.probing.tokens import Tokens
from vlattn.probing.train import train_probe
from vlattn.probing.train_layers import train_layers
from vlattn.probing.train_result import EpochRecord, ProbeResult
from vlattn.probing.train_source import LiveTokens, TokenBatches
from vlattn.probing.train_state import load_result

CLASSES, DIM = 4, 8
SHORT = ProbeSettings(epochs=4, warmup_epochs=1, blr=20.0, precision="fp32")


def clusters(images: int, seed: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, 6, 8] of which one, at a place that differs, tells the class; the rest is noise."""
    centres = 3 * torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(42))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    tokens = noise * torch.randn(images, 6, DIM, generator=generator)
    tokens[torch.arange(images), torch.randint(6, (images,), generator=generator)] += centres[labels]
    return tokens, labels


def sources(batch: int = 16, train: int = 70, **options: Any) -> tuple[TokenBatches, TokenBatches]:
    """70 images in batches of 16, the last of which is not full; 40 images to evaluate in batches of 16."""
    return (
        TokenBatches(*clusters(train, 0), batch, shuffle=True, **options),
        TokenBatches(*clusters(40, 1), 16),
    )


def naive(blr: float, settings: ProbeSettings, batch: int = 16, train: int = 70) -> tuple[ProbeHead, list[float]]:
    """The published protocol in a plain loop, LARS and its schedule written out: the last head, and val top-1."""
    head = make_head("ep:queries=4", DIM, CLASSES, seed=settings.seed).train()
    batches, val = sources(batch, train)
    mu = {p: torch.zeros_like(p) for p in head.parameters()}
    top1 = []
    for epoch in range(settings.epochs):
        head.train()
        batches.set_epoch(epoch)
        group = []
        for index, (tokens, labels) in enumerate(batches):
            if len(labels) < batch:
                continue
            group.append((index, tokens, labels))
            if len(group) < settings.accumulate:
                continue
            at = epoch + group[0][0] / len(batches)
            if at < settings.warmup_epochs:
                factor = at / settings.warmup_epochs
            else:
                share = (at - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
                factor = (1 + math.cos(math.pi * share)) / 2
            lr = blr * batch * settings.accumulate / 256 * factor
            head.zero_grad()
            for _, some_tokens, some_labels in group:
                (F.cross_entropy(head(some_tokens), some_labels) / settings.accumulate).backward()
            with torch.no_grad():
                for p in head.parameters():
                    g = p.grad * 0.001 * p.norm() / p.grad.norm() if p.ndim > 1 else p.grad
                    mu[p] = 0.9 * mu[p] + g
                    p -= lr * mu[p]
            group = []
        head.eval()
        with torch.no_grad():
            right = sum(int((head(tokens).argmax(1) == labels).sum()) for tokens, labels in val)
        top1.append(100 * right / 40)
    return head, top1


def same_states(a: ProbeResult, b: ProbeResult) -> bool:
    return all(torch.equal(a.states[name], b.states[name]) for name in a.states)


# What is trained ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2, 3])  # of 4 batches: 3 leaves one that makes no update
def test_training_is_the_published_protocol_in_a_plain_loop(accumulate: int) -> None:
    settings = ProbeSettings(epochs=4, warmup_epochs=1, blr=20.0, precision="fp32", accumulate=accumulate)
    result = train_probe(*sources(), "ep:queries=4", CLASSES, settings, device="cpu")
    _, top1 = naive(20.0, settings)
    assert [record.val["top1"][0] for record in result.epochs] == pytest.approx(top1)
    assert result.best.best == pytest.approx(max(top1))
    assert result.best.best_epoch == top1.index(max(top1))
    assert result.batch == 16 * accumulate
    assert result.best.lr == pytest.approx(20.0 * 16 * accumulate / 256)
    assert len({*top1}) > 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weights_after_one_epoch_are_those_of_the_plain_loop(accumulate: int) -> None:
    settings = replace(SHORT, epochs=1, warmup_epochs=0.5, seed=3, accumulate=accumulate)
    result = train_probe(*sources(), "ep:queries=4", CLASSES, settings, device="cpu")
    for name, value in naive(20.0, settings)[0].state_dict().items():
        torch.testing.assert_close(result.head().state_dict()[name], value, atol=1e-5, rtol=1e-5)
    start = make_head("ep:queries=4", DIM, CLASSES, seed=3).state_dict()
    assert not torch.allclose(start["pooler.query"], result.head().state_dict()["pooler.query"], atol=1e-4, rtol=0)


def test_a_sweep_gives_what_each_learning_rate_gives_alone() -> None:
    rates = (1.0, 20.0, 100.0)
    sweep = train_probe(*sources(), "ep:queries=4", CLASSES, replace(SHORT, blr=rates), device="cpu")
    for index, rate in enumerate(rates):
        alone = train_probe(*sources(), "ep:queries=4", CLASSES, replace(SHORT, blr=rate), device="cpu")
        assert [r.val["top1"][index] for r in sweep.epochs] == [r.val["top1"][0] for r in alone.epochs]
        assert [r.val["loss"][index] for r in sweep.epochs] == pytest.approx(
            [r.val["loss"][0] for r in alone.epochs], rel=1e-4
        )
        assert sweep.rates[index] == alone.rates[0]
        for name, value in alone.head().state_dict().items():
            torch.testing.assert_close(sweep.head(index).state_dict()[name], value, atol=1e-4, rtol=1e-4)
    assert sweep.best.best == max(rate.best for rate in sweep.rates)
    assert len({round(loss, 3) for loss in sweep.epochs[-1].val["loss"]}) == 3


def test_attention_finds_the_token_that_tells_the_class_where_the_mean_does_not() -> None:
    train, val = TokenBatches(*clusters(400, 0, 1.5), 40, shuffle=True), TokenBatches(*clusters(200, 1, 1.5), 50)
    settings = fast_settings(8, precision="fp32", lr=0.02)
    found = {
        name: train_probe(train, val, name, CLASSES, settings, device="cpu").best.best
        for name in ("gap", "ep:queries=4")
    }
    assert found["ep:queries=4"] > 90
    assert found["ep:queries=4"] > found["gap"] > 60


def test_images_with_several_labels_are_trained_with_binary_cross_entropy_and_scored_by_average_precision() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")

    def multi(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = clusters(images, seed), clusters(images, seed + 10)
        targets = F.one_hot(first[1], CLASSES) | F.one_hot(second[1], CLASSES)
        return torch.cat([first[0], second[0]], 1), targets.float()

    train, val = TokenBatches(*multi(300, 0), 30, shuffle=True), TokenBatches(*multi(100, 1), 30)
    settings = fast_settings(6, precision="fp32", lr=0.02)
    result = train_probe(train, val, "ep:queries=4", CLASSES, settings, device="cpu")
    assert result.metric == "map"
    assert set(result.epochs[0].val) == {"loss", "map"}
    tokens, targets = multi(100, 1)
    with torch.no_grad():
        logits = result.head()(tokens)
    expected = 100 * sklearn.average_precision_score(targets.numpy(), logits.numpy(), average="macro")
    assert result.best.best == pytest.approx(expected, abs=1e-4)
    assert result.best.best > 80


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_as_well(precision: str) -> None:
    result = train_probe(
        *sources(train=320), "ep:queries=4", CLASSES, fast_settings(6, precision=precision, lr=0.02), device="cpu"
    )
    assert result.best.best > 85
    assert {value.dtype for value in result.states.values()} == {torch.float32, torch.int64}


# Sources --------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Stands for a backbone: pixels [B, 3, 4, 4] to 4 patches and CLS, all of them in `Tokens`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 2, 2)

    def forward(self, pixels: torch.Tensor) -> Tokens:
        patches = self.patch(pixels).flatten(2).transpose(1, 2)
        return Tokens(patches, cls=patches.mean(1) + 5, grid=(2, 2))


class Loader:
    """Stands for a DataLoader whose images differ from epoch to epoch by torch's generator."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(3):
            yield torch.rand(8, 3, 4, 4), torch.randint(CLASSES, (8,))


def test_a_live_backbone_gets_no_gradient_and_is_told_the_epoch() -> None:
    encoder, loader = Encoder(), Loader()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    train, val = LiveTokens(encoder, loader, augmented=True), LiveTokens(encoder, Loader())
    result = train_probe(train, val, "clip:heads=2", CLASSES, replace(SHORT, epochs=2), device="cpu")
    assert result.grid == (2, 2)
    assert loader.epochs == [0, 1]
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any("augmentation" in text for text in result.departures)


@pytest.mark.parametrize(("pooler", "tokens"), [("gap", 4), ("gap_all", 5), ("cls", 1)])
def test_the_pooler_says_which_tokens_it_gets(pooler: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    for cls in (CLS, GAP):
        real = cls.forward
        monkeypatch.setattr(
            cls, "forward", lambda self, x, real=real: (shapes.append(tuple(x.shape)), real(self, x))[1]
        )
    train_probe(
        LiveTokens(Encoder(), Loader()),
        LiveTokens(Encoder(), Loader()),
        pooler,
        CLASSES,
        replace(SHORT, epochs=2),
        device="cpu",
    )
    assert set(shapes) == {(8, tokens, DIM)}


def test_batches_in_memory_are_shuffled_by_seed_and_epoch_and_shared_among_processes() -> None:
    tokens, labels = torch.arange(22.0)[:, None, None], torch.arange(22)

    def order(epoch: int, **options: Any) -> list[int]:
        source = TokenBatches(tokens, labels, 4, **options)
        source.set_epoch(epoch)
        read = list(source)
        assert len(read) == len(source)
        assert all(torch.equal(x[:, 0, 0].long(), y) for x, y in read)
        return torch.cat([y for _, y in read]).tolist()

    assert order(3) == list(range(22))
    assert sorted(order(0, shuffle=True)) == list(range(22))
    assert order(0, shuffle=True) == order(0, shuffle=True)
    assert len({tuple(order(e, shuffle=True, seed=s)) for e in range(3) for s in range(3)}) == 9
    assert len(order(0, drop_last=True)) == 20
    assert order(0, indices=torch.tensor([5, 3, 21])) == [5, 3, 21]
    shares = [order(1, shuffle=True, share=(rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [7, 7, 7]
    assert len({image for share in shares for image in share}) == 21


def test_a_token_cache_is_a_source(tmp_path: Path) -> None:
    class Images:
        classes, multi_label = ["a", "b", "c", "d"], False

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(index)), torch.tensor(index % 4)

    encoder = Encoder()
    encoder.describe = lambda: {"name": "encoder"}  # type: ignore[assignment]
    cache = TokenCache.write(encoder, Images(), tmp_path / "cache", announce=None)
    rows = shots_subset(cache.labels, 4)

    def train(pooler: str) -> ProbeResult:
        few = cache.batches(8, kind=parse_pooler(pooler)[2], shuffle=True, rows=rows)
        every = cache.batches(16, kind=parse_pooler(pooler)[2])
        return train_probe(few, every, pooler, 4, replace(SHORT, epochs=2), device="cpu", grid=cache.grid)

    for pooler in ("cls", "ep_all:queries=4", "clip:heads=2"):
        result = train(pooler)
        assert (result.batch, result.dim) == (8, DIM)
        assert same_states(result, train(pooler))
        assert any("without augmentation" in text for text in result.departures)


def test_few_images_are_trained_for_as_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    (tokens, labels), val = clusters(160, 0), TokenBatches(*clusters(40, 1), 20)
    settings = replace(SHORT, epochs=8, warmup_epochs=2)
    chosen = shots_subset(labels, 2)
    few, batch = comparable_settings(settings, 160, len(chosen), 16)
    steps = []
    real = LARS.step
    monkeypatch.setattr(LARS, "step", lambda self, **options: (steps.append(1), real(self, **options))[1])
    source = TokenBatches(tokens, labels, batch, indices=chosen, shuffle=True)
    result = train_probe(source, val, "ep:queries=4", CLASSES, few, device="cpu")
    assert len(steps) == 8 * 160 // 16
    assert (result.batch, len(result.epochs)) == (8, 80)
    assert sum(bool(record.val) for record in result.epochs) == 8


def test_half_precision_tokens_are_taken_as_they_are_kept() -> None:
    (tokens, labels), (val, val_labels) = clusters(64, 0), clusters(40, 1)

    def train(dtype: torch.dtype, precision: str) -> ProbeResult:
        return train_probe(
            TokenBatches(tokens.to(dtype), labels, 16), TokenBatches(val.to(dtype), val_labels, 16),
            "ep:queries=4", CLASSES, fast_settings(3, precision=precision, lr=0.02), device="cpu",
        )  # fmt: skip

    rounded = TokenBatches(tokens.half().float(), labels, 16), TokenBatches(val.half().float(), val_labels, 16)
    full = train_probe(*rounded, "ep:queries=4", CLASSES, fast_settings(3, precision="fp32", lr=0.02), device="cpu")
    assert same_states(train(torch.float16, "fp32"), full)
    assert train(torch.bfloat16, "bf16").best.best > 60


# Early stopping and best epochs ---------------------------------------------------------------------------------------


def test_training_stops_when_the_metric_has_not_gained_for_long_enough() -> None:
    settings = replace(SHORT, epochs=40, lr=0.02, blr=None, optimizer="adamw", patience=3, stop_from=6, min_delta=0.1)
    result = train_probe(*sources(train=320), "ep:queries=4", CLASSES, settings, device="cpu")
    values = [record.val["top1"][0] for record in result.epochs]
    mark, waited, expected = -1.0, 0, None
    for epoch, value in enumerate(values):
        waited = 0 if value > mark + 0.1 else waited + 1
        mark = value if waited == 0 else mark
        if waited >= 3 and epoch >= 6:
            expected = epoch
            break
    assert result.rates[0].stopped == expected == len(values) - 1
    assert len(values) < 40
    assert result.best.best == max(values)


def test_in_a_sweep_every_learning_rate_stops_where_it_would_alone() -> None:
    settings = replace(SHORT, epochs=16, blr=None, lr=(1e-9, 0.01), optimizer="adamw", patience=2, stop_from=3)
    sweep = train_probe(*sources(), "gap", CLASSES, settings, device="cpu")
    for index in range(2):
        alone = train_probe(*sources(), "gap", CLASSES, replace(settings, lr=settings.given_rates[index]), device="cpu")
        assert sweep.rates[index] == alone.rates[0]
    assert sweep.rates[0].stopped is not None
    assert sweep.rates[0].stopped < (sweep.rates[1].stopped or 16)


def test_a_learning_rate_that_diverges_is_said_to_and_leaves_the_others() -> None:
    settings = replace(SHORT, blr=None, lr=(1.0, 1e38), optimizer="sgd")
    result = train_probe(*sources(), "ep:queries=4", CLASSES, settings, device="cpu")
    assert [rate.diverged for rate in result.rates] == [False, True]
    assert result.rates[1].stopped == 0
    assert len(result.epochs) == 4
    alone = train_probe(*sources(), "ep:queries=4", CLASSES, replace(settings, lr=1.0), device="cpu")
    assert result.rates[0] == alone.rates[0]
    only = train_probe(*sources(), "ep:queries=4", CLASSES, replace(settings, lr=1e38), device="cpu")
    assert len(only.epochs) == 1


def test_epochs_between_evaluations_are_trained_and_the_last_is_evaluated() -> None:
    every = train_probe(*sources(), "ep:queries=4", CLASSES, replace(SHORT, epochs=5), device="cpu")
    some = train_probe(*sources(), "ep:queries=4", CLASSES, replace(SHORT, epochs=5, eval_every=3), device="cpu")
    assert [bool(record.val) for record in some.epochs] == [False, False, True, False, True]
    for a, b in zip(every.epochs, some.epochs, strict=True):
        assert a.train_loss == b.train_loss
        assert not b.val or a.val == b.val


# Files and going on ---------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_after(epochs: int) -> Any:
    def report(record: EpochRecord) -> None:
        if record.epoch + 1 == epochs:
            raise Killed

    return report


@pytest.mark.parametrize(
    ("pooler", "changes"),
    [
        ("ep:queries=4", {"blr": (5.0, 20.0)}),
        ("ep:queries=4", {"blr": None, "lr": (0.01, 0.05), "optimizer": "adamw", "precision": "fp16"}),
        ("aim:heads=2", {"accumulate": 2, "eval_every": 2}),
        ("acmil:n_masked_patch=2,mask_drop=0.5", {"patience": 1, "stop_from": 4}),
    ],
)
def test_a_run_cut_off_and_resumed_is_an_uninterrupted_one_bit_for_bit(
    pooler: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = replace(SHORT, epochs=6, **changes)
    whole = train_probe(*sources(), pooler, CLASSES, settings, device="cpu", out=tmp_path / "whole")
    out = tmp_path / "parts"
    with pytest.raises(Killed):
        train_probe(*sources(), pooler, CLASSES, settings, device="cpu", out=out, report=kill_after(4))
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    with (out / "log.jsonl").open("a") as log:  # a kill after the log and before the checkpoint
        log.write('{"epoch": 4}\n')
    torch.manual_seed(99)
    torch.rand(3)
    parts = train_probe(*sources(), pooler, CLASSES, settings, device="cpu", out=out, resume=True)
    assert same_states(whole, parts)
    assert whole.rates == parts.rates
    for name in ("log.jsonl", "result.json"):
        assert _without_seconds(tmp_path / "whole" / name) == _without_seconds(out / name)
    assert not (out / "checkpoint.pt").exists()


def test_a_live_source_that_draws_is_the_same_after_a_cut(tmp_path: Path) -> None:
    def train(**options: Any) -> ProbeResult:
        torch.manual_seed(0)
        encoder = Encoder()
        live = [LiveTokens(encoder, Loader()) for _ in range(2)]
        return train_probe(*live, "ep:queries=4", CLASSES, replace(SHORT, epochs=5), device="cpu", **options)

    whole = train()
    with pytest.raises(Killed):
        train(out=tmp_path, report=kill_after(2))
    assert same_states(whole, train(out=tmp_path, resume=True))


def test_training_leaves_the_generators_of_the_caller_as_they_were() -> None:
    train, val = (LiveTokens(Encoder(), Loader()) for _ in range(2))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    train_probe(train, val, "ep:queries=4", CLASSES, replace(SHORT, epochs=2), device="cpu")
    assert torch.equal(torch.rand(2), expected)


def test_the_log_grows_epoch_by_epoch_and_the_folder_ends_with_result_and_head(tmp_path: Path) -> None:
    lines = []

    def report(record: EpochRecord) -> None:
        lines.append((tmp_path / "log.jsonl").read_text().splitlines())

    result = train_probe(
        *sources(), "ep:queries=4", CLASSES, replace(SHORT, blr=BLR_GRID), device="cpu", out=tmp_path, report=report,
        about={"backbone": "none"},
    )  # fmt: skip
    assert [len(seen) for seen in lines] == [1, 2, 3, 4]
    logged = [json.loads(line) for line in lines[-1]]
    assert [entry["epoch"] for entry in logged] == [0, 1, 2, 3]
    assert all(len(entry["val"]["top1"]) == len(BLR_GRID) for entry in logged)
    tokens = clusters(5, 9)[0]
    head = load_head(tmp_path / "head.safetensors")
    assert torch.equal(head(tokens), result.head()(tokens))
    read = load_result(tmp_path)
    assert read.rates == result.rates
    assert read.epochs == result.epochs
    assert (read.settings, read.about, read.departures) == (result.settings, {"backbone": "none"}, result.departures)
    assert torch.equal(read.head()(tokens), head(tokens))
    with pytest.raises(InputError, match="rate: got"):
        read.head((result.best_rate + 1) % len(BLR_GRID))
    again = train_probe(
        *sources(), "ep:queries=4", CLASSES, replace(SHORT, blr=BLR_GRID), device="cpu", out=tmp_path, resume=True,
        about={"backbone": "none"},
    )  # fmt: skip
    assert again.rates == result.rates


def test_what_is_not_finite_is_written_as_null_and_read_back(tmp_path: Path) -> None:
    settings = replace(SHORT, blr=None, lr=1e38, optimizer="sgd")
    result = train_probe(*sources(), "ep:queries=4", CLASSES, settings, device="cpu", out=tmp_path)
    entry = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert entry["val"]["loss"] == [None]
    read = load_result(tmp_path)
    assert math.isnan(read.epochs[0].val["loss"][0])
    assert read.rates == result.rates


def test_folders_in_use_and_other_settings_are_refused(tmp_path: Path) -> None:
    def train(settings: ProbeSettings = SHORT, folder: str = "cut", **options: Any) -> ProbeResult:
        return train_probe(*sources(), "gap", CLASSES, settings, device="cpu", out=tmp_path / folder, **options)

    with pytest.raises(Killed):
        train(report=kill_after(2))
    with pytest.raises(InputError, match=r"holds checkpoint\.pt already; resume that run"):
        train()
    with pytest.raises(InputError, match=r"begun with other settings \(blr, seed\)"):
        train(replace(SHORT, blr=3.0, seed=1), resume=True)
    with pytest.raises(InputError, match=r"begun with other settings \(about\)"):
        train(resume=True, about={"layer": 3})
    with pytest.raises(InputError, match="holds no checkpoint; leave resume out"):
        train(folder="none", resume=True)
    train(resume=True)
    with pytest.raises(InputError, match=r"holds result\.json already"):
        train()
    with pytest.raises(InputError, match=r"begun with other settings \(seed\)"):
        train(replace(SHORT, seed=1), resume=True)
    with pytest.raises(InputError, match="resume: there is no folder"):
        train_probe(*sources(), "gap", CLASSES, SHORT, device="cpu", resume=True)
    with pytest.raises(InputError, match="cannot be read"):
        load_result(tmp_path / "none")


# Layers ---------------------------------------------------------------------------------------------------------------


def test_each_layer_gets_its_own_probe_from_the_same_seed_and_layer_0_is_the_first(tmp_path: Path) -> None:
    asked = []

    def of_layer(layer: int) -> tuple[TokenBatches, TokenBatches]:
        asked.append(layer)
        noise = {0: 20.0, 5: 1.0}[layer]
        return TokenBatches(*clusters(320, 0, noise), 32, shuffle=True), TokenBatches(*clusters(80, 1, noise), 32)

    settings = fast_settings(5, precision="fp32", lr=0.02)
    found = train_layers((0, 5), of_layer, "ep:queries=4", CLASSES, settings, device="cpu", out=tmp_path)
    assert asked == [0, 5]
    assert found[5].best.best > 90 > 60 > found[0].best.best
    assert load_result(tmp_path / "layer_0").rates == found[0].rates
    again = train_layers((0, 5), of_layer, "ep:queries=4", CLASSES, settings, device="cpu", out=tmp_path, resume=True)
    assert [result.rates for result in again.values()] == [result.rates for result in found.values()]
    with pytest.raises(InputError, match=r"layers: got \[1, 1\]"):
        train_layers((1, 1), of_layer, "gap", CLASSES)


# What a result says, and what is refused ------------------------------------------------------------------------------


def test_departures_from_the_published_protocol_are_said() -> None:
    assert ProbeSettings().departures(4096, True) == []
    assert ProbeSettings(blr=BLR_GRID, patience=5, momentum=0.9, weight_decay=0.0).departures(4096) == []
    assert ProbeSettings(trust=0.01, momentum=0.5).departures() == [
        "momentum 0.5 instead of 0.9",
        "trust 0.01 instead of 0.001",
    ]
    assert ProbeSettings(optimizer="adamw").departures()[1] == "weight_decay 0.01 instead of 0"
    result = train_probe(*sources(), "gap", CLASSES, fast_settings(3, precision="fp32"), device="cpu")
    text = "; ".join(result.departures)
    for part in ("optimizer adamw", "epochs 3", "lr given as it is", "batches of 16", "without augmentation"):
        assert part in text
    assert "weight_decay" not in text


def test_the_fast_settings_are_adamw_at_1e_3_without_weight_decay() -> None:
    settings = fast_settings(30)
    assert (settings.optimizer, settings.given_rates, settings.weight_decay) == ("adamw", (1e-3,), 0.0)
    assert fast_settings(30, blr=0.1).rates(256) == pytest.approx((0.1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: got 0"),
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"patience": 0}, "patience: got 0"),
        ({"stop_from": -1}, "stop_from: got -1"),
        ({"optimizer": "adam"}, "optimizer: got 'adam'"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
        ({"blr": 0.0}, "blr: got 0.0; give positive numbers"),
        ({"blr": ()}, "blr: got"),
        ({"lr": (0.1, -1.0)}, "lr: got"),
        ({"lr": 0.1, "blr": 0.1}, "blr, lr: got both"),
        ({"momentum": -0.1}, "momentum: got -0.1"),
        ({"optimizer": "adamw", "momentum": 0.9}, "which AdamW has not"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"min_delta": -1.0}, "min_delta: got -1.0"),
        ({"trust": -1.0}, "trust: got -1.0"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProbeSettings(**changes)


def test_sources_that_do_not_fit_are_refused() -> None:
    train, val = sources()
    with pytest.raises(InputError, match="classes: got 3, but labels go from 0 to 3"):
        train_probe(train, val, "gap", 3, SHORT, device="cpu")
    with pytest.raises(InputError, match="train: a generator has no length"):
        train_probe((x for x in train), val, "gap", CLASSES, SHORT, device="cpu")
    with pytest.raises(InputError, match="5 batches of up to 16 images make no update of 9"):
        train_probe(train, val, "gap", CLASSES, replace(SHORT, accumulate=9), device="cpu")
    with pytest.raises(InputError, match="val: it gave no images"):
        train_probe(train, [], "gap", CLASSES, SHORT, device="cpu")
    with pytest.raises(InputError, match="val: it gave no images"):
        train_probe(train, [], "gap", CLASSES, SHORT, device="cpu", dim=DIM)
    with pytest.raises(InputError, match=r"source: got tokens \[2, 8\] with 2 labels"):
        train_probe([(torch.zeros(2, 8), torch.zeros(2).long())], val, "gap", CLASSES, SHORT, device="cpu")
    with pytest.raises(InputError, match=r"labels: got torch\.float32"):
        train_probe([(torch.zeros(2, 1, 8), torch.zeros(2))], val, "gap", CLASSES, SHORT, device="cpu")
    with pytest.raises(InputError, match="labels: got 3 for 4 images"):
        TokenBatches(torch.zeros(4, 1, 8), torch.zeros(3), 2)


def test_a_bar_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    train_probe(*sources(), "gap", CLASSES, replace(SHORT, epochs=2), device="cpu")
    assert capsys.readouterr().out == ""
    train_probe(*sources(), "gap", CLASSES, replace(SHORT, epochs=2), device="cpu", progress=True)
    assert "top1" in capsys.readouterr().out


def _without_seconds(path: Path) -> list[Any]:
    """JSON lines, or one JSON document, without what differs from run to run."""
    text = path.read_text()
    entries = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    for entry in entries:
        for record in [entry, *entry.get("epochs", [])]:
            record.pop("seconds", None)
    return entries
