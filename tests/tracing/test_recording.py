"""What a trace says is what an ordinary EvictionCache holds after every forward pass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpolicy import LayerPlan, Plan, Policy, Scores, UsageError, View, select_top
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.receipt import Receipt
from kvpolicy.tracing import Trace, trace
from kvpolicy.tracing.cache import RecordingCache
from kvpolicy.tracing.recording import pieces_of
from tests.cli.tools import byte_tokenizer
from tests.models import tiny
from tests.tracing.traces import HOSTILE, VASE, model, recorded, usual

POLICIES = {
    "vase": ("llama", VASE),
    "layers": ("llama", "Policy(ValueGuard(norm='l2') >> TopK(PerLayer((None, 24, 16))), interval=8, recent=4)"),
    "heads": ("llama", "Policy(Sinks(2) >> TopK(Adaptive(20)), interval=8, recent=4)"),
    "every query": ("llama", "Policy(AccumulatedAttention() >> Prompt() >> TopK(24), interval=8, recent=4)"),
    "prompt only": ("llama", "Policy(ValueGuard() >> TopK(24), interval=None, recent=4)"),
    "sliding layers": ("gemma3", VASE),
    "latents": ("deepseek_v3", VASE),
}


def receipts(found: Trace, made: Any, policy: Any) -> list[Receipt]:
    """Return the receipt after each forward pass of the same tokens through an ordinary cache."""
    chosen = Policy.parse(policy) if isinstance(policy, str) else policy
    with torch.inference_mode(), EvictionCache(made, chosen, max_new_tokens=20) as cache:
        proofs, start = [], 0
        for stop in found.steps:
            made(torch.tensor([found.ids[start:stop]]), past_key_values=cache)
            proofs.append(cache.receipt())
            start = stop
    return proofs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chat": True}, "has no chat template"),
        ({"system": "Be brief."}, "which this model has not"),
        ({"prompt": ""}, "makes no token"),
    ],
)
def test_a_prompt_that_cannot_be_is_a_wrong_use_of_the_library(options: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"prompt": "a", **options}
    with pytest.raises(UsageError, match=said):
        trace(model(), byte_tokenizer(None), VASE, max_new_tokens=1, **given)


@pytest.mark.parametrize(("family", "policy"), POLICIES.values(), ids=POLICIES)
def test_kept_positions_are_those_of_the_receipt_at_every_moment(family: str, policy: str) -> None:
    found = recorded(policy, new=20, family=family)
    proofs = receipts(found, model(family), policy)
    assert found.evictions
    assert found.norm == ("l2" if "l2" in policy else "range")
    slots = found.slots()
    for step, (seen, proof) in enumerate(zip(found.steps, proofs, strict=True)):
        assert found.layers == proof.layers
        assert seen == proof.seen[0]
        held = found.held(seen).sum(1)
        assert held.equal(slots[:, step])
        assert int(held.max()) == proof.slots[0]
        for layer in proof.layers:
            assert found.kept(layer, seen).equal(proof.positions(layer)[0])
        assert found.nbytes[step] == proof.nbytes + proof.other_nbytes


def test_numbers_held_are_those_of_the_budget() -> None:
    found, held = usual(), usual().prompt_length
    for step, seen in enumerate(found.steps):
        held = 24 if (seen - found.prompt_length) % 8 == 0 else held + 1
        assert set(found.slots()[:, step].tolist()) == {held}


def test_text_is_that_of_the_tokens() -> None:
    found = usual()
    assert "".join(found.pieces) == byte_tokenizer(None).decode(found.ids)
    assert "".join(found.pieces).startswith(HOSTILE)
    assert found.prompt_length == len(HOSTILE.encode())
    assert (len(found.ids), found.seen) == (found.prompt_length + 40, found.prompt_length + 39)
    assert found.pieces[found.pieces.index("é") + 1] == ""  # two bytes, two tokens, one character


def test_pieces_keep_the_spaces_that_a_tokenizer_drops_at_the_front() -> None:
    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join([" a", " bc", "\ufffd"][one] for one in ids).removeprefix(" ")

    assert pieces_of(Words(), [0, 1, 0]) == ["a", " bc", " a"]
    assert "".join(pieces_of(Words(), [0, 2, 2])) == "a\ufffd\ufffd"


def test_values_are_those_of_the_first_layer() -> None:
    found = usual()
    inner: Any = model().model
    hidden = inner.layers[0].input_layernorm(inner.embed_tokens(torch.tensor(found.ids[: found.seen])))
    values = inner.layers[0].self_attn.v_proj(hidden).view(found.seen, 2, 8)
    expected = (values.amax(-1) - values.amin(-1)).T
    torch.testing.assert_close(found.values[:2], expected.detach())


def test_protected_are_the_sinks_and_the_largest_values_of_every_eviction() -> None:
    found, now = usual(), usual().dropped_at()
    for number, seen in enumerate(found.evictions, 1):
        before = (torch.arange(found.seen) < seen) & (now >= seen)
        may_go = before & (torch.arange(found.seen) < seen - 4)
        ranked = torch.where(may_go, found.values, -1)
        ranked[:, :4] = torch.inf
        order = ranked.sort(dim=1, stable=True).indices  # of equal ones the more recent is the larger
        largest = torch.zeros_like(may_go).scatter_(1, order[:, -24 // 4 :], True)
        protected = (found.protected_first > 0) & (found.protected_first <= number) & (found.protected_last >= number)
        assert protected.equal(largest)
        assert not (protected & (now == seen)).any()
    assert set(found.tier[:, :4].flatten().tolist()) == {4}
    assert set(found.tier[:, 4:].flatten().tolist()) == {0, 2}


def test_lifetimes_end_with_the_eviction_that_dropped() -> None:
    found, lives = usual(), usual().lifetimes()
    for line, position in ((0, 5), (3, 20), (5, found.seen - 1)):
        last = found.seen
        for seen in reversed(found.evictions):
            if not found.held(seen)[line, position] and position < seen:
                last = seen
        assert lives[line, position] == last - position


def test_bytes_in_use_and_of_the_full_cache_are_counted_by_hand() -> None:
    found = usual()
    token = 3 * 2 * (8 + 8) * 4  # layers, heads, keys and values, float32
    assert found.full_nbytes == tuple(seen * token for seen in found.steps)
    assert found.used_nbytes == tuple(int(held) * token for held in found.slots()[0])


def test_a_file_gives_the_trace_back(tmp_path: Path) -> None:
    found = usual()
    found.save(tmp_path / "a.json")
    again = Trace.load(tmp_path / "a.json")
    for one in dataclasses.fields(Trace):
        old, new = getattr(found, one.name), getattr(again, one.name)
        if one.name == "values":
            torch.testing.assert_close(new, old, rtol=1e-3, atol=0)
        elif isinstance(old, torch.Tensor):
            assert new.equal(old), one.name
        else:
            assert new == old, one.name
    assert str(again) == str(found)


def test_a_file_says_how_to_run_it_again(tmp_path: Path) -> None:
    run = usual().run
    asked = {"max_new_tokens": run["max_new_tokens"], "temperature": run["temperature"], "seed": run["seed"]}
    again = trace(model(), byte_tokenizer(None), run["policy"], run["prompt"], chat=run["chat"], **asked)
    assert again.ids == usual().ids
    assert again.dropped.equal(usual().dropped)
    assert set(run["versions"]) == {"kvpolicy", "torch", "transformers", "python"}


def test_the_seed_is_that_of_the_noise() -> None:
    text = "Policy(Constant() >> Stochastic() >> TopK(24), interval=8, recent=4)"
    one, two, same = (
        trace(model(), byte_tokenizer(None), text, HOSTILE, max_new_tokens=3, seed=seed) for seed in (1, 2, 1)
    )
    assert one.dropped.equal(same.dropped)
    assert not one.dropped[:, :40].equal(two.dropped[:, :40])


def test_a_policy_without_the_algebra_is_recorded() -> None:
    class KeepNewest:
        needs: frozenset[str] = frozenset()

        def plan(self, spec: Any) -> Plan:
            return Plan((LayerPlan(20, 28, interval=8, recent=1, window=0),) * spec.num_layers)

        def init(self, spec: Any, rows: int) -> tuple[()]:
            return ()

        def select(self, view: View, state: Any) -> Any:
            return select_top(Scores.of(view, view.positions, weights=False), view, view.budget), state

    found = recorded(KeepNewest(), new=20)
    for seen in found.evictions:
        assert found.kept(1, seen)[0].tolist() == list(range(seen - 20, seen))
    assert not found.tier.any()


# What is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no trace"),
        ('{"format": "kvpolicy trace", "version": 99}', "version 99"),
        ('{"format": "kvpolicy trace", "version": 1}', "not whole"),
    ],
)
def test_files_that_are_no_trace_are_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=says):
        Trace.load(tmp_path / "a.json")


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    what = usual().to_dict()
    what["dropped"] = {**what["dropped"], "data": what["dropped"]["data"][:40]}
    (tmp_path / "a.json").write_text(json.dumps(what))
    with pytest.raises(UsageError, match="no packed array"):
        Trace.load(tmp_path / "a.json")


def test_what_a_record_cannot_follow_is_refused() -> None:
    made, policy = tiny("llama"), Policy.parse(VASE)
    with torch.inference_mode(), RecordingCache(made, policy) as cache:
        with pytest.raises(UsageError, match="no token has been seen"):
            cache.trace([], [], {})
        with pytest.raises(UsageError, match="one request, and the batch has 2"):
            made(torch.ones(2, 4, dtype=torch.long), past_key_values=cache)
        made(torch.arange(2, 9)[None], past_key_values=cache)
        for refused in (
            cache.reset,
            cache.fork,
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([0])),
        ):
            with pytest.raises(UsageError, match="make a new RecordingCache"):
                refused()
    with pytest.raises(UsageError, match="layer 9 does not evict; those that do are 0 to 2"):
        usual().kept(9)
