"""Nearest neighbours, against a loop over images, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from vlattn.errors import InputError
from vlattn.probing import knn as module
from vlattn.probing.knn import K_GRID, TEMPERATURES, features_of, knn
from vlattn.probing.tokens import Tokens


def clusters(images: int, seed: int, classes: int = 6, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy features around fixed class centres."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(images, dim, generator=generator), labels


def naive(
    train: torch.Tensor, y: torch.Tensor, test: torch.Tensor, t: torch.Tensor, k: int, temperature: float
) -> list:
    """Top-1 and top-5 accuracy in percent, by sorting and voting in Python."""
    hits = [0, 0]
    for feature, label in zip(test.tolist(), t.tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in feature))
        similar = []
        for other, its in zip(train.tolist(), y.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(feature, other, strict=True))
            similar.append((dot / length / math.sqrt(sum(x * x for x in other)), its))
        votes = dict.fromkeys(range(6), 0.0)
        for similarity, its in sorted(similar, reverse=True)[:k]:
            votes[its] += math.exp(similarity / temperature)
        ranked = sorted(votes, key=lambda c: -votes[c])
        hits[0] += ranked[0] == label
        hits[1] += label in ranked[:5]
    return [100 * n / len(test) for n in hits]


def test_accuracies_are_those_of_a_loop_over_images() -> None:
    train, y = clusters(70, 0)
    test, t = clusters(30, 1)
    found = knn(train, y, test, t, ks=(1, 7, 70), temperatures=(0.07, 5.0))
    for k in (1, 7, 70):
        for temperature in (0.07, 5.0):
            # k = 70 gives all six classes a vote, so that top-5 has no ties among classes without votes
            top1, top5 = naive(train, y, test, t, k, temperature)
            assert found.top1[k, temperature] == pytest.approx(top1)
            if k == 70:
                assert found.top5[k, temperature] == pytest.approx(top5)
    assert len({*found.top1.values()}) > 2
    assert found.top1[found.best] == max(found.top1.values())


def test_neighbours_close_by_outvote_a_majority_at_low_temperature_only() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    y = torch.tensor([0, 1, 1])
    test, t = torch.tensor([[5.0, 0.0]]), torch.tensor([0])
    found = knn(train, y, test, t, ks=(3,), temperatures=(0.1, 1.0))
    # e^(1 / T) against 2 e^(0.8 / T): 0.2 / T must exceed log 2
    assert found.top1 == {(3, 0.1): 100.0, (3, 1.0): 0.0}
    assert found.best == (3, 0.1)


def test_the_length_of_features_does_not_matter() -> None:
    train, y = clusters(40, 0)
    test, t = clusters(20, 1)
    scale = torch.linspace(0.1, 30, 40)[:, None]
    assert knn(train * scale, y, test * 7, t, ks=(5,)) == knn(train, y, test, t, ks=(5,))


@pytest.mark.parametrize("elements", [1, 41, 40 * 7, 1 << 20])
def test_chunks_of_any_size_give_the_same(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, y = clusters(40, 0)
    test, t = clusters(20, 1)
    whole = knn(train, y, test, t, ks=(5, 10))
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    assert knn(train, y, test, t, ks=(5, 10)) == whole


@pytest.mark.parametrize("images", [1, 3, 499])
def test_small_test_sets_are_classified(images: int) -> None:
    train, y = clusters(40, 0)
    found = knn(train, y, train[:1].expand(images, -1), y[:1].expand(images), ks=(1,))
    assert found.top1[1, 0.07] == 100


def test_the_default_grid_is_the_published_one_without_k_above_the_train_set() -> None:
    train, y = clusters(60, 0)
    found = knn(train, y, *clusters(5, 1))
    assert set(found.top1) == {(k, t) for k in (5, 10, 15, 20, 50) for t in (0.07, 0.1, 0.2)}
    assert (K_GRID, TEMPERATURES) == ((5, 10, 15, 20, 50, 100, 200), (0.07, 0.1, 0.2))


def test_half_precision_features_are_compared_in_fp32() -> None:
    train, y = clusters(40, 0)
    test, t = clusters(20, 1)
    found = knn(train.half(), y, test.half(), t, ks=(5,))
    assert found == knn(train.half().float(), y, test.half().float(), t, ks=(5,))


def test_features_are_what_a_linear_probe_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    patches, cls = torch.randn(7, 6, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels = torch.arange(7) % 3
    batches = [(Tokens(patches[i : i + 3].half(), cls=cls[i : i + 3].half()), labels[i : i + 3]) for i in (0, 3, 6)]
    expected = {
        "cls": cls.half(),
        "gap": patches.half().float().mean(1),
        "gap_all": torch.cat([cls[:, None], patches], 1).half().float().mean(1),
    }
    for pooler, features in expected.items():
        found, found_labels = features_of(batches, pooler)
        torch.testing.assert_close(found, features.float())
        assert found.dtype == torch.float32
        assert torch.equal(found_labels, labels)
    with pytest.raises(InputError, match="has parameters that would have to be trained"):
        features_of(batches, "ep:queries=2")
    with pytest.raises(InputError, match="source: it gave no images"):
        features_of([], "gap")


def test_multi_label_data_and_sets_that_do_not_fit_are_refused() -> None:
    train, y = clusters(10, 0)
    with pytest.raises(InputError, match=r"train_labels: .*multi-label data is probed with a trained head"):
        knn(train, torch.zeros(10, 4), train, y)
    with pytest.raises(InputError, match="test_labels"):
        knn(train, y, train, y.float())
    with pytest.raises(InputError, match="test: got width 3, train has 8"):
        knn(train, y, torch.zeros(2, 3), y[:2])
    with pytest.raises(InputError, match="train: got features"):
        knn(train[:3], y, train, y)
    with pytest.raises(InputError, match="test: got features"):
        knn(train, y, train[:0], y[:0])
    with pytest.raises(InputError, match="ks, temperatures"):
        knn(train, y, train, y, ks=(11,))
    with pytest.raises(InputError, match="ks, temperatures"):
        knn(train, y, train, y, ks=(1,), temperatures=(0.0,))
