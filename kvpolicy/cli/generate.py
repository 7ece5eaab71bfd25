"""``kvpolicy generate``: write text under a policy."""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import console, options
from kvpolicy.cli.errors import CommandError
from kvpolicy.cli.prompt import read_prompt
from kvpolicy.errors import RunError

if TYPE_CHECKING:
    from kvpolicy import EvictionPolicy
    from kvpolicy.cli.running import Run
    from kvpolicy.generation import Sampling
    from kvpolicy.loading import Loaded
    from kvpolicy.receipt import Receipt

__all__ = ["check_numbers", "chosen_policy", "generate", "load_model", "warn_if_idle", "warn_if_too_long"]


def generate(
    prompt: options.Prompt = None,
    *,
    prompt_file: options.PromptFile = None,
    policy: options.PolicyText = "vase(256)",
    interval: options.Interval = None,
    recent: options.Recent = None,
    model: options.ModelName = None,
    max_new_tokens: options.MaxNewTokens = 512,
    compare: Annotated[bool, typer.Option("--compare", help="Run again with the full cache, and compare.")] = False,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    chat: options.Chat = None,
    system: options.System = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Write text while a policy keeps the KV cache small.

    The text goes to standard output; progress, warnings, receipt and timing to standard error.
    With --compare the comparison goes to standard output too.
    """
    text = read_prompt(prompt, prompt_file)
    chosen = chosen_policy(policy, interval, recent)
    check_numbers(max_new_tokens, temperature, seed)
    loaded = load_model(model, dtype, device, exact=compare)

    from kvpolicy.generation import Sampling, encode

    inputs = encode(loaded.tokenizer, text, chat=chat, system=system)
    sampling = Sampling(max_new_tokens, temperature, seed)
    warn_if_too_long(loaded, inputs, sampling)
    if compare:
        console.rule(f"kvpolicy: {_shown(chosen)}")
    run, receipt = _run_policy(loaded, inputs, chosen, sampling)
    warn_if_idle(receipt, chosen)
    if compare:
        _compare(loaded, inputs, sampling, chosen, run, receipt)
    console.note(str(receipt), style="dim")
    console.note(run.timing(), style="dim")


def chosen_policy(text: str, interval: str | None, recent: int | None) -> EvictionPolicy:
    """Return the policy, with what the options change about it."""
    from kvpolicy.grammar import parse_with

    changes: dict[str, int | None] = {}
    if interval is not None:
        try:
            changes["interval"] = None if interval.lower() == "none" else int(interval)
        except ValueError as error:
            raise CommandError(f"--interval {interval}: it is a whole number, or none") from error
    if recent is not None:
        changes["recent"] = recent
    return parse_with(text, **changes)


def load_model(name: str | None, dtype: str, device: str, *, exact: bool = False) -> Loaded:
    """Return the model that the options name, the default one where they name none."""
    try:
        import_module("transformers")  # before a model is fetched

        from kvpolicy.cli.devices import choose_device, choose_dtype
        from kvpolicy.loading import load
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install 'kvpolicy[cli]'") from error
    where = choose_device(device)
    numbers = choose_dtype(dtype, where, exact=exact)
    return load(_model_folder() if name is None else name, numbers, where, console.working)


def check_numbers(max_new_tokens: int, temperature: float, seed: int) -> None:
    """Refuse numbers that mean nothing."""
    if max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens {max_new_tokens}: it is at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise CommandError(f"--temperature {temperature}: it is 0 (greedy) or a number above 0")
    if not 0 <= seed < 2**63:
        raise CommandError(f"--seed {seed}: it is at least 0 and below 2**63")


def _model_folder() -> str:
    from kvpolicy.cli.default_model import default_model

    return str(default_model())


def warn_if_too_long(loaded: Loaded, inputs: dict[str, Any], sampling: Sampling) -> None:
    """Warn where the text may become longer than what the model was trained for."""
    length = inputs["input_ids"].shape[-1] + sampling.max_new_tokens
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        console.warn(
            f"prompt and new tokens may reach {length:,} positions; the model was trained for "
            f"{limit:,}, and writes nonsense beyond: eviction frees memory, not positions"
        )


def _run_policy(
    loaded: Loaded, inputs: dict[str, Any], policy: EvictionPolicy, sampling: Sampling
) -> tuple[Run, Receipt]:
    from kvpolicy.adapters.hf import EvictionCache
    from kvpolicy.cli.running import run

    most, seeds = sampling.max_new_tokens, [sampling.seed]
    with EvictionCache(loaded.model, policy, max_new_tokens=most, seeds=seeds) as cache:
        return run(loaded, inputs, cache, sampling), cache.receipt()


def _compare(
    loaded: Loaded, inputs: dict[str, Any], sampling: Sampling, chosen: EvictionPolicy, run: Run, receipt: Receipt
) -> None:
    from kvpolicy.cli.compare import Measured, run_full, table

    console.rule("full cache")
    full = run_full(loaded, inputs, sampling)
    ours = Measured(run, receipt.nbytes + receipt.other_nbytes)
    console.stdout().print()
    console.stdout().print(table(loaded.tokenizer, ours, full))
    if ours.nbytes >= full.nbytes and _evicts_once(chosen):
        console.warn("the prompt is too short to save memory: this policy evicts from the prompt alone")
    elif ours.nbytes >= full.nbytes:
        held = inputs["input_ids"].shape[-1] + len(full.run.tokens) - 1
        console.warn(
            "the run is too short to save memory: a policy's slots are allocated at once, and "
            f"the full cache outgrows them after about {held * ours.nbytes // full.nbytes:,} tokens"
        )


def warn_if_idle(receipt: Receipt, policy: EvictionPolicy) -> None:
    """Warn where nothing was evicted."""
    if not any(receipt.evictions):
        more = "" if _evicts_once(policy) else "ask for more with --max-new-tokens, or "
        console.warn(
            f"nothing was evicted: the run held {max(receipt.seen):,} tokens, which {_shown(policy)} "
            f"keeps whole; {more}give the policy a smaller budget"
        )


def _evicts_once(policy: EvictionPolicy) -> bool:
    """Return whether a policy evicts at the end of a turn only; one that is not made of stages may say so or not."""
    return getattr(policy, "interval", 0) is None


def _shown(policy: EvictionPolicy) -> str:
    from kvpolicy import Policy
    from kvpolicy.adapters.planning import policy_text

    return repr(policy) if isinstance(policy, Policy) else policy_text(policy)
