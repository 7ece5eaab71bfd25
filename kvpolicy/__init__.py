"""Decide what a language model may forget: KV-cache eviction policies.

    >>> from kvpolicy import Policy, Stochastic, TopK, ValueGuard
    >>> Policy(ValueGuard() >> Stochastic(tau=1.0) >> TopK(1024))
    Policy(ValueGuard() >> Stochastic() >> TopK(1024))

Importing kvpolicy changes nothing in any library, and loads torch alone.
"""

from pathlib import Path as _Path

from kvpolicy.allocators import Allocator, PerLayer, Proportional, Pyramid, Uniform
from kvpolicy.errors import (
    BindError,
    BudgetError,
    CompositionError,
    IntegrityError,
    KVPolicyError,
    ParameterError,
    ParseError,
    PolicyError,
    UnsupportedError,
    UntestedVersionWarning,
    UsageError,
)
from kvpolicy.grammar import parse_policy
from kvpolicy.guards import Prompt, Sinks, ValueGuard
from kvpolicy.heads import Adaptive, PerHead
from kvpolicy.output import OutputProjection
from kvpolicy.output_error import OutputError
from kvpolicy.output_norm import OutputNorm
from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec, Plan, Policy
from kvpolicy.score_guards import MassGuard, ScoreGuard
from kvpolicy.scorers import (
    AccumulatedAttention,
    Attention,
    AttentionCount,
    Constant,
    DecayedAttention,
    ExpectedAttention,
    KeyDifference,
    KeyNorm,
    LagRelative,
    LastAttended,
    LastQuery,
    Leverage,
    PerturbedAttention,
    Recency,
    Recurrence,
    Redundancy,
    SpreadAttention,
    ValueNorm,
    WorstAttention,
)
from kvpolicy.scores import Keep, Scores, Tier, select_top
from kvpolicy.selectors import TopK
from kvpolicy.stage import Chain, Scorer, Selector, Stage, Transform, maximum
from kvpolicy.token_number import TokenNumber
from kvpolicy.transforms import Normalize, Stochastic
from kvpolicy.view import LayerSpec, StageState, State, View

__version__ = "0.1.0"

# In a checkout without symbolic links, kvpolicy/policies and kvpolicy/adapters are small files and
# the packages stand beside this one.
if not (_Path(__file__).parent / "policies").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__all__ = [
    "AccumulatedAttention",
    "Adaptive",
    "Allocator",
    "Attention",
    "AttentionCount",
    "BindError",
    "BudgetError",
    "Chain",
    "CompositionError",
    "Constant",
    "DecayedAttention",
    "EvictionPolicy",
    "ExpectedAttention",
    "IntegrityError",
    "KVPolicyError",
    "Keep",
    "KeyDifference",
    "KeyNorm",
    "LagRelative",
    "LastAttended",
    "LastQuery",
    "LayerPlan",
    "LayerSpec",
    "Leverage",
    "MassGuard",
    "ModelSpec",
    "Normalize",
    "OutputError",
    "OutputNorm",
    "OutputProjection",
    "ParameterError",
    "ParseError",
    "PerHead",
    "PerLayer",
    "PerturbedAttention",
    "Plan",
    "Policy",
    "PolicyError",
    "Prompt",
    "Proportional",
    "Pyramid",
    "Recency",
    "Recurrence",
    "Redundancy",
    "ScoreGuard",
    "Scorer",
    "Scores",
    "Selector",
    "Sinks",
    "SpreadAttention",
    "Stage",
    "StageState",
    "State",
    "Stochastic",
    "Tier",
    "TokenNumber",
    "TopK",
    "Transform",
    "Uniform",
    "UnsupportedError",
    "UntestedVersionWarning",
    "UsageError",
    "ValueGuard",
    "ValueNorm",
    "View",
    "WorstAttention",
    "__version__",
    "maximum",
    "parse_policy",
    "select_top",
]
