"""``kvpolicy eval``: what policies cost, in one table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import console
from kvpolicy.cli.errors import CommandError
from kvpolicy.cli.options import MODEL_HELP
from kvpolicy.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvpolicy.evaluation.jobs import Job, Model, Worker
    from kvpolicy.evaluation.planning import Asking
    from kvpolicy.evaluation.record import Record
    from kvpolicy.evaluation.results import Results
    from kvpolicy.evaluation.run import Cluster
    from kvpolicy.evaluation.templates import Filled

__all__ = ["evaluate"]

TASK_HELP = (
    'What is asked, such as "gsm8k", "many(svamp, 8)", "passcode(length=2048)", "wikitext"; repeat it for more. '
    "kvpolicy eval --tasks lists them."
)
POLICY_HELP = (
    'A recipe such as "vase", or a policy with b for its budget: "ValueGuard() >> TopK(b)"; "full" is the full '
    "cache. Repeat it for more. By default full and vase."
)
QUICK_TASKS, QUICK_BUDGET = ("pydoc(length=512, count=8)", "passcode(length=512, count=16)"), 128


def evaluate(
    *,
    task: Annotated[list[str] | None, typer.Option(metavar="TEXT", help=TASK_HELP)] = None,
    policy: Annotated[list[str] | None, typer.Option(metavar="TEXT", help=POLICY_HELP)] = None,
    budget: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Slots per KV head; repeat it for more.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME|FOLDER", help=f"{MODEL_HELP} Repeat it.")] = None,
    seed: Annotated[list[int] | None, typer.Option(metavar="N", help="Of sampling and noise; repeat it.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two small tasks and six policies at a budget of 128: minutes.")
    ] = False,
    leaderboard: Annotated[
        bool, typer.Option("--leaderboard", help="All policies that are compared in the documentation.")
    ] = False,
    ablation: Annotated[bool, typer.Option("--ablation", help="The parts of VaSE, one by one.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Problems of each task, at most.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Cut answers there, not where the task does.")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="F", help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="F", help="Draw from the likeliest tokens of this share.")] = 1.0,
    batch: Annotated[int, typer.Option(metavar="N", help="Problems at once.")] = 16,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where data files lie; else $KVPOLICY_DATA, packages, the hub."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Results, a line each; a file that is there is gone on with.")
    ] = Path("results.jsonl"),
    report: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write tables and figures: a .md file or a folder.")
    ] = None,
    only_report: Annotated[
        bool, typer.Option("--only-report", help="Run nothing: show, or --report, what --out holds.")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Policy that others are compared with; by default full, or vase.")
    ] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="transformers or vllm.")] = "transformers",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="As in kvpolicy generate.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, ... or auto.")] = "auto",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help='Spread problems over a Ray cluster; "local" starts one here.')
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", help="With --ray: processes, each with a model.")] = 1,
    gpus: Annotated[float, typer.Option(metavar="N", help="With --ray: GPUs of each.")] = 0,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks, and stop.")] = False,
) -> None:
    """Measure what policies cost: tasks x policies x budgets x models x seeds, in one table.

    The table goes to standard output, progress to standard error. Every finished problem is kept in
    --out; the same command goes on where a killed one stopped.
    """
    try:
        from kvpolicy.evaluation import results
        from kvpolicy.evaluation.planning import Asking
        from kvpolicy.evaluation.run import Cluster
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install 'kvpolicy[eval]'") from error

    if tasks:
        _list_tasks()
        return
    if only_report:
        found = results.read(out)
        _show(found, report, baseline)
        return
    _check(limit=limit, max_new_tokens=max_new_tokens, batch=batch, workers=workers, seeds=seed or ())
    _check_sampling(temperature, top_p)
    wanted = list(task or []) + (list(QUICK_TASKS) if quick else [])
    if not wanted:
        raise CommandError('there is no task: add --task, such as --task "passcode(length=1024)", or --quick')
    filled = _policies(policy or [], budget or ([QUICK_BUDGET] if quick else []), quick, leaderboard, ablation)
    asking = Asking(tuple(seed or (0,)), temperature, top_p, limit, max_new_tokens, batch)
    if ray is None and (workers != 1 or gpus):
        raise CommandError("--workers and --gpus say how a Ray cluster is used: add --ray local, or its address")
    cluster = None if ray is None else Cluster(ray, workers, gpus=gpus)
    if data is not None and not data.is_dir():
        raise CommandError(f"--data {data}: there is no such folder")
    if report is not None and report.suffix not in ("", ".md"):
        raise CommandError(f"--report {report}: it is a .md file or a folder")
    models = _models(model or [], engine, dtype, device)
    _run(models, wanted, filled, asking, data, out, cluster)
    _show(results.read(out), report, baseline)


def _policies(given: list[str], budgets: list[int], quick: bool, leaderboard: bool, ablation: bool) -> list[Filled]:
    from kvpolicy.evaluation.leaderboard import ABLATION, LEADERBOARD, QUICK
    from kvpolicy.evaluation.templates import fill

    templates = list(given)
    for asked, more in ((quick, QUICK), (leaderboard, LEADERBOARD), (ablation, ABLATION)):
        templates += more if asked else ()
    return fill(list(dict.fromkeys(templates or ["full", "vase"])), budgets)


def _models(given: list[str], engine: str, dtype: str, device: str) -> list[Model]:
    from kvpolicy.cli.default_model import default_model
    from kvpolicy.cli.devices import choose_device, choose_dtype
    from kvpolicy.errors import nearest
    from kvpolicy.evaluation.jobs import ENGINES, Engine, Model

    known: dict[str, Engine] = {one: one for one in ENGINES}
    if engine not in known:
        raise CommandError(f"--engine {engine}: it is one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    where = choose_device(device)
    numbers = str(choose_dtype(dtype, where)).removeprefix("torch.")
    names = given or [str(default_model())]
    return [Model(name, numbers, str(where), known[engine]) for name in names]


def _run(
    models: list[Model],
    wanted: list[str],
    filled: list[Filled],
    asking: Asking,
    data: Path | None,
    out: Path,
    cluster: Cluster | None,
) -> None:
    """Do what is left of each model in turn."""
    from kvpolicy.evaluation import tasks
    from kvpolicy.evaluation.jobs import Worker
    from kvpolicy.evaluation.planning import asked_of, cells, jobs, later_jobs
    from kvpolicy.evaluation.results import Results
    from kvpolicy.evaluation.run import size
    from kvpolicy.evaluation.weights import fingerprint, folder_of, positions
    from kvpolicy.loading import load_tokenizer

    parsed = [tasks.parse(text) for text in dict.fromkeys(wanted)]
    with Results.open(out) as results:
        for model in models:
            tokenizer: Any = load_tokenizer(model.name)
            folder = folder_of(model.name)
            weights = fingerprint(folder)
            plans = cells(model, weights, parsed, filled, asking, data)
            work = list(jobs(plans, results, tokenizer, asking))
            left, of = sum(map(size, work)), asked_of(plans)
            console.note(f"{model.name}: {of - left} of {of} problems are finished; {left} to do, results in {out}")
            _warn_if_too_long(model.name, positions(folder), work)
            policies = list(dict.fromkeys(cell.policy for plan in plans for cell in plan.cells))
            worker = Worker(model, policies, weights, console.working)
            _do(worker, work, results, cluster)
            _do(worker, [job for plan in plans for job in later_jobs(plan, results, tokenizer)], results, cluster)


def _do(worker: Worker, work: Sequence[Job], results: Results, cluster: Cluster | None) -> None:
    from kvpolicy.cli.progress import progress
    from kvpolicy.evaluation.run import run, size

    if work:
        with progress(sum(map(size, work))) as tell:
            run(worker, work, results, cluster, tell)


def _warn_if_too_long(name: str, known: int | None, work: Sequence[Job]) -> None:
    """Warn where problems are longer than the positions that the model was trained for."""
    longest = max((one.longest for one in work), default=0)
    if known is not None and longest > known:
        console.warn(
            f"problems may reach {longest:,} positions; {name} was trained for {known:,}, and writes nonsense "
            "beyond: eviction frees memory, not positions"
        )


def _show(records: list[Record], report: Path | None, baseline: str | None) -> None:
    from kvpolicy.evaluation.record import FULL, short
    from kvpolicy.evaluation.report import report as write
    from kvpolicy.evaluation.table import footer, legend, rich_tables, rows, text_rows

    if not records:
        raise CommandError("there are no results yet: run it without --only-report, or name another file with --out")
    labels = dict.fromkeys(record.cell.label for record in records)
    if baseline is not None and baseline not in (*labels, *map(short, labels)):
        known = ", ".join(map(short, labels))
        raise CommandError(f"--baseline {baseline}: there is no such policy in the results; there are {known}")
    for found in (rows(records, baseline or FULL), text_rows(records, baseline)):
        for table in rich_tables(found):
            console.stdout().print(table)
        for line in (*legend(found), *footer(found)) if found else ():
            console.stdout().print(line, style="dim", markup=False, soft_wrap=True)
    if report is not None:
        console.note(f"the report is in {write(records, report, baseline)}")


def _list_tasks() -> None:
    from kvpolicy.evaluation import tasks

    for name, task in tasks.described().items():
        console.stdout().print(f"{name:<12} {task}", markup=False, soft_wrap=True)


def _check(*, seeds: Any, **least: int | None) -> None:
    for name, value in least.items():
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} {value}: it is at least 1")
    for one in seeds:
        if not 0 <= one < 2**63:
            raise CommandError(f"--seed {one}: it is at least 0 and below 2**63")


def _check_sampling(temperature: float, top_p: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise CommandError(f"--temperature {temperature}: it is 0 (greedy) or a number above 0")
    if not 0 < top_p <= 1:
        raise CommandError(f"--top-p {top_p}: it is above 0 and at most 1")
    if top_p < 1 and temperature == 0:
        raise CommandError(f"--top-p {top_p} says how tokens are drawn, and --temperature 0 draws none: set it, too")
