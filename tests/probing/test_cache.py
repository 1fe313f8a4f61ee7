"""A token cache holds what the backbone gave, survives a kill, computes nothing twice, and reads back every kind."""

from __future__ import annotations

import gc
import importlib.util
import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.cache import TokenCache
from vlattn.probing.cache_order import epoch_order, shared
from vlattn.probing.cache_prefetch import BatchMemory, prefetch
from vlattn.probing.tokens import Tokens

DIM, GRID, CLS = 6, (2, 3), 6


class Images:
    """Twelve or so small 'images' sorted by class; a transform that draws, where asked for. Counts what was read."""

    def __init__(self, count: int = 23, classes: int = 4, drawn: bool = False, labels: int | None = None) -> None:
        self.count, self.drawn, self.shape = count, drawn, {}
        self.classes = [f"class {k}" for k in range(classes)]
        self.multi_label = labels is not None
        self.read: list[int] = []
        self.fail_at: int | None = None

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> torch.Tensor:
        if self.multi_label:
            return torch.tensor([float(index >> bit & 1) for bit in range(len(self.classes))])
        return torch.tensor(index * len(self.classes) // self.count)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fail_at == len(self.read):
            raise KeyboardInterrupt
        self.read.append(index)
        noise = (
            random.random() + float(np.random.rand()) + torch.rand(3, *self.shape.get(index, GRID)) if self.drawn else 0
        )
        return torch.full((3, *self.shape.get(index, GRID)), float(index)) + noise, self.label(index)


class Backbone(nn.Module):
    """What the contract asks of a backbone, and a record of the images that it was run on."""

    def __init__(self, cls: int | None = CLS, registers: int = 2, layer: int = 3, project: bool = False) -> None:
        super().__init__()
        drawn = torch.randint(-64, 64, (3, DIM), generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(drawn / 32, requires_grad=False)  # sums are exact in fp32, whatever the batch
        self.cls, self.registers, self.layer, self.project, self.factor = cls, registers, layer, project, 1.0
        self.calls: list[int] = []
        self.version = "1.0"

    def describe(self) -> dict[str, Any]:
        return {"name": "fake", "layer": self.layer, "size": list(GRID), "versions": {"torch": self.version}}

    def forward(self, pixels: torch.Tensor) -> Tokens:
        assert not torch.is_grad_enabled()
        self.calls.append(len(pixels))
        patches = torch.einsum("bchw,cd->bhwd", pixels, self.weight).flatten(1, 2) * self.factor
        patches = patches + torch.arange(patches.shape[1])[:, None]
        cls = (
            None
            if self.cls is None
            else pixels.mean((1, 2, 3))[:, None].expand(-1, self.cls) + torch.arange(self.cls) / 8
        )
        registers = -patches[:, :1].expand(-1, self.registers, -1) if self.registers else None
        project = (lambda tokens: tokens[..., : self.cls] * 3) if self.project else None
        return Tokens(patches, cls, tuple(pixels.shape[2:]), registers, project)


def write(folder: Path, backbone: Backbone | None = None, images: Images | None = None, **settings: Any) -> TokenCache:
    settings = {"batch_size": 5, "announce": None} | settings
    return TokenCache.write(backbone or Backbone(), images or Images(), folder, **settings)


def live(backbone: Backbone, images: Images, index: int, kind: str = "patch") -> torch.Tensor:
    with torch.no_grad():
        return backbone(images[index][0][None]).choose(kind)[0]


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.bin")}


# What is kept


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["patch", "all", "cls"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_cache_gives_the_tokens_of_the_backbone_rounded_once(
    tmp_path: Path, dtype: str, kind: Any, in_memory: bool
) -> None:
    backbone, images = Backbone(), Images()
    cache = write(tmp_path, backbone, images, dtype=dtype, in_memory=in_memory)
    expected_dtype = getattr(torch, dtype)
    seen = []
    for tokens, labels in cache.batches(5, kind=kind):
        assert tokens.dtype == expected_dtype
        for row, label in zip(tokens, labels, strict=True):
            index = int(cache.indices[len(seen)])
            assert torch.equal(row, live(backbone, images, index, kind).to(expected_dtype))
            assert int(label) == int(images.label(index))
            seen.append(index)
    assert sorted(seen) == list(range(23))


def test_the_cache_tells_what_it_holds(tmp_path: Path) -> None:
    cache = write(tmp_path, views=2)
    assert len(cache) == 23
    assert (cache.views, cache.grid, cache.dtype, cache.multi_label) == (2, GRID, torch.float16, False)
    assert cache.classes == [f"class {k}" for k in range(4)]
    assert cache.labels.tolist() == [int(Images().label(int(i))) for i in cache.indices]
    assert cache.settings["backbone"]["name"] == "fake"
    assert cache.part("registers", 1).shape == (23, 2, DIM)
    assert sizes(tmp_path) == {
        "patches.bin": 2 * 23 * 6 * DIM * 2,
        "cls.bin": 2 * 23 * CLS * 2,
        "registers.bin": 2 * 23 * 2 * DIM * 2,
        "labels.bin": 23 * 8,
    }
    with pytest.raises(InputError, match="this cache has patches, cls, registers"):
        cache.part("projected")


def test_files_hold_bfloat16_bits_as_they_are(tmp_path: Path) -> None:
    cache = write(tmp_path, dtype="bfloat16")
    raw = np.fromfile(tmp_path / "cls.bin", np.uint16).astype(np.uint32) << 16
    assert np.array_equal(raw.view(np.float32).reshape(23, CLS), cache.part("cls").float().numpy())


def test_presence_labels_are_kept_as_float(tmp_path: Path) -> None:
    images = Images(labels=4)
    cache = write(tmp_path, images=images)
    assert cache.multi_label
    assert cache.labels.dtype == torch.float32
    assert torch.equal(cache.labels, torch.stack([images.label(int(i)) for i in cache.indices]))


def test_a_torch_dataset_of_pixels_and_int_is_taken(tmp_path: Path) -> None:
    class Plain:
        classes = ("a", "b", "c")

        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((3, *GRID), float(index)), index % 3

    cache = write(tmp_path, images=Plain())  # type: ignore[arg-type]
    assert cache.labels.tolist() == [int(i) % 3 for i in cache.indices]
    assert cache.classes == ["a", "b", "c"]


def test_images_are_stored_in_a_random_order_that_the_seed_decides(tmp_path: Path) -> None:
    one, two, other = (write(tmp_path / str(k), seed=seed) for k, seed in enumerate([0, 0, 1]))
    assert torch.equal(one.indices, two.indices)
    assert not torch.equal(one.indices, other.indices)
    assert one.indices.tolist() != sorted(one.indices.tolist())


def test_a_backbone_without_cls_gives_patches_alone(tmp_path: Path) -> None:
    cache = write(tmp_path, Backbone(cls=None, registers=0))
    assert sorted(sizes(tmp_path)) == ["labels.bin", "patches.bin"]
    for kind in ("all", "cls"):
        with pytest.raises(InputError, match=rf"kind: '{kind}' is not in this cache, which keeps patches \[6, 6\]"):
            cache.batches(5, kind=kind)  # type: ignore[arg-type]


def test_cls_of_another_width_does_not_join_patches(tmp_path: Path) -> None:
    cache = write(tmp_path, Backbone(cls=4))
    assert next(iter(cache.batches(5, kind="cls")))[0].shape == (5, 1, 4)
    with pytest.raises(InputError, match=r"keeps patches \[6, 6\], cls \[4\], registers \[2, 6\]; give 'patch', 'cls'"):
        cache.batches(5, kind="all")


def test_projected_cls_joins_projected_patches_as_in_live_tokens(tmp_path: Path) -> None:
    backbone, images = Backbone(cls=4, project=True), Images()
    cache = write(tmp_path, backbone, images, dtype="float32")
    for kind, shape in (("all", (7, 4)), ("patch", (6, 6)), ("cls", (1, 4))):
        tokens = torch.cat([tokens for tokens, _ in cache.batches(4, kind=kind)])  # type: ignore[arg-type]
        assert tokens.shape[1:] == shape
        expected = torch.stack([live(backbone, images, int(i), kind) for i in cache.indices])
        assert torch.equal(tokens, expected)


def test_only_the_kinds_asked_for_take_room(tmp_path: Path) -> None:
    clip = Backbone(cls=4, project=True)
    for kinds, files in (
        (("cls",), ["cls.bin"]),
        (("patch",), ["patches.bin"]),
        (("all",), ["cls.bin", "projected.bin"]),
        (("patch", "cls"), ["cls.bin", "patches.bin"]),
    ):
        folder = tmp_path / "-".join(kinds)
        cache = write(folder, clip, kinds=kinds)
        assert sorted(sizes(folder)) == sorted([*files, "labels.bin"])
        for kind in kinds:
            assert sum(len(tokens) for tokens, _ in cache.batches(5, kind=kind)) == 23
    assert write(tmp_path / "vit", kinds=("all",)).layout.parts == ("patches", "cls", "labels")
    with pytest.raises(InputError, match="needs a CLS token"):
        write(tmp_path / "none", Backbone(cls=None), kinds=("cls",))
    with pytest.raises(InputError, match="kinds: got 'registers'"):
        write(tmp_path / "none", kinds=("registers",))


# Views


def test_views_differ_by_image_and_view_and_do_not_depend_on_how_they_were_written(tmp_path: Path) -> None:
    backbone = Backbone()
    one = write(tmp_path / "one", backbone, Images(drawn=True), views=3, dtype="float32")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    two = write(tmp_path / "two", backbone, Images(drawn=True), views=3, dtype="float32", batch_size=7)
    for view in range(3):
        assert torch.allclose(one.part("patches", view), two.part("patches", view))
    noise = [one.part("cls", view)[:, 0] - one.indices for view in range(3)]
    assert len({round(float(value), 5) for row in noise for value in row}) == 3 * 23


@pytest.mark.slow
def test_workers_write_the_same_views(tmp_path: Path) -> None:
    backbone = Backbone()
    alone = write(tmp_path / "alone", backbone, Images(drawn=True), views=2)
    helped = write(tmp_path / "helped", backbone, Images(drawn=True), views=2, workers=2)
    for view in range(2):
        assert torch.equal(alone.part("patches", view), helped.part("patches", view))
    assert torch.equal(alone.labels, helped.labels)


def test_an_epoch_reads_its_view_and_labels_stay_with_their_images(tmp_path: Path) -> None:
    cache = write(tmp_path, images=Images(drawn=True), views=3, dtype="float32")
    batches = cache.batches(4, shuffle=True, kind="cls")
    assert batches.augmented
    for epoch in range(4):
        batches.set_epoch(epoch)
        found = {
            round(float(row[0, 0]), 4): int(label)
            for tokens, labels in batches
            for row, label in zip(tokens, labels, strict=True)
        }
        expected = zip(cache.part("cls", epoch % 3), cache.labels, strict=True)
        assert found == {round(float(row[0]), 4): int(label) for row, label in expected}
    fixed = cache.batches(23, view=1, epoch=2)
    assert not fixed.augmented
    assert torch.equal(next(iter(fixed))[0], cache.part("patches", 1))
    with pytest.raises(InputError, match="view: got 3, but the cache has views 0 to 2"):
        cache.batches(4, view=3)


# Being killed, and going on


@pytest.mark.parametrize("fail_at", [3, 5, 17, 26, 44, 60])
def test_a_killed_run_goes_on_and_computes_nothing_twice(tmp_path: Path, fail_at: int) -> None:
    whole = write(tmp_path / "whole", images=Images(drawn=True), views=3)
    images, backbone = Images(drawn=True), Backbone()
    images.fail_at = 3 + fail_at  # three images are read to know the dataset by
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", backbone, images, views=3)
    first_run = sum(backbone.calls)
    assert 0 <= first_run <= fail_at < 69
    if first_run:
        with pytest.raises(InputError, match=rf"has {first_run} of 69 rows; go on with TokenCache\.write"):
            TokenCache.open(tmp_path / "cut")
    images.fail_at = None
    told: list[tuple[int, int]] = []
    cache = write(tmp_path / "cut", backbone, images, views=3, progress=lambda *done: told.append(done))
    assert sum(backbone.calls) == 69
    assert told[0][0] > first_run
    assert told[-1] == (69, 69)
    for name in sizes(tmp_path / "whole"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert torch.equal(cache.labels, whole.labels)
    cache.verify()


def test_a_run_may_go_on_with_another_batch_size(tmp_path: Path) -> None:
    images, backbone = Images(), Backbone()
    images.fail_at = 3 + 11
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, backbone, images)
    images.fail_at = None
    cache = write(tmp_path, backbone, images, batch_size=2)
    assert backbone.calls == [5, 5, *[2] * 6, 1]
    assert torch.equal(cache.part("patches"), write(tmp_path / "whole").part("patches"))


def test_a_finished_cache_is_opened_and_nothing_is_computed(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "journal.jsonl"}
    backbone = Backbone()
    assert len(write(tmp_path, backbone)) == 23
    assert backbone.calls == []
    assert {path: path.read_bytes() for path in before} == before


def test_a_torn_line_of_the_journal_is_computed_again(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    cut(tmp_path, rows=10)
    journal = tmp_path / "journal.jsonl"
    lines = [line for line in journal.read_bytes().splitlines(keepends=True) if b"start" in line]
    journal.write_bytes(b"".join(lines)[:-4])
    backbone = Backbone()
    cache = write(tmp_path, backbone)
    assert sum(backbone.calls) == 23 - 5
    assert torch.equal(cache.part("patches"), whole.part("patches"))
    cache.verify()


def test_rows_that_never_reached_the_disk_are_computed_again(tmp_path: Path) -> None:
    """A machine that went down may have kept the journal's line and lost the rows, or a part of them."""
    whole = write(tmp_path / "whole")
    cut(tmp_path, rows=15)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if b"synced" not in line))
    overwrite(tmp_path / "cls.bin", 7 * CLS * 2)
    backbone = Backbone()
    cache = write(tmp_path, backbone)
    assert sum(backbone.calls) == 23 - 5
    assert torch.equal(cache.part("cls"), whole.part("cls"))
    cache.verify()


def cut(folder: Path, rows: int) -> None:
    """A run that is killed after so many rows."""
    images = Images()
    images.fail_at = 3 + rows
    with pytest.raises(KeyboardInterrupt):
        write(folder, images=images)


def overwrite(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)


def test_a_journal_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    cut(tmp_path, rows=10)
    journal = tmp_path / "journal.jsonl"
    lines = [line for line in journal.read_bytes().splitlines(keepends=True) if b"start" in line]
    for content, message in ((b"{}\n", "line 1 is damaged"), (lines[1], "line 1 does not follow")):
        journal.write_bytes(content)
        with pytest.raises(InputError, match=message):
            write(tmp_path)
    journal.write_bytes(b"".join(lines))
    (tmp_path / "cls.bin").unlink()
    with pytest.raises(InputError, match=r"cls\.bin is gone"):
        write(tmp_path)


def test_two_writers_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    images, entered, go_on = Images(), threading.Event(), threading.Event()

    def wait(done: int, rows: int) -> None:
        entered.set()
        go_on.wait(10)

    first = threading.Thread(target=lambda: write(tmp_path, images=images, progress=wait))
    first.start()
    try:
        assert entered.wait(10)
        with pytest.raises(InputError, match="another process is writing"):
            write(tmp_path)
    finally:
        go_on.set()
        first.join()
    assert len(TokenCache.open(tmp_path)) == 23


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype (made with 'float16', asked for 'bfloat16')"),
        ({"views": 2}, "views (made with 1, asked for 2)"),
        ({"seed": 4}, "seed (made with 0, asked for 4)"),
        ({"kinds": ("cls",)}, "kinds (made with None, asked for ['cls'])"),
        ({"backbone": Backbone(layer=2)}, "backbone.layer (made with 3, asked for 2)"),
        ({"images": Images(count=24)}, "dataset.items (made with 23, asked for 24)"),
        ({"images": Images(classes=5)}, "dataset.classes (made with 4, asked for 5)"),
        ({"images": Images(drawn=True)}, "dataset.sample ("),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    write(tmp_path) if finished else cut(tmp_path, rows=10)
    before = sizes(tmp_path)
    with pytest.raises(InputError) as caught:
        write(tmp_path, **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sizes(tmp_path) == before


def test_every_setting_that_differs_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(InputError) as caught:
        write(tmp_path, Backbone(layer=1), dtype="bfloat16", views=4)
    assert all(name in str(caught.value) for name in ("backbone.layer", "dtype", "views"))
    assert "seed" not in str(caught.value)


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    other = Backbone()
    other.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"backbone\.weights"):
        write(tmp_path, other)


def test_versions_are_told_and_not_compared(tmp_path: Path) -> None:
    write(tmp_path)
    newer = Backbone()
    newer.version = "2.0"
    cache = write(tmp_path, newer)
    assert cache.manifest.environment["versions"] == {"torch": "1.0"}


def test_opening_checks_what_it_is_given(tmp_path: Path) -> None:
    write(tmp_path)
    assert len(TokenCache.open(tmp_path, backbone=Backbone(), dataset=Images())) == 23
    with pytest.raises(InputError, match=r"backbone\.layer \(made with 3, asked for 9\)"):
        TokenCache.open(tmp_path, backbone=Backbone(layer=9))
    with pytest.raises(InputError, match=r"dataset\.items"):
        TokenCache.open(tmp_path, dataset=Images(count=5))
    with pytest.raises(InputError, match="holds no token cache"):
        TokenCache.open(tmp_path / "none")


def test_image_files_that_changed_size_are_refused_with_what_to_do(tmp_path: Path) -> None:
    def images() -> Images:
        found = Images()
        found.file_sizes = lambda: size  # type: ignore[attr-defined]
        return found

    size = "one"
    write(tmp_path, images=images())
    assert len(write(tmp_path, images=images())) == 23
    size = "two"
    for look in (lambda: write(tmp_path, images=images()), lambda: TokenCache.open(tmp_path, dataset=images())):
        with pytest.raises(InputError, match=r"dataset\.files .* other sizes than .*: remove this folder"):
            look()


def test_a_cache_from_before_sizes_were_noted_is_read_and_compared_by_the_rest(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    told = json.loads(manifest.read_text())
    del told["settings"]["dataset"]["files"]
    manifest.write_text(json.dumps(told))
    images = Images()
    images.file_sizes = lambda: "sizes"  # type: ignore[attr-defined]
    assert len(write(tmp_path, images=images)) == 23
    assert len(TokenCache.open(tmp_path, dataset=images)) == 23
    with pytest.raises(InputError, match=r"dataset\.sample \(.*; give those settings, or another folder"):
        write(tmp_path, images=Images(drawn=True))


def test_a_run_without_rows_may_change_its_settings(tmp_path: Path) -> None:
    cut(tmp_path, rows=2)
    assert len(write(tmp_path, dtype="bfloat16", views=2)) == 23


def test_a_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    for broken in ("{", json.dumps(content | {"format": "other"}), json.dumps({"format": content["format"]})):
        manifest.write_text(broken)
        with pytest.raises(InputError, match=r"manifest\.json is no manifest"):
            TokenCache.open(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 0}, "views: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"workers": -1}, "workers: got -1"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


# Checksums


def test_verifying_finds_one_flipped_byte(tmp_path: Path) -> None:
    cache = write(tmp_path, views=2)
    cache.verify()
    for name, at, rows in (
        ("patches.bin", 12 * 72 + 3, "10 to 14"),
        ("cls.bin", 45 * 12, "43 to 45"),
        ("labels.bin", 0, "0 to 4"),
    ):
        overwrite(tmp_path / name, at)
        with pytest.raises(InputError, match=rf"{name} differs from its checksums in rows {rows}"):
            cache.verify()
        overwrite(tmp_path / name, at)
    cache.verify()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "patches.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"patches\.bin has 1655 bytes where 1656 are due"):
        TokenCache.open(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"patches\.bin is missing"):
        TokenCache.open(tmp_path)


# Room on the disk


class Usage(NamedTuple):
    free: int


def test_the_size_is_announced_before_anything_is_written(tmp_path: Path) -> None:
    said: list[tuple[str, bool]] = []

    def listen(text: str) -> None:
        said.append((text, any(path.stat().st_blocks for path in tmp_path.glob("*.bin"))))

    write(tmp_path, images=Images(count=40, classes=3), views=2, announce=listen)
    exact = sum(sizes(tmp_path).values()) / 1e9
    ((text, written),) = said
    assert f"{exact:.2f} GB" in text
    assert "40 images x 2 views" in text
    assert not written


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "cache"
    needed = 2 * 23 * (6 * DIM + CLS + 2 * DIM) * 2 + 23 * 8
    monkeypatch.setattr("vlattn.probing.cache_write.GB", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
    with pytest.raises(
        InputError, match=rf"needs {needed / 1000:.2f} GB, but its disk has {(needed - 1) / 1000:.2f} GB free"
    ):
        write(folder, views=2)
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed))
    assert len(write(folder, views=2)) == 23


def test_going_on_needs_room_for_what_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(tmp_path, rows=10)
    row = (6 * DIM + CLS + 2 * DIM) * 2 + 8
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(13 * row - 1))
    with pytest.raises(InputError, match="GB free"):
        write(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(13 * row))
    said: list[str] = []
    write(tmp_path, announce=said.append)
    assert "are still to be written" in said[0]


# Tokens that cannot be kept


def test_tokens_beyond_float16_are_refused_and_bfloat16_keeps_them(tmp_path: Path) -> None:
    backbone = Backbone()
    backbone.factor = 1e5
    with pytest.raises(InputError, match="which float16 cannot hold; give dtype='bfloat16'"):
        write(tmp_path, backbone)
    assert torch.isfinite(write(tmp_path, backbone, dtype="bfloat16").part("patches")).all()


def test_tokens_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    backbone = Backbone()
    backbone.factor = float("nan")
    with pytest.raises(InputError, match="its patches are not all finite"):
        write(tmp_path, backbone, dtype="bfloat16")


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    images = Images(count=10)
    images.shape = dict.fromkeys(range(10), (2, 2)) | {0: GRID, 5: GRID, 9: GRID}
    with pytest.raises(InputError, match="a transform that makes all images one size"):
        write(tmp_path, images=images, batch_size=1)


# Reading


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return write(tmp_path, images=Images(count=60, classes=6), dtype="float32")


def read(batches: Any, cache: TokenCache) -> list[list[int]]:
    """Stored rows of each batch, told by their tokens, which must have come with their labels."""
    rows = {round(float(row), 3): at for at, row in enumerate(cache.part("patches")[:, 0, 0])}
    found = []
    for tokens, labels in batches:
        first = tokens.float()[:, 0, 0] if tokens.shape[1] == 6 else tokens.float()[:, 1, 0]
        found.append([rows[round(float(value), 3)] for value in first])
        assert torch.equal(labels, cache.labels[found[-1]])
    return found


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("block", [1, 4, 16, 100])
@pytest.mark.parametrize("kind", ["patch", "all"])
def test_an_epoch_reads_every_image_once(cache: TokenCache, depth: int, block: int, kind: Any) -> None:
    batches = cache.batches(8, kind=kind, shuffle=True, block=block, prefetch=depth)
    found = read(batches, cache)
    assert len(batches) == len(found) == 8
    assert [len(batch) for batch in found] == [8] * 7 + [4]
    assert sorted(row for batch in found for row in batch) == list(range(60))
    assert all(batch == sorted(batch) for batch in found)


def test_without_a_shuffle_rows_come_as_stored(cache: TokenCache) -> None:
    assert read(cache.batches(25), cache) == [list(range(25)), list(range(25, 50)), list(range(50, 60))]
    assert read(cache.batches(25, drop_last=True), cache) == [list(range(25)), list(range(25, 50))]
    assert len(cache.batches(25, drop_last=True)) == 2


def test_orders_depend_on_seed_and_epoch_alone(cache: TokenCache) -> None:
    for block in (1, 7):

        def order(seed: int, epoch: int, block: int = block) -> list[list[int]]:
            return read(cache.batches(8, shuffle=True, block=block, seed=seed, epoch=epoch), cache)

        assert order(0, 3) == order(0, 3)
        assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
        batches = cache.batches(8, shuffle=True, block=block)
        batches.set_epoch(2)
        assert read(batches, cache) == order(0, 2)


def test_blocks_stay_together_and_singles_do_not() -> None:
    rows = torch.arange(1000)
    blocks, singles = epoch_order(rows, 50, 0, 0), epoch_order(rows, 1, 0, 0)
    assert (blocks.diff() == 1).sum() >= 1000 - 22
    assert (singles.diff() == 1).sum() < 10
    assert blocks.sort().values.equal(rows)
    assert singles.sort().values.equal(rows)
    starts = set()
    for epoch in range(20):
        order = epoch_order(rows, 50, 0, epoch)
        begins = Counter((order[1:][order.diff() != 1] % 50).tolist())
        starts.add(begins.most_common(1)[0][0])
    assert len(starts) > 5


def test_chosen_rows_are_read_and_no_others(cache: TokenCache) -> None:
    rows = torch.tensor([50, 3, 4, 17])
    assert read(cache.batches(3, rows=rows), cache) == [[3, 4, 17], [50]]
    assert sorted(chain(*read(cache.batches(3, rows=rows, shuffle=True), cache))) == [3, 4, 17, 50]
    for bad, message in (
        ([60], "got 60, but the cache has rows 0 to 59"),
        ([-1], "got -1"),
        ([1, 1], "more than once"),
        ([], "give row numbers"),
        ([0.5], "give row numbers"),
    ):
        with pytest.raises(InputError, match=message):
            cache.batches(3, rows=torch.tensor(bad))


def test_processes_share_an_epoch_without_overlap(cache: TokenCache) -> None:
    parts = [cache.batches(7, shuffle=True, share=(rank, 7)) for rank in range(7)]
    found = [list(chain(*read(part, cache))) for part in parts]
    assert [len(part) for part in found] == [8] * 7
    assert all(len(part) == 2 for part in parts)
    assert max(Counter(chain(*found)).values()) == 1
    assert shared(torch.arange(10), 2, 3).tolist() == [6, 7, 8]


def test_neighbours_are_looks_at_the_file_and_others_are_copies(cache: TokenCache) -> None:
    stored = cache.part("patches")
    first, last = stored.data_ptr(), stored.data_ptr() + stored.numel() * 4

    def inside(tokens: torch.Tensor) -> bool:
        return first <= tokens.data_ptr() < last

    assert all(inside(tokens) for tokens, _ in cache.batches(8))
    assert not any(inside(tokens) for tokens, _ in cache.batches(8, shuffle=True))
    assert not any(inside(tokens) for tokens, _ in cache.batches(8, kind="all"))
    assert not any(inside(tokens) for tokens, _ in cache.batches(8, dtype=torch.bfloat16))


def test_writing_into_tokens_never_reaches_the_file(cache: TokenCache) -> None:
    before = (cache.folder / "patches.bin").read_bytes()
    for tokens, _ in cache.batches(8):
        tokens.zero_()
    assert (cache.folder / "patches.bin").read_bytes() == before
    cache.verify()


@pytest.mark.parametrize("kind", ["patch", "all", "cls"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_tokens_come_in_the_dtype_asked_for(tmp_path: Path, kind: Any, shuffle: bool) -> None:
    cache = write(tmp_path, dtype="bfloat16")
    kept = [tokens for tokens, _ in cache.batches(5, kind=kind, shuffle=shuffle)]
    wide = [tokens for tokens, _ in cache.batches(5, kind=kind, shuffle=shuffle, dtype=torch.float32)]
    assert {tokens.dtype for tokens in wide} == {torch.float32}
    assert all(torch.equal(a.float(), b) for a, b in zip(kept, wide, strict=True))


def test_batches_that_are_held_keep_their_content(cache: TokenCache) -> None:
    held = [tokens for tokens, _ in cache.batches(8, shuffle=True)]
    copies = [tokens.clone() for tokens, _ in cache.batches(8, shuffle=True)]
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert len({tokens.data_ptr() for tokens in held}) == len(held)


def test_a_batch_size_that_leaves_no_batch_is_refused(cache: TokenCache) -> None:
    with pytest.raises(InputError, match=r"batch_size: got 61 of 60 images .* leaves none"):
        cache.batches(61, drop_last=True)
    assert len(cache.batches(61)) == 1
    for settings in ({"batch_size": 0}, {"batch_size": 4, "block": 0}, {"batch_size": 4, "prefetch": -1}):
        with pytest.raises(InputError, match=f"{list(settings)[-1]}: got"):
            cache.batches(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kind: got 'registers'"):
        cache.batches(4, kind="registers")  # type: ignore[arg-type]


def test_leaving_an_epoch_early_ends_its_thread(cache: TokenCache) -> None:
    before = threading.active_count()
    for _ in cache.batches(2, shuffle=True):
        break
    gc.collect()
    assert threading.active_count() == before


# The thread, and the memory of batches


def test_prefetch_keeps_order_and_hands_errors_on() -> None:
    def items() -> Iterator[int]:
        yield from range(20)
        raise ValueError("at the end")

    for depth in (0, 1, 5):
        found = []
        with pytest.raises(ValueError, match="at the end"):
            found.extend(prefetch(items(), depth))
        assert found == list(range(20))


def test_prefetch_works_ahead_and_no_further_than_asked() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    stream = prefetch(items(), 3)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.02)
    assert len(made) == 5  # one given, three waiting, one in hand
    stream.close()
    assert len(made) <= 6


def test_memory_is_lent_again_only_when_no_tensor_looks_at_it() -> None:
    memory = BatchMemory(64)
    first = memory.empty((4, 4), torch.float32)
    place = first.data_ptr()
    look = first[1:, 2].detach()
    del first
    gc.collect()
    other = memory.empty((4, 4), torch.float32)
    assert other.data_ptr() != place
    del look
    gc.collect()
    assert memory.empty((8,), torch.bfloat16).data_ptr() == place


def test_memory_keeps_what_autograd_needs() -> None:
    memory = BatchMemory(64)
    tokens = memory.empty((4, 4), torch.float32).fill_(2.0)
    weight = torch.ones(4, requires_grad=True)
    loss = (tokens @ weight).sum()
    del tokens
    memory.empty((4, 4), torch.float32).fill_(9.0)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [8.0] * 4


# The benchmark


def test_the_benchmark_runs_and_says_all(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "benchmarks" / "probe_cache.py"
    spec = importlib.util.spec_from_file_location("vlattn_benchmark_probe_cache", program)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    out = tmp_path / "results" / "toy.json"
    shape = ["--images", "24", "--tokens", "4", "--dim", "8", "--classes", "3", "--batch", "8", "--repeats", "2"]
    benchmark.main([*shape, "--heads", "gap", "ep:queries=2", "--out", str(out)])
    found = json.loads(out.read_text())
    names = ["sum", "shuffled", "blocks", "train gap", "compute gap", "train ep:queries=2", "compute ep:queries=2"]
    assert list(found["arms"]) == names
    assert found["arms"]["sum"]["rate_over_sum"]["median"] == 1
    for name, arm in found["arms"].items():
        assert arm["seconds"]["n"] == 2
        assert arm["images_per_second"] == pytest.approx(24 / arm["seconds"]["median"])
        trains = name.startswith("train")
        assert arm["met"] == (arm["rate_over_sum"]["median"] >= 0.6 if trains else None)
    assert found["machine"]["cpu"]
    cache = write(tmp_path / "some", images=Images(count=60))
    assert float(benchmark.sum_cache(cache)) == pytest.approx(float(cache.part("patches").float().sum()), rel=1e-5)
