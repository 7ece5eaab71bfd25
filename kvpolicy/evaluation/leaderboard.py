"""The policies that are compared with each other, at matched budgets."""

from __future__ import annotations

from kvpolicy.evaluation.record import short

__all__ = ["ABLATION", "LEADERBOARD", "QUICK"]

_RANDOM = "random: Policy(Constant() >> Stochastic() >> TopK(b), interval=b // 8, recent=b // 8)"
_EVICT_LARGEST = "evict largest values: Policy(-1 * ValueNorm() >> Sinks(4) >> TopK(b), interval=b // 8, recent=b // 8)"

#: Every policy evicts as often (each eighth of the budget) and spares as many recent tokens, where its definition
#: leaves that open: what differs is what it keeps.
LEADERBOARD = (
    "full",
    "VaSE: vase(b, interval=b // 8, recent=b // 8)",
    "VaSE, noise stays: vase(b, redraw=False, interval=b // 8, recent=b // 8)",
    "VaSE-DKV: vase_dkv(b, interval=b // 8, recent=b // 8)",
    "R-KV: rkv(b, window=b // 8, interval=b // 8, recent=b // 8)",
    "R-KV, 64 queries: rkv(b, interval=b // 8, recent=b // 8)",  # as many as VaSE asks
    "SnapKV: snapkv(b, window=b // 8, interval=b // 8)",
    "H2O: h2o(b, interval=b // 8)",
    "TOVA: tova(b, interval=b // 8)",
    "key norm: knorm(b, interval=b // 8, recent=b // 8)",
    "KeyDiff: keydiff(b, interval=b // 8, recent=b // 8)",
    "recency: streaming_llm(b, interval=b // 8, recent=b // 8)",
    "random + prompt: random_eviction(b, interval=b // 8, recent=b // 8)",
    "random + prompt, noise stays: random_eviction(b, redraw=False, interval=b // 8, recent=b // 8)",
    _RANDOM,
    "random, noise stays: Policy(Constant() >> Stochastic(redraw=False) >> TopK(b), interval=b // 8, recent=b // 8)",
    "recommended: recommended(b, interval=b // 8, recent=b // 8)",
    _EVICT_LARGEST,
)

#: What ``--quick`` compares.
QUICK = tuple(
    one for one in LEADERBOARD if short(one) in ("full", "VaSE", "R-KV", "SnapKV", "random + prompt", "recommended")
)

_ATTENTION = "Attention(b // 8)"

#: The pilot study of VaSE (its first figure): top-k, sampling, the guard in four sizes, both, and what they are not.
#: Guards are 16, 32, 64 and 256 of 512 there; here the same shares.
ABLATION = (
    "full",
    f"top-k: Policy({_ATTENTION} >> TopK(b), interval=b // 8, recent=b // 8)",
    f"top-k + sampling: Policy({_ATTENTION} >> Stochastic() >> TopK(b), interval=b // 8, recent=b // 8)",
    *(
        f"top-k + guard of {size}/512: Policy({_ATTENTION} >> ValueGuard({size / 512}) >> TopK(b), interval=b // 8, "
        "recent=b // 8)"
        for size in (16, 32, 64, 256)
    ),
    f"top-k + sampling + guard of 256/512: Policy({_ATTENTION} >> ValueGuard(0.5) >> Stochastic() >> TopK(b), "
    "interval=b // 8, recent=b // 8)",
    "DKV, fixed: Policy(Leverage(resample=False) >> Sinks(4) >> TopK(b), interval=b // 8, recent=b // 8)",
    "DKV, drawn anew: vase_dkv(b, interval=b // 8, recent=b // 8)",
    _EVICT_LARGEST,
    _RANDOM,
)
