"""Sources of tokens: kept once, told apart by backbone, or live under augmentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.probing.data.named import NamedData, named_data
from vlattn.probing.named_backbone import named_backbone
from vlattn.probing.settings import fast_settings
from vlattn.probing.sources import TokenSources


@pytest.fixture(scope="module")
def small() -> NamedData:
    data = named_data("digits")
    return NamedData(data.train.subset(range(40)), data.val.subset(range(10)), data.name)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def make(small: NamedData, work: Path, tokens: Path, **settings: object) -> TokenSources:
    backbone = named_backbone("digits-mim:0", work)
    return TokenSources(backbone, small, tokens, batch_size=16, **settings)  # type: ignore[arg-type]


def test_kept_tokens_are_the_backbones_and_are_computed_once(
    small: NamedData, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make(small, work, tmp_path)
    images = small.val.with_transform(sources.backbone.transform(train=False))
    expected = sources.backbone(torch.stack([images[i][0] for i in range(10)])).choose("all")
    order = sources.cache("val").indices
    ((tokens, labels),) = sources.val("all")
    assert torch.allclose(tokens.float(), expected[order], atol=5e-3)
    assert torch.equal(labels, small.val.labels[order])
    monkeypatch.setattr(type(sources.backbone), "_read", lambda *_: pytest.fail("tokens were computed again"))
    assert len(list(sources.val("patch"))) == 1


def test_training_batches_are_full_and_their_order_follows_epoch_and_seed(
    small: NamedData, work: Path, tmp_path: Path
) -> None:
    sources = make(small, work, tmp_path)

    def labels(seed: int, epoch: int) -> list[int]:
        source = sources.train("cls", seed)
        source.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = [batch for _, batch in source]
        assert [len(batch) for batch in batches] == [16, 16]
        return torch.cat(batches).tolist()

    assert labels(0, 0) == labels(0, 0)
    assert len({tuple(labels(*at)) for at in ((0, 0), (0, 1), (1, 0))}) == 3


def test_augmented_sources_see_other_images_in_each_epoch_and_say_so(
    small: NamedData, work: Path, tmp_path: Path
) -> None:
    source = make(small, work, tmp_path, augment=True).train("patch")
    assert source.augmented is True  # type: ignore[attr-defined]
    first, second = (next(iter(source))[0].patches for _ in range(2))
    assert first.shape == (16, 64, 96)
    assert not torch.equal(first, second)
    assert not list(tmp_path.glob("*-train"))


def test_another_layer_has_a_cache_of_its_own_and_a_foreign_cache_is_refused(
    small: NamedData, work: Path, tmp_path: Path
) -> None:
    sources = make(small, work, tmp_path)
    place = sources.cache("val").folder
    other = TokenSources(named_backbone("digits-mim:0", work, layer=0), small, tmp_path)
    elsewhere = other.cache("val").folder
    assert elsewhere != place
    for file in elsewhere.iterdir():
        file.unlink()
    for file in place.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"cache with other settings: .*layer"):
        other.cache("val")


def test_an_image_that_does_not_decode_is_named(work: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "set" / part / name / "0.png")
    (tmp_path / "set" / "train" / "b" / "0.png").write_bytes(b"\x89PNG broken")
    sources = make(named_data(str(tmp_path / "set")), work, tmp_path / "tokens")
    with pytest.raises(InputError, match=r"0\.png is no readable image"):
        sources.train("patch")


def test_few_shots_are_so_many_images_of_each_class_drawn_by_the_seed_of_the_run(work: Path, tmp_path: Path) -> None:
    data = named_data("digits")
    backbone = named_backbone("digits-mim:0", work)
    sources = TokenSources(backbone, data, tmp_path, batch_size=256, shots=2)
    assert sources.train_images == 20
    drawn = {}
    for seed in (0, 1):
        ((tokens, labels),) = sources.train("cls", seed)
        assert sorted(labels.tolist()) == sorted([*range(10)] * 2)
        rows = sources.rows(seed)
        assert rows is not None
        images = data.train.with_transform(backbone.transform(train=False))
        expected = torch.cat([backbone(images[int(row)][0][None]).choose("cls")[0] for row in rows])  # [20, 96]
        near = torch.cdist(tokens[:, 0].float(), expected)
        assert float(near.min(1).values.max()) < 0.02  # each is one of the drawn images
        drawn[seed] = rows.tolist()
    assert drawn[0] != drawn[1]
    assert len(sources.cache("train")) == len(data.train)  # the cache serves any number of shots


def test_few_shots_under_augmentation_pass_the_same_images_through_the_backbone(work: Path, tmp_path: Path) -> None:
    sources = TokenSources(
        named_backbone("digits-mim:0", work), named_data("digits"), tmp_path, augment=True, batch_size=16, shots=2
    )
    batches = [labels for _, labels in sources.train("cls")]
    assert [len(labels) for labels in batches] == [16]  # of 20 images


def test_few_shots_get_about_as_many_updates_and_say_so(small: NamedData, work: Path, tmp_path: Path) -> None:
    whole = make(small, work, tmp_path)
    few = make(small, work, tmp_path, shots=1)
    asked = fast_settings(3)
    assert whole.settings(asked) == asked
    assert whole.departures() == []
    assert "shots" not in whole.describe()
    changed = few.settings(asked)
    assert changed.epochs == 3 * (40 // 16)  # one update an epoch
    assert few.describe()["shots"] == 1
    assert few.departures() == ["1 image of each class, 10 of 40, with epochs to match"]


def test_shots_that_cannot_be_are_refused(small: NamedData, work: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shots: got 9, but class \d has"):
        make(small, work, tmp_path, shots=9)
    with pytest.raises(InputError, match="images of tiny-coco have any number of labels"):
        TokenSources(named_backbone("digits-mim:0", work), named_data("tiny-coco"), tmp_path, shots=2)
