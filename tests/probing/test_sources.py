"""Sources of tokens: kept once, told apart by backbone, or live under augmentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vlattn.errors import InputError
from vlattn.probing.data.named import NamedData, named_data
from vlattn.probing.named_backbone import named_backbone
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
