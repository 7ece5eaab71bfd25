"""Blocks that a kernel has packed are read as an index would read them, however it packs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.adapters.vllm import memory

SIZE, DIM, HEADS, LAYERS = 32, 64, 3, 2
NUMBERS = torch.arange(SIZE * DIM)
KEYS_BY_DIM = NUMBERS.view(DIM, SIZE).T.flatten()
IN_PAIRS = NUMBERS.view(DIM // 2, SIZE, 2).transpose(0, 1).flatten()
GENERATOR = torch.Generator().manual_seed(0)
PACKINGS = {
    "in order": NUMBERS,
    "transposed": KEYS_BY_DIM,
    "transposed in pairs": IN_PAIRS,
    "without rule": torch.randperm(SIZE * DIM, generator=GENERATOR),
    "two swapped": NUMBERS[[*range(5), 6, 5, *range(7, SIZE * DIM)]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKINGS)
def test_blocks_are_read_as_by_an_index(name: str, dtype: torch.dtype) -> None:
    packings = (PACKINGS[name], PACKINGS["transposed"])
    caches = [torch.randn(9, HEADS, SIZE, 2 * DIM, generator=GENERATOR).to(dtype) for _ in range(LAYERS)]
    table = torch.tensor([[3, 7, 1], [8, 2, 2]])
    found = memory._unpacked(caches, packings, table)
    for which, (packing, mine) in enumerate(zip(packings, found, strict=True)):
        assert torch.equal(mine, torch.stack([_by_index(cache, which, packing, table) for cache in caches]))


def _by_index(cache: Tensor, which: int, packing: Tensor, table: Tensor) -> Tensor:
    blocks = cache.view(len(cache), HEADS, 2, -1)[table, :, which]
    return blocks[..., packing].unflatten(-1, (SIZE, DIM)).transpose(2, 3).flatten(1, 2)


def test_only_a_packing_that_permutes_bits_is_read_as_a_view() -> None:
    viewed = {name for name, packing in PACKINGS.items() if memory._steps(packing) is not None}
    assert viewed == {"in order", "transposed", "transposed in pairs"}


def test_blocks_of_an_odd_head_size_are_read_by_an_index() -> None:
    assert memory._steps(torch.arange(32 * 80)) is None
