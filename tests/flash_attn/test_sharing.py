"""Views that lie between each other are told from those that share memory, against every address they touch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvpolicy.adapters.flash_attn.sharing import crossing, overlaps


def touched(tensor: Tensor) -> list[Any]:
    places = itertools.product(*map(range, tensor.shape))
    return [tensor.storage_offset() + sum(i * s for i, s in zip(at, tensor.stride(), strict=True)) for at in places]


@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    others=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    strides=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    offset=st.integers(0, 30),
)
def test_what_is_called_apart_is_apart(sizes: list[int], others: list[int], strides: list[int], offset: int) -> None:
    memory = torch.zeros(200)
    first = memory.as_strided(sizes, strides[: len(sizes)])
    second = memory.as_strided(others[: len(sizes)], strides[: len(sizes)], offset)
    for one in (first, second):
        if not overlaps(one):
            assert len(set(touched(one))) == one.numel()
    if not overlaps(first) and not overlaps(second) and crossing([first, second]) is None:
        assert not set(touched(first)) & set(touched(second))


@pytest.mark.parametrize(
    "apart",
    [
        [(both := torch.zeros(2, 3, 10, 2, 2, 4))[:, i, :, j] for i in range(3) for j in range(2)],
        [(both := torch.zeros(2, 10, 2, 12))[..., :8], both[..., 8:]],  # values of another size
        [(both := torch.zeros(2, 2, 10, 2, 4))[:, 0], both[:, 1]],
        [(both := torch.zeros(2, 10, 4, 4)).transpose(1, 2)[:, :2], both.transpose(1, 2)[:, 2:]],
        [torch.zeros(2, 3), torch.zeros(2, 3)],
    ],
)
def test_layouts_that_lie_between_each_other(apart: list[Tensor]) -> None:
    assert crossing(apart) is None
    assert crossing([*apart, apart[0]]) == (0, len(apart))


@pytest.mark.parametrize("offset", [0, 1, 3, 4])
def test_a_gap_that_is_too_small(offset: int) -> None:
    first = torch.zeros(20).as_strided((2, 2), (4, 1))
    second = first.as_strided((2, 2), (4, 1), offset)
    assert set(touched(first)) & set(touched(second))
    assert crossing([first, second]) == (0, 1)
    assert crossing([first, first.as_strided((2, 2), (4, 1), 2)]) is None
