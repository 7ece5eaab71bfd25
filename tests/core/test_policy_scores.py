"""A policy's scores, asked without its choice."""

from __future__ import annotations

import dataclasses

import torch

from kvpolicy import KeyNorm, LayerSpec, Policy, Sinks, TopK
from kvpolicy.scores import Tier
from tests.core.views import view_of


def test_scores_are_those_that_select_picks_from() -> None:
    torch.manual_seed(0)
    policy = Policy(KeyNorm() >> Sinks(2) >> TopK(6), interval=4, recent=2)
    view = view_of(torch.randn(1, 2, 12, 4), budget=6, recent=2)
    spec = LayerSpec(2, 2, 4, 4, 12, torch.float32, torch.device("cpu"))
    keep, state = policy.select(view, policy.init(spec, 1))
    scores = policy.scores(view, state)
    assert (scores.tier > Tier.CANDIDATE).sum(-1).tolist() == [[4, 4]]  # sinks and recent tokens
    assert scores.values.equal(-view.keys.norm(dim=-1))
    again = policy.chain.selector.select(scores, view)
    for field in dataclasses.fields(keep):
        assert torch.equal(getattr(keep, field.name), getattr(again, field.name))
