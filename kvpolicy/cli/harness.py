"""``kvpolicy lm-eval``: EleutherAI's lm-evaluation-harness, which knows the model ``kvpolicy``."""

from __future__ import annotations

import sys

import typer

from kvpolicy.errors import RunError

__all__ = ["PASSED_ON", "lm_eval"]

#: Of the command: every argument belongs to lm_eval, ``--help`` among them.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, whose --model kvpolicy answers under a policy.

    All arguments are those of lm_eval: kvpolicy lm-eval --model kvpolicy --model_args
    pretrained=MODEL,policy="vase(256)" --tasks gsm8k
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import kvpolicy.evaluation.harness  # noqa: F401  # pyright: ignore[reportUnusedImport]  # tells lm_eval of us
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install 'kvpolicy[harness]'") from error
    before = sys.argv
    sys.argv = ["lm-eval", *context.args]  # lm_eval reads its arguments there and nowhere else
    try:
        cli_evaluate()
    finally:
        sys.argv = before
