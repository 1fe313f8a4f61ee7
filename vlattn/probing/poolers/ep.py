"""EP, efficient probing: learnable queries look at raw tokens, each gathers its own slice of the projected ones.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from vlattn import ops
from vlattn.checks import require_choice, require_divisor
from vlattn.errors import InputError
from vlattn.probing.poolers.base import Pooler, attention_maps, on_kernel
from vlattn.probing.poolers.ep_frozen import frozen_ep

Form = Literal["auto", "direct", "reassociated"]


class EP(Pooler):
    """M learnable queries, raw tokens as keys, one value projection cut into M slices, outputs joined.

    Query j attends with a_j = softmax(D^(-1/2) q_j X^T) and gathers y_j = a_j V_j, where V = X W^T [N, D / d] and V_j
    is the j-th of M equal slices of its channels; the feature [D / d] is y_1, ..., y_M in a row. There is no other
    parameter: no key or output projection, no norm, no bias, no more heads than one.

    queries: M; has to divide D / d.
    d: the feature is D / d wide.
    form: `direct` projects every token, as released: N D^2 / d multiply-accumulates for the values. `reassociated` sums
        the tokens first and projects the M sums, y_j = W_j (a_j X), the same numbers for D^2 / d; `auto` takes this
        where it is cheaper, M < D / d.
    """

    def __init__(self, dim: int, *, queries: int = 32, d: int = 1, form: Form = "auto") -> None:
        super().__init__(dim)
        require_divisor("d", d, "dim", dim)
        self.width = dim // d
        require_divisor("queries", queries, "dim / d", self.width)
        require_choice("form", form, ("auto", "direct", "reassociated"))
        self.queries, self.d = queries, d
        self.direct = form == "direct" or (form == "auto" and queries >= self.width)
        self.query = nn.Parameter(torch.empty(queries, dim).normal_(std=0.02))
        self.value = nn.Linear(dim, self.width, bias=False)

    def forward(self, tokens: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """Feature [B, D / d].

        Args:
            tokens: [B, N, D].
            query: [B, M, D], queries of each image in place of the learned ones, such as those made from its CLS token.
        """
        self.check(tokens)
        query = self._query(tokens, query)
        if self.direct:
            values = self.value(tokens).unflatten(-1, (self.queries, -1))  # [B, N, M, D / dM]
            maps = attention_maps(query, tokens, self.dim**-0.5).to(values.dtype)
            return torch.einsum("bmn,bnmc->bmc", maps, values).flatten(1)
        slices = self.value.weight.unflatten(0, (self.queries, -1))  # [M, D / dM, D]
        tokens, query, slices = _as_autocast(tokens, query, slices)
        if on_kernel(tokens):
            sums = ops.pooled_probe(query, tokens, scale=self.dim**-0.5)  # [B, M, D]
        elif query.ndim == 2 and not tokens.requires_grad:
            return frozen_ep(tokens, query, slices, self.dim**-0.5)
        else:
            sums = attention_maps(query, tokens, self.dim**-0.5).to(tokens.dtype) @ tokens
        return torch.einsum("bmd,mcd->bmc", sums, slices).flatten(1)

    def attention(self, tokens: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """One map per query, [B, M, N]."""
        self.check(tokens)
        return attention_maps(self._query(tokens, query), tokens, self.dim**-0.5)

    def macs(self, tokens: int) -> int:
        """Of the form in use."""
        if self.direct:
            return tokens * self.dim * self.width + self.queries * tokens * self.dim + tokens * self.width
        return 2 * self.queries * tokens * self.dim + self.dim * self.width

    def _query(self, tokens: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        if query is None:
            return self.query
        wanted = (len(tokens), self.queries, self.dim)
        if query.shape != wanted:
            raise InputError(f"query: got shape {list(query.shape)}; give {list(wanted)}, queries of each image")
        return query


def _as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one device in the dtype that autocast gives to products there; as they are outside autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
