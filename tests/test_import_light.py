"""`import kvpolicy` stays light: no engine, and no tool of the command line, comes along."""

import subprocess
import sys

ENGINES = {"transformers", "vllm", "flash_attn", "accelerate"}
TOOLS = {"typer", "rich", "hypothesis", "pytest"}


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after one statement."""
    program = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_import_brings_no_engine_and_no_tool() -> None:
    brought = modules_after("import kvpolicy, kvpolicy.policies, kvpolicy.adapters")
    assert not brought & (ENGINES | TOOLS)


def test_import_brings_what_torch_brings() -> None:
    brought = modules_after("import kvpolicy") - modules_after("import torch")
    assert brought - set(sys.stdlib_module_names) == {"kvpolicy"}
