"""Let a model of transformers write behind a prompt, with any cache, and weigh what the cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvpolicy.errors import UsageError, one_line
from kvpolicy.quiet import quiet

__all__ = ["Sampling", "encode", "generated", "held_bytes"]


@dataclass(frozen=True)
class Sampling:
    """Say how many tokens are drawn, and how.

    Attributes:
        max_new_tokens: at most.
        temperature: 0 takes the likeliest token. Above it, ``top_p`` and ``top_k`` are those of the model's own
            ``generation_config``, and transformers' where it has none.
        seed: of the draws.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return what ``generate`` takes."""
        if self.temperature > 0:
            how: dict[str, Any] = {"do_sample": True, "temperature": self.temperature}
        else:
            how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": self.max_new_tokens, "num_beams": 1, **how}


def encode(tokenizer: Any, prompt: str, *, chat: bool | None, system: str | None) -> dict[str, Any]:
    """Return the prompt as ``input_ids`` and ``attention_mask``, both ``[1, T]``.

    Args:
        tokenizer: of the model.
        prompt: as it was written.
        chat: put it into the model's chat template; where None, if there is one.
        system: a system message before it.

    Raises:
        UsageError: there is no chat template, or it refuses the messages.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UsageError("a chat is asked for, and the tokenizer of this model has no chat template; leave it out")
    chat = has_template if chat is None else chat
    if system is not None and not chat:
        why = "contradicts `chat=False`"
        if not has_template:
            why = "goes with a chat template, which this model has not"
        raise UsageError(f"a system message {why}; leave it out, or put it into the prompt")
    if not chat:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template raises what it likes
            raise UsageError(f"the chat template of this model refuses: {one_line(error)}") from error
    ids = encoded["input_ids"]
    if ids.shape[-1] == 0:
        raise UsageError("the tokenizer makes no token of this prompt")
    return {"input_ids": ids, "attention_mask": encoded["attention_mask"]}


def generated(model: Any, inputs: dict[str, Any], cache: Any, sampling: Sampling, **options: Any) -> torch.Tensor:
    """Return the prompt's tokens and those that the model writes behind them, ``[1, T]``.

    Modifies the cache, and torch's global random state.

    Args:
        model: of transformers.
        inputs: what :func:`encode` returned.
        cache: any.
        sampling: how many tokens, and how they are drawn.
        options: more of what ``generate`` takes.
    """
    from kvpolicy.adapters.hf.compat import CACHE_ARGUMENT

    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    torch.manual_seed(sampling.seed)
    with quiet(), torch.inference_mode():
        found: torch.Tensor = model.generate(**on_device, **{CACHE_ARGUMENT: cache, **sampling.arguments()}, **options)
    return found


def held_bytes(cache: Any) -> int:
    """Return the bytes of all storage that the layers of a transformers cache hold.

    A tensor that is a piece of a larger one counts as the larger one, which it keeps alive.
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
