"""What docs/vllm.md shows of vLLM in Python runs, with a small model and short answers."""

from __future__ import annotations

import pytest

from tests.docs.pages import ROOT, blocks
from tests.models import default_folder

pytestmark = [pytest.mark.vllm, pytest.mark.model]

PAGE = ROOT / "docs/vllm.md"


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
