"""The oracle: the same policy on a cache that keeps every token and hides the evicted ones.

Nothing here is shared with the store, the eviction driver or the adapter: slots are never moved,
order is sorted anew, and attention is written out over all tokens ever seen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from kvpolicy import EvictionPolicy, LayerPlan, LayerSpec, ModelSpec, StageState, View

_current: list[Oracle] = []


@dataclass
class Layer:
    alive: Tensor  # [R, H, S] bool
    positions: Tensor  # [R, S]
    queries: Tensor  # [R, Hq, N, D] every query ever
    query_positions: Tensor  # [R, N]
    state: Any
    evictions: list[int]
    told: int = 0  # columns that the policy has seen
    budgets: Tensor = field(default_factory=lambda: torch.zeros(0))  # [R, H]


@dataclass
class Oracle:
    """Decode with a full cache, hiding what the policy has evicted.

    With ``drafts``, later passes of up to one token more are drafts: :meth:`crop` takes some back,
    and only then is anything evicted. Of a longer pass, the last ``drafts`` tokens are decoded ones, and
    the turn ends before them.
    """

    model: Any
    policy: EvictionPolicy
    max_new_tokens: int | None = None
    seeds: list[int] | None = None
    drafts: int = 0
    layers: dict[int, Layer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        kinds = [type(layer).__name__ for layer in self.cache.layers]
        self.evicting = [i for i, kind in enumerate(kinds) if kind == "DynamicLayer"]
        self.plan = self.policy.plan(ModelSpec(len(self.evicting), self.max_new_tokens))
        self.columns, self.decoded, self.prompt = 0, 0, torch.zeros(0)
        self.pads: Tensor | None = None
        self.together: Tensor | None = None
        self.pictures = False
        self.history: list[dict[int, Tensor]] = []
        self.unsettled: dict[int, tuple[Tensor, Tensor, Any]] = {}
        self.in_prompt = True
        self.turn_done = False  # a turn has ended, but for the tokens that may be drafts

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, **image: Any) -> Tensor:
        """Return the logits of the last token of each row, ``[R, vocabulary]``.

        ``image`` is what a model takes beside tokens; its positions are then left to the model, and
        tokens of one ``token_type_ids`` block, 1 for a piece of an image, see each other.
        """
        width = tokens.shape[1]
        new = torch.ones_like(tokens) if attention_mask is None else attention_mask[:, -width:]
        self.valid = new.bool() if self.pads is None else torch.cat([self.pads, new.bool()], 1)
        self.pads = self.valid
        positions = (self.valid.long().cumsum(1) - 1).clamp(min=0)[:, -width:]
        self.decoding = self.columns > 0 and width <= self.drafts + 1
        self.tail = 0 if self.decoding else min(self.drafts, int(new.sum(1).min()) - 1)
        self.settled = self.decoded if self.decoding else 0
        self.decoded = self.decoded + width if self.decoding else self.tail
        if not self.decoding and self.in_prompt:
            self.prompt = self.valid.sum(1) - self.tail
        self.in_prompt = self.in_prompt and not self.decoding and not self.tail
        if "token_type_ids" in image:
            self.together = image["token_type_ids"].bool()
        places = {} if image or self.pictures else {"position_ids": positions}
        self.pictures = self.pictures or bool(image)
        before = self.model.get_decoder()
        original = before.config._attn_implementation
        before.set_attn_implementation("oracle")
        _current.append(self)
        try:
            out = self.model(
                tokens,
                attention_mask=self.valid.long(),
                past_key_values=self.cache,
                use_cache=True,
                **places,
                **image,
            )
        finally:
            _current.pop()
            before.set_attn_implementation(original)
        self.columns += width
        return out.logits[:, -1]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        layer, (rows, heads, size, _), width = module.layer_idx, key.shape, query.shape[2]
        asked, keys, values = query, key, value  # what the policy sees
        if hasattr(module, "expand_kv"):
            heads = 1
            asked, keys, values = absorbed(module, query, self.cache.layers[layer])
        held = self.layers.get(layer)
        if held is None:
            held = self.layers[layer] = Layer(
                torch.zeros(rows, heads, 0, dtype=torch.bool),
                torch.zeros(rows, 0, dtype=torch.long),
                asked[:, :, :0],
                torch.zeros(rows, 0, dtype=torch.long),
                None,
                [0] * rows,
            )
        if not self.decoding and held.told < held.alive.shape[2] and "every_query" in self.policy.needs:
            self.evict(layer, held, keys[:, :, :-width], values[:, :, :-width], kwargs, seen=self.valid[:, :-width])
        new = self.valid[:, -width:]
        numbers = torch.where(new, self.valid.long().cumsum(1)[:, -width:] - 1, -1)
        held.alive = torch.cat([held.alive, new[:, None].expand(-1, heads, -1)], 2)
        held.positions = torch.cat([held.positions, numbers], 1)
        held.queries = torch.cat([held.queries, asked], 2)
        held.query_positions = torch.cat([held.query_positions, numbers], 1)
        causal = torch.arange(size) <= torch.arange(size - width, size)[:, None]
        if self.together is not None and width > 1:  # a prompt with one image: its pieces see each other
            causal = causal | (self.together[:, None, :, None] & self.together[:, None, None, :])
        visible = held.alive[:, :, None] & causal
        group = query.shape[1] // key.shape[1]
        out = attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            visible.repeat_interleave(query.shape[1] // heads, 1),
            **kwargs,
        )
        if self.drafts:
            self.unsettled[layer] = keys, values, kwargs
            if not self.decoding:
                self.cut(layer, held, keys, values, kwargs)
        else:
            self.evict(layer, held, keys, values, kwargs)
        return out.transpose(1, 2).contiguous()

    def cut(self, layer: int, held: Layer, keys: Tensor, values: Tensor, kwargs: dict[str, Any]) -> None:
        """Evict at the end of a turn, without the tokens that may be drafts."""
        end = keys.shape[2] - self.tail
        whole, hidden = self.valid, held.alive[:, :, end:]
        early = Layer(held.alive[:, :, :end], held.positions[:, :end], held.queries[:, :, :end],
                      held.query_positions[:, :end], held.state, held.evictions, held.told)  # fmt: skip
        self.valid, self.turn_done = whole[:, :end], False
        self.evict(layer, early, keys[:, :, :end], values[:, :, :end], kwargs)
        self.valid, self.turn_done = whole, True
        held.state, held.told = early.state, early.told
        held.alive = torch.cat([early.alive, hidden], 2)

    def crop(self, count: int) -> None:
        """Take back the last tokens, and evict where it is due."""
        self.cache.crop(-count)
        size = self.valid.shape[1] - count
        self.valid = self.pads = self.valid[:, :size]
        self.columns, self.decoded = self.columns - count, self.decoded - count
        for layer, (keys, values, kwargs) in self.unsettled.items():
            held = self.layers[layer]
            held.alive, held.positions = held.alive[:, :, :size], held.positions[:, :size]
            held.queries, held.query_positions = held.queries[:, :, :size], held.query_positions[:, :size]
            self.evict(layer, held, keys[:, :, :size], values[:, :, :size], kwargs)
        self.unsettled = {}

    def evict(
        self, index: int, held: Layer, keys: Tensor, values: Tensor, kwargs: dict[str, Any], seen: Tensor | None = None
    ) -> None:
        """Evict where it is due; with ``seen``, only let the policy see what a turn is about to push away."""
        plan = self.plan.layers[self.evicting.index(index)]
        if plan is None:  # the policy leaves this layer alone
            return
        if seen is not None:
            view = self.view(index, held, keys, values, plan, torch.zeros(len(seen), dtype=torch.bool), kwargs, seen)
            _, held.state = self.policy.select(view, self.state(held, view, plan))
            held.told = keys.shape[2]
            return
        interval = plan.interval
        at_interval = interval is not None and self.decoded // interval > self.settled // interval
        turn = not self.decoding and not self.turn_done
        length = held.alive.sum(-1)
        if not len(held.budgets):
            held.budgets = torch.tensor(plan.heads or (plan.budget,)).expand_as(length)
        due = (length > held.budgets).any(-1)
        if not (at_interval or turn) or not (due.any() or "every_query" in self.policy.needs):
            return
        view = self.view(index, held, keys, values, plan, due, kwargs)
        again = torch.tensor([not n or (plan.refresh is not None and n % plan.refresh == 0) for n in held.evictions])
        sharing = due & again if plan.shared else torch.zeros_like(due)
        if sharing.any():
            most = int(length.max())
            view = dataclasses.replace(view, sharing=sharing, max_budget=most, max_victims=most)
        state = self.state(held, view, plan)
        keep, state = self.policy.select(view, state)
        held.budgets = torch.where(sharing[:, None], keep.mask.sum(-1), held.budgets)
        held.told = keys.shape[2]
        held.state = state
        held.alive = held.alive & keep.mask
        for r, one in enumerate(due.tolist()):
            held.evictions[r] += one
        self.history.append({index: held.alive.clone()})

    def view(
        self,
        index: int,
        held: Layer,
        keys: Tensor,
        values: Tensor,
        plan: LayerPlan,
        due: Tensor,
        kwargs: Any,
        valid: Tensor | None = None,
    ) -> View:
        rows, heads, size, _ = keys.shape
        positions = torch.where(held.alive, held.positions[:, None].expand(-1, heads, -1), -1)
        order = torch.argsort(torch.where(held.alive, positions, 2**30), dim=-1, stable=True)
        length = held.alive.sum(-1)
        goal = held.budgets if len(held.budgets) else torch.full_like(length, plan.budget)
        budget = torch.where(due[:, None], goal, length)
        queries, at = held.queries, held.query_positions
        if plan.window:  # the newest of each row, absent where it has fewer
            pick = torch.argsort(at, dim=1, stable=True)[:, -plan.window :]
            short = max(0, plan.window - pick.shape[1])
            queries = queries.gather(2, pick[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
            at = at.gather(1, pick)
            queries = torch.nn.functional.pad(queries, (0, 0, short, 0))
            at = torch.nn.functional.pad(at, (short, 0), value=-1)
        zeros = torch.zeros(rows, dtype=torch.long)
        columns = torch.arange(size)
        unseen = held.alive & (columns >= held.told)
        fresh = torch.where(unseen, columns, size).sort(-1).values[..., : size - held.told]
        fresh = torch.where(fresh == size, -1, fresh)
        sinks = kwargs.get("s_aux")
        return View(
            keys=keys, values=values, positions=positions.int(), order=order.int(),
            fresh=fresh,
            budget=budget, lengths=length,
            seen=(self.valid if valid is None else valid).sum(1), prompt_length=self.prompt,
            evictions=torch.tensor(held.evictions), request=zeros,
            seed=torch.tensor(self.seeds) if self.seeds else zeros, layer=zeros + index,
            recent=plan.recent, max_budget=int(budget.max()), max_victims=int((length - budget).max()),
            queries=queries if plan.window else None, query_positions=at.int() if plan.window else None,
            num_layers=len(self.cache.layers), num_heads=heads, scaling=kwargs["scaling"],
            softcap=kwargs.get("softcap"),
            sink_logits=None if sinks is None else sinks.detach().expand(rows, -1),
        )  # fmt: skip

    def state(self, held: Layer, view: View, plan: LayerPlan) -> Any:
        """Return the state over all tokens ever seen: what was remembered, then nothing."""
        rows, heads, size = view.shape
        spec = LayerSpec(heads, held.queries.shape[1], view.keys.shape[3], view.values.shape[3], size,
                         view.keys.dtype, view.keys.device)  # fmt: skip
        empty = self.policy.init(spec, rows)
        if held.state is None:
            return empty
        joined: list[StageState | None] = []
        for old, new in zip(held.state, empty, strict=True):
            if old is None or new is None:
                joined.append(None)
                continue
            slots = [torch.cat([a, b[:, :, a.shape[2] :]], 2) for a, b in zip(old.slots, new.slots, strict=True)]
            joined.append(StageState(tuple(slots), old.rows))
        return tuple(joined)

    def kept(self, layer: int) -> Tensor:
        """Return kept positions, ascending, -1 behind the last: ``[R, H, slots]``."""
        held = self.layers[layer]
        found = torch.where(held.alive, held.positions[:, None], 2**30).sort(-1).values
        found = found[..., : int(held.alive.sum(-1).max())]
        return torch.where(found == 2**30, -1, found)


def absorbed(module: Any, query: Tensor, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of latent attention as one KV head, from the model's own cache."""
    plain, rank = module.qk_nope_head_dim, module.kv_lora_rank
    weight = module.kv_b_proj.weight.view(query.shape[1], -1, rank)
    in_latents = torch.einsum("bhwp,hpr->bhwr", query[..., :plain], weight[:, :plain])
    keys = torch.cat([layer.keys, layer.values], -1)
    return torch.cat([in_latents, query[..., plain:]], -1), keys, layer.keys


def attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scaling: float,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Attend, written out."""
    logits = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    weights = torch.nan_to_num(torch.softmax(logits, -1))
    return weights[..., : key.shape[2]] @ value


def _oracle(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    oracle = _current[-1]
    kwargs.pop("sliding_window", None)
    kwargs.setdefault("scaling", query.shape[-1] ** -0.5)  # what attention takes where a model names none
    if module.layer_idx in oracle.evicting:
        return oracle.attend(module, query, key, value, **kwargs), None
    group, size, width = query.shape[1] // key.shape[1], key.shape[2], query.shape[2]
    if mask is None:
        mask = (torch.arange(size) <= torch.arange(size - width, size)[:, None])[None, None]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return attention(query, key, value, mask, **kwargs).transpose(1, 2).contiguous(), None


AttentionInterface.register("oracle", _oracle)
AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
