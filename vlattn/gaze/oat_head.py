"""From what the decoder thinks to the next fixation: scores against the encoder's tokens, so any number of objects."""

from __future__ import annotations

import torch
from torch import nn

from vlattn.errors import InputError


class PointerHead(nn.Module):
    """Scores of objects, of the target token, which is the end, and of a padding class.

    Head k scores token i by <A_k E_i + a_k, B_k h + b_k> / sqrt(dim); a readout weighs the heads, and its bias is the
    score of padding. A single head has no readout, and padding scores 0.
    """

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(dim, dim) for _ in range(heads))
        self.queries = nn.ModuleList(nn.Linear(dim, dim) for _ in range(heads))
        self.readout = nn.Linear(heads, 1) if heads > 1 else None

    def read_keys(self, encoded: torch.Tensor) -> torch.Tensor:
        """Encoder tokens [B, P + 1, D] -> [B, heads, P + 1, D], which a whole path shares."""
        return torch.stack([key(encoded) for key in self.keys], 1)

    def forward(self, decoded: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[B, T, D] and what `read_keys` gave -> [B, T, P + 2]."""
        root = decoded.shape[-1] ** -0.5
        scores = [(query(decoded) * root) @ keys[:, index].transpose(1, 2) for index, query in enumerate(self.queries)]
        if self.readout is None:
            return torch.cat((scores[0], torch.zeros_like(scores[0][..., :1])), -1)
        bias = self.readout.bias
        mixed = sum(weight * score for weight, score in zip(self.readout.weight[0], scores, strict=True)) + bias
        return torch.cat((mixed, bias.expand(*mixed.shape[:-1], 1)), -1)


class LinearHead(nn.Module):
    """The reference's first version: classes by a linear map. It knows one number of objects, and its layout."""

    def __init__(self, dim: int, objects: int) -> None:
        super().__init__()
        self.objects, self.out = objects, nn.Linear(dim, objects + 2)

    def read_keys(self, encoded: torch.Tensor) -> torch.Tensor:
        if encoded.shape[1] != self.objects + 1:
            raise InputError(
                f"objects: got a scene of {encoded.shape[1] - 1} for a linear head of {self.objects}; give as many"
            )
        return encoded

    def forward(self, decoded: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, P + 2]."""
        out: torch.Tensor = self.out(decoded)
        return out
