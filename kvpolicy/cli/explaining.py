"""``kvpolicy explain``: what a policy does, what it needs, what it saves and what it costs."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError
from kvpolicy.cli.options import POLICY_HELP
from kvpolicy.errors import RunError

if TYPE_CHECKING:
    from kvpolicy.cli.shapes import ModelShape
    from kvpolicy.policy import EvictionPolicy

__all__ = ["explain"]

MODEL_HELP = (
    "A folder of transformers, or a name on the Hugging Face hub, whose configuration alone is read. "
    "SmolLM2-135M-Instruct by default, if it has been fetched."
)


def explain(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help=POLICY_HELP)],
    *,
    model: Annotated[str | None, typer.Option(metavar="NAME|FOLDER", help=MODEL_HELP)] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Requests at once.")] = 1,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of each in the full cache; as many as the model reads, 32768 at most."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens decoded at most, where a policy has no interval.")
    ] = 512,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, bfloat16, float16 or auto: the configuration's.")
    ] = "auto",
    bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Of the memory: gives the time of an eviction.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(metavar="TFLOP/S", help="Of the device: its products take time.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Explain what a policy does: its chain, when it evicts, what it holds, needs and costs, and which engines follow.

    Nothing is run and nothing is fetched. Memory is counted to the byte, as the caches allocate it; the cost of an
    eviction is the least that any machine must read, write and multiply.
    """
    from kvpolicy import explanation as told
    from kvpolicy import parse_policy

    _check_numbers(batch, tokens, max_new_tokens, bandwidth, flops)
    chosen = parse_policy(policy)
    shape = _shape(model, dtype)
    if model is None and shape is not None and not _fits(chosen, shape):
        shape = None  # a policy for another model than the default one
    costs, refused = None, None
    if shape is None:
        found = told.explain(chosen)
    else:
        found = told.explain(chosen, num_layers=len(shape.layers), num_heads=shape.num_heads)
        refused = shape.refusal(chosen, max_new_tokens)
        found = dataclasses.replace(found, engines=_of_model(found.engines, refused))
    if shape is not None and refused is None:
        from kvpolicy.cli.costs import costs_of

        tokens = tokens or min(32768, shape.positions or 32768)
        costs = costs_of(chosen, shape, batch=batch, tokens=tokens, max_new_tokens=max_new_tokens)
        costs = costs.at(bandwidth, flops)
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "model": None if costs is None else costs.data()}, indent=2))
        return
    from kvpolicy.cli.blocks import blocks

    out = console.stdout()
    for block in blocks(policy.strip(), found, costs):
        out.print(block)
    if refused is not None:
        console.note("memory and cost are not told: the transformers adapter refuses this policy on this model")
    elif costs is None:
        console.note("--model NAME|FOLDER tells memory and cost too: a configuration is enough.", style="dim")
    elif costs.eviction_seconds is None:
        console.note("--bandwidth GB/s tells the time of an eviction, and its share of decoding.", style="dim")


def _shape(name: str | None, dtype: str) -> ModelShape | None:
    """Return what a model caches; of the default model, if it has been fetched."""
    import torch

    from kvpolicy.cli import default_model
    from kvpolicy.cli.devices import choose_dtype

    wanted = None if dtype == "auto" else choose_dtype(dtype, torch.device("cpu"))
    own = default_model.cache_folder() / default_model.FOLDER
    if name is None and not default_model.is_complete(own):
        return None
    try:
        from kvpolicy.cli.shapes import read_shape
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install 'kvpolicy[cli]'") from error
    if name is not None:
        return read_shape(name, wanted)
    return dataclasses.replace(read_shape(str(own), wanted), name=default_model.NAME)


def _fits(policy: EvictionPolicy, shape: ModelShape) -> bool:
    """Return whether a policy names as many layers and heads as a model has."""
    from kvpolicy import BudgetError, ModelSpec

    try:
        policy.plan(ModelSpec(len(shape.layers), 1, shape.num_heads))
    except BudgetError:
        return False
    return True


def _of_model(engines: tuple[Any, ...], refusal: str | None) -> tuple[Any, ...]:
    """Return the engines, of which transformers knows the model."""
    first, *others = engines
    if refusal is not None and first.follows:
        first = dataclasses.replace(first, follows=False, why=refusal)
    return first, *others


def _check_numbers(
    batch: int, tokens: int | None, max_new_tokens: int, bandwidth: float | None, flops: float | None
) -> None:
    for name, count in (("batch", batch), ("tokens", tokens), ("max-new-tokens", max_new_tokens)):
        if count is not None and count < 1:
            raise CommandError(f"--{name} {count}: it is at least 1")
    for name, speed in (("bandwidth", bandwidth), ("flops", flops)):
        if speed is not None and not (math.isfinite(speed) and speed > 0):
            raise CommandError(f"--{name} {speed}: it is a number above 0")
    if flops is not None and bandwidth is None:
        raise CommandError("--flops alone gives no time: most of an eviction is memory; give --bandwidth, too")
