"""A cache that writes down what it drops: :class:`RecordingCache`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.losses import held
from kvpolicy.errors import UsageError
from kvpolicy.guards import ValueGuard
from kvpolicy.policy import EvictionPolicy, Policy
from kvpolicy.scorers.tokens import Norm, magnitude
from kvpolicy.scores import Scores, Tier
from kvpolicy.tracing.traces import Trace
from kvpolicy.view import State, View

__all__ = ["RecordingCache"]


class Watched(Policy):
    """Be a policy, and show its scores to somebody before slots are picked by them."""

    def __init__(self, policy: Policy, show: Callable[[View, Scores], None]) -> None:
        super().__init__(policy.chain, interval=policy.interval, recent=policy.recent)
        object.__setattr__(self, "_show", show)

    def scores(self, view: View, state: State) -> Scores:
        """Return the policy's scores, shown."""
        scores = super().scores(view, state)
        self._show(view, scores)  # type: ignore[attr-defined]
        return scores


class RecordingCache(EvictionCache):
    """Be an eviction cache of one request, and record what becomes of each token.

    It keeps the same tokens as an :class:`~kvpolicy.adapters.hf.EvictionCache`. Of policies that are
    not a :class:`~kvpolicy.Policy`, what guards protect is not known, and nothing is said to be protected.

    Args:
        model: a decoder of transformers.
        policy: what to keep.
        max_new_tokens: tokens decoded at most.
        seed: of the policy's noise.

    Raises:
        BindError: as an EvictionCache does.
    """

    def __init__(self, model: Any, policy: EvictionPolicy, *, max_new_tokens: int | None = None, seed: int = 0) -> None:
        self.norm: Norm = "range"
        if isinstance(policy, Policy):
            guards = [stage for stage in policy.stages if isinstance(stage, ValueGuard)]
            self.norm = guards[0].norm if guards else self.norm
            policy = Watched(policy, self._show)
        self._values: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._marks: defaultdict[tuple[str, int], Tensor | None] = defaultdict(lambda: None)
        self._shown: list[tuple[int, Tensor, Tensor]] = []
        self._before: tuple[int, ...] = ()
        self._happened: list[int] = []
        self._steps: list[tuple[int, int, int, int]] = []
        super().__init__(model, policy, max_new_tokens=max_new_tokens, seeds=[seed])

    def __enter__(self) -> RecordingCache:
        """Return the cache."""
        return self

    # What is seen on the way

    def take(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values of one layer; note how large the values are."""
        group = self._group_of[layer]
        given = super().take(layer, keys, values)
        if group.evicts:  # a latent is the value, and the model gives it as the key
            value = keys if layer in group.latents else values
            self._values[layer].append(magnitude(value[0].detach(), self.norm, torch.float32))
        return given

    def _show(self, view: View, scores: Scores) -> None:
        """Note what guards protect, where something has to go."""
        if view.max_victims < 1:
            return
        guarded = (scores.tier > Tier.CANDIDATE) & (scores.tier < Tier.RECENT)
        tier = torch.where(guarded, scores.tier, 0).cpu()
        for row, layer in enumerate(view.layer.tolist()):
            positions = view.positions[row].to("cpu", copy=True)  # the eviction moves slots in place
            self._shown.append((layer, positions, tier[row]))

    def _finish(self) -> None:
        super()._finish()
        stores = [group.store for group in self.groups if group.store is not None and group.evicts]
        now = tuple(store.rows[0].evictions for store in stores)
        before, self._before = self._before or (0,) * len(now), now
        seen = self.seen[0]
        if now != before:
            self._happened.append(seen)
            for store, old, new in zip(stores, before, now, strict=True):
                for layer, positions in store.kept().items() if new != old else ():
                    self._drop(layer, held(positions, seen)[0], seen)
            for layer, positions, tier in self._shown:
                self._protect(layer, positions.long(), tier, seen)
        self._shown.clear()
        self._steps.append((seen, *self._nbytes(seen)))

    def _nbytes(self, seen: int) -> tuple[int, int, int]:
        """Return the bytes that are allocated, those in use, and those of a cache that keeps every token."""
        used = full = 0
        stores = [group.store for group in self.groups if group.store is not None]
        alone = self.nbytes(turns=False) - sum(store.nbytes() for store in stores)
        for store in stores:
            spec = store.spec
            width = spec.head_dim + (0 if spec.values_in_keys else spec.value_dim)
            slot = spec.num_heads * width * spec.dtype.itemsize
            used += round(store.slots_of(0) * slot)
            full += len(store.layers) * seen * slot
        return self.nbytes(turns=False), used + alone, full + alone

    def _marked(self, name: str, layer: int, heads: int, seen: int) -> Tensor:
        """Return the numbers of a layer's tokens, ``[heads, seen]`` or more; those that are new are 0."""
        known = self._marks[name, layer]
        if known is None or known.shape[1] < seen:
            grown = torch.zeros(heads, 2 * seen, dtype=torch.int32)
            if known is not None:
                grown[:, : known.shape[1]] = known
            self._marks[name, layer] = known = grown
        return known

    def _drop(self, layer: int, holds: Tensor, seen: int) -> None:
        dropped = self._marked("dropped", layer, len(holds), seen)[:, :seen]
        dropped[~holds & (dropped == 0)] = len(self._happened)

    def _protect(self, layer: int, positions: Tensor, tier: Tensor, seen: int) -> None:
        number = len(self._happened)
        of_token = torch.zeros(len(tier), seen + 1, dtype=torch.int32)
        of_token.scatter_(1, positions.where(positions >= 0, seen), tier.to(torch.int32))
        now = of_token[:, :seen] > 0
        first, last, highest = (
            self._marked(name, layer, len(tier), seen)[:, :seen] for name in ("first", "last", "tier")
        )
        first[now & (first == 0)] = number
        last[now] = number
        highest.copy_(torch.maximum(highest, of_token[:, :seen]))

    # What came of it

    def trace(self, ids: list[int], pieces: list[str], run: dict[str, Any]) -> Trace:
        """Return what was recorded.

        Args:
            ids: the tokens, at least all that were seen.
            pieces: the text of each.
            run: see :class:`Trace`.

        Raises:
            UsageError: no token has been seen yet.
        """
        if not self._steps:
            raise UsageError("no token has been seen yet: there is nothing to trace; generate with this cache first")
        seen, layers = self.seen[0], sorted(self._values)
        values = {layer: torch.cat(self._values[layer], 1).float().cpu() for layer in layers}
        heads = [(layer, head) for layer in layers for head in range(len(values[layer]))]
        lines = {
            name: torch.cat([self._marked(name, one, len(values[one]), seen)[:, :seen] for one in layers])
            for name in ("dropped", "first", "last", "tier")
        }
        steps, nbytes, used, full = zip(*self._steps, strict=True)
        store = next(group.store for group in self.groups if group.store is not None)
        return Trace(
            run=run,
            ids=tuple(ids),
            pieces=tuple(pieces),
            prompt_length=store.rows[0].prompt,
            heads=tuple(heads),
            evictions=tuple(self._happened),
            steps=steps,
            nbytes=nbytes,
            used_nbytes=used,
            full_nbytes=full,
            norm=self.norm,
            dropped=lines["dropped"],
            values=torch.cat([values[layer] for layer in layers]),
            protected_first=lines["first"],
            protected_last=lines["last"],
            tier=lines["tier"],
        )

    # What would make the record wrong

    def new_seeds(self, requests: int) -> list[tuple[int, int]]:
        """Return the name and the seed of the request."""
        if requests != 1:
            raise UsageError(f"a trace is of one request, and the batch has {requests} rows; give one prompt, one beam")
        return super().new_seeds(requests)

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(f"{what} would make the record of this cache wrong; make a new RecordingCache instead")

    def fork(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        self._refuse("fork()")

    def reset(self) -> NoReturn:
        """Refuse."""
        self._refuse("reset()")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refuse."""
        self._refuse("crop()")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> NoReturn:
        """Refuse."""
        self._refuse("reorder_cache()")
