"""Record a generation: :func:`trace`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from kvpolicy.grammar import parse_policy
from kvpolicy.policy import EvictionPolicy
from kvpolicy.tracing.traces import Trace

__all__ = ["pieces_of", "run_of", "trace"]

LONGEST_CHARACTER = 8  #: tokens after which bytes that are no character yet are shown as they are


def trace(
    model: Any,
    tokenizer: Any,
    policy: EvictionPolicy | str,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
    system: str | None = None,
) -> Trace:
    """Let a model write under a policy, and record what each head keeps.

    The text is what :class:`~kvpolicy.adapters.hf.EvictionCache` gives. Modifies torch's random state.

    Args:
        model: a decoder of transformers.
        tokenizer: of the model.
        policy: what to keep, or the text of a :class:`~kvpolicy.Policy`.
        prompt: as a user would write it.
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token; above 0 samples.
        seed: of the sampling, and of the policy's noise.
        chat: put the prompt into the model's chat template; where None, if there is one.
        system: a system message before it.

    Raises:
        BindError: the policy cannot run on this model.
        UsageError: the tokenizer has no chat template, or it refuses the prompt.

    Example::

        found = trace(model, tokenizer, "vase(64, interval=16, recent=16)", "Tell me about the sea.")
        print(found.held().float().mean())
        write_page(found, "sea.html")
    """
    from kvpolicy.generation import Sampling, encode, generated
    from kvpolicy.tracing.cache import RecordingCache

    policy = parse_policy(policy) if isinstance(policy, str) else policy
    inputs = encode(tokenizer, prompt, chat=chat, system=system)
    sampling = Sampling(max_new_tokens, temperature, seed)
    with RecordingCache(model, policy, max_new_tokens=max_new_tokens, seed=seed) as cache:
        ids = generated(model, inputs, cache, sampling)[0].tolist()
        run = run_of(model, policy, sampling, prompt, chat=chat, system=system)
        return cache.trace(ids, pieces_of(tokenizer, ids), run)


def run_of(
    model: Any,
    policy: EvictionPolicy,
    sampling: Any,
    prompt: str,
    *,
    chat: bool | None,
    system: str | None,
    name: str | None = None,
) -> dict[str, Any]:
    """Return what it takes to run a generation again.

    Args:
        model: a decoder of transformers.
        policy: what was kept.
        sampling: how tokens were drawn.
        prompt: as it was written.
        chat: whether it was put into a template; None: if there is one.
        system: the system message.
        name: what the user calls the model.
    """
    import transformers

    from kvpolicy import __version__
    from kvpolicy.adapters.planning import policy_text

    return {
        "model": name or getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "policy": policy_text(policy),
        "prompt": prompt,
        "chat": chat,
        "system": system,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {
            "kvpolicy": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text of each token, which joined are the text of all.

    A character whose bytes are several tokens stands with the first of them; the others are empty.

    Args:
        tokenizer: that made them.
        ids: the tokens.
    """

    def text(some: list[int]) -> str:
        found = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(found)

    # Some tokenizers drop the space at the front of what they decode: each piece is decoded behind the one before.
    pieces, before, start = [""] * len(ids), 0, 0
    for stop in range(1, len(ids) + 1):
        whole = text(ids[before:stop])
        if whole.endswith("\ufffd") and stop - start < LONGEST_CHARACTER and stop < len(ids):
            continue
        known = text(ids[before:start])
        pieces[start] = whole[len(known) :] if whole.startswith(known) else text(ids[start:stop])
        before, start = start, stop
    return pieces
