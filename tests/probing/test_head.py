"""The probe as a whole: what stands between tokens and logits, its parameters, and the file it is kept in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vlattn.errors import InputError
from vlattn.probing.head import ProbeHead, load_head, make_head, read_about, save_head
from vlattn.probing.poolers.registry import make_pooler


def tokens(seed: int = 0, batch: int = 5, count: int = 9, dim: int = 8) -> torch.Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def trained(pooler: str = "ep:queries=4") -> ProbeHead:
    """A head whose running statistics have moved."""
    head = make_head(pooler, 8, 3, grid=(3, 3), seed=0).train()
    for seed in range(3):
        head(tokens(seed))
    return head


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at the smaller one eps is as large as the variance
def test_logits_are_classifier_of_non_affine_batch_norm_of_pooler(scale: float) -> None:
    head = make_head("gap", 8, 3, seed=0).train()
    pooled = scale * tokens().mean(1)
    variance = ((pooled - pooled.mean(0)) ** 2).mean(0)
    normed = (pooled - pooled.mean(0)) / (variance + 1e-6).sqrt()
    expected = normed @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(scale * tokens()), expected)
    assert not list(head.norm.parameters())


def test_eval_after_training_uses_running_statistics() -> None:
    head = make_head("gap", 8, 3, seed=0).train()
    mean, variance = torch.zeros(8), torch.ones(8)
    for seed in range(3):
        head(tokens(seed))
        pooled = tokens(seed).mean(1)
        mean = 0.9 * mean + 0.1 * pooled.mean(0)
        variance = 0.9 * variance + 0.1 * pooled.var(0)  # unbiased, as batch norm keeps it
    head.eval()
    normed = (tokens(7).mean(1) - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(head(tokens(7)), F.linear(normed, head.classifier.weight, head.classifier.bias))
    torch.testing.assert_close(head(tokens(7)[:1]), head(tokens(7))[:1])


@pytest.mark.parametrize(
    ("pooler", "dim", "parameters"),
    [
        ("ep:queries=32", 768, 1_383_400),
        ("ep:queries=32", 1024, 2_106_344),
        ("ep_all:queries=32", 512, 791_528),
        ("ep:queries=128", 1152, 2_627_560),
        ("ep:queries=32", 1664, 4_487_144),
        ("cls", 768, 769_000),
        ("gap", 768, 769_000),
    ],
)
def test_trainable_parameters_are_those_of_the_published_logs(pooler: str, dim: int, parameters: int) -> None:
    assert make_head(pooler, dim, 1000).trainable() == parameters


def test_a_narrower_feature_has_a_narrower_classifier() -> None:
    head = make_head("ep:queries=4,d=2", 16, 10)
    assert head.classifier.weight.shape == (10, 8)
    assert head.trainable() == 16 * 16 // 2 + 4 * 16 + 10 * (8 + 1)


def test_the_pooler_draws_its_weights_before_the_classifier() -> None:
    torch.manual_seed(3)
    pooler = make_pooler("ep", 8, queries=4)
    classifier = torch.nn.Linear(8, 3)
    head = make_head("ep:queries=4", 8, 3, seed=3)
    for ours, theirs in zip(head.pooler.parameters(), pooler.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(head.classifier.weight, classifier.weight)
    assert torch.equal(head.classifier.bias, classifier.bias)


def test_a_seed_leaves_the_generator_of_torch_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_head("ep:queries=4", 8, 3, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(
        make_head("gap", 8, 3, seed=1).classifier.weight, make_head("gap", 8, 3, seed=1).classifier.weight
    )


def test_one_image_is_refused_in_training_and_classified_in_eval() -> None:
    head = trained()
    with pytest.raises(InputError, match="tokens: got a batch of 1 in training mode"):
        head(tokens(batch=1))
    assert head.eval()(tokens(batch=1)).shape == (1, 3)


def test_no_gradient_is_needed_of_the_tokens_and_none_reaches_them() -> None:
    frozen = tokens()
    trained()(frozen).sum().backward()
    assert frozen.grad is None
    assert not frozen.requires_grad


@pytest.mark.parametrize("pooler", ["ep:queries=4", "cls", "gap_all", "clip:heads=2"])
def test_a_saved_head_gives_the_same_logits_bit_for_bit(pooler: str, tmp_path: Path) -> None:
    count = 1 if pooler == "cls" else 9
    head = make_head(pooler, 8, 3, grid=(3, 3), seed=0).train()
    for seed in range(3):
        head(tokens(seed, count=count))
    save_head(head, tmp_path / "sub" / "head.safetensors", {"classes": ["a", "b", "c"]})
    loaded = load_head(tmp_path / "sub" / "head.safetensors")
    assert not loaded.training
    assert torch.equal(loaded(tokens(9, count=count)), head.eval()(tokens(9, count=count)))
    assert read_about(tmp_path / "sub" / "head.safetensors") == {"classes": ["a", "b", "c"]}
    assert int(loaded.norm.num_batches_tracked) == 3


def test_a_head_in_another_dtype_keeps_it(tmp_path: Path) -> None:
    head = trained().double().eval()
    save_head(head, tmp_path / "head.safetensors")
    assert torch.equal(load_head(tmp_path / "head.safetensors")(tokens().double()), head(tokens().double()))


def test_only_heads_that_can_be_built_again_are_saved(tmp_path: Path) -> None:
    by_hand = ProbeHead(make_pooler("ep", 8, queries=4), 3)
    with pytest.raises(InputError, match="it was not made by make_head"):
        save_head(by_hand, tmp_path / "head.safetensors")


def test_files_that_are_no_heads_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no head")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other"))
    for name, reason in (("missing", ""), ("text", ""), ("other", "it does not say")):
        with pytest.raises(InputError, match=rf"head: .*{name}' cannot be read \(.*{reason}"):
            load_head(tmp_path / name)


def test_unknown_poolers_and_no_classes_are_refused() -> None:
    with pytest.raises(InputError, match="unknown"):
        make_head("nothing", 8, 3)
    with pytest.raises(InputError, match="classes: got 0"):
        make_head("gap", 8, 0)
    with pytest.raises(InputError, match="grid: got None"):
        make_head("clip", 8, 3)
