"""Tiny models of random weights that read an image, and prompts with one image in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.families import SMALL
from tests.models import sharpen

IMAGE, BEGIN = 90, 91  #: the token that stands for a piece of the image, and the one before the first
_TEXT = {**SMALL, "hidden_size": 32}
_SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llava() -> Any:
    sight = transformers.CLIPVisionConfig(**_SIGHT, image_size=16, patch_size=4)
    config = transformers.LlavaConfig(
        vision_config=sight, text_config=transformers.LlamaConfig(**_TEXT), image_token_index=IMAGE
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={
                **_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            vision_config={
                "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
            },
            image_token_id=IMAGE, vision_start_token_id=BEGIN, vision_end_token_id=92, video_token_id=93,
        )
    )  # fmt: skip


def _gemma3() -> Any:
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": 16}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**{**_TEXT, **layers}, query_pre_attn_scalar=8),
            vision_config=transformers.SiglipVisionConfig(**_SIGHT, image_size=16, patch_size=4),
            mm_tokens_per_image=16, boi_token_index=BEGIN, eoi_token_index=92, image_token_index=IMAGE,
        )
    )  # fmt: skip


VISION: dict[str, Callable[[], Any]] = {"llava": _llava, "qwen2_vl": _qwen2_vl, "gemma3_vl": _gemma3}
PIECES = {"llava": 16, "qwen2_vl": 4, "gemma3_vl": 16}  #: tokens of one image


def seeing(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model that reads images, the same at every call."""
    torch.manual_seed(0)
    return sharpen(VISION[name]()).to(dtype).eval()


def prompt(name: str, model: Any, before: list[int], length: int) -> dict[str, Tensor]:
    """Return left-padded prompts with an image behind ``before`` tokens of each row, and the image.

    Args:
        name: of the model.
        model: whose dtype the image has.
        before: tokens of each row that come before the image.
        length: tokens behind the image.
    """
    generator = torch.Generator().manual_seed(7)
    rows, pieces = len(before), PIECES[name]
    width = max(before) + 1 + pieces + length
    tokens = torch.randint(2, 89, (rows, width), generator=generator)
    mask = torch.ones_like(tokens)
    at = max(before)
    tokens[:, at] = BEGIN
    tokens[:, at + 1 : at + 1 + pieces] = IMAGE
    for r, count in enumerate(before):
        mask[r, : at - count] = 0
        tokens[r, : at - count] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    kinds = (tokens == IMAGE).long()
    if name == "qwen2_vl":  # four by four patches of three channels, two frames and four by four pixels
        inputs["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        inputs["mm_token_type_ids"] = kinds
    else:
        inputs["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator)
    if name == "gemma3_vl":
        inputs["token_type_ids"] = kinds
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs
