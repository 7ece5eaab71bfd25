"""Equal tokens have equal scores, wherever they stand."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import OutputError, Scores
from kvpolicy.testing import RowSpec, make_view


@pytest.mark.parametrize("high", [(3, 9), (9, 5), (3, 4, 5, 6, 7, 8, 9, 10, 11)])
def test_tokens_that_share_the_largest_weight_have_one_score(high: tuple[int, ...]) -> None:
    """What the others have is summed for one of them: slots must not say for which."""
    view = make_view(rows=(RowSpec(length=18, fresh=18, budget=12),), heads=1, shuffle=False)
    view.values[:, :, 4:] = view.values[:, :, 3:4]
    weights = torch.full(view.shape, 0.3).index_fill(-1, torch.tensor(high), 0.7)
    scores = OutputError().apply(Scores.of(view, weights, weights=True), view, None)
    assert len(set(scores.values[0, 0, list(high)].tolist())) == 1
