"""FlowCut: prune visual tokens progressively inside the vision encoder, by the information that flows through CLS.

"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlattn.errors import InputError
from vlattn.interventions.decoder_pruner import top_visual
from vlattn.interventions.flowcut_decoder import decoder_flow_score
from vlattn.interventions.flowcut_encoder import EncoderFlow
from vlattn.interventions.flowcut_qwen import QwenFlow
from vlattn.interventions.placement import Reduced
from vlattn.interventions.tower_pruner import Reducer, TowerPruner
from vlattn.interventions.visual_pruner import VisualPruner
from vlattn.models.adapter import Adapter
from vlattn.models.qwen2_vl import Qwen2VLAdapter
from vlattn.models.qwen3_vl import Qwen3VLAdapter
from vlattn.models.video_llava import VideoLlavaAdapter
from vlattn.runtime.decoder import Cut, Request
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.layer_state import LayerState
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

Semantic = Literal["auto", "softmax", "cosine", "none"]
Count = Literal["batch_max", "per_image"]


@dataclass(frozen=True)
class FlowCut(VisualPruner, TowerPruner):
    """FlowCut: patches are scored layer by layer in the vision encoder and dropped every second layer.

    "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536. In
    each encoder layer up to the one before the feature layer, patches are scored by (CLS attention + value similarity
    to CLS) x L1 norm of the value, scores are averaged over layers, and every second layer drops patches; the last
    pruning lands on the target. Scoring computes the CLS row alone, so layers stay on sdpa or flash attention.

    What happens on each family:

    - LLaVA: `keep` patches per image. Video-LLaVA (ours): `keep` per image or frame.
    - LLaVA-NeXT, and LLaVA-OneVision (ours): keep // 2 patches of every tile, then `keep` tokens per image after
      decoder layer `decoder_layer`, by the same kind of score seen from the last prompt token.
    - Qwen2-VL and Qwen2.5-VL: 8 x keep patches of each image, by the mean query instead of CLS and without the value
      similarity, which the merger makes 2 x keep tokens; then `keep` in the decoder, as above.
    - Towers without CLS (SigLIP): scored as Qwen2-VL's (ours).

    keep: visual tokens per image at the end (the paper: 192, 128 or 64 of 576; 640, 320, 160 of LLaVA-NeXT's 2880).
    positions: see `VisualPruner`.
    semantic: how value similarity is measured. `softmax` is the released code; the paper's text is said to use a
        cosine, which `cosine` offers; `none` leaves it out (attention x size). `auto` is `softmax` where there is a CLS
        and `none` where there is not, as the released code does.
    count: `batch_max` drops the batch's largest count from every image, as the released code does, so that an image's
        kept set can depend on its batch; `per_image` gives each image the set it has when it is alone (ragged rows are
        masked inside the tower; needs eager or sdpa attention there). Qwen-VL always counts per image.
    decoder_layer: the decoder layer after which the second stage cuts, where there is one.
    group_aligned: on Qwen-VL, keep whole 2 x 2 cells (scores summed over a cell), each at its own place, instead of
        single patches that the merger then mixes, four by four in the order of the tower, and that take the first
        places of the image, as the released code does. Qwen2.5-VL's tower has patches in the order of its windows, and
        `trace.kept_by_layer` counts them in the order of the tower.
    """

    semantic: Semantic = "auto"
    count: Count = "batch_max"
    decoder_layer: int = 1
    group_aligned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.semantic not in ("auto", "softmax", "cosine", "none"):
            raise InputError(f"semantic: got {self.semantic!r}; give 'auto', 'softmax', 'cosine' or 'none'")
        if self.count not in ("batch_max", "per_image"):
            raise InputError(f"count: got {self.count!r}; give 'batch_max' or 'per_image'")
        if isinstance(self.decoder_layer, bool) or not isinstance(self.decoder_layer, int) or self.decoder_layer < 0:
            raise InputError(f"decoder_layer: got {self.decoder_layer!r}; give the index of a decoder layer, 0 or more")
        if not isinstance(self.group_aligned, bool):
            raise InputError(f"group_aligned: got {self.group_aligned!r}; give True or False")

    @classmethod
    def refuses(cls, family: type[Adapter]) -> str | None:
        if issubclass(family, Qwen3VLAdapter):
            return "its decoder also gets features from inside the tower, of patches that would be gone"
        return None if issubclass(family, Qwen2VLAdapter) else super().refuses(family)

    @classmethod
    def ranks_on(cls, family: type[Adapter]) -> bool:
        return issubclass(family, Qwen2VLAdapter) or cls._two_stages(family)

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        adapter = session.adapter
        if isinstance(adapter, Qwen2VLAdapter):
            QwenFlow(self.keep, self.semantic, self.positions, self.group_aligned).attach(session, hooks, trace)
        else:
            super()._attach(session, hooks, trace)
        if self.ranks_on(type(adapter)):
            positions = session.positions
            session.cuts.after(Request(self.decoder_layer, self._second_stage, positions, projections="qkv"), hooks)

    @staticmethod
    def _two_stages(family: type[Adapter]) -> bool:
        return family.many_tiles and not issubclass(family, VideoLlavaAdapter)

    def _target(self, adapter: Adapter) -> int:
        """Patches to end with in each tile; CLS counts inside the budget where the model hands it over."""
        if not self._two_stages(type(adapter)):
            self._check_keep(adapter, tiles=True)
            return self.keep - int(adapter.cls_in_features)
        target = self.keep // 2 - int(adapter.cls_in_features)
        if target < 1:
            raise InputError(
                f"keep: got {self.keep}; half of it is kept of every tile, so give at least "
                f"{2 + 2 * int(adapter.cls_in_features)}"
            )
        return target

    def _reducer(self, session: Session, hooks: HookSet, trace: Trace) -> Reducer | None:
        adapter = session.adapter
        target, last, lead = self._target(adapter), adapter.feature_layer - 1, int(adapter.has_cls)
        if last < 0:
            raise InputError(
                "FlowCut: image features come from the first vision layer, so there is none before it to prune in; "
                "set model.config.vision_feature_layer to a later layer"
            )
        implementation = adapter.tower.config._attn_implementation or "eager"
        if self.count == "per_image" and implementation not in ("eager", "sdpa"):
            raise InputError(
                f"count: 'per_image' masks keys inside the tower, which {implementation} cannot; "
                "load the model with attn_implementation='sdpa' or use count='batch_max'"
            )
        if target >= adapter.patches:
            return None
        semantic = ("softmax" if lead else "none") if self.semantic == "auto" else self.semantic
        per_image = self.count == "per_image"
        flows = [EncoderFlow(e, last, lead, target, semantic, per_image, trace) for e in adapter.encoders]
        for flow in flows:
            flow.attach(hooks)

        def reduce(features: torch.Tensor) -> Reduced:
            ran = next((flow for flow in flows if flow.flow is not None), None)
            if ran is None:
                raise InputError(
                    "model: its projector ran without its vision tower, so nothing was pruned in between; "
                    "give pixel_values, or leave the context"
                )
            ids = ran.take().ids
            if features.shape[1] > ids.shape[1]:  # CLS is among the features
                ids = torch.cat([torch.full_like(ids[:, :1], -1), ids], 1)
            return Reduced(features, ids)

        return reduce

    def _second_stage(self, state: LayerState) -> Cut | None:
        """After a decoder layer: `keep` visual tokens of each image, as the last prompt token sees them."""
        last = torch.full_like(state.slot[:, :1], state.last)
        value = state.value
        score = decoder_flow_score(state.query(last), state.key, value[:, :, -1:], value, state.visual, state.scaling)
        keep = torch.zeros_like(state.visual)
        counts = state.image[state.visual].bincount()
        budget = torch.full_like(state.slot[:, 0], self.keep)
        for local in range(self._most_images(state)):
            of_image = state.visual & (self._local_image(state) == local)
            keep |= top_visual(score, of_image, budget)
        return None if bool((counts <= self.keep).all()) else Cut(keep | ~state.visual)

    @staticmethod
    def _local_image(state: LayerState) -> torch.Tensor:
        """Index of each visual token's image within its prompt [B, n]; -1 for text."""
        first = state.image.masked_fill(~state.visual, torch.iinfo(state.image.dtype).max).min(1, keepdim=True).values
        return torch.where(state.visual, state.image - first, -1)

    @classmethod
    def _most_images(cls, state: LayerState) -> int:
        return int(cls._local_image(state).max()) + 1
