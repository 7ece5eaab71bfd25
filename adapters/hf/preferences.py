"""How much each layer of a model prefers to keep: :func:`layer_preferences`, what CAKE shares slots by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import _check
from kvpolicy.adapters.hf.cache import EvictionCache
from kvpolicy.each_query import each_query
from kvpolicy.errors import UsageError
from kvpolicy.policy import LayerPlan, ModelSpec, Plan
from kvpolicy.scorers.attention import newest
from kvpolicy.scorers.spread import moments
from kvpolicy.scores import Keep, Scores, select_top
from kvpolicy.view import LayerSpec, State, View

__all__ = ["layer_preferences"]


class _Measuring:
    """Keep the newest tokens, and note the preference of each layer at the end of a prompt."""

    needs = frozenset({"queries", "every_query", "cross_heads"})

    def __init__(self, window: int, tau1: float, tau2: float) -> None:
        self.window, self.taus = window, (tau1, tau2)
        self.found: dict[int, list[Tensor]] = {}

    def plan(self, model: ModelSpec) -> Plan:
        window = self.window
        return Plan((LayerPlan(window + 1, window + 2, 1, window, window),) * model.num_layers)

    def init(self, spec: LayerSpec, rows: int) -> State:
        return ()

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        for layer, number in zip(view.layer.tolist(), preference(view, self.window, *self.taus), strict=True):
            self.found.setdefault(layer, []).append(number)
        return select_top(Scores.of(view, view.positions, weights=False), view, view.budget), state


@torch.no_grad()
def layer_preferences(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    window: int = 32,
    tau1: float = 1.0,
    tau2: float = 1.0,
) -> tuple[float, ...]:
    """Return how much each layer that may evict prefers to keep, the mean over some prompts, summing to 1.

    ``H ** (1 / tau1) * V ** (1 / tau2)`` of the attention that the last queries of a prompt pay to the tokens
    before them: its entropy, and its variance over the queries. One forward pass a prompt.

    Args:
        model: a decoder of transformers.
        prompts: token ids of each, ``[1, length]`` or ``[length]``, each longer than the window.
        window: the last queries of each prompt.
        tau1: of the entropy; the official code has a pair of its own for some models.
        tau2: of the variance.

    Raises:
        UsageError: there is no prompt, or one of them has no token before the window.

    Source: CAKE, https://arxiv.org/abs/2503.12491, section 4.2.
    """
    _check.integer("layer_preferences", "window", window, 2)
    for name, tau in (("tau1", tau1), ("tau2", tau2)):
        _check.number("layer_preferences", name, tau, 0, above=True)
    texts = [ids[None] if ids.dim() == 1 else ids for ids in prompts]
    if not texts:
        raise UsageError("layer_preferences() measures on prompts, and there is none")
    for ids in texts:
        if ids.shape[0] != 1 or ids.shape[1] <= window:
            raise UsageError(
                f"layer_preferences() takes the token ids of one prompt each, longer than window={window}; one of them "
                f"has the shape {tuple(ids.shape)}"
            )
    totals: dict[int, float] = {}
    for ids in texts:
        measuring = _Measuring(window, tau1, tau2)
        with EvictionCache(model, measuring) as cache:
            model(ids.to(model.device), past_key_values=cache)
        found = {layer: float(numbers[0]) for layer, numbers in measuring.found.items()}
        whole = sum(found.values())
        for layer, one in found.items():
            totals[layer] = totals.get(layer, 0.0) + one / whole / len(texts)
    return tuple(totals[layer] for layer in sorted(totals))


def preference(view: View, window: int = 32, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """Return how much each row, one layer, prefers to keep: entropy and variance of its attention.

    ``H ** (1 / tau1) * V ** (1 / tau2)``: the entropy of what the newest queries pay the candidates, and its
    variance over the queries, each summed over query heads.

    Args:
        view: with queries.
        window: how many of the newest are asked.
        tau1: of the entropy.
        tau2: of the variance.

    Returns:
        ``[B]``, in ``view.compute_dtype``.
    """
    b, h, _ = view.shape
    entropy = torch.zeros(b * h, dtype=view.compute_dtype, device=view.positions.device)
    variance = torch.zeros_like(entropy)
    candidates = view.candidates.flatten(0, 1)
    for at, paid, _, positions in each_query(view, *newest(view, window), whole=True):
        shares = torch.where(candidates[at, None], paid[:, 0], 0)
        entropy[at] -= (shares * torch.log(shares + 1e-10)).sum((1, 2))
        variance[at] += moments(shares, positions >= 0)[1].sum(-1)
    totals = [view.reduce_heads(one.view(b, h).sum(-1)) for one in (entropy, variance)]
    return totals[0] ** (1 / tau1) * totals[1] ** (1 / tau2)
