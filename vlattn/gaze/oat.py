"""Where do people look next, object by object, until they find what they search for?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from vlattn.gaze.oat_appearance import Appearance, CropCNN, FeatureLinear
from vlattn.gaze.oat_batch import OATBatch
from vlattn.gaze.oat_config import OATConfig
from vlattn.gaze.oat_head import LinearHead, PointerHead
from vlattn.gaze.oat_layers import DecoderLayer, EncoderLayer, LayerCache, time_encoding
from vlattn.gaze.positions import NOWHERE, PositionTable


@dataclass(frozen=True)
class Memory:
    """What all paths of a trial share, for B trials of up to P objects.

    tokens: [B, P + 3, D], the decoder's input for each id. layers: keys and values [B, h, P + 1, d] of the encoder for
    each decoder layer. keys: of the head. visible: bool [B, 1, 1, P + 1], None where everything is.
    """

    tokens: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    keys: torch.Tensor
    visible: torch.Tensor | None

    @property
    def objects(self) -> int:
        return self.tokens.shape[1] - 3

    def select(self, trials: torch.Tensor) -> Memory:
        """These trials [B'], in this order; one may come several times."""
        layers = tuple((keys[trials], values[trials]) for keys, values in self.layers)
        visible = None if self.visible is None else self.visible[trials]
        return replace(self, tokens=self.tokens[trials], layers=layers, keys=self.keys[trials], visible=visible)


class OAT(nn.Module):
    """The Object-Level Attention Transformer of "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
    arXiv 2407.13335.

    Objects and the target are the encoder's tokens, fixations the decoder's. What comes next is a pointer to one of the
    encoder's tokens, and pointing to the target token is the end: nothing depends on the number of objects.

    Batch first: [B, T, ...]. Each look is encoded once, for encoder and decoder.
    """

    def __init__(self, config: OATConfig | None = None) -> None:
        """config: None is the published model."""
        super().__init__()
        config = self.config = config or OATConfig()
        half = config.dim // 2
        self.appearance: Appearance
        if config.appearance == "cnn":
            self.appearance = CropCNN(half, config.crop, config.levels, config.scaling)
        else:
            assert config.features is not None
            self.appearance = FeatureLinear(config.features, half)
        self.positions = PositionTable(
            config.positions, half, config.rows, config.sigma, config.scale,
            steps=config.table_steps, seed=config.table_seed,
        )  # fmt: skip
        sizes = (config.dim, config.heads, config.ffn, config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(config.decoder_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.head: PointerHead | LinearHead
        if config.head == "pointer":
            self.head = PointerHead(config.dim, config.pointer_heads)
        else:
            assert config.objects is not None
            self.head = LinearHead(config.dim, config.objects)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, batch: OATBatch) -> torch.Tensor:
        """Logits [B, T + 1, P + 2] of each fixation of the batch's paths and of the end behind them, given what came
        before; the last class is padding. Objects that a scene does not have get -inf."""
        return self.logits(self.encode(batch), batch.inputs)

    def encode(self, batch: OATBatch) -> Memory:
        """Everything that does not depend on a path. The batch lies on the model's device."""
        rows = torch.arange(batch.size, device=batch.index.device)
        seen = self.appearance(batch.looks)[batch.index]  # [B, P, D / 2]
        no_object = self.appearance(self.appearance.start()).expand(batch.size, 3, -1)
        placed, target_placed, revisited, begun = self._positions(batch)
        encoded = torch.cat(
            (torch.cat((seen, seen[rows, batch.target][:, None]), 1), torch.cat((placed, target_placed), 1)), -1
        )  # [B, P + 1, D]
        tokens = torch.cat(
            (torch.cat((seen, no_object), 1), torch.cat((revisited, begun.expand(-1, 3, -1)), 1)), -1
        )  # [B, P + 3, D]
        visible = None if batch.present is None else F.pad(batch.present, (0, 1), value=True)[:, None, None]
        for layer in self.encoder:
            encoded = layer(encoded, visible)
        layers = tuple(layer.multihead_attn.keys_values(encoded) for layer in self.decoder)  # type: ignore[union-attr,operator]
        return Memory(tokens, layers, self.head.read_keys(encoded), visible)

    def logits(self, memory: Memory, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, P + 2] after each id of whole paths [B, T], which start with the beginning's id.

        Padding behind a path needs no mask: what is causal does not see it.
        """
        x = memory.tokens.gather(1, ids[..., None].expand(-1, -1, memory.tokens.shape[-1]))
        x = self.dropout(x + time_encoding(ids.shape[1], x.shape[-1], x.device))
        for layer, shared in zip(self.decoder, memory.layers, strict=True):
            x = layer(x, shared, memory.visible)
        return self._point(x, memory)

    def step(self, memory: Memory, caches: list[LayerCache], ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, N, P + 2] after the newest id of N paths a trial [B, N]; `caches` hold what came before."""
        x = memory.tokens.gather(1, ids[..., None].expand(-1, -1, memory.tokens.shape[-1]))
        time = caches[0].length
        x = self.dropout(x + time_encoding(time + 1, x.shape[-1], x.device)[time])
        for layer, shared, past in zip(self.decoder, memory.layers, caches, strict=True):
            x = layer.step(x, shared, memory.visible, past)  # type: ignore[union-attr,operator]
        return self._point(x, memory)

    def caches(self, capacity: int) -> list[LayerCache]:
        """Empty ones, for `step`."""
        return [LayerCache(capacity) for _ in self.decoder]

    def token_losses(self, batch: OATBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropies [B, T + 1] of the batch's paths and ends, and which of them count, bool [B, T + 1].

        Unless `config.parity`, choices that generation does not have are none in training either: padding, and an end
        before the first fixation.
        """
        logits, wanted = self(batch), batch.wanted
        if not self.config.parity:
            parts = (exclude(logits[:, :1], batch.objects, True), exclude(logits[:, 1:], batch.objects, False))
            logits = torch.cat(parts, 1)
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=batch.pad, reduction="none")
        return losses.view_as(wanted), wanted != batch.pad

    def loss(self, batch: OATBatch) -> torch.Tensor:
        """Mean cross-entropy over fixations and ends."""
        losses, counted = self.token_losses(batch)
        return losses.sum() / counted.sum()

    def _point(self, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        scores = self.head(x, memory.keys)
        if memory.visible is None:
            return scores
        return scores.masked_fill(~F.pad(memory.visible[:, 0], (0, 1), value=True), -torch.inf)

    def _positions(self, batch: OATBatch) -> tuple[torch.Tensor, ...]:
        """Encodings of objects [B, P, D / 2], of the target token [B, 1, .], of objects as fixated ones, which say
        whether they are the target [B, P, .], and of the beginning [B, 1, .]."""
        target = batch.target.cpu()
        rows = torch.arange(batch.size)
        is_target = torch.zeros(batch.size, batch.objects, dtype=torch.float64)
        is_target[rows, target] = 1
        where = batch.cells[rows, target][:, None]
        if not self.config.reveal_target_position:
            where = torch.full_like(where, NOWHERE)
        cells = (
            F.pad(batch.cells, (0, 1)),
            F.pad(where, (0, 1), value=1.0),
            torch.cat((batch.cells, is_target[..., None]), -1),
            F.pad(batch.start[:, None], (0, 1)),
        )
        return self.positions(torch.cat(cells, 1)).split([part.shape[1] for part in cells], 1)


def exclude(logits: torch.Tensor, objects: int, first: bool) -> torch.Tensor:
    """Logits [..., P + 2] without padding, and without the end where these are for the first fixation."""
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[objects + 1] = True
    banned[objects] = first
    return logits.masked_fill(banned, -torch.inf)


def make_oat(config: OATConfig | None = None, seed: int = 0) -> OAT:
    """A new model whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OAT(config)
