"""The cache that transformers is given: :class:`EvictionCache`."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy import _check
from kvpolicy.adapters.hf import binding, compat, others, saving
from kvpolicy.adapters.hf.attention import AttentionFunction, one_token, several_tokens, turn
from kvpolicy.adapters.hf.group import Group
from kvpolicy.adapters.hf.layer import EvictionLayer
from kvpolicy.adapters.hf.ranks import kept_alike, said
from kvpolicy.adapters.hf.static import StaticSlots
from kvpolicy.adapters.hf.step import Step, open_step
from kvpolicy.errors import BindError, IntegrityError, UnsupportedError, UsageError
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Plan
from kvpolicy.receipt import Receipt
from kvpolicy.row import Row
from kvpolicy.stage import Chain, Stage
from kvpolicy.store import Store
from kvpolicy.view import DEFAULT_WORKSPACE, LayerSpec

__all__ = ["EvictionCache"]

_OFFERS = frozenset({"queries", "every_query", "cross_heads"})


@compat.guarded
class EvictionCache(Cache, binding.Evicting):
    """Keep a fixed number of key-value pairs for each head, and forget the rest as a policy says.

    Pass it as ``past_key_values`` to the model that it is bound to, or to ``model.generate()``.
    While bound, the model uses an attention function of kvpolicy; with an ordinary cache, or none,
    it gives what it gave before. Leaving a ``with`` block, or :meth:`unbind`, restores the model.

    Only full-attention layers evict; sliding-window and linear layers are left alone. The prompt
    is attended in full: a prompt beyond the capacity exists for one layer at a time.

    Args:
        model: a decoder of transformers.
        policy: what to keep; any :class:`~kvpolicy.EvictionPolicy`, or one for each row of the batch.
        max_new_tokens: tokens decoded at most, needed by policies that evict at the end of a turn
            only (``interval=None``), whose slots must hold them all.
        max_draft_tokens: tokens that assisted or prompt-lookup decoding may draft at once. Each layer
            holds as many slots and queries more. A later forward pass of at most one token more is
            then a draft: what :meth:`crop` leaves of it counts as decoded, and is evicted only then.
            Of a longer pass, the last so many tokens count as decoded, since they may be drafts.
        prompt_length: columns of the prompt, pads among them, where the first token after it cannot
            tell: a prompt given in chunks whose last one is a single token, or known text behind it
            that several tokens at a time are fed of. All that follows counts as decoded.
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
        if prompt_length is not None:
            _check.integer("EvictionCache", "prompt_length", prompt_length, 1)
        self.model, self.static = model, static
        self.max_draft_tokens, self.prompt_length = max_draft_tokens, prompt_length
        self.policies = _checked(policy)
        self.sharing, self.ranks = found.sharing, found.ranks
        if static and self.ranks.size > 1:
            raise UnsupportedError(
                "static=True of a model that is split over processes is not supported yet; leave it out"
            )
        self._seeds, self._requests = _integers("seeds", seeds), _integers("requests", requests)
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "max_draft_tokens": max_draft_tokens,
            "prompt_length": prompt_length,
            "static": static,
            "seeds": self._seeds,
            "requests": self._requests,
            "workspace": workspace,
        }
        spec = ModelSpec(len(found.evicting), max_new_tokens)
        by_layer = _by_layer([one.plan(spec) for one in self.policies], found.evicting)
        self.skipped = {
            **found.skipped,
            **{i: "left alone by its budget" for i, plans in by_layer.items() if plans is None},
        }
        self.groups = [
            Group(
                tuple(same),
                plans,
                device,
                len(found.layers),
                workspace,
                found.ranks,
                {i: found.latents[i] for i in same if i in found.latents},
            )
            for device, group in found.groups.items()
            for plans, same in _by_plan(group, by_layer).items()
        ]
        self._group_of = {layer: group for group in self.groups for layer in group.layers}
        if not self._group_of:
            raise UnsupportedError(
                f"{_names(self.policies)} leaves every layer of {type(model).__name__} alone: nothing would evict"
            )
        layers: list[Any] = [
            EvictionLayer(self, i) if i in self._group_of else layer for i, layer in enumerate(found.layers)
        ]
        super().__init__(layers=layers)
        self.columns = 0
        self.columns_seen = torch.zeros((), dtype=torch.int64, device=model.device)
        self._ran = False
        self.last: Tensor | None = None
        self._step: Step | None = None
        self._told: tuple[Any] | None = None
        self._failed = False
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

    @property
    def num_requests(self) -> int:
        """Return the rows of the batch, 0 before the first forward pass."""
        store = self.groups[0].store
        return 0 if store is None else len(store.rows)

    @property
    def seen(self) -> list[int]:
        """Return the tokens of each request, empty before the first forward pass."""
        store = self.groups[0].store
        return [] if store is None else [row.seen for row in store.rows]

    @property
    def evictions(self) -> list[int]:
        """Return the evictions of each request, empty before the first forward pass."""
        store = self.groups[0].store
        return [] if store is None else [row.evictions for row in store.rows]

    def policy_of(self, request: int) -> EvictionPolicy:
        """Return what a row of the batch follows."""
        return self.policies[request if len(self.policies) > 1 else 0]

    def until_eviction(self) -> int:
        """Return how many tokens can be decoded before an eviction is due in some row."""
        left = [sys.maxsize]
        for group in self.groups:
            if group.store is not None:
                for row, plan in zip(group.store.rows, group.store.plans, strict=True):
                    if plan.interval is not None:
                        left.append(plan.interval - row.decoded % plan.interval)
        return min(left)

    def allocate(self, group: Group, spec: LayerSpec, rows: list[Row]) -> Store:
        """Return new slots for the layers of a group."""
        policies = [self.policy_of(r) for r in range(len(rows))]
        plans = [group.plans[r % len(group.plans)] for r in range(len(rows))]
        return Store(policies, plans, spec, group.layers, rows, self.max_draft_tokens)

    def evicts(self, layer: int) -> bool:
        """Return whether a layer evicts."""
        return layer in self._group_of

    # One forward pass: begin, then take and attend for each layer, then finish

    def told(self, mask: Any) -> None:
        """Remember the mask that a model around the decoder was given; it may hand on another, made of it."""
        self._told = (mask,)

    def begin(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """Open a step; the model's hook calls it before each forward pass."""
        if torch.compiler.is_compiling():
            self._begin_compiled(arguments)
            return
        self.step()
        if not self._release.alive:
            raise UsageError("this EvictionCache was unbound; make a new one for the model")
        if decoder is not self._decoder_binding.decoder:
            raise UsageError("this EvictionCache is bound to another model; make one for this model")
        self._check_whole()
        told, self._told = self._told, None
        if told is not None and isinstance(arguments.get("attention_mask"), dict):
            arguments = {**arguments, "attention_mask": told[0]}
        if not self.columns:
            self._insist_on_one_prompt(arguments)
        step = open_step(self, arguments)
        self._settle()  # only now: a refused pass changes nothing
        self._step = step
        # Slots count only once a step is finished; layers left alone have moved on by then.
        self._failed = not self._step.decoding or len(self._group_of) < len(self.layers)

    def _begin_compiled(self, arguments: dict[str, Any]) -> None:
        """Check what a graph depends on; whatever is read here is a guard of the graph."""
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        assert tokens is not None
        if not self.static:
            raise UsageError("compiled code needs fixed shapes; write EvictionCache(..., static=True)")
        if tokens.shape[1] != 1 or self.groups[0].static is None:
            raise UsageError("compile one-token steps alone: give the prompt to the model itself")
        if self._ran or self._failed:
            raise UsageError("the last compiled step does not count yet; call cache.step() after each")

    def step(self) -> None:
        """Make a compiled step count, and evict where it is due.

        ``generate()`` has it called by looking at the cache before each step; whoever calls
        compiled code calls it after each token. Without a compiled step it does nothing.
        """
        if not self._ran:
            return
        self._ran = False
        self._settle()
        self._step = Step(self, 1, [1] * self.num_requests, decoding=True)
        self._step.attended_all()
        if self.last is not None:
            self._step.last = self.last + 1
        self._finish()

    def _check_whole(self) -> None:
        if self._failed:
            raise UsageError("a forward pass failed half-way; reset() the cache and begin again")

    def take(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values of one layer; return what the new tokens attend to."""
        if torch.compiler.is_compiling():
            group = self._group_of[layer]
            assert group.static is not None
            latent = group.latents.get(layer)
            if latent is None:
                return group.static.take(group.index(layer), keys, values)
            keys = latent.joined(layer, keys, values)
            return latent.parts(group.static.take(group.index(layer), keys, keys)[0])
        if not self._release.alive:
            raise UsageError("this EvictionCache was unbound, as its with block ended; make a new one for the model")
        if self._step is None:
            raise UsageError(
                "an EvictionCache works inside the forward pass of the model that it is bound to; "
                "call that model, with past_key_values=cache, and not a part or a copy of it"
            )
        return self._step.take(self._group_of[layer], layer, keys, values)

    def attend(
        self,
        module: nn.Module,
        function: AttentionFunction,
        original: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Attend, then let the layer remember its queries and, at the end of a turn, evict."""
        step, layer = self._step, int(module.layer_idx)  # type: ignore[arg-type]
        for name in ("sliding_window", "position_bias"):
            if kwargs.get(name) is not None:
                raise UnsupportedError(f"layer {layer} attends with {name}, which slots without order cannot honour")
        group = self._group_of[layer]
        if torch.compiler.is_compiling():
            static = group.static
            assert static is not None
            static.observe(group.index(layer), query)
            return one_token(module, function, original, query, key, value, static.visible(), **kwargs)
        assert step is not None
        visible = step.visible(group)
        if not step.decoding:
            out = turn(module, function, original, query, key, value, visible, mask, **kwargs)
        else:
            attend = one_token if step.width == 1 else several_tokens
            out = attend(module, function, original, query, key, value, visible, **kwargs)
        step.attended(group, layer, query, key, value, kwargs)
        return out

    def finish(self) -> None:
        """Make the step count, and evict where it is due; the model's hook calls it."""
        if torch.compiler.is_compiling():
            self._ran = True  # whatever the host does next with this cache counts the step first
            return
        self._finish()

    def _finish(self) -> None:
        assert self._step is not None
        self._failed = True
        self._step.commit()
        self.columns += self._step.width
        self.last = self._step.last
        self._step, self._failed = None, False
        self._refresh()

    def _refresh(self) -> None:
        """Tell compiled code where the next tokens go."""
        if not self.static:
            return
        self.columns_seen.fill_(self.columns)
        for group in self.groups:
            if group.static is None or group.static.store is not group.store:
                assert group.store is not None
                group.static = StaticSlots(group.store)
            group.static.refresh()

    # What transformers calls between steps

    def reset(self) -> None:
        """Forget everything, keeping the slots, so that the cache can be used again."""
        self._ran = False
        super().reset()
        for group in self.groups:
            group.unsettled = None
            if group.store is not None:
                group.store.reset()
        self.columns, self.last, self._step, self._failed = 0, None, None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace every row by the one that ``beam_idx`` names."""
        self.step()
        super().reorder_cache(beam_idx)
        if self.last is not None:
            self.last = self.last.index_select(0, beam_idx.to(self.last.device))
        for group in self.groups:
            if group.store is not None:
                group.store.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, as if they had never been given, then evict where it is due.

        Args:
            tokens_to_remove: how many, as a negative number or 0. A positive number is the columns
                that stay, as older versions of transformers say it.

        Raises:
            UsageError: tokens so old that some heads have evicted some of them; nothing was changed.
        """
        self.step()
        stores = [group.store for group in self.groups if group.store is not None]
        if not stores:
            raise UsageError(f"crop({tokens_to_remove}): no token has been seen yet")
        count = compat.tokens_to_remove(self.columns, tokens_to_remove, to_length=True)
        self._check_whole()
        for store in stores:
            store.check_crop([count] * len(store.rows))
        for layer in self._others():
            if count or compat.ANNOUNCES_DRAFTS:
                layer.crop(-count)  # what was recorded for drafts is trimmed also where none goes
        for store in stores:
            store.crop([count] * len(store.rows))
        self.columns -= count
        self.last = None if self.last is None else self.last - count
        self._settle()

    def _settle(self) -> None:
        """Evict where it is due, now that no more drafts will be taken back."""
        for group in self.groups:
            group.settle()

    def _others(self) -> list[Any]:
        """Return the layers that are left alone."""
        return [layer for layer in self.layers if not isinstance(layer, EvictionLayer)]

    def activate_past_recording(self) -> None:
        """Prepare for drafts, as assisted decoding asks.

        Raises:
            UnsupportedError: no slots were set aside for them.
        """
        if not self.max_draft_tokens:
            raise UnsupportedError(
                "assisted and prompt-lookup decoding draft tokens and take some back, and no slots were set aside for "
                "them; write EvictionCache(..., max_draft_tokens=20), at least as many as are drafted at once"
            )
        for layer in self._others():
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    # Copies

    def fork(self, requests: Sequence[int] | None = None, *, seeds: Sequence[int] | None = None) -> EvictionCache:
        """Return a cache that goes on from the same tokens, with memory of its own, bound to the same model.

        One compressed prompt serves many questions: each fork answers one, or
        ``cache.fork([0] * 8)`` eight in one batch.

        Args:
            requests: which rows the new cache has, each as often as it is named; all by default.
            seeds: of the new rows' randomness; by default each goes on with its own.

        Raises:
            UsageError: there is no such row, or a forward pass failed half-way.
        """
        self.step()
        self._check_whole()
        count = self.num_requests
        named = list(range(count)) if requests is None else list(requests)
        if not count or not named or not all(isinstance(r, int) and 0 <= r < count for r in named):
            raise UsageError(f"fork({requests!r}): the cache holds {count} requests; name some of them by their rows")
        given = _integers("seeds", seeds)
        if given is not None and len(given) != len(named):
            raise UsageError(f"seeds names {len(given)} requests, and the fork has {len(named)} rows")
        if not self._release.alive:
            raise UsageError("this EvictionCache was unbound; fork it before its with block ends")
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.groups = [group.fork(named) for group in self.groups]
        new._group_of = {layer: group for group in new.groups for layer in group.layers}
        new.layers = [
            EvictionLayer(new, i) if i in new._group_of else others.copied(layer, named, count)
            for i, layer in enumerate(self.layers)
        ]
        new.policies = tuple(self.policies[r] for r in named) if len(self.policies) > 1 else self.policies
        rows = [row for group in new.groups if group.store is not None for row in group.store.rows]
        for number, row in enumerate(rows):
            row.seed = row.seed if given is None else given[number % len(named)]
        new._seeds, new._requests = (
            [row.seed for row in rows[: len(named)]],
            [row.request for row in rows[: len(named)]],
        )
        new.options = {**self.options, "seeds": new._seeds, "requests": new._requests}
        new._acquire()
        new.columns_seen = self.columns_seen.clone()
        last = None if self.last is None else self.last[torch.tensor(named, device=self.last.device)]
        new.continue_at(self.columns, last)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> EvictionCache:
        """Return a fork of all rows: what transformers' recipes for a shared prompt ask for."""
        return self.fork()

    def continue_at(self, columns: int, last: Tensor | None) -> None:
        """Go on behind so many columns, whose last tokens have these positions."""
        self.columns, self.last, self._step, self._failed = columns, last, None, False
        self._refresh()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what the cache holds into a safetensors file, whole or not at all.

        Args:
            path: of the file.

        Raises:
            UsageError: no token has been seen yet, or a forward pass failed half-way.
            UnsupportedError: the model is split over processes.
        """
        if self.ranks.size > 1:  # the file would not say whose heads it holds
            raise UnsupportedError("save() of a model that is split over processes is not supported yet")
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
            model: the one that it was saved with: its kind, configuration, dtype and weights are checked.
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
        from kvpolicy import __version__

        self.step()
        stores = [group.store for group in self.groups if group.store is not None]
        if not stores:
            raise UsageError("no token has been seen yet: there is nothing to prove")
        rows = stores[0].rows
        broken = torch.stack([store.broken.view(-1, len(rows)).sum(0).cpu() for store in stores]).sum(0)
        kept = {layer: at for group in self.groups for layer, at in group.positions().items()}
        return Receipt(
            policy=tuple(saving.policy_text(self.policy_of(r)) for r in range(len(rows))),
            version=__version__,
            seen=tuple(row.seen for row in rows),
            slots=tuple(max(store.rows[r].length for store in stores) for r in range(len(rows))),
            capacity=max(store.spec.capacity for store in stores),
            evictions=tuple(row.evictions for row in rows),
            guards_broken=tuple(broken.tolist()),
            nbytes=sum(store.nbytes() for store in stores),
            turn_nbytes=max(group.turn_nbytes for group in self.groups),
            window_nbytes=sum(store.window.nbytes() for store in stores),
            other_nbytes=sum(others.nbytes(layer) for layer in self._others()),
            layers=tuple(sorted(self._group_of)),
            skipped=self.skipped,
            kept=kept,
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

    def _insist_on_one_prompt(self, arguments: dict[str, Any]) -> None:
        """Stop processes that would go separate ways, before they wait for each other for ever."""
        if self.ranks.size == 1:
            return
        found: dict[str, Any] = {
            "the policy": repr(self.policies),
            "the plans of the layers": [(group.layers, str(group.plans)) for group in self.groups],
            **self.options,
        }
        for name in ("input_ids", "inputs_embeds", "attention_mask"):
            found[f"{name}, its shape and a fingerprint,"] = said(arguments.get(name))
        self.ranks.insist(found, UsageError)

    def new_seeds(self, requests: int) -> list[tuple[int, int]]:
        """Return the name and the seed of each request of a batch.

        Raises:
            UsageError: ``seeds`` or ``requests`` were given for another number.
        """
        if len(self.policies) not in (1, requests):
            raise UsageError(f"there are {len(self.policies)} policies, and the batch has {requests} rows: one each")
        columns = []
        for name, given in (("requests", self._requests), ("seeds", self._seeds)):
            if given is not None and len(given) != requests:
                raise UsageError(f"{name} names {len(given)} requests, and the batch has {requests} rows")
            columns.append(given or [0] * requests)
        return list(zip(*columns, strict=True))


def _checked(policy: EvictionPolicy | Sequence[EvictionPolicy]) -> tuple[EvictionPolicy, ...]:
    """Return the policies, one object for equal ones, or say why one of them cannot be followed here."""
    if isinstance(policy, Sequence) and not isinstance(policy, str):
        if not policy:
            raise BindError("an empty list of policies: give one policy, or one for each row of the batch")
        found: list[EvictionPolicy] = []
        for one in policy:
            same = next((other for other in found if other == one), one)
            found.append(_checked_one(same))
        return tuple(found)
    return (_checked_one(policy),)


def _checked_one(policy: EvictionPolicy) -> EvictionPolicy:
    """Return the policy, or say why it is none, or why transformers cannot give what it needs."""
    if isinstance(policy, Stage | Chain):
        raise BindError(f"{policy!r} is not a policy yet; write Policy({policy!r})")
    if isinstance(policy, str):
        raise BindError(f"{policy!r} is a text; write Policy.parse({policy!r})")
    if isinstance(policy, type) or not isinstance(policy, EvictionPolicy):
        raise BindError(
            f"{policy!r} is not an EvictionPolicy: write one with vase(1024) or Policy(...), or give your class the "
            "attribute needs and the methods plan(model), init(spec, rows) and select(view, state)"
        )
    missing = policy.needs - _OFFERS
    if missing:
        raise UnsupportedError(
            f"{policy!r} needs {', '.join(sorted(missing))}, which the transformers adapter cannot give; "
            f"it gives {', '.join(sorted(_OFFERS))}"
        )
    return policy


def _names(policies: Sequence[EvictionPolicy]) -> str:
    return " and ".join(dict.fromkeys(repr(policy) for policy in policies))


def _integers(name: str, given: Sequence[int] | None) -> list[int] | None:
    if given is None:
        return None
    numbers = list(given) if isinstance(given, Sequence) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and -(2**63) <= n < 2**63 for n in numbers):
        raise BindError(f"{name}={given!r}: write one 64-bit integer for each row of the batch")
    return [int(n) for n in numbers if n is not None]


def _by_layer(plans: Sequence[Plan], evicting: tuple[int, ...]) -> dict[int, tuple[LayerPlan, ...] | None]:
    """Return the plans of each layer, one a policy, or None where it is left alone."""
    found: dict[int, tuple[LayerPlan, ...] | None] = {}
    for plan in plans:
        if len(plan.layers) != len(evicting):
            raise BindError(
                f"the policy planned {len(plan.layers)} layers, and the model has {len(evicting)} that evict"
            )
    for number, layer in enumerate(evicting):
        of_layer = tuple(plan.layers[number] for plan in plans)
        given = tuple(one for one in of_layer if one is not None)
        if given and len(given) < len(of_layer):
            raise UnsupportedError(
                f"one policy of the batch leaves layer {layer} alone and another does not; policies of one batch must "
                "leave the same layers alone"
            )
        found[layer] = given or None
    return found


def _by_plan(
    group: tuple[int, ...], by_layer: dict[int, tuple[LayerPlan, ...] | None]
) -> dict[tuple[LayerPlan, ...], list[int]]:
    same: dict[tuple[LayerPlan, ...], list[int]] = {}
    for layer in group:
        plans = by_layer[layer]
        if plans is not None:
            same.setdefault(plans, []).append(layer)
    return same
