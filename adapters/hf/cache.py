"""The cache that transformers is given: :class:`EvictionCache`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import _check
from kvpolicy.adapters import planning
from kvpolicy.adapters.hf import binding, compat, others, saving
from kvpolicy.adapters.hf.group import Group
from kvpolicy.adapters.hf.layer import EvictionLayer
from kvpolicy.adapters.hf.passes import Passes
from kvpolicy.adapters.hf.ranks import kept_alike
from kvpolicy.adapters.hf.weights import weights_of
from kvpolicy.errors import IntegrityError, UnsupportedError, UsageError
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec
from kvpolicy.receipt import Receipt, receipt_of
from kvpolicy.view import DEFAULT_WORKSPACE

__all__ = ["EvictionCache"]


@compat.guarded
class EvictionCache(Passes):
    """Keep a fixed number of key-value pairs for each head, and forget the rest as a policy says.

    Pass it as ``past_key_values`` to the model that it is bound to, or to ``model.generate()``;
    since transformers 5.24 as ``cache``, of which the former is a deprecated name.
    While bound, the model uses an attention function of kvpolicy; with an ordinary cache, or none,
    it gives what it gave before. Leaving a ``with`` block, or :meth:`unbind`, restores the model.

    Only full-attention layers evict; sliding-window and linear layers are left alone. So is a layer
    to which the policy gives no budget: it keeps every token, and its memory grows. The prompt is
    attended in full: a prompt beyond the capacity exists for one layer at a time.

    Args:
        model: a decoder of transformers.
        policy: what to keep; any :class:`~kvpolicy.EvictionPolicy`, or one for each row of the batch.
        max_new_tokens: tokens decoded at most, needed by policies that evict at the end of a turn
            only (``interval=None``), whose slots must hold them all.
        max_draft_tokens: tokens that assisted or prompt-lookup decoding may draft at once. Each layer
            holds as many slots and queries more. A later forward pass of at most one token more is
            then a draft: what :meth:`crop` leaves of it counts as decoded, and is evicted only then.
            Assisted decoding gives a prompt and its first draft together; the turn then ends so many
            tokens earlier, unless ``prompt_length`` says where. What is decoded is not to the letter
            what plain decoding gives: an eviction waits for the end of a draft.
        prompt_length: columns of the prompt, pads among them, where its end cannot be told: a prompt
            in chunks whose last one is a single token, a prompt with a draft behind it, or known text
            behind it that is fed several tokens at a time. All before it is prompt, all that follows
            counts as decoded: a number too large makes every decoded token a turn.
        static: let decoding have fixed shapes, so that ``torch.compile`` and ``generate()`` make one
            graph of it; all slots are attended to, and those in use are told by a mask.
        seeds: of each request's randomness; all 0 by default, so that a row of a batch equals its
            own single run.
        requests: names of the requests, integers that key randomness beside the seeds; all 0 by
            default.
        workspace: bytes that the temporaries of one eviction may take.

    Raises:
        BudgetError: guards and recent tokens do not fit into the budget.
        UnsupportedError: this model, or this policy, cannot run correctly here.

    Example::

        with EvictionCache(model, vase(256)) as cache:
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=1000)
            print(cache.receipt())
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: EvictionPolicy | Sequence[EvictionPolicy],
        *,
        max_new_tokens: int | None = None,
        max_draft_tokens: int = 0,
        prompt_length: int | None = None,
        static: bool = False,
        seeds: Sequence[int] | None = None,
        requests: Sequence[int] | None = None,
        workspace: int = DEFAULT_WORKSPACE,
    ) -> None:
        compat.check_version()
        found = binding.survey(model, static=static)
        _check.integer("EvictionCache", "workspace", workspace, 1)
        _check.integer("EvictionCache", "max_draft_tokens", max_draft_tokens, 0)
        compat.check_drafts(max_draft_tokens)
        compat.check_static(static)
        if static and max_draft_tokens:
            raise UnsupportedError(
                "static=True compiles steps of one token, and drafts have several; leave static or max_draft_tokens out"
            )
        if prompt_length is not None:
            _check.integer("EvictionCache", "prompt_length", prompt_length, 1)
        self.model, self.static = model, static
        self.max_draft_tokens, self.prompt_length = max_draft_tokens, prompt_length
        self.policies = planning.checked(policy, "the transformers adapter", planning.TRANSFORMERS)
        self.sharing, self.ranks = found.sharing, found.ranks
        if static and self.ranks.size > 1:
            raise UnsupportedError(
                "static=True of a model that is split over processes is not supported yet; leave it out"
            )
        self._seeds, self._requests = planning.integers("seeds", seeds), planning.integers("requests", requests)
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "max_draft_tokens": max_draft_tokens,
            "prompt_length": prompt_length,
            "static": static,
            "seeds": self._seeds,
            "requests": self._requests,
            "workspace": workspace,
        }
        spec = ModelSpec(len(found.evicting), max_new_tokens, found.num_heads)
        by_layer = planning.plans_of_layers([one.plan(spec) for one in self.policies], found.evicting)
        _check_head_wise([plan for plans in by_layer.values() for plan in plans], self, found.latents)
        alone = [layer for layer, plans in by_layer.items() if not plans]
        if static and alone:
            raise UnsupportedError(
                f"static=True gives decoding fixed shapes, and the policy leaves layers alone, whose slots grow: "
                f"{', '.join(map(str, alone))}; leave static out, or give them a budget beyond the longest text"
            )
        evicting = [layer for layer, plans in by_layer.items() if plans]
        needs = frozenset[str]().union(*(one.needs for one in self.policies))
        shapes = set(found.groups) == {torch.device("meta")}
        weights = weights_of(compat.decoder_of(model), evicting, needs, alone=found.ranks.size == 1, shapes=shapes)
        self.skipped = {**found.skipped, **dict.fromkeys(alone, "left alone by the policy")}
        groups = [
            Group(
                tuple(same),
                plans,
                device,
                len(found.layers),
                workspace,
                found.ranks,
                {i: found.latents[i] for i in same if i in found.latents},
                weights,
            )
            for device, group in found.groups.items()
            for plans, same in planning.by_plan(group, by_layer)
        ]
        self.hold(sorted(groups, key=lambda group: not group.evicts))
        layers: list[Any] = [
            EvictionLayer(self, i) if i in self._group_of else layer for i, layer in enumerate(found.layers)
        ]
        super().__init__(layers, model.device)
        self._decoder_binding = binding.bind(model)
        self._acquire()

    # The life of a binding

    def _acquire(self) -> None:
        self._decoder_binding.acquire()
        self._release = weakref.finalize(self, self._decoder_binding.release)

    def unbind(self) -> None:
        """Let the model go: it is restored when its last cache lets go. The receipt can still be had."""
        self._release()

    def __enter__(self) -> EvictionCache:
        """Return the cache."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the model go."""
        self.unbind()

    # Copies

    def fork(self, requests: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> EvictionCache:
        """Return a cache that goes on from the same tokens, with memory of its own, bound to the same model.

        One compressed prompt serves many questions: each fork answers one, or
        ``cache.fork([0] * 8)`` eight in one batch. A fork holds on to the model like any cache: use
        it in a ``with`` block of its own, or :meth:`unbind` it.

        Args:
            requests: which rows the new cache has, each as often as it is named; all by default.
            seeds: of the new rows' randomness; by default each goes on with its own.

        Raises:
            UsageError: there is no such row, or a forward pass failed half-way.
        """
        self.step()
        self._check_whole()
        count = self.num_requests
        if not count:
            raise UsageError("no token has been seen yet: there is nothing to fork")
        named = list(range(count)) if requests is None else list(requests) if isinstance(requests, Sequence) else []
        if not named or not all(isinstance(r, int) and 0 <= r < count for r in named):
            raise UsageError(
                f"fork({requests!r}): the cache holds {count} requests; name some of them, as fork([0, 0, {count - 1}])"
            )
        given = planning.integers("seeds", seeds)
        if given is not None and len(given) != len(named):
            raise UsageError(f"seeds names {len(given)} requests, and the fork has {len(named)} rows")
        if not self._release.alive:
            raise UsageError("this EvictionCache was unbound; fork it before its with block ends")
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.hold([group.fork(named) for group in self.groups])
        new.layers = [
            EvictionLayer(new, i) if i in new._group_of else others.copied(layer, named, count)
            for i, layer in enumerate(self.layers)
        ]
        new.policies = tuple(self.policies[r] for r in named) if len(self.policies) > 1 else self.policies
        rows = [row for group in new.groups if group.store is not None for row in group.store.rows]
        for number, row in enumerate(rows):
            row.seed = row.seed if given is None else given[number % len(named)]
        named_before = self._seeds is not None or self._requests is not None or given is not None
        if named_before:  # else a new batch after reset() may have any size
            new._seeds = [row.seed for row in rows[: len(named)]]
            new._requests = [row.request for row in rows[: len(named)]]
        new.options = {**self.options, "seeds": new._seeds, "requests": new._requests}
        new._acquire()
        new.columns_seen = self.columns_seen.clone()
        last = self.last[torch.tensor(named, device=self.last.device)] if isinstance(self.last, Tensor) else self.last
        new.continue_at(self.columns, last)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> EvictionCache:
        """Return a fork of all rows: what transformers' recipes for a shared prompt ask for."""
        return self.fork()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied without memory of its own."""
        raise UsageError(
            "an EvictionCache is bound to a model in this process: write cache.fork(), or cache.save(path)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what the cache holds into a safetensors file, whole or not at all.

        Drafts that may still be taken back are there to stay from then on.

        Args:
            path: of the file.

        Raises:
            UsageError: no token has been seen yet, or a forward pass failed half-way.
            UnsupportedError: the model is split over processes.
        """
        if self.ranks.size > 1:  # the file would not say whose heads it holds
            raise UnsupportedError("save() of a model that is split over processes is not supported yet")
        if any(plan.head_wise for group in self.groups for plan in group.plans):
            raise UnsupportedError("save() of layers whose heads have budgets of their own is not supported yet")
        self.step()
        self._check_whole()
        self._settle()
        saving.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        policy: EvictionPolicy | Sequence[EvictionPolicy] | None = None,
    ) -> EvictionCache:
        """Return the cache that :meth:`save` wrote, bound to the same model, which goes on as if never saved.

        Args:
            path: of the file.
            model: the one that it was saved with: its kind, configuration, dtype and a sample of each weight
                are checked.
            policy: what it followed; needed where its text cannot be read, being a third party's.

        Raises:
            UsageError: the file is no cache, or belongs to another model, policy or version.
        """
        return saving.load(cls, path, model, policy)

    # Proof

    def receipt(self) -> Receipt:
        """Return what the cache holds and what happened to it.

        Raises:
            UsageError: no forward pass has been made yet.
        """
        self.step()
        stores = [group.store for group in self.groups if group.store is not None]
        if not stores:
            raise UsageError("no token has been seen yet: there is nothing to prove")
        return receipt_of(
            [planning.policy_text(self.policy_of(r)) for r in range(self.num_requests)],
            [store for store in stores if store.bands],
            [store for store in stores if not store.bands],
            turn_nbytes=max(group.turn_nbytes for group in self.groups),
            other_nbytes=sum(map(others.nbytes, self._others())),
            skipped=self.skipped,
        )

    def check_ranks(self) -> None:
        """Check that all processes of a model with split heads did the same; every one must call it.

        They compare the counters of every request. Where all heads must keep the same tokens, since
        no stage tells heads apart or each process has all heads, they compare the kept positions,
        too. A token that one process sampled differently does not show. One process checks nothing.

        Raises:
            IntegrityError: two processes differ, on all of them; the message says in what.
        """
        found: dict[str, Any] = {}
        for group in self.groups:
            for r, row in enumerate([] if group.store is None else group.store.rows):
                found[f"the counters of request {r} in layer {group.layers[0]}"] = str(row)
            for layer, number in kept_alike(self.policies, self.ranks, group.positions()).items():
                found[f"the fingerprint of the positions that layer {layer} keeps"] = number
        self.ranks.insist(found, IntegrityError)


def _check_head_wise(plans: Sequence[LayerPlan], cache: EvictionCache, latents: object) -> None:
    """Refuse what heads with different budgets do not go together with."""
    if not any(plan.head_wise for plan in plans):
        return
    for what, found in {
        "a policy for each row": len(cache.policies) > 1,
        "static=True": cache.static,
        "max_draft_tokens": cache.max_draft_tokens > 0,
        "a model that is split over processes": cache.ranks.size > 1,
        "latent attention, which caches one head,": bool(latents),
    }.items():
        if found:
            raise UnsupportedError(f"budgets of heads and {what} do not go together yet: write TopK(budget)")
