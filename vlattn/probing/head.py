"""The probe as a whole: tokens to pooler to batch norm to classifier, and the file it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlattn.checks import require_count
from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler
from vlattn.probing.poolers.branches import BranchClassifiers, BranchPooler
from vlattn.probing.poolers.registry import make_pooler, parse_pooler

MOMENTUM = 0.1
"""Weight of a batch in the running statistics of the norm."""

_FORMAT = "vlattn-probe-head-1"
_TRAINING_ONLY = "branch_classifiers."


class ProbeHead(nn.Module):
    """pooler -> BatchNorm1d(width, affine=False, eps=1e-6, momentum=0.1) -> Linear(width, classes).

    "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178. The norm has no
    parameters, but running statistics, which eval mode uses and the state dict holds. The classifier starts as
    `nn.Linear` does. Make the pooler before the head: the published order of random draws.

    A pooler with `branch_losses` also gets classifiers of its branches, which only training uses: the bag's norm is not
    in front of them, as in the specification of `vlattn.probing.poolers.acmil`.

    pooler: see `vlattn.probing.poolers`.
    classes: number of classes K.
    for_training: False leaves those classifiers out.
    """

    branch_classifiers: BranchClassifiers | None

    def __init__(self, pooler: Pooler, classes: int, for_training: bool = True) -> None:
        super().__init__()
        require_count("classes", classes)
        self.pooler = pooler
        self.norm = nn.BatchNorm1d(pooler.width, eps=1e-6, momentum=MOMENTUM, affine=False)
        self.classifier = nn.Linear(pooler.width, classes)
        # Last, so that what is drawn for the parts above does not depend on them.
        self.branch_classifiers = _branch_classifiers(pooler, classes) if for_training else None
        self.made_from: dict[str, Any] | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of tokens [B, N, D].

        Raises:
            InputError: one image in training mode, which has no variance to normalise by.
        """
        check_batch(tokens, self.training)
        return self.classifier(self.norm(self.pooler(tokens)))

    def trainable(self) -> int:
        """Number of trainable parameters, those of the classifier included, and of the branches' classifiers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def training_only(self) -> int:
        """How many of them only training needs."""
        return 0 if self.branch_classifiers is None else sum(p.numel() for p in self.branch_classifiers.parameters())


def inference_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A head's state dict without what only training needs."""
    return {name: value for name, value in state.items() if not name.startswith(_TRAINING_ONLY)}


def check_batch(tokens: torch.Tensor, training: bool) -> None:
    """Refuse a training batch that has no variance to normalise by."""
    if training and len(tokens) == 1:
        raise InputError(
            "tokens: got a batch of 1 in training mode, where batch norm needs 2 images; call eval() or add"
        )


def make_head(
    pooler: str,
    dim: int,
    classes: int,
    *,
    grid: tuple[int, int] | None = None,
    seed: int | None = None,
    for_training: bool = True,
) -> ProbeHead:
    """A head with the pooler that a short form names, such as "ep:queries=32" or "cls".

    Args:
        pooler: as `vlattn.probing.poolers.registry.parse_pooler` reads it; which tokens it takes does not matter here.
        dim: width D of the tokens.
        classes: number of classes K.
        grid: (rows, columns) of the patch tokens, for poolers that need it.
        seed: of the first weights; torch's own generators stay as they are. None draws from them.
        for_training: False leaves out what only training needs; see `ProbeHead`.
    """
    name, settings, _ = parse_pooler(pooler)
    devices: list[int] = []  # weights are drawn on the CPU
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
        head = ProbeHead(make_pooler(name, dim, grid=grid, **settings), classes, for_training)
    head.made_from = {"pooler": pooler, "dim": dim, "classes": classes, "grid": None if grid is None else list(grid)}
    return head


def save_head(head: ProbeHead, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a head that `make_head` made as one safetensors file, running statistics included, and without what only
    training needs.

    Args:
        head: its weights are kept in their dtypes.
        path: file to write, `head.safetensors` by custom; its folder is made.
        about: plain data to keep beside the weights, such as class names or the backbone.

    Raises:
        InputError: the head was built by hand, so that a file could not say how to build it again.
    """
    if head.made_from is None:
        raise InputError(
            "head: it was not made by make_head, so its file could not name its pooler; save its state_dict"
        )
    state = {name: value.detach().cpu().contiguous() for name, value in inference_state(head.state_dict()).items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    record = {"made_from": head.made_from, "about": dict(about or {})}
    save_file(state, str(path), metadata={"format": _FORMAT, "head": json.dumps(record)})


def load_head(path: str | Path, device: str | torch.device = "cpu") -> ProbeHead:
    """The head that `save_head` wrote, in eval mode: the same logits bit for bit."""
    return _read(path, device)[0]


def read_about(path: str | Path) -> dict[str, Any]:
    """What `save_head` was given to keep beside the weights."""
    return _read(path, "cpu")[1]


def _branch_classifiers(pooler: Pooler, classes: int) -> BranchClassifiers | None:
    losses = pooler.branch_losses
    if losses is None or not losses.w_branch:
        return None
    with_branches: BranchPooler = pooler  # type: ignore[assignment]  # what has such losses has branches
    return BranchClassifiers(pooler.width, classes, with_branches.n_token, losses.share_branch_classifier)


def _read(path: str | Path, device: str | torch.device) -> tuple[ProbeHead, dict[str, Any]]:
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise KeyError(f"it does not say {_FORMAT}")
            record = json.loads(metadata["head"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        made = record["made_from"]
        grid = None if made["grid"] is None else tuple(made["grid"])
        head = make_head(made["pooler"], made["dim"], made["classes"], grid=grid, for_training=False)
        head.to(state["classifier.weight"].dtype).load_state_dict(state)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"head: {str(path)!r} cannot be read ({reason}); give a file that save_head wrote") from None
    return head.eval().to(device), record["about"]
