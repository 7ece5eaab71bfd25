"""A cache for a plain decoding loop: :class:`FlashCache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpolicy.adapters import planning
from kvpolicy.adapters.flash_attn import arguments, by_head
from kvpolicy.adapters.flash_attn.backends import TABLE, Backend, select_backend
from kvpolicy.adapters.flash_attn.backends.checks import refuse_unknown
from kvpolicy.adapters.flash_attn.groups import (
    Group,
    check_neighbours,
    follow,
    layers_by_plan,
    made_store,
    new_rows,
    packed_places,
)
from kvpolicy.errors import UsageError
from kvpolicy.eviction import LogitSpec, evict_due
from kvpolicy.host import on_device
from kvpolicy.policy import EvictionPolicy
from kvpolicy.ragged import RaggedStore
from kvpolicy.receipt import Receipt, receipt_of
from kvpolicy.turn import begin_turn, end_turn, take_turn
from kvpolicy.view import DEFAULT_WORKSPACE, LayerSpec

__all__ = ["FlashCache"]


@dataclass(eq=False)
class _Pass:
    """Be one forward pass: a decoded token of every row, or a turn."""

    width: int
    counts: list[int]
    decoding: bool
    attended: set[int] = field(default_factory=set)


class FlashCache:
    """Keep a fixed number of key-value pairs for each head, in a decoding loop of your own.

    In each layer, :meth:`attend` takes the new queries, keys and values in FlashAttention's layout and
    returns what they attend to. :meth:`step` ends the forward pass: tokens count from then on, and all
    layers are evicted when they are due.

    The first forward pass is a prompt, whatever its width, and later ones of several tokens are turns:
    attention over what is held and over the new tokens is exact, and the layer is cut afterwards. A pass
    of one token is decoded: the kernel appends it in place. Slots never move in memory.

    Args:
        policy: what to keep; any :class:`~kvpolicy.EvictionPolicy`, or one for each row of the batch.
        num_layers: layers of the model.
        num_heads: KV heads.
        num_query_heads: query heads, a multiple of it.
        head_dim: size of a query and a key.
        value_dim: size of a value; ``head_dim`` by default.
        batch_size: rows.
        dtype: of queries, keys and values.
        device: where they are.
        backend: what attends: ``"auto"``, or a name or a backend of
            :func:`~kvpolicy.adapters.flash_attn.select_backend`.
        max_new_tokens: tokens decoded at most, needed by policies that evict at the end of a turn
            only (``interval=None``), whose slots must hold them all.
        scaling: what logits are multiplied by; ``head_dim ** -0.5`` by default.
        softcap: what they are capped with, or None.
        seeds: of each row's randomness; all 0 by default, so that a row of a batch equals its own
            single run.
        requests: names of the rows, integers that key randomness beside the seeds; all 0 by default.
        workspace: bytes that the temporaries of one eviction may take.

    Raises:
        BindError: the policy cannot be followed, its plan does not fit, or there is no such device.
        UnsupportedError: no backend can serve these tensors.
        ParameterError: a size, a dtype, a scale or a cap that is none.

    Example:
        >>> import torch
        >>> from kvpolicy.policies import knorm
        >>> cache = FlashCache(
        ...     knorm(8, interval=4, recent=2),
        ...     num_layers=1,
        ...     num_heads=1,
        ...     num_query_heads=2,
        ...     head_dim=8,
        ...     dtype=torch.float32,
        ... )
        >>> for width in (12, 1, 1, 1, 1):  # a prompt, and four decoded tokens
        ...     q, k, v = (torch.randn(1, width, heads, 8) for heads in (2, 1, 1))
        ...     out = cache.attend(0, q, k, v)
        ...     cache.step()
        >>> cache.seen, cache.lengths
        ([16], [8])
    """

    def __init__(
        self,
        policy: EvictionPolicy | Sequence[EvictionPolicy],
        *,
        num_layers: int,
        num_heads: int,
        num_query_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        value_dim: int | None = None,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        backend: str | Backend = "auto",
        max_new_tokens: int | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        seeds: Sequence[int] | None = None,
        requests: Sequence[int] | None = None,
        workspace: int = DEFAULT_WORKSPACE,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "num_query_heads": num_query_heads}
        sizes |= {"head_dim": head_dim, "value_dim": value_dim, "batch_size": batch_size, "workspace": workspace}
        arguments.check_sizes("FlashCache", sizes)
        arguments.check_logits("FlashCache", scaling, softcap)
        arguments.check_dtype("FlashCache", dtype)
        device = arguments.device_of("FlashCache", device)
        needs = {"strided", "row_lengths"}  # of one row, too: it may be padded, and forks have more
        needs |= {"softcap"} if softcap is not None else set()
        needs |= {"value_dim"} if value_dim != head_dim else set()
        self.policies = follow(policy, batch_size)
        by_plan = layers_by_plan(self.policies, num_layers, num_heads, max_new_tokens)
        if any(plan.head_wise for plans, _ in by_plan for plan in plans):
            needs |= by_head.NEEDS
        name = backend.name if isinstance(backend, Backend) else backend
        found = select_backend(name, device=device, dtype=dtype, head_dim=head_dim, needs=needs)
        # Lengths are counted here, and need not be checked in every layer.
        self.backend = replace(backend if isinstance(backend, Backend) else found, check_lengths=False)
        self.num_layers, self.batch_size = num_layers, batch_size
        self.logits = LogitSpec(
            scaling=head_dim**-0.5 if scaling is None else scaling,
            softcap=softcap,
            num_layers=num_layers,
            num_heads=num_heads,
            workspace=workspace,
        )
        lse = "lse" in TABLE[self.backend.name].has
        self.groups = []
        for plans, layers in by_plan:
            capacity = max((plan.capacity for plan in plans), default=0)
            spec = LayerSpec(num_heads, num_query_heads, head_dim, value_dim, capacity, dtype, device)
            rows = new_rows(batch_size, requests, seeds)
            self.groups.append(Group(made_store(self.policies, plans, spec, layers, rows, lse=lse)))
        self.groups.sort(key=lambda group: not group.evicts)
        self._group_of = {layer: group for group in self.groups for layer in group.store.layers}
        self._pass: _Pass | None = None
        self._failed = False

    # What is held

    @property
    def seen(self) -> list[int]:
        """Return the tokens of each row, which is the position of its next one."""
        return [row.seen for row in self.groups[0].store.rows]

    @property
    def lengths(self) -> list[int]:
        """Return the slots in use of each row, in the layer with most of those that evict."""
        stores = [group.store for group in self.groups if group.evicts]
        return [max(store.rows[r].length for store in stores) for r in range(self.batch_size)]

    def next_positions(self, width: int, counts: Sequence[int] | None = None) -> Tensor:
        """Return the positions of the next tokens, ``[B, width]`` int64 on the device, 0 for pads.

        Args:
            width: columns of the next forward pass.
            counts: tokens of each row, its last columns; all of them by default.
        """
        given = arguments.check_counts(counts, self.batch_size, arguments.checked_width(width))
        return arguments.positions(self.seen, width, given, self.groups[0].store.spec.device)

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the slots of a layer as kernels see them: ``[B, C, Hkv, D]`` and ``[B, C, Hkv, Dv]``, no copy.

        Raises:
            UsageError: there is no such layer, or its heads have slots of different numbers.
        """
        store = self._group(layer).store
        if isinstance(store, RaggedStore):
            raise UsageError(
                f"heads of layer {layer} have slots of different numbers, which no [B, C, Hkv, D] can show"
            )
        at = store.layers.index(layer)
        return store.keys[at].transpose(1, 2), store.values[at].transpose(1, 2)

    def _group(self, layer: int) -> Group:
        if layer not in self._group_of:
            raise UsageError(f"layer {layer!r}: there are the layers 0 to {self.num_layers - 1}")
        return self._group_of[layer]

    # One forward pass

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: Sequence[int] | None = None,
        **unknown: object,
    ) -> Tensor:
        """Write new keys and values of one layer, and attend to them and to all that it holds.

        Modifies the layer's slots; the tokens count once :meth:`step` is called.

        Args:
            layer: index; each layer attends once a forward pass.
            q: ``[B, T, Hq, D]``, rotated by its positions; see :meth:`next_positions`.
            k: ``[B, T, Hkv, D]``, rotated, too.
            v: ``[B, T, Hkv, Dv]``.
            counts: tokens of each row, which are its last columns: rows are left-padded. All columns
                by default.
            **unknown: is refused: rotary tables, windows and ALiBi are wrong once slots have moved.

        Returns:
            ``[B, T, Hq, Dv]``; anything where a row has pads.

        Raises:
            UsageError: tensors of another shape, dtype or device, a layer that attends twice, or no
                room; nothing was modified.
            UnsupportedError: an argument that a cache without order cannot honour.
        """
        refuse_unknown(unknown, arguments.ATTEND)
        group = self._group(layer)
        arguments.check_tokens(q, k, v, group.store.spec, self.batch_size)
        given = arguments.check_counts(counts, self.batch_size, q.shape[1])
        step = self._opened(layer, q.shape[1], given)
        if step.decoding:
            group.store.insist_on_room(step.counts)
            out = self._decode(group, layer, q, k, v)
        else:
            out = self._turn(group, layer, q, k, v, step)
        step.attended.add(layer)
        return out

    def _opened(self, layer: int, width: int, counts: list[int]) -> _Pass:
        """Return the forward pass that a layer is part of; begins one if it is the first."""
        self._check_whole()
        step = self._pass
        if step is not None and step.attended:
            if layer in step.attended:
                raise UsageError(
                    f"layer {layer} attends twice in one forward pass: call step() once every layer has attended"
                )
            if (width, counts) != (step.width, step.counts):
                raise UsageError(
                    f"layer {layer} has {counts} tokens in {width} columns, and other layers of this forward pass have "
                    f"{step.counts} in {step.width}"
                )
            return step
        decoding = width == 1 and min(self.seen) > 0
        if not decoding and not any(self.seen):
            for group in self.groups:
                group.store.window.align(counts)
        self._pass = _Pass(width, counts, decoding)
        for group in self.groups:
            group.lengths = group.packed = None
        return self._pass

    def _decode(self, group: Group, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token to each row, and attend."""
        store, index = group.store, group.index(layer)
        lse = store.window.size > 0 and store.window.lse is not None
        ones = [1] * self.batch_size
        if isinstance(store, RaggedStore):
            store.append(index, k.transpose(1, 2), v.transpose(1, 2), ones)
            out, told = by_head.attend_decoded(self.backend, store, index, q, self.logits, lse=lse)
            store.observe(index, q.transpose(1, 2), ones, told)
            return out
        in_kernel = "append_in_kernel" in TABLE[self.backend.name].has and group.evicts
        if not in_kernel:
            store.append(index, k.transpose(1, 2), v.transpose(1, 2), ones)
        if group.lengths is None:
            group.lengths = store.column("length").to(torch.int32) + (0 if in_kernel else 1)
        k_cache, v_cache = self.cache(layer)
        out = self.backend.with_kvcache(
            q,
            k_cache,
            v_cache,
            k if in_kernel else None,
            v if in_kernel else None,
            cache_seqlens=group.lengths,
            scale=self.logits.scaling,
            softcap=self.logits.softcap,
            return_lse=lse,
        )
        out, told = out if lse else (out, None)
        store.observe(index, q.transpose(1, 2), ones, told)
        return out

    def _turn(self, group: Group, layer: int, q: Tensor, k: Tensor, v: Tensor, step: _Pass) -> Tensor:
        """Attend to what a layer holds joined with new tokens, then cut it."""
        store, index, counts = group.store, group.index(layer), step.counts
        lse = store.window.size > 0 and store.window.lse is not None
        self._failed = True  # what a turn has rewritten, or a policy was shown, cannot be taken back
        if not any(one in step.attended for one in store.layers):
            self._begin_turn(group, step)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if k.stride() != v.stride():  # kernels of torch want both laid out alike
            keys, values = keys.contiguous(), values.contiguous()
        if store.longest:
            held_keys, held_values = store.in_use(index)
            keys, values = torch.cat([held_keys, keys], 2), torch.cat([held_values, values], 2)
        seen_keys, seen_values = keys, values
        if group.packed is not None:
            seen_keys, seen_values = _packed(keys, group.packed), _packed(values, group.packed)
        held = {id(t): t.nbytes for t in (keys, values, seen_keys, seen_values)}
        group.turn_nbytes = max(group.turn_nbytes, sum(held.values()))
        if isinstance(store, RaggedStore):
            out, told = by_head.attend_turn(self.backend, store, index, q, keys, values, counts, self.logits, lse=lse)
        else:
            assert group.lengths is not None
            out = self.backend.with_kvcache(
                q,
                seen_keys.transpose(1, 2),
                seen_values.transpose(1, 2),
                cache_seqlens=group.lengths,
                scale=self.logits.scaling,
                softcap=self.logits.softcap,
                return_lse=lse,
            )
            out, told = out if lse else (out, None)
        store.observe(index, q.transpose(1, 2), counts, told)
        take_turn(store, index, keys, values, counts, group.after, lambda: self.logits)
        self._failed = False
        return out

    def _begin_turn(self, group: Group, step: _Pass) -> None:
        store = group.store
        group.after = begin_turn(store, step.counts, lambda: self.logits)
        if not isinstance(store, RaggedStore):  # there, heads are packed one by one
            group.packed = packed_places(store, step.width, step.counts)
        lengths = [row.length + count for row, count in zip(store.rows, step.counts, strict=True)]
        group.lengths = on_device(lengths, store.spec.device, torch.int32)

    def step(self) -> None:
        """End a forward pass: its tokens count, and all layers are evicted in one call when they are due.

        Modifies the slots of every layer.

        Raises:
            UsageError: a layer has not attended; nothing was modified.
        """
        self._check_whole()
        step = self._pass
        missing = set(self._group_of) - (set[int]() if step is None else step.attended)
        if step is None or missing:
            raise UsageError(
                f"step() ends a forward pass, and layer {min(missing)} has not attended in it; every layer attends "
                "once before each step()"
            )
        self._failed = True
        for group in self.groups:
            store = group.store
            if step.decoding:
                before = store.rows
                store.advance([row.advanced(1, decoding=True) for row in before])
                evict_due(store, before, lambda: self.logits, turn=False)
            else:
                end_turn(store, group.after, lambda: self.logits)
        self._pass, self._failed = None, False

    def _check_whole(self) -> None:
        if self._failed:
            raise UsageError("a forward pass failed half-way; reset() the cache and begin again")

    def _check_between(self, what: str) -> None:
        self._check_whole()
        if self._pass is not None and self._pass.attended:
            raise UsageError(f"{what} comes between two forward passes; call step() first, or reset()")

    # Between forward passes

    def reset(self) -> None:
        """Forget everything but the rows' names and seeds, keeping the slots."""
        for group in self.groups:
            group.store.reset()
        self._pass, self._failed = None, False

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Replace every row by the one that is named, as beam search does; modifies every tensor, in place.

        Raises:
            UsageError: a row does not exist, or follows another policy; nothing was modified.
        """
        self._check_between("reorder()")
        numbers = arguments.host_integers("reorder", rows, self.batch_size)
        named = torch.tensor(numbers)
        for group in self.groups:
            check_neighbours(group.store, numbers)
        for group in self.groups:
            group.store.check_reorder(named)
        for group in self.groups:
            group.store.reorder(named)

    def fork(self, rows: Sequence[int] | Tensor | None = None, *, seeds: Sequence[int] | None = None) -> FlashCache:
        """Return a cache that goes on from the same tokens, with memory of its own.

        Args:
            rows: which rows the new cache has, each as often as it is named; all by default.
            seeds: of the new rows' randomness; by default each goes on with its own.

        Raises:
            UsageError: there is no such row, or a forward pass is open.
        """
        self._check_between("fork()")
        named = list(range(self.batch_size)) if rows is None else arguments.host_integers("fork", rows, None)
        if not named or not all(0 <= r < self.batch_size for r in named):
            raise UsageError(f"fork({rows!r}): name some of the rows 0 to {self.batch_size - 1}, as fork([0, 0])")
        given = planning.integers("seeds", seeds)
        if given is not None and len(given) != len(named):
            raise UsageError(f"seeds names {len(given)} rows, and the fork has {len(named)}")
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.batch_size, new.policies = len(named), tuple(self.policies[r] for r in named)
        new.groups = [Group(group.store.fork(named), turn_nbytes=group.turn_nbytes) for group in self.groups]
        new._group_of = {layer: group for group in new.groups for layer in group.store.layers}
        for group in new.groups:
            for r, seed in enumerate(given or []):
                group.store.rows[r].seed = seed
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashCache:
        """Return a fork of all rows."""
        return self.fork()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied without memory of its own."""
        raise UsageError("two copies of a FlashCache would write the same slots: write cache.fork()")

    # Proof

    def receipt(self) -> Receipt:
        """Return what the cache holds and what happened to it.

        Raises:
            UsageError: a forward pass is open, or failed.
        """
        self._check_between("receipt()")
        alone = [group.store for group in self.groups if not group.evicts]
        return receipt_of(
            [planning.policy_text(policy) for policy in self.policies],
            [group.store for group in self.groups if group.evicts],
            alone,
            turn_nbytes=max(group.turn_nbytes for group in self.groups),
            other_nbytes=0,
            skipped={layer: "left alone by the policy" for store in alone for layer in store.layers},
            backend=self.backend.text,
        )

    def check_integrity(self) -> None:
        """Check that what is held agrees with itself; waits for the device; modifies nothing.

        Raises:
            IntegrityError: two parts contradict each other; the message says which, and where.
        """
        for group in self.groups:
            group.store.check_integrity()


def _packed(x: Tensor, places: Tensor) -> Tensor:
    """Return ``[R, H, S, D]`` with the slots of each row in other places."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
