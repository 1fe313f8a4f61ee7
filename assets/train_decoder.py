"""Stage two of the tiny LLaVA: projector and decoder on packed questions, with three aids that make it look.

Language-model loss alone learns the captions' form and answers yes to everything. What makes it see: an alignment loss
(each projected patch against the mean word embedding of its category), a presence loss (a throw-away linear head
reads, at the object's last word, whether the object is there), and larger weights on yes, no and object names.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vlattn.assets.language import other_turns, yes_no_turns
from vlattn.assets.scenes import NAMES, SIZE, Scene, draw_scene
from vlattn.assets.train_tower import PATCH, K, patch_labels, pixels
from vlattn.assets.training import Log, Optimiser, learning_rate_factor, load_checkpoint, save_checkpoint, step_rng

BATCH = 32
IMAGE_TOKENS = (SIZE // PATCH) ** 2
LENGTH = 288
"""Tokens in a packed row: the image prefix, then as many independent turns as fit."""

DECODER: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def new_model(tower: Any, tokenizer: Any) -> LlavaForConditionalGeneration:
    """An untrained LLaVA around the trained tower."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **DECODER,
    )
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


def kept_patches(rng: np.random.Generator, labels: torch.Tensor) -> torch.Tensor:
    """Which patches the decoder sees, bool [B, patches]: all of them in half of the rows, fewer in the others.

    So that it can answer from any number of visual tokens, of objects and of background in any proportion: a decoder
    that has only ever seen mostly background takes a short list of object patches for more objects than there are.
    """
    batch, patches = labels.shape
    keep = torch.from_numpy(rng.integers(patches // 12, patches, batch))
    keep[torch.from_numpy(rng.random(batch) < 0.5)] = patches
    bias = torch.from_numpy(rng.random((batch, 1)) * 1.5)
    score = torch.from_numpy(rng.random((batch, patches))) + bias * (labels < K)
    rank = score.argsort(1, descending=True).argsort(1)
    return rank < keep[:, None]


class Packer:
    """Turns scenes into packed rows whose turns see the image and themselves, never each other."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encode = lru_cache(20_000)(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))
        self.tail = self.encode(" ASSISTANT:")
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.yes, self.no, self.after_object = self.encode("yes")[0], self.encode("no")[0], self.encode("in")[0]
        self.prefix = [
            tokenizer.bos_token_id,
            *self.encode("USER:"),
            *[tokenizer.convert_tokens_to_ids("<image>")] * IMAGE_TOKENS,
        ]

    def row(
        self, rng: np.random.Generator, scene: Scene
    ) -> tuple[list[int], list[int], list[int], list[int], list[tuple]]:
        """ids, labels (-100 outside answers), segment (0 prefix, 1.. turns), position ids, and presence probes."""
        ids, segment = list(self.prefix), [0] * len(self.prefix)
        labels, position = [-100] * len(ids), list(range(len(ids)))
        probes: list[tuple] = []
        turns: list[tuple] = [*other_turns(rng, scene), *yes_no_turns(rng, scene, 12)]
        for number, (question, answer, *category) in enumerate(turns, 1):
            q, a = [*self.encode(question), *self.tail], [*self.encode(answer), self.eos]
            if len(ids) + len(q) + len(a) > LENGTH:
                continue
            if category:
                probes.append((len(ids) + q.index(self.after_object) - 1, float(answer == "yes")))
            ids += q + a
            labels += [-100] * len(q) + a
            segment += [number] * (len(q) + len(a))
            position += range(len(self.prefix), len(self.prefix) + len(q) + len(a))
        short = LENGTH - len(ids)
        return ids + [self.pad] * short, labels + [-100] * short, segment + [-1] * short, position + [0] * short, probes

    def batch(
        self, rng: np.random.Generator, scenes: list[Scene], kept: torch.Tensor, chained: bool
    ) -> dict[str, torch.Tensor]:
        """Tensors of a batch; `chained` lets each turn see the earlier ones, as in a real dialogue.

        Patches that are not `kept` are masked, and positions count only what is kept.
        """
        rows = [self.row(rng, scene) for scene in scenes]
        ids, labels, segment, position = (torch.tensor([r[i] for r in rows]) for i in range(4))
        probes = torch.tensor([(b, t, y) for b, r in enumerate(rows) for t, y in r[4]])
        if chained:
            position = torch.arange(LENGTH).expand_as(ids)
            segment = segment.clamp(max=1)
        dropped = torch.zeros(ids.shape, dtype=torch.bool)
        dropped[:, self.prefix.index(self.prefix[-1]) : len(self.prefix)] = ~kept
        position = (position - dropped.cumsum(1)).clamp(min=0)
        same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        allowed = same & ~dropped[:, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        return {"ids": ids, "labels": labels, "position": position, "allowed": allowed[:, None], "probes": probes}


def train_decoder(
    work: Path,
    tower: Any,
    tokenizer: PreTrainedTokenizerFast,
    sprites: list,
    steps: int,
    seed: int,
    device: str,
    compiled: bool,
    log: Log,
) -> LlavaForConditionalGeneration:
    """Train (or go on training) projector and decoder for `steps` steps of 32 fresh scenes; the tower stays frozen."""
    torch.manual_seed(seed + 1)
    model: Any = new_model(tower, tokenizer)
    model.to(device)
    vision, projector, language = (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
    )
    vision.requires_grad_(False)
    width = DECODER["hidden_size"]
    aids = nn.ModuleDict({"presence": nn.Linear(width, 1)}).to(device)
    aids.background = nn.Parameter(torch.randn(width, device=device) * 0.02)
    aids.scale = nn.Parameter(torch.tensor(2.0, device=device))
    trained = nn.ModuleDict({"projector": projector, "language": language, "aids": aids})
    optimiser = Optimiser(trained, lr=2e-3)
    path = work / "decoder.pt"
    first = load_checkpoint(path, trained, optimiser)
    packer = Packer(tokenizer)
    names = [torch.tensor(packer.encode(name), device=device) for name in NAMES]
    objects = torch.cat(names).unique()
    start = packer.prefix.index(packer.prefix[-1])

    def forward(features: torch.Tensor, ids: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> tuple:
        with torch.autocast(device, torch.bfloat16):
            visual = projector(features)
            words = language.embed_tokens(ids)
            merged = torch.cat([words[:, :start], visual.to(words.dtype), words[:, start + IMAGE_TOKENS :]], 1)
            out = language(inputs_embeds=merged, attention_mask=mask, position_ids=position, use_cache=False)
            return out.last_hidden_state, visual

    run = torch.compile(forward) if compiled else forward
    see = torch.compile(vision) if compiled else vision
    for step in range(first, steps):
        rng = step_rng(seed, 2, step)
        scenes = [draw_scene(rng, sprites) for _ in range(BATCH)]
        patches = patch_labels(scenes)
        packed = packer.batch(rng, scenes, kept_patches(rng, patches), chained=step % 8 == 7)
        data = {k: v.to(device) for k, v in packed.items()}
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            features = see(pixels(scenes).to(device), output_hidden_states=True).hidden_states[-2][:, 1:]
        mask = torch.zeros(data["allowed"].shape, dtype=torch.bfloat16, device=device).masked_fill(
            ~data["allowed"], -1e9
        )
        hidden, visual = run(features, data["ids"], data["position"], mask)

        table = language.embed_tokens.weight
        row, at = (data["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        target = data["labels"][row, at + 1]
        logits = hidden[row, at].float() @ table.T
        yes_no = (target == packer.yes) | (target == packer.no)
        weight = torch.where(yes_no, 4.0, torch.where(torch.isin(target, objects), 3.0, 1.0))
        loss_lm = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()

        words = torch.stack([table[n].mean(0) for n in names] + [aids.background])
        cosine = F.normalize(visual.float(), dim=-1) @ F.normalize(words, dim=-1).T * aids.scale.exp()
        loss_align = F.cross_entropy(cosine.transpose(1, 2), patches.to(device))

        b, t, there = data["probes"].T
        seen = aids["presence"](hidden[b.long(), t.long()].float()).squeeze(-1)
        loss_presence = F.binary_cross_entropy_with_logits(seen, there)
        (loss_lm + 0.5 * loss_align + loss_presence).backward()
        optimiser.step(learning_rate_factor(step, steps))
        if step % 50 == 49 or step == steps - 1:
            says_yes = logits[:, packer.yes] > logits[:, packer.no]
            right = (says_yes == (target == packer.yes))[yes_no].float().mean().item()
            log(stage="decoder", step=step + 1, lm=loss_lm.item(), align=loss_align.item(), yes_no=right)
        if step % 200 == 199 or step == steps - 1:
            save_checkpoint(path, step + 1, trained, optimiser)
    return model.cpu()
