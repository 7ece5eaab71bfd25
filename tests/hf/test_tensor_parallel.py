"""A model split over processes keeps what one process keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from kvpolicy.adapters.hf.ranks import Ranks
from kvpolicy.errors import UnsupportedError
from tests.hf.split import CASES, Asked, same, start
from tests.models import default_folder, tiny

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this torch has no torch.distributed with gloo",
)

# model, changes, policies, KV heads that each of two processes has
SPLITS: list[tuple[str, dict[str, Any], list[str], int]] = [
    ("llama", {}, list(CASES), 1),
    ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4}, ["vase", "apart"], 2),
    ("gpt_oss", {}, ["vase"], 2),  # its plan splits experts, and leaves attention whole
]


def compare(whole: dict[str, Any], parts: list[dict[str, Any]], heads: int, close: float) -> None:
    for name, one in whole.items():
        for rank, part in enumerate(parts):
            here = f"{name}, rank {rank} of {len(parts)}"
            assert one["kept"].keys() == part[name]["kept"].keys(), here
            for layer, kept in one["kept"].items():
                first = 0 if heads == kept.shape[1] else rank * heads
                mine = kept[:, first : first + heads]
                assert torch.equal(mine, part[name]["kept"][layer]), f"{here}, layer {layer}"
            assert (one["logits"] - part[name]["logits"]).abs().max() <= close, here


def test_two_processes_keep_what_one_keeps(tmp_path: Path) -> None:
    for family, changes, _, _ in SPLITS:
        tiny(family, torch.float64, **changes).save_pretrained(tmp_path / family)
    asked: list[Asked] = [(str(tmp_path / family), names, torch.float64, (17, 9)) for family, _, names, _ in SPLITS]
    found = start("same", tmp_path, 2, asked)
    for one_asked, (_, _, names, heads) in zip(asked, SPLITS, strict=True):
        where = one_asked[0]
        parts = [one[where] for one in found]
        whole = same([one_asked], 0, 1)[where]
        kept = whole["vase"]["kept"][1]
        assert not torch.equal(kept[:, 0], kept[:, -1]), "heads that all keep the same would prove nothing"
        compare(whole, parts, heads, 1e-9)
        if heads < kept.shape[1]:  # what is split is held once, but for the positions of queries
            for name in names:
                assert sum(part[name]["nbytes"] for part in parts) <= whole[name]["nbytes"] * 1.05


def test_what_processes_cannot_do_together_is_refused_on_each_of_them(tmp_path: Path) -> None:
    for name, heads in {"even": 2, "uneven": 3, "few": 1}.items():
        tiny("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=heads).save_pretrained(tmp_path / name)
    expected = {
        "uneven": ("UnsupportedError", "LlamaForCausalLM has 3 KV heads, which 2 processes cannot share"),
        "few": ("UnsupportedError", "start 1"),
        "prompt": ("UsageError", "must agree on input_ids"),
        "seeds": ("UsageError", "seeds; on rank 0 it is [0, 0, 0], and on rank 1 [1, 1, 1]"),
        "counters": ("IntegrityError", "the counters of request 0"),
        "positions": ("IntegrityError", "the positions that layer 1 keeps"),
        "static": ("UnsupportedError", "static=True"),
        "save": ("UnsupportedError", "save()"),
        "stages": ("UnsupportedError", "split into stages"),
        "others": ("UnsupportedError", "tp_plan='auto'"),
    }
    for said in start("misuse", tmp_path, 2, str(tmp_path)):
        assert said.keys() == expected.keys()
        for name, (kind, words) in expected.items():
            assert said[name][0] == kind, said[name]
            assert words in said[name][1]


def test_heads_are_where_the_plan_says_or_nothing_is_decided() -> None:
    assert Ranks().heads(5) == (5, 0)
    assert [Ranks(2, index, 4, split=True).heads(2) for index in (0, 1)] == [(4, 0), (4, 2)]
    assert [Ranks(2, index, 4, split=False).heads(4) for index in (0, 1)] == [(4, 0), (4, 0)]
    assert Ranks(2, 1, 4, split=False).all_reduce is None  # each has all heads: a sum would count them twice
    for split, local in ((True, 4), (False, 2), (True, 1)):
        with pytest.raises(UnsupportedError, match=f"a layer has {local} KV heads on rank 1"):
            Ranks(2, 1, 4, split=split).heads(local)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_on_three_processes(tmp_path: Path) -> None:
    asked: list[Asked] = [(default_folder(), ["apart"], torch.float32, (9,))]
    parts = [one[default_folder()] for one in start("same", tmp_path, 3, asked)]  # it has 3 KV heads
    compare(same(asked, 0, 1)[default_folder()], parts, 1, 1e-3)
