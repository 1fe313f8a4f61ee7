"""VCD: contrast the logits with those of a noised image, in which mostly language prior and bias are left.

"Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding", arXiv
2311.16922.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from vlattn.checks import require_count, require_number
from vlattn.errors import InputError
from vlattn.interventions.base import Intervention
from vlattn.interventions.contrast import contrast
from vlattn.runtime.hooks import HookSet
from vlattn.runtime.second_prompt import PIXELS, with_image
from vlattn.runtime.second_stream import SecondStream
from vlattn.runtime.session import Session
from vlattn.runtime.trace import Trace

STEPS = 1000


def noise_schedule() -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's diffusion schedule of 1000 steps: (b_t, alpha bar_t), fp64 [1000] each.

    b rises along a sigmoid from about 1e-5 to 5e-3; alpha bar is the running product of 1 - b, so that an image after
    step t keeps sqrt(alpha bar_t) of its amplitude beside noise of deviation sqrt(1 - alpha bar_t).
    """
    b = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return b, (1 - b).cumprod(0)


def diffuse(pixels: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
    """sqrt(alpha bar_t) x + sqrt(1 - alpha bar_t) eps for t = `step`, 0-based: step t has seen t + 1 additions.

    pixels, noise: x and eps, of one shape; computed in fp32 at least and given back in the dtype of `pixels`.
    """
    kept = noise_schedule()[1][step].item()
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    return (kept**0.5 * pixels.to(dtype) + (1 - kept) ** 0.5 * noise.to(pixels.device, dtype)).to(pixels.dtype)


def noised(arguments: dict[str, Any], step: int, seed: int) -> dict[str, Any]:
    """The arguments with every image (tile, frame) in them diffused; tiles of zeros are padding and stay.

    The draw depends on the seed and on the pixels: an image gets the same noise in any batch, for every beam and on
    every device, different images get different noise, and nobody else's random numbers are touched.
    """
    found = dict(arguments)
    for name in PIXELS:
        pixels = arguments.get(name)
        if pixels is None:
            continue
        new = torch.empty_like(pixels)
        for image, place in zip(_images(pixels, name, arguments), _images(new, name, arguments), strict=True):
            place.copy_(diffuse(image, _noise(image, seed), step) if bool(image.any()) else image)
        found[name] = new
    return found


def _images(pixels: torch.Tensor, name: str, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Views of single images: [C, H, W], or [patches, C * ...] where images are rows of patches."""
    if pixels.ndim > 2:
        return pixels.view(-1, *pixels.shape[-3:]).unbind()
    grids = arguments["video_grid_thw" if "video" in name else "image_grid_thw"]
    return pixels.split(torch.as_tensor(grids).prod(-1).tolist())


def _noise(image: torch.Tensor, seed: int) -> torch.Tensor:
    own = image.detach().float().cpu().contiguous()
    generator = torch.Generator().manual_seed(zlib.crc32(own.numpy().tobytes(), seed))
    return torch.randn(own.shape, generator=generator)


@dataclass(frozen=True)
class VCD(Intervention):
    """Baseline: subtract the logits that the model has for a noised image, among plausible tokens.

    "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding", arXiv
    2311.16922. l is the model's logits, l' those of the same prompt with noise on the preprocessed pixels, generating
    the same tokens with a cache of its own: (1 + alpha) l - alpha l', where l >= max l + log beta. Defaults are those
    of the released scripts for LLaVA; their POPE script has beta = 0.2. The paper samples; greedy search and beams take
    the same logits. One draw of noise serves the whole answer; tiles, frames and Qwen-VL's two copies of an image in
    time each have noise of their own.

    Methods that prune or edit act on the model's own stream: the noised image is seen whole.

    alpha: weight of the contrast; 0 leaves the model as it is, the mask included.
    beta: a token needs at least this share of the largest probability, 0 to 1; 0 keeps all tokens.
    noise_step: how far along the diffusion schedule the image is, 0 to 999; at 500 it keeps 86% of its amplitude.
    seed: of the noise.
    """

    place = "decoder"

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, 0)
        require_number("beta", self.beta, 0, 1)
        require_count("noise_step", self.noise_step, 0)
        require_count("seed", self.seed, 0)
        if self.noise_step >= STEPS:
            raise InputError(f"noise_step: got {self.noise_step}; the schedule has steps 0 to {STEPS - 1}")
        if self.seed >= 2**31:
            raise InputError(f"seed: got {self.seed}; give an integer from 0 to {2**31 - 1}")

    def _attach(self, session: Session, hooks: HookSet, trace: Trace) -> None:
        if self.alpha == 0:
            return

        def make(call: dict[str, Any], session: Session) -> dict[str, Any]:
            return with_image(call, session, lambda arguments: noised(arguments, self.noise_step, self.seed))

        def combine(main: torch.Tensor, second: torch.Tensor, step: int) -> torch.Tensor:
            return contrast(main, second, 1 + self.alpha, -self.alpha, self.beta)

        SecondStream(session, make, combine).attach(hooks)
