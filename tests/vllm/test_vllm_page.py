"""What docs/vllm.md shows of vLLM in Python runs, with a small model and short answers."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import LayerSpec
from kvpolicy.adapters.vllm import Config, Reservation
from kvpolicy.adapters.vllm.arena import Arena
from tests.docs.pages import ROOT, blocks
from tests.models import default_folder

pytestmark = pytest.mark.vllm

PAGE = ROOT / "docs/vllm.md"


@pytest.mark.model
def test_blocks_that_need_vllm_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = default_folder()
    first, second = [block for block in blocks(PAGE, "python") if block.not_run is not None]
    assert 'LLM("Qwen/Qwen3-8B", ' in first.code
    code = first.code.replace('"Qwen/Qwen3-8B"', f'{str(model)!r}, dtype="float32", enforce_eager=True, max_num_seqs=4')
    namespace: dict[str, object] = {}
    exec(compile(shortened(code), str(PAGE), "exec"), namespace)
    assert capsys.readouterr().out.strip()

    # The settings of the other block, each for a request of that engine.
    lines = [line for line in second.code.splitlines() if line]
    assert len(lines) == 3
    every = ", ".join(shortened(line) for line in lines)
    asked = f'llm.generate(["The sky is"] * {len(lines)}, [{every}])'
    found = eval(asked, namespace)
    assert [bool(one.outputs[0].token_ids) for one in found] == [True] * len(lines)


def shortened(code: str) -> str:
    assert "max_tokens=8000" in code
    return code.replace("max_tokens=8000", "max_tokens=8, ignore_eos=True")


def test_sizes_of_its_example() -> None:
    """32 layers, 32 query and 8 KV heads of 128 in bfloat16, blocks of 16."""
    page, config = PAGE.read_text("utf-8"), Config("vase(1024)", interval=128)
    spec = LayerSpec(8, 32, 128, 128, config.plan.capacity, torch.bfloat16, torch.device("meta"))
    token = 32 * 8 * (128 + 128) * 2  # bytes in all layers

    def cache(chunk: int | None, prompt: int) -> tuple[int, int]:
        promised = Reservation(config.plan.capacity, config.plan.budget, 16, chunk)
        return promised.decode * 16 * token // 2**20, promised.prefill(prompt) * 16 * token // 2**20

    def remembered(places: int, window: int) -> float:
        arena = Arena(spec, range(32), places, window)
        arena.set_aside(config.default[0])
        return arena.nbytes() / 2**20

    (decode, exact), (_, bounded) = cache(None, 2**14), cache(2048, 2**14)
    assert (decode, cache(None, 2**15)) == (144, (144, 4096))
    beside = round(remembered(1, config.ring))
    assert f"| while it decodes | {decode} MiB | {decode} MiB | {beside} MiB |" in page
    assert f"| while its prompt is as long, exact | {exact:,} MiB | 4,096 MiB | {beside} MiB |" in page
    assert f"chunks of 2,048 | {bounded} MiB | {bounded} MiB | {beside} MiB |" in page
    queries = remembered(1, config.ring) - remembered(1, 0)
    assert f"Of the {beside} MiB, {queries:.0f} are queries, {config.ring} of each head" in page
    assert f"256 seats of this example are {remembered(256, config.ring) / 2**10:.1f} GiB" in page
