"""Every published method, and policies from every corner of the algebra, under every check."""

from kvpolicy import (
    AccumulatedAttention,
    Adaptive,
    Attention,
    Constant,
    EvictionPolicy,
    KeyDifference,
    KeyNorm,
    LastQuery,
    Leverage,
    Normalize,
    PerHead,
    PerLayer,
    Policy,
    Prompt,
    Recency,
    Redundancy,
    Sinks,
    Stochastic,
    TopK,
    ValueGuard,
    ValueNorm,
    maximum,
    policies,
)
from kvpolicy.testing import parametrize_with_checks
from kvpolicy.testing.checks import Check

BUDGET, RECENT, INTERVAL = 11, 3, 4


def small(policy: Policy) -> Policy:
    """The same chain, made for views of some twenty slots."""
    interval = None if policy.interval is None else INTERVAL
    return Policy(policy.chain, interval=interval, recent=RECENT)


ZOO = {
    "adakv": small(policies.adakv(BUDGET, window=4, pool=3)),
    "cake": small(policies.cake(BUDGET, preferences=(2.0, 1.5, 1.0), window=4)),
    "criticalkv": small(policies.criticalkv(BUDGET, window=4)),
    "curdkv": small(policies.curdkv(BUDGET, local=3)),
    "defensivekv": small(policies.defensivekv(BUDGET, window=4)),
    "duo_attention": small(
        policies.duo_attention(BUDGET, ((True, False), (False, True), (True, False)), sinks=2, recent=RECENT)
    ),
    "expected_attention": small(policies.expected_attention(BUDGET, window=6, future=9, sinks=2)),
    "caote": small(policies.caote(BUDGET)),
    "gkv": small(policies.gkv(BUDGET, window=4)),
    "h2o": small(policies.h2o(BUDGET)),
    "keydiff": small(policies.keydiff(BUDGET)),
    "keyformer": small(policies.keyformer(BUDGET)),
    "knorm": small(policies.knorm(BUDGET)),
    "lagkv": small(policies.lagkv(BUDGET, lag=4, sinks=2)),
    "lazy_eviction": small(policies.lazy_eviction(BUDGET, threshold=0.1)),
    "nacl": small(policies.nacl(BUDGET, window=4)),
    "nexus": small(policies.nexus(BUDGET, window=6)),
    "pyramidkv": small(policies.pyramidkv(BUDGET, beta=4, window=4)),
    "raas": small(policies.raas(BUDGET, recent=RECENT)),
    "random_eviction": small(policies.random_eviction(BUDGET)),
    "reservoir": small(policies.random_eviction(BUDGET, redraw=False)),
    "recommended": small(policies.recommended(BUDGET)),
    "rkv": small(policies.rkv(BUDGET, window=6)),
    "scissorhands": small(policies.scissorhands(BUDGET, window=6)),
    "snapkv": small(policies.snapkv(BUDGET, window=4)),
    "streaming_llm": small(policies.streaming_llm(BUDGET)),
    "tova": small(policies.tova(BUDGET)),
    "vatp": small(policies.vatp(BUDGET, sinks=2)),
    "vase": small(policies.vase(BUDGET)),
    "vase_dkv": small(policies.vase_dkv(BUDGET)),
}

COMPOSED = {
    "adaptive": Policy(Attention(4, over="all") >> TopK(Adaptive(BUDGET)), interval=4, recent=3),
    "adaptive, shared again": Policy(
        AccumulatedAttention(4) >> ValueGuard(0.25) >> Stochastic() >> TopK(Adaptive(BUDGET, 0.5, refresh=2)),
        interval=4,
        recent=3,
    ),
    "split heads": Policy(Recency() >> Sinks(2) >> TopK(PerHead((14, 7))), interval=4, recent=3),
    "all guards": Policy(
        Recency() >> Prompt(0.5) >> Sinks(2) >> ValueGuard(0.5, "l2") >> TopK(8), interval=1, recent=2
    ),
    "sum of normalised": Policy(
        (Attention(3, over="all", reduce="max") >> Normalize("max")) + (KeyNorm() >> Normalize("z"))
        >> Stochastic(0.3, seed=5)
        >> TopK(BUDGET),
        interval=INTERVAL,
        recent=1,
    ),
    "maximum": Policy(
        maximum(0.5 * ValueNorm("var"), AccumulatedAttention(3) >> Normalize("sum")) >> Stochastic() >> TopK(6),
        interval=3,
        recent=2,
    ),
    "guard inside a sum": Policy(
        (LastQuery() >> Sinks(1)) + -1.0 * KeyDifference() >> TopK(7), interval=INTERVAL, recent=RECENT
    ),
    "leverage of one matrix": Policy(
        Leverage(None) + Leverage(3, resample=False, seed=2) >> TopK(5), interval=2, recent=1
    ),
    "two samplers": Policy(
        Constant() >> Stochastic(seed=1) >> Stochastic(2.0, seed=2, redraw=False) >> TopK(4), recent=1
    ),
    "redundancy at the end of a turn": Policy(Redundancy() >> TopK(9), interval=None, recent=4),
    "two windows": Policy(Attention(6, pool=1) + LastQuery() >> TopK(6), interval=3, recent=1),
    "a layer left alone": Policy(
        ValueGuard(0.25) >> TopK(PerLayer((BUDGET, None, 8))), interval=INTERVAL, recent=RECENT
    ),
    "published sizes": policies.vase(88),
}


@parametrize_with_checks({**ZOO, **COMPOSED})
def test_every_invariant(policy: EvictionPolicy, check: Check) -> None:
    check(policy)


def test_no_method_is_left_out() -> None:
    assert ZOO.keys() - {"reservoir"} == set(policies.__all__)
