"""EleutherAI's lm-evaluation-harness under a policy: :class:`PolicyLM`, its model ``kvpolicy``.

lm_eval has no entry points for models: whoever imports this module registers ours. The command
``kvpolicy lm-eval`` does so; in Python::

    import kvpolicy.evaluation.harness

    lm_eval.simple_evaluate("kvpolicy", model_args="pretrained=...,policy=vase(256)", tasks=["gsm8k"])
"""

from __future__ import annotations

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Final

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from kvpolicy import EvictionPolicy, _check
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.compat import CACHE_ARGUMENT
from kvpolicy.errors import UnsupportedError, UsageError
from kvpolicy.evaluation.scoring import score
from kvpolicy.grammar import parse_with, text_of

__all__ = ["PolicyLM", "Tally"]

OWN: Final = "own"  #: stands for what the policy's text says


@dataclasses.dataclass
class Tally:
    """Count what happened to the requests of a run.

    Attributes:
        requests: answered or scored.
        cut: those of which something was forgotten before their last token was predicted.
        evictions: of all requests together, those that came too late for a request's last token left out.
        longest: tokens of the longest request, prompt included.
    """

    requests: int = 0
    cut: int = 0
    evictions: int = 0
    longest: int = 0

    def add(self, evictions: int, tokens: int) -> None:
        """Count one request."""
        self.requests += 1
        self.cut += evictions > 0
        self.evictions += evictions
        self.longest = max(self.longest, tokens)


class _Noting(LogitsProcessor):
    """Note, whenever a token is chosen, how often each row has been evicted so far."""

    def __init__(self, cache: EvictionCache) -> None:
        self.cache = cache
        self.evictions: list[list[int]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the scores as they are."""
        self.evictions.append(list(self.cache.evictions))
        return scores


class PolicyLM(HFLM):
    """Answer and score what lm_eval asks, under a policy.

    Whatever lm_eval's own model ``hf`` takes is taken too. Text is generated as with ``hf``, with an
    :class:`~kvpolicy.adapters.hf.EvictionCache`. A continuation is scored behind its context as if the
    model had written it: see :func:`~kvpolicy.evaluation.scoring.score`. So a continuation of one token,
    such as the letter of a choice, has the score of the full cache. ``loglikelihood_rolling`` reads a text
    as if the model had written all of it.

    What happened is in the results, at ``config`` / ``kvpolicy``: see :class:`Tally`. With
    several processes it counts those of the first.

    Args:
        pretrained: name or folder of a model, or the model.
        policy: its text, such as ``"vase(256)"``.
        interval: instead of the policy's; None evicts at the end of the prompt only.
        recent: instead of the policy's.
        seed: of the policy's noise.
        options: those of lm_eval's model ``hf``.

    Raises:
        PolicyError: the policy cannot be read.
        BudgetError: guards and recent tokens do not fit into the budget.
        UnsupportedError: this model, or an option, does not go together with the policy.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: str = "",
        *,
        interval: int | str | None = OWN,
        recent: int | str = OWN,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.policy = _policy(policy, interval, recent)
        _check.integer("kvpolicy", "seed", seed, -(2**63), 2**63 - 1)
        self.seed = seed
        if options.get("mixed_precision_dtype") is not None:
            raise UnsupportedError("mixed_precision_dtype does not go together with a policy: write dtype=bfloat16")
        super().__init__(pretrained, **options)
        self.tally = Tally()
        # What cannot run is refused before a task is loaded.
        EvictionCache(self.model, self.policy, max_new_tokens=self.max_gen_toks).unbind()

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        rows, prompt = context.shape
        for name in ("num_beams", "num_return_sequences"):
            if options.get(name, 1) != 1:
                raise UnsupportedError(f"{name}={options[name]} does not go together with a policy here: leave it out")
        most, seeds = max_length - prompt, [self.seed] * rows
        with EvictionCache(self.model, self.policy, max_new_tokens=most, seeds=seeds) as cache:
            noting = _Noting(cache)
            more = {CACHE_ARGUMENT: cache, "logits_processor": LogitsProcessorList([noting])}
            found: Tensor = super()._model_generate(context, max_length, stop, **more, **options)
        mask = options.get("attention_mask")
        prompts = [prompt] * rows if mask is None else mask.sum(1).tolist()
        for row, tokens in enumerate(found[:, prompt:].tolist()):
            length = self._length(tokens, stop)
            # Token i was predicted by a pass that began with what was kept when token i - 1 was chosen.
            evictions = noting.evictions[length - 2][row] if length > 1 else 0
            self.tally.add(evictions, prompts[row] + length)
        return found

    def _length(self, tokens: Sequence[int], stop: Sequence[str]) -> int:
        """Return how many tokens an answer has; what follows stands there because others of the batch went on."""

        def stopped(length: int) -> bool:
            text = self.tok_decode(tokens[:length], skip_special_tokens=False)
            return any(one in text for one in stop)

        return min(len(tokens), bisect_left(range(1, len(tokens) + 1), True, key=stopped) + 1)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rows = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size))
        pairs = [self._shortened(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]), reverse=True)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(pairs), disable=hidden, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                found = score(self.model, self.policy, [pairs[i] for i in batch], seed=self.seed)
                for i, one in zip(batch, found, strict=True):
                    answers[i] = one.log_prob, one.greedy
                    self.tally.add(one.evictions, sum(map(len, pairs[i])))
                    asked = requests[i][0]
                    if asked is not None:  # windows of a longer text have none
                        self.cache_hook.add_partial("loglikelihood", asked, answers[i])
                bar.update(len(batch))
        return answers

    def _shortened(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return a pair that fits the model, cut from the left as lm_eval cuts it."""
        left = self.max_length + 1 - len(continuation)
        if left < 1:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}: "
                "write a larger max_length in --model_args"
            )
        return context[-left:], continuation

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes of a model, and what happened to the requests."""
        from kvpolicy import __version__

        if self.tally.requests and not self.tally.cut:
            logging.getLogger(__name__).warning(
                "nothing was forgotten: the longest of %d requests had %d tokens, which %r keeps whole, or was cut "
                "after its last token was predicted; the results are those of the full cache",
                self.tally.requests,
                self.tally.longest,
                self.policy,
            )
        ours = {
            "version": __version__,
            "policy": text_of(self.policy),
            "seed": self.seed,
            **dataclasses.asdict(self.tally),
        }
        return {**super().get_model_info(), "kvpolicy": ours}


def _policy(text: str, interval: int | str | None, recent: int | str) -> EvictionPolicy:
    """Return the policy, with what the options change about it."""
    if not isinstance(text, str) or not text:
        raise UsageError('there is no policy: write --model_args pretrained=...,policy="vase(256)"')
    changes: dict[str, Any] = {}
    if interval != OWN:
        changes["interval"] = None if interval in (None, "none") else interval
    if recent != OWN:
        changes["recent"] = recent
    return parse_with(text, **changes)


register_model("kvpolicy")(PolicyLM)
