"""What cannot be right is refused, each with its own words, and nothing is modified."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import KVPolicyError, PerLayer, Policy, TopK, UsageError
from kvpolicy.adapters.flash_attn import EvictionState, FlashCache
from kvpolicy.adapters.flash_attn.eviction import evict_
from kvpolicy.policies import h2o, knorm, snapkv
from tests.flash_attn.own import Own

POLICY = knorm(8, interval=4, recent=2)
SIZES = {"num_layers": 2, "num_heads": 2, "num_query_heads": 4, "head_dim": 8, "batch_size": 2}


def new(width: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, width, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_query_heads": 3}, "no multiple of num_heads=2"),
        ({"head_dim": 8.0}, "head_dim is a whole number"),
        ({"backend": "flash-atn"}, "did you mean 'flash-attn'"),
        ({"backend": "flash-attn"}, "cannot serve"),
        ({"softcap": 0.0}, "softcap=None switches it off"),
        ({"softcap": float("inf")}, "softcap is a positive, finite number"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"scaling": 0}, "scaling=0"),
        ({"scaling": -1.0}, "scaling=-1.0"),
        ({"scaling": "1"}, "scaling='1'"),
        ({"dtype": "float32"}, "write dtype=torch.float32"),
        ({"dtype": None}, "dtype=None"),
        ({"dtype": torch.int32}, "dtype=torch.int32"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"backend": None}, "backend None is no name"),
        ({"backend": ["sdpa"]}, r"backend \['sdpa'\] is no name"),
        ({"seeds": [1]}, "seeds names 1 rows, and batch_size is 2"),
        ({"requests": ["a", "b"]}, "one 64-bit integer"),
        ({"policy": [POLICY] * 3}, "3 policies for batch_size=2"),
        ({"policy": knorm}, "is a function that makes a policy"),
        ({"policy": snapkv(128)}, "say how many tokens will be decoded"),
    ],
)
def test_a_cache_that_cannot_be(options: dict[str, Any], words: str) -> None:
    given = {"policy": POLICY, "dtype": torch.float32, **SIZES, **options}
    with pytest.raises(KVPolicyError, match=words):
        FlashCache(**given)
    if "backend" not in options:
        with pytest.raises(KVPolicyError, match=words):
            EvictionState(slots=32, **given)


def swapped(i: int, make: Callable[[Tensor], Any]) -> Callable[[FlashCache], None]:
    def call(cache: FlashCache) -> None:
        given: list[Any] = [*new()]
        given[i] = make(given[i])
        cache.attend(0, *given)

    return call


def twice(cache: FlashCache) -> None:
    cache.attend(1, *new())


USES: dict[str, Callable[[FlashCache], Any]] = {
    "v is None": swapped(2, lambda v: None),
    "k has shape": swapped(1, lambda k: k.transpose(1, 2)),
    "q has shape": swapped(0, lambda q: q[:, :0]),
    "v has shape": swapped(2, lambda v: v[..., :4]),
    r"k is torch.float64, and the cache torch.float32": swapped(1, Tensor.double),
    "q is on meta": swapped(0, lambda q: q.to("meta")),
    "q has strides": swapped(0, lambda q: q.transpose(2, 3).contiguous().transpose(2, 3)),
    "asks for a gradient": swapped(1, lambda k: k.requires_grad_()),
    "there are the layers 0 to 1": lambda cache: cache.attend(2, *new()),
    "layer 1 attends twice": twice,
    "other layers of this forward pass": lambda cache: cache.attend(0, *new(3)),
    "counts=": lambda cache: cache.attend(0, *new(), [0, 1]),
    "no token was given": lambda cache: cache.attend(0, *new(0)),
    "softmax_scale= is not taken: .*FlashCache.scaling=": lambda cache: cache.attend(0, *new(), softmax_scale=1.0),
    "scale= is not taken: .*FlashCache.scaling=": lambda cache: cache.attend(0, *new(), scale=1.0),
    "softcap= is not taken: .*FlashCache.softcap=": lambda cache: cache.attend(0, *new(), softcap=1.0),
    "causal= is not taken: attend is causal": lambda cache: cache.attend(0, *new(), causal=True),
    "attention_mask= is not taken: .*counts=": lambda cache: cache.attend(0, *new(), attention_mask=None),
    "position_ids= is not taken: .*next_positions": lambda cache: cache.attend(0, *new(), position_ids=None),
    "return_lse= is not taken: attend keeps": lambda cache: cache.attend(0, *new(), return_lse=True),
    r"next_positions\(2.0\): width is": lambda cache: cache.next_positions(2.0),  # pyright: ignore[reportArgumentType]
    r"next_positions\(-1\): width is": lambda cache: cache.next_positions(-1),
    "write the same slots: write cache.fork": copy.copy,
    "two copies of a FlashCache": pickle.dumps,
    "fork.. comes between two": copy.deepcopy,
    "counts names 1 rows": lambda cache: cache.attend(0, *new(), [1]),
    "rotary_cos= is not taken": lambda cache: cache.attend(0, *new(), rotary_cos=1),
    "window_size= is not taken": lambda cache: cache.attend(0, *new(), window_size=(4, 0)),
    "alibi_slopes= is not taken": lambda cache: cache.attend(0, *new(), alibi_slopes=1),
    "layer 0 has not attended": lambda cache: cache.step(),
    "comes between two forward passes": lambda cache: cache.receipt(),
}


@pytest.mark.parametrize("words", USES)
def test_a_forward_pass_that_cannot_be(words: str) -> None:
    cache = FlashCache(POLICY, dtype=torch.float32, **SIZES)
    for layer in range(2):
        cache.attend(layer, *new(12))
    cache.step()
    cache.attend(1, *new())  # half of a forward pass
    held = [t.clone() for group in cache.groups for t in group.store.tensors()]
    rows = [group.store.rows for group in cache.groups]
    with torch.enable_grad(), pytest.raises(KVPolicyError, match=words):
        USES[words](cache)
    for now, then in zip([t for group in cache.groups for t in group.store.tensors()], held, strict=True):
        assert now.equal(then)
    assert rows == [group.store.rows for group in cache.groups]
    cache.attend(0, *new())
    cache.step()
    assert cache.seen == [13, 13]


def test_a_fork_that_cannot_be() -> None:
    cache = FlashCache(POLICY, dtype=torch.float32, **SIZES)
    for rows, words in (
        (0, "fork=0: give a list"),
        ([2], "rows 0 to 1"),
        ([], "name some"),
        ([0.0], "list of integers"),
    ):
        with pytest.raises(UsageError, match=words):
            cache.fork(rows)  # pyright: ignore[reportArgumentType]


def test_copies_are_forks() -> None:
    cache = FlashCache(POLICY, dtype=torch.float32, **SIZES)
    for layer in range(2):
        cache.attend(layer, *new(12))
    cache.step()
    for made in (copy.deepcopy(cache), cache.fork(torch.tensor([0, 1]))):
        for mine, other in zip(cache.cache(1), made.cache(1), strict=True):
            assert mine.data_ptr() != other.data_ptr()
            assert mine[:, :8].equal(other[:, :8])
    one = cache.fork(torch.tensor([1]))
    assert one.cache(0)[0][0, :8].equal(cache.cache(0)[0][1, :8])


def test_rows_of_equal_policies_that_lie_apart() -> None:
    other = knorm(6, interval=4, recent=2)
    cache = FlashCache([POLICY, other, POLICY], dtype=torch.float32, **{**SIZES, "batch_size": 3})
    with pytest.raises(UsageError, match="let rows under one policy stand next to each other"):
        cache.reorder([2, 1, 2])
    with pytest.raises(UsageError, match="follows the same policy"):
        cache.reorder([1, 1, 2])
    cache.reorder([0, 1, 2])


def test_no_room() -> None:
    cache = FlashCache(snapkv(128), max_new_tokens=2, dtype=torch.float32, **SIZES)
    for width in (140, 1, 1):
        for layer in range(2):
            cache.attend(layer, *new(width))
        cache.step()
    with pytest.raises(UsageError, match="larger max_new_tokens"):
        cache.attend(0, *new())


def test_num_splits_names_what_can_be_imported() -> None:
    cache = FlashCache(POLICY, dtype=torch.float32, **SIZES)
    with pytest.raises(KVPolicyError, match="TorchVarlen") as refused:
        cache.attend(0, *new(), num_splits=2)
    assert importlib.import_module(str(refused.value).split()[-1]).TorchVarlen(num_splits=2).num_splits == 2


# Caches of the caller


def with_(**options: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda call: {**call, **options}


def changed(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda call: {**call, name: make(call[name])}


def same_page(table: Tensor) -> Tensor:
    table = table.clone()
    table[1, 0] = table[0, 0]
    return table


def page_twice(table: Tensor) -> Tensor:
    table = table.clone()
    table[0, 1] = table[0, 0]
    return table


def crossed() -> dict[str, list[Tensor]]:
    """Return the keys and values of two layers, those of each in one buffer that is shorter than both."""
    buffers = [torch.zeros(2, 42, 2, 8) for _ in range(2)]
    return {"k_cache": [one[:, :32] for one in buffers], "v_cache": [one[:, 10:] for one in buffers]}


DENSE = {
    "was given": changed("policy", lambda _: knorm(9, interval=4, recent=2)),
    "k_cache has 1 layers, and the state was made for 2": changed("k_cache", lambda k: k[:1]),
    "k_cache has shape": changed("k_cache", lambda k: [one.transpose(1, 2) for one in k]),
    "v_cache has shape": changed("v_cache", lambda v: [one[:, :31] for one in v]),
    "v_cache is torch.float16": changed("v_cache", lambda v: [one.half() for one in v]),
    "k_cache is on meta": changed("k_cache", lambda k: [one.to("meta") for one in k]),
    "k_cache has strides": changed(
        "k_cache", lambda k: [one.transpose(2, 3).contiguous().transpose(2, 3) for one in k]
    ),
    "several slots share memory": changed("k_cache", lambda k: [one[:1].expand(2, -1, -1, -1) for one in k]),
    "begin at the same address": lambda call: {**call, "v_cache": call["k_cache"]},
    "cache_seqlens is torch.int64": changed("cache_seqlens", Tensor.long),
    r"cache_seqlens is \[19, 13\], not \[20, 14\]": changed("cache_seqlens", lambda x: x - 1),
    "cache_seqlens has strides .* rows share memory": changed("cache_seqlens", lambda x: x[:1].expand(2)),
    r"k_cache\[\d\] and v_cache\[\d\] share memory": lambda call: {**call, **crossed()},
    "state is None: make one": with_(state=None),
    "state is a FlashCache": lambda call: {**call, "state": FlashCache(POLICY, dtype=torch.float32, **SIZES)},
    "the order is": lambda call: {**call, "state": call["policy"], "policy": call["state"]},
    "k_cache is None; it is a tensor": with_(k_cache=None),
    "v_cache is 'v'; it is a tensor": with_(v_cache="v"),
    "function that makes a policy": with_(policy=knorm),
    "is a text; write Policy.parse": with_(policy="knorm(8)"),
    "page_refs= counts the pages of a block_table": with_(page_refs=[[1]]),
    r"make the state with batch_size=2, slots=31": changed("k_cache", lambda k: [one[:, :31] for one in k]),
    r"this is transformers' layout": changed("v_cache", lambda v: [one.transpose(1, 2) for one in v]),
    "heads or their size are others": changed("k_cache", lambda k: [one[..., :4] for one in k]),
    "the prompt needs 33 slots of a row, and there are 32": with_(tokens=[33, 20]),
    "it is int32": changed("cache_seqlens", lambda x: x[:1]),
    "every row has new tokens": with_(tokens=[20, 0]),
    "nothing to look at": with_(tokens=0),
    "tokens='3'": with_(tokens="3"),
}
PAGED = {
    r"block_table is \(2, 8\) torch.int64|block_table is torch.int64": changed("block_table", Tensor.long),
    "in one row": changed("block_table", page_twice),
    "have a page in common": changed("block_table", same_page),
    "is none of the": changed("block_table", lambda t: t + 100),
    "for each row, and the state": changed("block_table", lambda t: t[:, :4].contiguous()),
    "page_refs has another shape": with_(page_refs=[[1]]),
    "give allocate=": with_(page_refs=[[2] * 8] * 2),
    "it returns 4 page numbers": with_(page_refs=[[2] * 8] * 2, allocate=lambda n: [1]),
    r"allocate\(4\) returned None": with_(page_refs=[[2] * 8] * 2, allocate=lambda n: None),
    "allocate=3: give a function": with_(page_refs=[[2] * 8] * 2, allocate=3),
    "page_refs holds 1.0": with_(page_refs=torch.ones(2, 8)),
    "page_refs=3: give a list": with_(page_refs=3),
    "held by its row at least": with_(page_refs=[[0] * 8] * 2),
    "give block_table= if these are pages": with_(block_table=None),
    "block_table has strides": changed("block_table", lambda t: t[:1].expand(2, -1)),
    "do not exist, twice, or in use": with_(page_refs=[[2] * 8] * 2, allocate=lambda n: [0] * n),
}


@pytest.mark.parametrize(
    ("layout", "words"), [*(("dense", words) for words in DENSE), *(("paged 4", words) for words in PAGED)]
)
def test_caches_that_cannot_be(layout: str, words: str) -> None:
    own = Own(layout, POLICY, (2, 2, 32, 4, 2, 8), torch.float32)
    own.k.normal_()
    own.v.normal_()
    own.begin([20, 14])
    own.seqlens += torch.tensor([20, 14], dtype=torch.int32)
    call = {"k_cache": own.given[0], "v_cache": own.given[1], "cache_seqlens": own.seqlens, "policy": POLICY,
            "state": own.state, "tokens": [20, 14], "block_table": own.table}  # fmt: skip
    watched = [own.k, own.v, own.seqlens, *own.state.store.tensors(), *([] if own.table is None else [own.table])]
    held, rows = [t.clone() for t in watched], own.state.store.rows
    change = {**DENSE, **PAGED}[words]
    with pytest.raises(KVPolicyError, match=words) as refused:
        evict_(**change(dict(call)))
    assert ("transpose(" in str(refused.value)) == ("transformers" in str(refused.value))
    assert all(now.equal(then) for now, then in zip(watched, held, strict=True))
    assert own.state.store.rows is rows
    assert evict_(**call).rows == (True, True)


@pytest.mark.parametrize(
    ("policy", "slots", "words"),
    [
        (POLICY, 11, "allocate more"),
        (Policy(TopK(PerLayer((8, 9))), interval=4, recent=2), 32, "one length of each row"),
    ],
)
def test_a_state_that_cannot_be(policy: Policy, slots: int, words: str) -> None:
    with pytest.raises(KVPolicyError, match=words):
        EvictionState(policy, slots=slots, dtype=torch.float32, **SIZES)


def test_queries_that_are_not_known() -> None:
    policy = h2o(24, interval=8)
    own = Own("dense", policy, (2, 2, 64, 4, 2, 8), torch.float32)
    own.seqlens += 10
    q = torch.randn(2, 10, 4, 8)
    own.state.observe(0, q)
    with pytest.raises(UsageError, match="layer 1 are not known"):
        evict_(*own.given, own.seqlens, policy, own.state)
    with pytest.raises(UsageError, match="layer 0 was observed"):
        own.state.observe(0, q)
    with pytest.raises(UsageError, match="layer 5"):
        own.state.observe(5, q)
    with pytest.raises(UsageError, match="other layers of this forward pass"):
        own.state.observe(1, q[:, :3])
    own.state.observe(1, q)
    evict_(*own.given, own.seqlens, policy, own.state)
    own.seqlens += 1
    for layer in range(2):
        own.state.observe(layer, q[:, :1])
    evict_(*own.given, own.seqlens, policy, own.state)
    with pytest.raises(UsageError, match="tokens=0"):
        own.state.observe(0, q)
    evict_(*own.given, own.seqlens, policy, own.state, tokens=0)
    own.state.observe(0, q)
