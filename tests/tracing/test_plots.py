"""Figures of a trace show what the trace says."""

from __future__ import annotations

import builtins
import importlib.util
from typing import Any

import pytest
import torch

from kvpolicy import UsageError
from kvpolicy.tracing import plots
from tests.tracing.traces import usual

NEEDS = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


@NEEDS
@pytest.mark.parametrize("kind", plots.KINDS)
def test_figures_have_names_on_their_axes_and_take_axes(kind: str) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert plots.KINDS[kind](usual(), axes) is axes
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert axes.get_title(loc="left")
    axes.figure.canvas.draw()


@NEEDS
def test_survival_is_that_of_kaplan_and_meier() -> None:
    trace, (line,) = usual(), plots.survival(usual()).get_lines()
    alive = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    lives, gone = trace.lifetimes(), trace.dropped > 0
    expected = 1.0
    for age in range(1, 30):
        expected *= 1 - int((gone & (lives == age)).sum()) / int((lives >= age).sum())
        assert alive[age] == pytest.approx(expected)
    assert 0 < alive[29] < 1


@NEEDS
def test_lifetimes_count_each_token_and_head_once() -> None:
    axes: Any = plots.lifetimes(usual())
    assert sum(bar.get_height() for bar in axes.patches) == usual().dropped.numel()


@NEEDS
def test_memory_has_the_recorded_bytes() -> None:
    lines: dict[Any, Any] = {one.get_label(): one.get_ydata() for one in plots.memory(usual()).get_lines()}
    assert lines["in use"].tolist() == [one / 1000 for one in usual().used_nbytes]
    assert lines["full cache"][-1] == usual().full_nbytes[-1] / 1000


@NEEDS
def test_values_tell_the_protected_apart() -> None:
    found = {one.get_label(): len(one.get_offsets()) for one in plots.values(usual(), layer=1, head=1).collections}
    line = usual().heads.index((1, 1))
    assert found["protected by a guard"] == int((usual().tier[line] > 0).sum())
    assert sum(found.values()) == usual().seen
    with pytest.raises(
        UsageError, match="layer 7, head 0: the trace has no such KV head; it has layers 0 to 2, heads 0 to 1"
    ):
        plots.values(usual(), layer=7)
    with pytest.raises(UsageError, match=r"layer 1, head 9: .* it has layers 0 to 2, heads 0 to 1$"):
        plots.values(usual(), layer=1, head=9)


@NEEDS
def test_the_map_is_what_is_held() -> None:
    seen = usual().evictions[1]
    picture = torch.tensor(plots.map_of_heads(usual(), seen=seen).get_images()[0].get_array().tolist())
    assert (picture > 0).equal(usual().held(seen))
    assert int((picture == 2).sum()) == len(usual().heads) * (24 // 4)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'kvpolicy\[eval\]'"):
        plots.survival(usual())
