"""k nearest neighbours on frozen features: an evaluation without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.metrics import topk_correct
from vlattn.probing.poolers.registry import make_pooler, parse_pooler
from vlattn.probing.train_source import Source, read_batches

K_GRID = (5, 10, 15, 20, 50, 100, 200)
TEMPERATURES = (0.07, 0.1, 0.2)

_ELEMENTS = 1 << 27  # similarities held at once: 512 MiB in fp32


@dataclass(frozen=True)
class KNNResult:
    """Accuracies in percent, for every k and temperature.

    top1, top5: {(k, temperature): accuracy}.
    best: the (k, temperature) of the highest top-1 accuracy, the first such in the order of the grid.
    """

    top1: dict[tuple[int, float], float]
    top5: dict[tuple[int, float], float]
    best: tuple[int, float]


@torch.no_grad()
def features_of(
    source: Source, pooler: str = "cls", device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels of one pass over a source, in fp32 on the CPU, for `knn`.

    Args:
        source: batches of evaluation views; see `vlattn.probing.train_source`.
        pooler: one without parameters, `cls`, `gap` or `gap_all`: what a linear probe would read.
        device: where tokens are pooled.

    Returns:
        [N, D] and [N].

    Raises:
        InputError: the pooler has parameters, or there are no images.
    """
    name, settings, kind = parse_pooler(pooler)
    features, every = [], []
    for tokens, labels in read_batches(source, 0, kind, None, torch.device(device)):
        pool = make_pooler(name, tokens.shape[-1], **settings).to(device)
        if next(pool.parameters(), None) is not None:
            raise InputError(f"pooler: {pooler!r} has parameters that would have to be trained; give 'cls' or 'gap'")
        features.append(pool(tokens).float().cpu())
        every.append(labels.cpu())
    if not features:
        raise InputError("source: it gave no images; give one with at least one")
    return torch.cat(features), torch.cat(every)


def knn_votes(neighbours: torch.Tensor, labels: torch.Tensor, classes: int, k: int, temperature: float) -> torch.Tensor:
    """Votes of the k nearest for their classes, each with weight exp(similarity / temperature).

    Args:
        neighbours: cosine similarities [B, n] of the n >= k nearest, nearest first.
        labels: int64 [B, n], their classes.

    Returns:
        fp32 [B, classes].
    """
    weight = (neighbours[:, :k].float() / temperature).exp()
    return weight.new_zeros(len(labels), classes).scatter_add_(1, labels[:, :k], weight)


@torch.no_grad()
def knn(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    classes: int | None = None,
    ks: Sequence[int] = K_GRID,
    temperatures: Sequence[float] = TEMPERATURES,
) -> KNNResult:
    """Classify test features by their nearest train features in cosine similarity.

    Features are L2-normalised in fp32. Test features go through in chunks, so that not all similarities are held at
    once; any number of them works.

    Args:
        train: features [N, D] of any floating-point dtype, such as `features_of` gives.
        train_labels: int64 [N].
        test: [T, D], on the device of `train`.
        test_labels: int64 [T].
        classes: number of classes; None is one more than the highest label.
        ks: numbers of neighbours; those above N are left out.
        temperatures: of the weights exp(similarity / temperature).

    Raises:
        InputError: shapes do not fit, labels are multi-label, a set is empty, or no k is at most N.
    """
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if labels.ndim != 1 or labels.is_floating_point():
            raise InputError(
                f"{name}_labels: got {labels.dtype} {list(labels.shape)}; nearest neighbours vote for one class each, "
                "so give int64 labels [N] (multi-label data is probed with a trained head)"
            )
        if features.ndim != 2 or len(features) != len(labels) or len(labels) == 0:
            raise InputError(
                f"{name}: got features {list(features.shape)} and {len(labels)} labels; give [N, D] and N, at least 1"
            )
    if train.shape[1] != test.shape[1]:
        raise InputError(f"test: got width {test.shape[1]}, train has {train.shape[1]}; give features of one kind")
    for k in ks:
        require_count("ks", k)
    usable = [k for k in ks if k <= len(train)]
    if not usable or not temperatures or not all(t > 0 for t in temperatures):
        raise InputError(
            f"ks, temperatures: got {tuple(ks)} and {tuple(temperatures)} for {len(train)} train features; give a k "
            "of at most that many, and positive temperatures"
        )
    if classes is None:
        classes = int(max(train_labels.max(), test_labels.max())) + 1
    bank = F.normalize(train.float(), dim=1)
    grid = [(k, t) for k in usable for t in temperatures]
    hits = {1: dict.fromkeys(grid, 0), 5: dict.fromkeys(grid, 0)}
    for rows in torch.arange(len(test)).split(max(1, _ELEMENTS // len(train))):
        asked = F.normalize(test[rows].float(), dim=1)
        nearest, index = (asked @ bank.T).topk(max(usable), 1)
        voters, right = train_labels.to(index.device)[index], test_labels[rows].to(index.device)
        for k, temperature in grid:
            votes = knn_votes(nearest, voters, classes, k, temperature)
            for top, count in hits.items():
                count[k, temperature] += int(topk_correct(votes, right, top))
    top1, top5 = ({point: 100 * n / len(test) for point, n in hits[top].items()} for top in (1, 5))
    return KNNResult(top1, top5, max(grid, key=top1.__getitem__))


def knn_probe(
    train: Source, val: Source, features: str = "gap", classes: int | None = None, device: torch.device | str = "cpu"
) -> KNNResult:
    """Classify the images of one source by their nearest ones in another, without any training.

    Args:
        train, val: sources of evaluation views; see `vlattn.probing.train_source`.
        features: as `features_of` takes its pooler: `cls`, `gap` or `gap_all`.
        classes: number of classes; None is one more than the highest label.
        device: where tokens are pooled.

    Raises:
        InputError: as `features_of` and `knn` do.
    """
    return knn(*features_of(train, features, device), *features_of(val, features, device), classes)
