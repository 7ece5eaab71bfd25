"""Texts that are read under policies: the details add up."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpolicy import Policy
from kvpolicy.adapters.hf import replay, replays, survival
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.jobs import Model, Reading
from kvpolicy.evaluation.planning import PROMPT_OF_TEXT, TEXTS_AT_ONCE, Asking, cells, jobs
from kvpolicy.evaluation.problem import Text
from kvpolicy.evaluation.record import Record
from kvpolicy.evaluation.results import Results, encode
from kvpolicy.evaluation.templates import fill
from kvpolicy.evaluation.texts import BLOCKS, EVERY, read
from kvpolicy.policies import random_eviction, snapkv, vase
from tests.cli.tools import byte_tokenizer
from tests.models import tiny

PROMPT, LENGTH = 16, 200
POLICIES = [vase(24, interval=8, recent=8), random_eviction(32, interval=16, recent=8), vase(400)]
NAMES = [11, 12, 13]
STARTS = [24, 32, 0]  # the budgets


@functools.cache
def model() -> Any:
    return tiny("llama", torch.float64)


def texts(count: int = 3, length: int = LENGTH) -> list[list[int]]:
    return torch.randint(2, 97, (count, length), generator=torch.Generator().manual_seed(2)).tolist()


@functools.cache
def found() -> list[list[dict[str, Any]]]:
    return read(model(), POLICIES, texts(), PROMPT, 5, NAMES, STARTS)


def test_every_text_has_details_under_every_policy() -> None:
    assert [len(of) for of in found()] == [3, 3, 3]
    for details in (one for of in found() for one in of):
        assert details["kl"] >= 0
        assert 0 <= details["agreement"] <= 1
        assert max(details["log_prob"], details["full_log_prob"]) < 0
        assert set(details["by_position"]) == {"kl", "agreement", "log_prob", "full_log_prob"}
        assert {len(values) for values in details["by_position"].values()} == {BLOCKS}
        assert min(details["by_position"]["kl"]) >= -1e-12
        assert len(details["mass_lost"]) == len(details["output_error"]) == 3  # layers
        assert all(0 <= share <= 1 for share in details["mass_lost"])
        assert 0 <= details["survival"] <= details["survival_union"] <= 1
        assert 0 < details["compression"] <= 1
        assert details["peak_nbytes"] > 0


def test_blocks_of_positions_average_to_the_whole() -> None:
    # 184 tokens behind the prompt, of which every 7th is compared: 27, in three blocks of 4 and five of 3.
    for details in found()[2]:  # nothing is evicted: the means are over all
        for name, values in details["by_position"].items():
            assert (4 * sum(values[:3]) + 3 * sum(values[3:])) / 27 == pytest.approx(details[name], abs=1e-12)


def test_nothing_is_lost_where_nothing_is_evicted() -> None:
    for details in found()[2]:
        assert details["kl"] == pytest.approx(0, abs=1e-9)
        assert details["log_prob"] == pytest.approx(details["full_log_prob"], abs=1e-9)
        assert [details["agreement"], details["compression"], details["evictions"]] == [1, 1, 0]
        assert [details["survival"], details["survival_union"]] == [1, 1]
        assert max(details["mass_lost"]) < 1e-6
        assert max(details["output_error"]) < 1e-5


def test_what_is_lost_is_what_replaying_each_text_alone_says() -> None:
    for policy, start, of in zip(POLICIES[:2], STARTS, found(), strict=False):
        for tokens, name, details in zip(texts(), NAMES, of, strict=True):
            one = replays_alone(policy, tokens, name)
            behind = one.columns > start
            assert details["kl"] == pytest.approx(float(one.kl[0, behind].mean()), abs=1e-9)
            assert details["log_prob"] == pytest.approx(float(one.log_probs[0, behind].mean()), abs=1e-9)
            assert details["evictions"] == one.receipt.evictions[0] > 5
            assert details["compression"] == pytest.approx(one.shares[0], abs=1e-12)
            assert details["peak_nbytes"] == one.receipt.peak_nbytes
            old = LENGTH - 1 - one.receipt.capacity
            assert (details["survival"], details["survival_union"]) == tuple(
                float(share[0]) for share in survival(one.receipt, 0, old)
            )
            assert details["kl"] > 1e-4
            assert min(details["mass_lost"]) > 0.05


def replays_alone(policy: Policy, tokens: Sequence[int], name: int) -> Any:
    columns = list(range(PROMPT, LENGTH, EVERY))
    (one,) = replays(model(), [policy], torch.tensor([tokens]), PROMPT, columns=columns, seeds=[5], requests=[name])
    return one


@pytest.mark.parametrize("interval", [8, 12, 16, 32, 64])
def test_tokens_are_compared_at_every_distance_from_the_last_eviction(interval: int) -> None:
    assert {column % interval for column in range(PROMPT, PROMPT + EVERY * interval, EVERY)} == set(range(interval))


def test_an_eviction_of_the_prompt_alone_is_behind_it() -> None:
    (of,) = read(model(), [snapkv(12, window=4)], texts(1), PROMPT, 0, [1], [12])
    whole = replay(model(), snapkv(12, window=4), torch.tensor(texts(1)), PROMPT, full=True)
    assert whole.kl is not None
    assert of[0]["evictions"] == 1
    assert of[0]["kl"] == pytest.approx(float(whole.kl[0, ::EVERY].mean()), abs=1e-9)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_models_with_layers_of_other_kinds_are_read_too(family: str) -> None:
    some = texts(2, 90)
    tight, plenty = read(tiny(family), [vase(24, interval=8, recent=8), vase(400)], some, PROMPT, 0, [1, 2], [24, 0])
    assert {len(details["mass_lost"]) for details in tight} == {2}  # two of four layers evict
    assert min(min(details["mass_lost"]) for details in tight) > 0.01
    assert max(max(details["mass_lost"]) for details in plenty) < 1e-5


# --- which texts are read


@dataclass(frozen=True)
class Some:
    """Texts of bytes."""

    count: int
    length: int = 40
    characters: int = 60

    def problems(self, data: Path | None) -> Sequence[Text]:
        return [Text(f"some/{i}", chr(97 + i) * self.characters, self.length) for i in range(self.count)]


def planned(path: Path, task: Some, policies: list[str], **asking: Any) -> list[Reading]:
    how = Asking(**asking)
    (plan,) = cells(Model("m", "float32", "cpu"), "w", [task], fill(policies, []), how, None)
    with Results.open(path) as results:
        made = list(jobs([plan], results, byte_tokenizer(None), how))
    assert all(isinstance(job, Reading) for job in made)
    return made  # type: ignore[return-value]


def finish(path: Path, job: Reading, texts: Sequence[str]) -> None:
    """Write that some texts have been read under all policies of a job."""
    with path.open("ab") as file:
        for cell in job.cells:
            for one in texts:
                file.write(encode(Record(cell, one, 0.1, {"kl": 0.1}, {})))


def test_policies_of_one_budget_and_seed_read_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    made = planned(path, Some(10), ["full", "vase(96)", "tova(96)"], seeds=(0, 1), batch=4)
    assert [(job.number, job.cells[0].seed, len(job.cells), len(job.ids)) for job in made] == [
        (number, seed, 2, count) for number, count in enumerate((4, 4, 2)) for seed in (0, 1)
    ]
    assert {cell.policy == "full" for job in made for cell in job.cells} == {False}
    assert {job.prompt_length for job in made} == {PROMPT_OF_TEXT}
    assert {len(tokens) for job in made for tokens in job.tokens} == {40}
    assert [len(job.ids) for job in planned(path, Some(10), ["vase(96)"])] == [TEXTS_AT_ONCE, 2]


def test_only_what_is_missing_is_read(tmp_path: Path) -> None:
    path, both = tmp_path / "out.jsonl", ["vase(96)", "tova(96)"]
    first, second = planned(path, Some(4), both, batch=2)
    finish(path, first, first.ids)
    assert planned(path, Some(4), both, batch=2) == [second]
    finish(path, second, second.ids[:1])
    (left,) = planned(path, Some(4), both, batch=2)
    assert (left.cells, left.number, left.ids, left.tokens) == (second.cells, 1, second.ids[1:], second.tokens[1:])
    finish(path, left, left.ids)
    assert planned(path, Some(4), both, batch=2) == []
    more = planned(path, Some(4), [*both, "knorm(96)"], batch=2)
    assert [[cell.label for cell in job.cells] for job in more] == [["knorm(96)"]] * 2


def test_no_text_is_read_twice_under_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    (one,) = planned(path, Some(3), ["vase(96)"], limit=1)
    finish(path, one, one.ids)
    made = planned(path, Some(3), ["vase(96)", "tova(96)"])
    pairs = [(cell.label, text) for job in made for cell in job.cells for text in job.ids]
    expected = {(label, f"some/{i}") for label in ("vase(96)", "tova(96)") for i in range(3)} - {("vase(96)", "some/0")}
    assert sorted(pairs) == sorted(expected)


@pytest.mark.parametrize(("length", "characters"), [(31, 60), (61, 60)])
def test_texts_that_are_too_short_are_refused(length: int, characters: int, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"some/0 has .* texts are read from 32 tokens on"):
        planned(tmp_path / "out.jsonl", Some(1, length, characters), ["vase(96)"])
