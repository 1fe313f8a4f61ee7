"""Train the tiny LLaVA and write it as a folder that transformers loads.

    python -m vlattn.assets.build_tiny_llava --artwork node_modules --work build/tiny_llava --out assets/tiny_llava

Hours on a CPU, minutes on a GPU (`--device cuda`); stop it at any time and run it again to go on from its checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from transformers import CLIPImageProcessor, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from vlattn.assets.language import CHAT_TEMPLATE, build_tokenizer
from vlattn.assets.scenes import SEEN_FAMILIES, SIZE, load_sprites
from vlattn.assets.train_decoder import train_decoder
from vlattn.assets.train_tower import MEAN, PATCH, STD, train_tower
from vlattn.assets.training import Log


def write(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Save weights (bf16 safetensors), configs, tokenizer, image processor and chat template to `out`."""
    tokenizer = build_tokenizer()
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    cast(Any, model).to(torch.bfloat16)
    model.save_pretrained(out)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--artwork", type=Path, required=True, help="node_modules folder that holds the artwork packages"
    )
    parser.add_argument("--work", type=Path, default=Path("build/tiny_llava"), help="checkpoints are kept here")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny_llava"))
    parser.add_argument("--tower-steps", type=int, default=2400)
    parser.add_argument("--decoder-steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile both stages: 15% faster on a CPU")
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "training_log.jsonl")
    sprites = load_sprites(args.artwork, SEEN_FAMILIES)
    shared = {"seed": args.seed, "device": args.device, "compiled": args.compile, "log": log}
    tower = train_tower(args.work, sprites, args.tower_steps, **shared)
    model = train_decoder(args.work, tower, build_tokenizer(), sprites, args.decoder_steps, **shared)
    write(model, args.out)


if __name__ == "__main__":
    main()
