"""What workers tell the process that takes requests: what they follow, and what they have counted.

vLLM has no way from a worker to its front end that is open to plug-ins. The process that starts vLLM names a
folder in an environment variable, which all processes that it starts inherit; a worker of an evicting engine
writes its configuration and its counters there. Nothing is written for any other engine.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kvpolicy.adapters.vllm.config import Config

__all__ = ["COUNTERS", "Counters", "announce", "configs", "open_board"]

_VARIABLE = "KVPOLICY_VLLM_BOARD"

#: What is counted, and what it says in vLLM's metrics.
COUNTERS = {
    "evictions": "requests cut to their budget, each time that one was",
    "evicted_tokens": "tokens that left the cache, in each layer and head",
    "compaction_seconds": "seconds of the worker's host that evictions took",
    "recomputed_requests": "requests that were preempted after an eviction, and computed again without what it kept",
    "slots_in_use": "slots that the requests of the last step use, in each layer and head",
}


def open_board() -> None:
    """Name the folder, in the first process of an engine."""
    if _VARIABLE not in os.environ:
        path = Path(tempfile.gettempdir()) / f"kvpolicy-{uuid.uuid4().hex}"
        os.environ[_VARIABLE] = str(path)
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    _collect()  # whoever started this process may have named the folder


def _folder() -> Path:
    return Path(os.environ[_VARIABLE])


def announce(config: Config, name: str, rank: int) -> Counters:
    """Tell of an engine of this process, and return its counters.

    Args:
        config: what it was asked for.
        name: of the engine.
        rank: of this worker in it.
    """
    open_board()
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}-{rank}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(config)))
    part.replace(path)
    return Counters(path.with_suffix(".counters"), create=True)


def configs() -> list[Config]:
    """Return what the engines of this process and of those that it started were asked for."""
    found: dict[Config, None] = {}
    for path in sorted(_folder().glob("*.json")) if _VARIABLE in os.environ else ():
        with contextlib.suppress(OSError, ValueError):  # an engine that has just gone
            found[Config(**json.loads(path.read_text()))] = None
    return list(found)


class Counters:
    """Hold numbers that another process may read.

    Args:
        path: of the file, which lies beside the engine's configuration.
        create: for a worker; it begins with zeros.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._path, size = path, len(COUNTERS)
        if create:
            path.write_bytes(bytes(8 * size))
        self._held = np.memmap(path, dtype=np.float64, mode="r+" if create else "r", shape=(size,))
        self._places = {name: place for place, name in enumerate(COUNTERS)}

    def close(self) -> None:
        """Take the engine off the board."""
        for suffix in (".json", ".counters"):
            self._path.with_suffix(suffix).unlink(missing_ok=True)

    def add(self, name: str, amount: float) -> None:
        """Add to a number."""
        self._held[self._places[name]] += amount

    def set(self, name: str, amount: float) -> None:
        """Replace a number."""
        self._held[self._places[name]] = amount

    def read(self) -> dict[str, float]:
        """Return all numbers."""
        return {name: float(self._held[place]) for name, place in self._places.items()}


def counted() -> dict[str, dict[str, float]]:
    """Return the numbers of each engine, those of its first worker: all of them count the same."""
    found = {}
    for path in sorted(_folder().glob("*-0.counters")) if _VARIABLE in os.environ else ():
        with contextlib.suppress(OSError, ValueError):
            found[path.name.removesuffix("-0.counters")] = Counters(path).read()
    return found


@functools.cache
def _collect() -> None:
    """Add the counters to the registry that vLLM serves under ``/metrics``."""
    try:
        from prometheus_client import REGISTRY
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError:  # vLLM brings it
        return

    class Collector:
        def collect(self) -> Iterator[Any]:
            numbers = counted()
            for name, text in COUNTERS.items() if numbers else ():
                kind = GaugeMetricFamily if name == "slots_in_use" else CounterMetricFamily
                family = kind(f"vllm:kvpolicy_{name}", f"kvpolicy: {text}.", labels=["engine"])
                for number, (_, values) in enumerate(sorted(numbers.items())):
                    family.add_metric([str(number)], values[name])
                yield family

    REGISTRY.register(Collector())
