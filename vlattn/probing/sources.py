"""Where a probe's batches come from, for a backbone and a data set: tokens kept on disk, or augmented images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from vlattn.errors import InputError
from vlattn.probing.backbones.base import Backbone
from vlattn.probing.cache import TokenCache
from vlattn.probing.cache_manifest import backbone_settings
from vlattn.probing.data.named import NamedData
from vlattn.probing.lowshot import comparable_settings, shots_subset
from vlattn.probing.settings import ProbeSettings
from vlattn.probing.tokens import TokenKind
from vlattn.probing.train_source import LiveTokens, Source

Part = Literal["train", "val"]


@dataclass(frozen=True)
class TokenSources:
    """Makes the train and val sources of a probe.

    Tokens of evaluation views are computed once and kept under `folder`, in a subfolder for each backbone, layer and
    data set: another backbone has another, so that its tokens are never taken for these.

    backbone, data: what is probed, and on what.
    folder: for caches.
    batch_size: images of a training batch; at most what there is.
    augment: whether training images are cropped and flipped anew in each epoch, as published probes do, and pass the
        backbone each time; else the views of evaluation are read from the cache.
    seed: of the order of images.
    shots: train on so many images of each class alone, drawn by the seed of the run (see `vlattn.probing.lowshot`);
        None is all.
    workers: processes that decode images.
    announce: told the size of a cache before it is written; None for silence.
    """

    backbone: Backbone
    data: NamedData
    folder: Path
    batch_size: int = 256
    augment: bool = False
    seed: int = 0
    workers: int = 0
    announce: Callable[[str], object] | None = None
    shots: int | None = None

    def __post_init__(self) -> None:
        if self.shots is not None and self.data.train.multi_label:
            raise InputError(
                f"shots: got {self.shots}, but images of {self.data.name} have any number of labels, so that none "
                "counts for one class; leave it out"
            )
        self.rows(self.seed)  # refuses more than a class has

    def cache(self, part: Part) -> TokenCache:
        """The tokens of a part, computed where they are not there yet.

        Raises:
            InputError: an image does not decode, the disk is short, or the folder holds tokens of another backbone.
        """
        dataset = getattr(self.data, part).with_transform(self.backbone.transform(train=False))
        place = self.folder / f"{self._key()}-{part}"
        return TokenCache.write(self.backbone, dataset, place, workers=self.workers, announce=self.announce)

    def train(self, kind: TokenKind, seed: int | None = None) -> Source:
        """Training batches, all full, in an order of its own in each epoch.

        Args:
            kind: which tokens; see `vlattn.probing.tokens`.
            seed: of the order; None is the one of these sources.
        """
        seed = self.seed if seed is None else seed
        rows, size = self.rows(seed), min(self.batch_size, self.train_images)
        if not self.augment:
            cache = self.cache("train")
            stored = None if rows is None else torch.isin(cache.indices, rows).nonzero()[:, 0]
            return cache.batches(size, kind=kind, shuffle=True, seed=seed, drop_last=True, rows=stored)
        images = self.data.train.with_transform(self.backbone.transform(train=True))
        if rows is not None:
            images = images.subset(rows.tolist())
        # Without a generator of its own: training seeds torch's for each epoch, so that a resumed run sees the same.
        loader: Any = DataLoader(images, size, shuffle=True, drop_last=True, num_workers=self.workers)
        return LiveTokens(self.backbone, loader, augmented=True)

    @property
    def train_images(self) -> int:
        """Images that a run is trained on."""
        rows = self.rows(self.seed)
        return len(self.data.train) if rows is None else len(rows)

    def rows(self, seed: int) -> torch.Tensor | None:
        """Positions in the data set of the images that the run of a seed is trained on; None is all."""
        return None if self.shots is None else shots_subset(self.data.train.labels, self.shots, seed)

    def settings(self, settings: ProbeSettings) -> ProbeSettings:
        """Settings meant for the whole data set, with as many updates for few shots; see `comparable_settings`."""
        if self.shots is None:
            return settings
        whole = len(self.data.train)
        return comparable_settings(settings, whole, self.train_images, min(self.batch_size, whole))[0]

    def departures(self) -> list[str]:
        """Where training on these images leaves the published protocol, in words."""
        if self.shots is None:
            return []
        images = "1 image" if self.shots == 1 else f"{self.shots} images"
        return [f"{images} of each class, {self.train_images} of {len(self.data.train)}, with epochs to match"]

    def val(self, kind: TokenKind) -> Source:
        """All val images once, in views of evaluation."""
        return self.cache("val").batches(self.batch_size, kind=kind)

    def sample(self, kind: TokenKind) -> torch.Tensor:
        """Tokens of one image [1, N, D]; raises InputError where the backbone does not have the kind."""
        height, width = self.backbone.images.size
        return self.backbone(torch.zeros(1, 3, height, width)).choose(kind)

    def describe(self) -> dict[str, Any]:
        """What is kept with results: backbone, weights and data, and shots where they are few, as plain data."""
        few = {} if self.shots is None else {"shots": self.shots}
        return {
            "backbone": {**self.backbone.describe(), "weights": backbone_settings(self.backbone)["weights"]},
            "data": self.data.name,
            "classes": self.data.classes,
            "augment": self.augment,
            **few,
        }

    def _key(self) -> str:
        """A folder name that differs for each backbone, layer and data set."""
        told = [backbone_settings(self.backbone), self.data.name, self.data.train.identity(), self.data.val.identity()]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return f"layer{self.backbone.layer}-{digest}"
