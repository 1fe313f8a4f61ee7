"""Merging pruned tokens by density peaks, the recycling step of SparseVLM (arXiv 2410.04417).

A cluster centre is dense itself and far from anything denser; every other token joins the nearest centre.
"""

from __future__ import annotations

import torch

from vlattn.kernels.reference import accumulation_dtype


def cluster_merge(
    tokens: torch.Tensor,
    count: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the tokens of each row into `count[b]` means.

    Args:
        tokens: [B, M, C].
        count: int64 [B], clusters of each row, at least 1 and no more than its tokens.
        valid: bool [B, M], False on filler of ragged rows; None for none.
        noise: densities get uniform noise in [0, noise), the same in every row, which decides between equal ones (the
            released code: 1e-6); with 0, equal densities are ordered by position.
        generator: on the CPU, where the noise comes from; None for torch's own.

    Returns:
        (merged [B, K, C], member int64 [B, M], centre int64 [B, K]) with K = max(count): the plain mean of each
        cluster in the tokens' dtype, the cluster each token went to, and the token each cluster grew from, clusters in
        order of their centre's rank. Filler has -1 and 0.
    """
    batch, size, width = tokens.shape
    dtype = accumulation_dtype(tokens.dtype)
    x = tokens.to(dtype)
    if valid is None:
        valid = torch.ones(batch, size, dtype=torch.bool, device=tokens.device)
    place = torch.arange(size, device=tokens.device)
    distance = _distances(x) / width**0.5  # [B, M, M]
    both = valid[:, :, None] & valid[:, None]

    nearest = distance.masked_fill(~both, torch.inf).sort(-1).values.square()  # itself first, at distance 0
    among = place < count[:, None]  # [B, M]
    density = nearest.masked_fill(~among[:, None], 0).sum(-1).div(count[:, None]).neg().exp()  # [B, M]
    if noise:
        density = density + noise * torch.rand(size, generator=generator, dtype=dtype).to(density.device)

    denser = (density[:, None] > density[..., None]) & both
    furthest = distance.masked_fill(~both, 0).amax((1, 2))
    isolation = distance.masked_fill(~denser, torch.inf).amin(-1)  # to the nearest denser token
    isolation = torch.where(denser.any(-1), isolation, furthest[:, None])

    rank = (density * isolation).masked_fill(~valid, -torch.inf)
    most = int(count.max())
    centre = rank.sort(dim=-1, descending=True, stable=True).indices[:, :most]  # [B, K]
    real = torch.arange(most, device=tokens.device) < count[:, None]
    to_centre = distance.gather(2, centre[:, None].expand(-1, size, -1)).masked_fill(~real[:, None], torch.inf)
    member = to_centre.argmin(-1)
    # A centre is its own, also where its double is a centre as well.
    own = (centre[:, None] == place[:, None]) & real[:, None]  # [B, M, K]
    member = torch.where(own.any(-1), own.int().argmax(-1), member)

    belongs = (member[..., None] == torch.arange(most, device=tokens.device)) & valid[..., None]  # [B, M, K]
    total = belongs.to(dtype).transpose(1, 2) @ x.masked_fill(~valid[..., None], 0)
    merged = total / belongs.sum(1).clamp(min=1)[..., None]
    return (
        merged.masked_fill(~real[..., None], 0).to(tokens.dtype),
        member.masked_fill(~valid, -1),
        centre.masked_fill(~real, -1),
    )


def _distances(x: torch.Tensor) -> torch.Tensor:
    """Euclidean distances between all rows [B, M, C] -> [B, M, M].

    The form |a|^2 + |b|^2 - 2ab is several times faster and loses small distances to cancellation, so it is only used
    where it can run in fp64 on fp32 rows, which leaves errors below those of fp32.
    """
    if x.dtype == torch.float64 or x.device.type == "mps":
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    wide = x.double()
    gram = wide @ wide.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    return (square[:, :, None] + square[:, None] - 2 * gram).clamp_(min=0).sqrt_().to(x.dtype)


def arrange(
    visual: torch.Tensor,
    kept: torch.Tensor,
    image: torch.Tensor,
    clusters: torch.Tensor,
    centre: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens that stay and clusters stand.

    Without `centre`, clusters follow behind the kept tokens of the last image; what does not fit into the places of its
    pruned tokens follows behind those of the image before, and so on. With `centre`, each cluster stands at that place.

    Args:
        visual, kept: bool [B, N], the tokens that competed and those of them that stay.
        image: int64 [B, N], which image each belongs to.
        clusters: int64 [B], no more than pruned tokens.
        centre: int64 [B, K], a pruned token's place for each cluster.

    Returns:
        (keep bool [B, N], source int64 [B, N]): which places go on, and what each holds: i < N what stood at place i,
        N + j cluster j.
    """
    size = visual.shape[1]
    keep, source = ~visual | kept, torch.arange(size, device=visual.device).repeat(visual.shape[0], 1)
    for b, count in enumerate(clusters.tolist()):
        if count == 0:
            continue
        new = torch.arange(size, size + count, device=visual.device)
        if centre is not None:
            keep[b, centre[b, :count]], source[b, centre[b, :count]] = True, new
            continue
        places = visual[b].nonzero().flatten()
        _, lengths = image[b, places].unique_consecutive(return_counts=True)
        runs, left = list(places.split(lengths.tolist())), count
        for run in reversed(runs):
            stay = run[kept[b, run]]
            more = min(left, len(run) - len(stay))
            left -= more
            contents = torch.cat([stay, new[left : left + more]])
            keep[b, run] = torch.arange(len(run), device=run.device) < len(contents)
            source[b, run[: len(contents)]] = contents
            if not left:
                break
    return keep, source
