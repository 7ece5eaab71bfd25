"""Scorers: each gives every slot a number, higher is kept."""

from kvpolicy.scorers.attention import AccumulatedAttention, Attention, LastQuery
from kvpolicy.scorers.expected import ExpectedAttention
from kvpolicy.scorers.keys import KeyDifference, Redundancy
from kvpolicy.scorers.lag import LagRelative
from kvpolicy.scorers.leverage import Leverage
from kvpolicy.scorers.recurrence import AttentionCount, LastAttended, Recurrence
from kvpolicy.scorers.remembered import DecayedAttention, PerturbedAttention
from kvpolicy.scorers.spread import SpreadAttention, WorstAttention
from kvpolicy.scorers.tokens import Constant, KeyNorm, Recency, ValueNorm, magnitude

__all__ = [
    "AccumulatedAttention",
    "Attention",
    "AttentionCount",
    "Constant",
    "DecayedAttention",
    "ExpectedAttention",
    "KeyDifference",
    "KeyNorm",
    "LagRelative",
    "LastAttended",
    "LastQuery",
    "Leverage",
    "PerturbedAttention",
    "Recency",
    "Recurrence",
    "Redundancy",
    "SpreadAttention",
    "ValueNorm",
    "WorstAttention",
    "magnitude",
]
