"""The policies that are compared with each other, at matched budgets."""

from __future__ import annotations

__all__ = ["ABLATION", "LEADERBOARD", "QUICK"]

#: Every policy evicts as often (each eighth of the budget) and spares as many recent tokens, where its definition
#: leaves that open: what differs is what it keeps.
LEADERBOARD = (
    "full",
    "vase(b, interval=b // 8, recent=b // 8)",
    "vase(b, redraw=False, interval=b // 8, recent=b // 8)",
    "vase_dkv(b, interval=b // 8, recent=b // 8)",
    "rkv(b, window=b // 8, interval=b // 8, recent=b // 8)",
    "snapkv(b, window=b // 8, interval=b // 8)",
    "h2o(b, interval=b // 8)",
    "tova(b, interval=b // 8)",
    "knorm(b, interval=b // 8, recent=b // 8)",
    "keydiff(b, interval=b // 8, recent=b // 8)",
    "streaming_llm(b, interval=b // 8, recent=b // 8)",
    "random_eviction(b, interval=b // 8, recent=b // 8)",
    "random_eviction(b, redraw=False, interval=b // 8, recent=b // 8)",
    "random_eviction(b, share=0.0, interval=b // 8, recent=b // 8)",
    "random_eviction(b, share=0.0, redraw=False, interval=b // 8, recent=b // 8)",
    "Policy(-1 * ValueNorm() >> Sinks(4) >> TopK(b), interval=b // 8, recent=b // 8)",  # evict the largest values
)

QUICK = (
    "full",
    "vase(b, interval=b // 8, recent=b // 8)",
    "rkv(b, window=b // 8, interval=b // 8, recent=b // 8)",
    "snapkv(b, window=b // 8, interval=b // 8)",
    "random_eviction(b, interval=b // 8, recent=b // 8)",
)

#: The pilot study of VaSE (its first figure): top-k, sampling, the guard in four sizes, both, and what they are not.
ABLATION = (
    "full",
    "Policy(Attention() >> TopK(b), interval=b // 8, recent=b // 8)",
    "Policy(Attention() >> Stochastic() >> TopK(b), interval=b // 8, recent=b // 8)",
    "Policy(ValueGuard(0.03125) >> TopK(b), interval=b // 8, recent=b // 8)",
    "Policy(ValueGuard(0.0625) >> TopK(b), interval=b // 8, recent=b // 8)",
    "Policy(ValueGuard(0.125) >> TopK(b), interval=b // 8, recent=b // 8)",
    "Policy(ValueGuard(0.5) >> TopK(b), interval=b // 8, recent=b // 8)",
    "Policy(ValueGuard(0.5) >> Stochastic() >> TopK(b), interval=b // 8, recent=b // 8)",
    "Policy(Leverage(resample=False) >> Sinks(4) >> TopK(b), interval=b // 8, recent=b // 8)",
    "vase_dkv(b, interval=b // 8, recent=b // 8)",
    "Policy(-1 * ValueNorm() >> Sinks(4) >> TopK(b), interval=b // 8, recent=b // 8)",
    "random_eviction(b, share=0.0, interval=b // 8, recent=b // 8)",
)
