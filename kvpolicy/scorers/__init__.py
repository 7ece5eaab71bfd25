"""Scorers: each gives every slot a number, higher is kept."""

from kvpolicy.scorers.attention import AccumulatedAttention, Attention, LastQuery
from kvpolicy.scorers.each import SpreadAttention, WorstAttention
from kvpolicy.scorers.expected import ExpectedAttention
from kvpolicy.scorers.keys import KeyDifference, Redundancy
from kvpolicy.scorers.lag import LagRelative
from kvpolicy.scorers.leverage import Leverage
from kvpolicy.scorers.tokens import Constant, KeyNorm, Recency, ValueNorm, magnitude

__all__ = [
    "AccumulatedAttention",
    "Attention",
    "Constant",
    "ExpectedAttention",
    "KeyDifference",
    "KeyNorm",
    "LagRelative",
    "LastQuery",
    "Leverage",
    "Recency",
    "Redundancy",
    "SpreadAttention",
    "ValueNorm",
    "WorstAttention",
    "magnitude",
]
