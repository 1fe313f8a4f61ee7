"""Loading a model with its processor, by name, folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlattn.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def load(
    name_or_path: str | Path = "tiny",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model and its processor, ready for generation.

    Args:
        name_or_path: "tiny" (embedded, offline), a local folder, or a hub id, loaded exactly as transformers does.
        dtype: "auto" (as stored; fp32 for "tiny", whose weights are stored in bf16), a torch dtype or its name.
        device: where to put it; None leaves it on the CPU or to `device_map`.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None is transformers' default.
        kwargs: anything else for `from_pretrained` (revision, device_map, quantization_config, ...).

    Returns:
        (model, processor): the model in eval mode, the tokenizer padding on the left, as batched generation needs.

    Raises:
        InputError: no such folder and no such model within reach.
    """
    path = str(name_or_path)
    if path == "tiny":
        from vlattn.assets.paths import tiny_llava

        path = str(tiny_llava())
        dtype = torch.float32 if dtype == "auto" else dtype
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InputError(f"dtype: {dtype!r} is not a torch dtype; give float32, bfloat16, float16 or auto")
        dtype = getattr(torch, dtype)
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise InputError(f"model: the folder {path!r} holds no config.json; give one that save_pretrained wrote")
    shared = {k: kwargs[k] for k in ("revision", "token", "trust_remote_code", "cache_dir") if k in kwargs}
    try:
        processor = AutoProcessor.from_pretrained(path, **shared)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **kwargs)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model: {path!r} is neither a folder with a model nor a model that can be fetched ({reason}). "
            'Give "tiny", a local folder, or a hub id on a machine that is online or has it in its cache'
        ) from error
    if device is not None:
        cast(Any, model).to(device)  # in place; transformers' wrapper of `to` hides its arguments from type checkers
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor
