"""Tokens of a frozen backbone, kept on disk: computed once, read as fast as the memory map gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlattn.errors import InputError
from vlattn.probing.cache_journal import damaged, read_journal, rows_done
from vlattn.probing.cache_layout import DTYPES, Kind, map_part, stored_order
from vlattn.probing.cache_manifest import Manifest, backbone_settings, read_manifest, require_same
from vlattn.probing.cache_read import CacheBatches
from vlattn.probing.cache_write import write_cache
from vlattn.probing.data.fingerprint import fingerprint
from vlattn.probing.data.torch_dataset import as_labeled


class TokenCache:
    """A finished cache. Make one with `write`, or `open` one that is there.

    Images lie in a random order, which the seed decides, so that neighbours on disk make a fair batch; `indices` tells
    which is which. Published probes pass newly augmented images through the encoder in every epoch ("Attention, Please!
    Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178): results from a cache compare with
    them only as far as its views stand in for that.

    labels: int64 [images], or float32 [images, K] of presence, in the stored order.
    indices: int64 [images], positions in the dataset, in the stored order.
    classes: K names. multi_label: whether an image may have any number of them.
    settings: what the tokens were made with: backbone, dataset, kinds, views, dtype, seed.
    """

    def __init__(self, folder: Path, manifest: Manifest, in_memory: bool) -> None:
        self.folder, self.manifest, self.layout = folder, manifest, manifest.layout
        self._maps = {part: map_part(folder, self.layout, part, in_memory) for part in self.layout.parts}
        self.labels = self._maps["labels"].clone()
        self.indices = stored_order(self.layout.images, manifest.settings["seed"])
        self.classes, self.multi_label = list(manifest.classes), self.layout.multi_label
        self.settings: Mapping[str, Any] = manifest.settings
        self.views, self.grid, self.dtype = self.layout.views, self.layout.grid, DTYPES[self.layout.dtype]

    @classmethod
    def write(
        cls,
        backbone: Any,
        dataset: Any,
        folder: str | Path,
        *,
        kinds: Sequence[Kind] | None = None,
        views: int = 1,
        dtype: str = "float16",
        seed: int = 0,
        batch_size: int = 64,
        workers: int = 0,
        announce: Callable[[str], object] | None = print,
        progress: Callable[[int, int], object] | None = None,
        in_memory: bool = False,
    ) -> TokenCache:
        """Run a backbone over a dataset and keep its tokens, or go on where such a run was cut off.

        Every batch is noted with its checksums once it is written, so that a run which is killed loses the batch it was
        computing and no other. A cache that is finished is opened, and nothing is computed.

        Args:
            backbone: pixels [B, 3, H, W] to `Tokens`, with `describe()`.
            dataset: items (pixels [3, H, W], label), such as those of `vlattn.probing.data` under the backbone's
                transform, or any torch dataset of (pixels, int) with `classes`.
            folder: where the cache lies; made where it is missing.
            kinds: keep what these are read from, such as ("cls",), and nothing else; default all that the backbone
                gives, registers and, where CLS is projected as in CLIP, patches in both widths.
            views: augmented views of each image; view v of image i is drawn under a seed of its own, which no order of
                reading changes. 1 for a transform that draws nothing.
            dtype: `float16`, `bfloat16` (wider range, fewer digits) or `float32`.
            seed: of the views and of the stored order.
            batch_size: images that the backbone gets at once; a run may go on with another.
            workers: processes that decode images.
            announce: told the size in GB before anything is written; None for silence.
            progress: called after each batch with the rows done and the rows there will be (images x views).
            in_memory: as for `open`.

        Raises:
            InputError: the disk has less room than the cache needs; the folder holds a cache with other settings, or
                one that another process is writing; the backbone does not give one of `kinds`; tokens do not fit the
                dtype; images give tokens of different shapes.
        """
        write_cache(
            backbone,
            dataset,
            folder,
            kinds=kinds,
            views=views,
            dtype=dtype,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            announce=announce,
            progress=progress,
        )
        return cls.open(folder, in_memory=in_memory)

    @classmethod
    def open(
        cls, folder: str | Path, *, backbone: Any = None, dataset: Any = None, in_memory: bool = False
    ) -> TokenCache:
        """Open a finished cache.

        Args:
            folder: of the cache.
            backbone, dataset: where given, the cache must have been made with them.
            in_memory: read all of it into memory first; else the system keeps what memory it can spare.

        Raises:
            InputError: there is no cache, it is not finished, or it was made with something else; names what differs.
        """
        place = Path(folder)
        manifest = read_manifest(place)
        if manifest is None:
            raise InputError(f"folder: {str(folder)!r} holds no token cache; make one with TokenCache.write")
        asked = {} if backbone is None else {"backbone": backbone_settings(backbone)}
        if dataset is not None:
            asked["dataset"] = fingerprint(as_labeled(dataset), manifest.settings["seed"])
        require_same(place, manifest.settings, asked)
        done = rows_done(read_journal(place)[0])
        if done != manifest.layout.rows:
            raise InputError(
                f"folder: {str(folder)!r} has {done} of {manifest.layout.rows} rows; go on with TokenCache.write"
            )
        return cls(place, manifest, in_memory)

    def __len__(self) -> int:
        """Images."""
        return self.layout.images

    def part(self, name: str, view: int = 0) -> torch.Tensor:
        """A part of a view over the file itself; do not write into it.

        Args:
            name: `patches` [images, N, D], `cls` [images, Dc], `registers` [images, R, D], or `projected`, the patches
                in the width of a projected CLS [images, N, Dc].
            view: which augmented view.

        Raises:
            InputError: the part was not kept.
        """
        if name not in self.layout.parts or name == "labels":
            there = ", ".join(part for part in self.layout.parts if part != "labels")
            raise InputError(f"name: got {name!r}; this cache has {there}")
        return self._maps[name][view * len(self) : (view + 1) * len(self)]

    def batches(
        self,
        batch_size: int,
        *,
        kind: Kind = "patch",
        shuffle: bool = False,
        block: int = 1,
        seed: int = 0,
        epoch: int = 0,
        view: int | None = None,
        rows: torch.Tensor | None = None,
        share: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        prefetch: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> CacheBatches:
        """Batches (tokens, labels): tokens [B, N, D], or [B, N + 1, D] with CLS in front, or CLS alone [B, 1, Dc].

        Inside a batch, images are in the stored order. Batches of neighbours (no shuffle, or blocks that a batch
        divides) are looks at the file without a copy, where `kind` and `dtype` allow; do not write into them.

        Args:
            batch_size: images of a batch.
            kind: `patch`, `all` or `cls`.
            shuffle: whether each epoch has an order of its own.
            block: neighbours that are shuffled as one, as large reads suit a disk better than small ones.
            seed, epoch: decide the order; `set_epoch` changes the epoch.
            view: the view to read; None reads view e modulo `views` in epoch e.
            rows: int64, the stored rows to take, as found in `labels`; None is all.
            share: (rank, processes): which part of each epoch this process reads; what does not divide is left out.
            drop_last: whether a last batch that is not full is left out.
            prefetch: batches made ahead in a thread; 0 makes each when it is asked for. Memory for so many batches and
                two more is held.
            dtype: of the tokens given; None as they are kept.
            device: where tokens and labels are given.

        Raises:
            InputError: the backbone has no CLS, or one of another width than the patches; or numbers out of range.
        """
        return CacheBatches(
            self,
            batch_size,
            kind=kind,
            shuffle=shuffle,
            block=block,
            seed=seed,
            epoch=epoch,
            view=view,
            rows=rows,
            share=share,
            drop_last=drop_last,
            prefetch=prefetch,
            dtype=dtype,
            device=device,
        )

    def verify(self) -> None:
        """Read the files and compare them with their checksums.

        Raises:
            InputError: names the first file and rows that differ.
        """
        for entry in read_journal(self.folder)[0]:
            found = damaged(self.folder, self.layout, entry)
            if found is not None:
                raise InputError(
                    f"folder: {self.folder / found} differs from its checksums in rows {entry.start} to "
                    f"{entry.stop - 1}; write the cache anew in another folder"
                )
