"""The worker's parts, each beside what it stands for: pages, buffers, request tables, the self-test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from kvpolicy import UnsupportedError
from kvpolicy.adapters.vllm import account, board, evictor, selftest
from kvpolicy.adapters.vllm.buffers import Buffers
from kvpolicy.adapters.vllm.memory import Pages
from kvpolicy.adapters.vllm.progress import Request
from kvpolicy.adapters.vllm.requests import RequestTable
from tests.vllm.engine import answers, engine, params, stand_in

CPU = torch.device("cpu")
POLICY = "vase(64, interval=32, recent=16)"


def started(folder: Path, dtype: str = "float32") -> vllm.LLM:
    return engine(folder, {"policy": POLICY}, dtype=dtype)


def answer(llm: vllm.LLM, prompt: int = 100, output: int = 100) -> list[int]:
    return answers(llm, [[(7 * i) % 512 for i in range(prompt)]], params(output))[0]


# Pages


def layout(order: str, layers: int = 2) -> list[Tensor]:
    """Return the caches of layers ``[blocks, H, block_size, D + Dv]`` that lie in memory as backends have it."""
    sizes = {"L": layers, "B": 6, "H": 2, "N": 4, "C": 16}
    whole = torch.randn(*(sizes[axis] for axis in order))
    return list(whole.permute([order.index(axis) for axis in "LBHNC"]))


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BHLNC", "BLNHC"])
def test_slots_move_in_place_whatever_the_layout(order: str) -> None:
    caches = layout(order)
    before = [cache.clone() for cache in caches]
    pages = Pages([SimpleNamespace(kv_cache=cache) for cache in caches], 8, 8, packed=False)
    table = torch.tensor([[3, 1], [5, 0]])
    memory, write = pages.open(slice(0, 2), table, [8, 8], [4, 4])
    assert memory.joined
    rows = slice(0, 4)  # layers times requests
    keys, values = memory.slots(rows, 8)
    assert torch.equal(keys[0, :, 5], before[0][1, :, 1, :8])  # slot 5 of request 0: block 1, line 1
    assert torch.equal(values[3, :, 2], before[1][5, :, 2, 8:])
    source, target = torch.tensor([[[6]] * 2] * 4), torch.tensor([[[1]] * 2] * 4)
    memory.move_(rows, source, target)
    write()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[3, :, 1], old[1, :, 2])
        assert torch.equal(cache[5, :, 1], old[0, :, 2])
        old[3, :, 1], old[5, :, 1] = old[1, :, 2].clone(), old[0, :, 2].clone()
        assert torch.equal(cache, old)  # nothing else


def test_layers_that_lie_apart_are_read_one_by_one() -> None:
    caches = [torch.randn(3, 2, 4, 16) for _ in range(3)]
    caches[1] = torch.randn(3, 2, 4, 32)[..., :16]
    pages = Pages([SimpleNamespace(kv_cache=cache) for cache in caches], 8, 8, packed=False)
    memory, _ = pages.open(slice(0, 3), torch.tensor([[2]]), [4], [2])
    assert not memory.joined
    for number, cache in enumerate(caches):
        assert torch.equal(memory.slots(slice(number, number + 1), 4)[0][0, 1, 3], cache[2, 1, 3, :8])


# Buffers


def test_a_graph_for_more_tokens_finds_queries_that_nobody_asks() -> None:
    buffers = Buffers(5, 16, places=4, window=8, device=CPU)
    counts, seen, places = np.array([3, 1]), np.array([0, 9]), np.array([2, 0])
    buffers.direct(6, counts, seen, places)
    assert buffers.lines.tolist() == [16, 17, 18, 1, 32, 32]
    whole = buffers._lines
    buffers.direct(1, np.array([1]), np.array([10]), np.array([0]))
    assert buffers.lines.tolist() == [2]
    assert whole[:6].tolist() == [2, 32, 32, 32, 32, 32]
    assert buffers._lines.data_ptr() == whole.data_ptr()


def test_of_a_long_chunk_only_the_newest_queries_are_kept() -> None:
    buffers = Buffers(2, 16, places=1, window=4, device=CPU)
    buffers.direct(7, np.array([7]), np.array([2]), np.array([0]))
    assert buffers.lines.tolist() == [4, 4, 4, 1, 2, 3, 0]
    buffers.direct(2, np.array([2]), np.array([9]), np.array([-1]))
    assert buffers.lines.tolist() == [4, 4]


def test_slots_are_found_in_the_blocks_of_a_row() -> None:
    buffers = Buffers(3, 16, places=2, window=0, device=CPU)
    cm = SimpleNamespace(block_table_tensor=torch.tensor([[4, 2], [7, 9]]), slot_mapping=torch.full((6,), -1))
    buffers.map_slots(cm, np.array([2, 3]), np.array([3, 0]), 4)
    assert cm.slot_mapping.tolist() == [4 * 4 + 3, 2 * 4, 28, 29, 30, -1]
    assert buffers.lines is None


# Tables of requests


def config_of(**additional: Any) -> Any:
    """Return what a table reads of vLLM's configuration."""
    found = stand_in(additional_config=additional, instance_id="here", use_v2_model_runner=False)
    found.scheduler_config = SimpleNamespace(max_num_seqs=2)
    found.parallel_config.data_parallel_rank = found.parallel_config.rank = 0
    return found


@pytest.fixture
def first_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RequestTable:
    monkeypatch.setenv("KVPOLICY_VLLM_BOARD", str(tmp_path / "board"))
    table = RequestTable(config_of(kvpolicy=POLICY), CPU, False)
    table.evicts = True
    return table


def update(removed: Any = (), added: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size=0, removed=list(removed), added=list(added), moved=list(moved))


def found(requests: list[Request] | None) -> list[Request]:
    assert requests is not None
    return requests


def test_requests_are_followed_through_the_rows_of_runner_v1(first_runner: RequestTable) -> None:
    table, params = first_runner, vllm.SamplingParams()
    a: list[int] = []
    b: list[int] = []
    table.update_state(update(added=[(0, params, [1, 2], a), (1, params, [3], b)]))
    first, second = found(table.rows(2, None))
    assert (first.prompt, second.prompt) == (2, 1)
    table.update_state(update(moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert table.rows(2, None) == [second, first]
    table.update_state(update(removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert table.rows(2, None) == [first]
    table.update_state(update(added=[(1, params, [3], b)]))  # it had only waited
    assert table.rows(2, None) == [first, second]


def test_a_new_request_takes_the_place_of_the_one_that_has_gone_longest(first_runner: RequestTable) -> None:
    table, params = first_runner, vllm.SamplingParams()
    lives: list[list[int]] = []
    for _ in range(9):
        lives.append([])
        table.update_state(update(removed=[0], added=[(0, params, [1], lives[-1])]))
    assert len(table._known) == table.places == 4
    assert [known.output is mine for known, mine in zip(table._known.values(), lives[-4:], strict=True)] == [True] * 4
    assert len({known.place for known in table._known.values()}) == 4


def test_a_request_that_waits_a_step_keeps_its_place_however_many_have_gone(first_runner: RequestTable) -> None:
    table, params = first_runner, vllm.SamplingParams()
    prompt, output = [1, 2], [0]
    table.update_state(update(added=[(0, params, prompt, output)]))
    (decoder,) = found(table.rows(1, None))
    gone: list[list[int]] = []
    for _ in range(9):
        gone.append([])
        table.update_state(update(removed=[1], added=[(1, params, [3], gone[-1])]))
    table.update_state(update(removed=[0, 1], added=[(0, params, [4], []), (1, params, [5], [])]))
    table.update_state(update(removed=[0, 1], added=[(0, params, prompt, [0, 7])]))  # async scheduling: another list
    assert table.rows(1, None) == [decoder]


def test_runner_v2_numbers_its_requests_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPOLICY_VLLM_BOARD", str(tmp_path / "board"))
    states = SimpleNamespace(
        prompt_len=SimpleNamespace(np=np.array([5, 7])), prefill_len=SimpleNamespace(np=np.array([5, 9]))
    )
    table = RequestTable(config_of(kvpolicy=POLICY), states)
    table.evicts = True
    assert table.add_request(1, vllm.SamplingParams(seed=3)) is False
    assert table.add_request(0, vllm.SamplingParams(extra_args={"kvpolicy": "off"})) is False
    table.apply_staged_writes()
    again, off = found(table.rows(2, np.array([1, 0])))
    assert (again.prompt, again.place, again.again, again.settings.seed) == (7, 1, True, 3)
    assert (off.prompt, off.again, off.settings.off) == (5, False, True)
    assert table.places == 2
    assert table.step == 1


def test_an_engine_in_which_nothing_evicts_does_not_step(first_runner: RequestTable) -> None:
    first_runner.evicts = False
    with pytest.raises(UnsupportedError, match="no layer of this model"):
        first_runner.update_state(None)


def test_a_table_of_an_engine_without_eviction_does_nothing() -> None:
    table = RequestTable(config_of(), CPU, False)
    table.update_state(update(added=[(0, vllm.SamplingParams(), [1], [])]))
    assert table.rows(1, None) is None
    logits = torch.ones(2)
    assert table.apply(logits) is logits
    assert table.is_argmax_invariant()


# The engine asks itself


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_start_is_compared_with_the_full_cache(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, float]] = []
    original = selftest._difference

    def kept(*given: Any) -> tuple[float, float]:
        found.append(original(*given))
        return found[-1]

    monkeypatch.setattr(selftest, "_difference", kept)
    answer(started(folder, dtype), output=2)
    ((error, size),) = found
    assert 0 <= error <= {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}[dtype] * size
    assert size > 0.1


def test_an_engine_whose_pages_lie_otherwise_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Pages.open

    def shifted(self: Pages, at: slice, table: Tensor, *rest: Any) -> Any:
        memory: Any
        memory, write = original(self, at, table, *rest)
        keys = memory._pieces[0][0]
        keys.copy_(keys.roll(1, -1))
        return memory, write

    monkeypatch.setattr(Pages, "open", shifted)
    with pytest.raises(UnsupportedError, match="differs from the full cache"):
        answer(started(folder), output=2)


def test_an_engine_that_writes_elsewhere_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffers, "map_slots", lambda *_: None)
    with pytest.raises(UnsupportedError, match="has not written a token into the slot"):
        answer(started(folder))


@pytest.fixture
def counted(folder: Path) -> dict[str, float]:
    names = set(board.counted())
    answer(started(folder), prompt=150, output=200)
    return board.counted()[(set(board.counted()) - names).pop()]


def test_what_a_request_costs_follows_from_its_lengths(counted: dict[str, float]) -> None:
    expected = account(POLICY, prompt=150, output=200)
    assert counted["evictions"] == expected.evictions > 3
    assert counted["evicted_tokens"] == expected.evicted
    assert counted["slots_in_use"] == expected.slots
    assert counted["recomputed_requests"] == 0
    assert counted["compaction_seconds"] > 0


def test_a_layer_sets_memory_aside_on_a_gpu_alone() -> None:
    assert evictor.reserve(config_of(kvpolicy=POLICY), SimpleNamespace()) is None
