"""Time, memory and launches on a device: events of CUDA, or the clock of the host."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import environment

__all__ = ["Mark", "bandwidth", "described", "free", "launches", "peak_bytes", "reset_peak", "synchronize", "timed"]


_event: Callable[..., Any] = torch.cuda.Event


class Mark:
    """Mark a moment in the work of a device."""

    def __init__(self, device: torch.device) -> None:
        self.event: Any = _event(enable_timing=True) if device.type == "cuda" else None
        self.seconds = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def until(self, later: Mark) -> float:
        """Return the milliseconds between two marks; the device must have passed both."""
        if self.event is not None and later.event is not None:
            return self.event.elapsed_time(later.event)
        return (later.seconds - self.seconds) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that the device took for some work."""
    synchronize(device)
    start = Mark(device)
    work()
    stop = Mark(device)
    synchronize(device)
    return start.until(stop)


def launches(work: Callable[[], object], device: torch.device) -> int | str:
    """Return how many kernels, copies and fills some work starts; unknown without a profiler of CUDA."""
    if device.type != "cuda":
        return "–"
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            work()
            synchronize(device)
    except RuntimeError:  # a driver may deny profiling; times are not lost for it
        return "–"
    events: Any = found.events()
    return sum(event.device_type.name == "CUDA" for event in events) or "–"


def reset_peak(device: torch.device) -> None:
    """Forget the peak of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that tensors held since :func:`reset_peak`; None on the CPU, which does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bandwidth(device: torch.device, nbytes: int, repeats: int = 10) -> float:
    """Return the bytes a second that a copy on the device reads and writes.

    Args:
        device: which.
        nbytes: of the tensor that is copied; larger than the device's caches.
        repeats: the fastest counts.
    """
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(repeats + 1))
    return 2 * nbytes / (best / 1e3)


def described(device: torch.device) -> dict[str, Any]:
    """Return versions and machine, those of the device among them."""
    found = {**environment("flash-attn", "triton"), "device": "cpu", "commit": _commit()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
    return found


def _commit() -> str:
    return _answer("git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty")


def _answer(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]
