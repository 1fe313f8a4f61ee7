"""Image towers of open_clip: its own ViT, timm towers, and CLIP's ResNets, each with the transforms of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlattn.errors import InputError
from vlattn.probing.backbones.base import Backbone, FinalNorm
from vlattn.probing.backbones.blocks import BlockBackbone, flatten_map, read_block
from vlattn.probing.backbones.timm_backbone import TimmBackbone
from vlattn.probing.backbones.transforms import CLIP, ImageSettings, Transform
from vlattn.probing.tokens import Tokens


def _images(visual: Any) -> ImageSettings:
    config = getattr(visual, "preprocess_cfg", None) or {}
    size = config.get("size") or visual.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    mean, std = tuple(config.get("mean") or CLIP[0]), tuple(config.get("std") or CLIP[1])
    return ImageSettings((height, width), mean, std)


def _library_transform(visual: Any, images: ImageSettings, train: bool) -> Transform:
    """The transform that open_clip makes for this tower."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = dict(getattr(visual, "preprocess_cfg", None) or {})
    config |= {"size": images.size, "mean": images.mean, "std": images.std}
    return image_transform_v2(PreprocessCfg(**config), is_train=train)


class OpenClipBackbone(BlockBackbone):
    """open_clip's own ViT. As it ends: CLS projected, patches as `output_tokens=True` gives them, un-projected.

    `Tokens.choose("all")` takes the patches through the same norm and projection as CLS. Anywhere else than at the
    tower's own end (`layer` given, or another `final_norm`) CLS is a token like the patches, un-projected.
    Towers that pool by the mean of patches do not project CLS at all. In those with an attentional pooler (CoCa) CLS is
    what that pools, projected, and patches are those in front of it, which no projection takes to its width; the final
    norm is the pooler's, so that patches have none.
    """

    library = "open_clip"

    def __init__(
        self,
        visual: Any,
        *,
        name: str,
        images: ImageSettings,
        layer: int | None = None,
        final_norm: FinalNorm = "auto",
    ) -> None:
        self._attentional = getattr(visual, "attn_pool", None) is not None
        super().__init__(
            visual,
            blocks=visual.transformer.resblocks,
            norm=None if self._attentional else visual.ln_post,
            cls=1,
            name=name,
            images=images,
            layer=layer,
            final_norm=final_norm,
        )

    @property
    def _normed_by_library(self) -> bool:
        return not self._attentional and not self.module.final_ln_after_pool

    def _own_transform(self, train: bool) -> Transform:
        return _library_transform(self.module, self.images, train)

    def _call(self, pixels: torch.Tensor) -> Any:
        return self.module(pixels)

    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        rows, columns = self.module.patch_size
        return pixels.shape[2] // rows, pixels.shape[3] // columns

    def _read(self, pixels: torch.Tensor) -> Tokens:
        visual = self.module
        pools = self.whole and (self._attentional or visual.pool_type == "tok")
        hidden, pooled = read_block(self._blocks[self.layer], lambda: visual(pixels), stop=not pools)
        if not getattr(visual.transformer, "batch_first", True):
            hidden = hidden.transpose(0, 1)
        tokens = self._split(hidden, self._grid(pixels))
        if not pools:
            return tokens
        cls = pooled[0] if isinstance(pooled, tuple) else pooled
        return Tokens(tokens.patches, cls, tokens.grid, project=None if self._attentional else self._project)

    def _project(self, patches: torch.Tensor) -> torch.Tensor:
        visual = self.module
        if not self.final_norm:  # with final_ln_after_pool CLS is normed on its way, and patches are not yet
            patches = visual.ln_post(patches)
        return patches if visual.proj is None else patches @ visual.proj


class OpenClipTimmBackbone(TimmBackbone):
    """A timm trunk inside open_clip's tower; CLS projected where the tower takes CLS for the image, as in EVA-CLIP."""

    library = "open_clip"

    @property
    def _trunk(self) -> Any:
        return self.module.trunk

    @property
    def _projection(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if getattr(self._trunk, "global_pool", None) != "token":
            return None
        return self._head

    def _head(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the tower does to the token that it takes for the image; tokens [..., D]."""
        for step in (getattr(self._trunk, "fc_norm", None), getattr(self._trunk, "head", None), self.module.head):
            tokens = tokens if step is None else step(tokens)
        return tokens

    def _own_transform(self, train: bool) -> Transform:
        return _library_transform(self.module, self.images, train)


class OpenClipResNet(Backbone):
    """CLIP's ResNets: the cells of a stage's feature map; the attention pool behind the last one is not applied."""

    library = "open_clip"

    @property
    def _stages(self) -> list[nn.Module]:
        return [self.module.layer1, self.module.layer2, self.module.layer3, self.module.layer4]

    @property
    def depth(self) -> int:
        return len(self._stages)

    @property
    def _norm(self) -> None:
        return None

    @property
    def _normed_by_library(self) -> bool:
        return False

    def _own_transform(self, train: bool) -> Transform:
        return _library_transform(self.module, self.images, train)

    def _read(self, pixels: torch.Tensor) -> Tokens:
        features, _ = read_block(self._stages[self.layer], lambda: self.module(pixels))
        patches, grid = flatten_map(features)
        return Tokens(patches, grid=grid)


def open_clip_backbone(model: Any, **settings: Any) -> Backbone:
    """The backbone of an open_clip model, or of its visual tower; settings as those of its class."""
    visual = getattr(model, "visual", model)
    for part, kind in (("trunk", OpenClipTimmBackbone), ("transformer", OpenClipBackbone), ("layer4", OpenClipResNet)):
        if hasattr(visual, part):
            return kind(visual, images=_images(visual), **settings)
    raise InputError(
        f"what: {type(visual).__name__} is no visual tower of open_clip that is known; give a ViT, timm or ResNet one"
    )


def load_open_clip(what: str, *, pretrained: bool, image_size: int | None) -> nn.Module:
    """The visual tower of an open_clip model: NAME:TAG, hf-hub:REPO or local-dir:FOLDER."""
    import open_clip

    schema = what.startswith(("hf-hub:", "local-dir:"))
    name, _, tag = (what, "", "") if schema else what.partition(":")
    if not schema and name not in open_clip.list_models():
        raise InputError(f"what: open_clip has no model {name!r}; `open_clip.list_models()` names those it has")
    if pretrained and not schema and not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none, so give pretrained=False"
        raise InputError(f"what: name the weights of {name}, as open_clip/{name}:TAG; there are: {tags}")
    more: dict[str, Any] = {"load_weights": False} if schema and not pretrained else {}
    tag_or_none = tag if tag and pretrained else None
    return open_clip.create_model(name, pretrained=tag_or_none, force_image_size=image_size, **more).visual
