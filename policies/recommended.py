"""The policy that this project recommends, and why: https://kvpolicy.readthedocs.io/en/latest/results/."""

from kvpolicy import AccumulatedAttention, Attention, Normalize, Policy, Prompt, TopK, ValueGuard
from kvpolicy.scorers.every_query import window_for

__all__ = ["recommended"]


def recommended(
    budget: int, *, share: float = 0.5, prompt: float = 0.25, interval: int | None = 64, recent: int | None = None
) -> Policy:
    """Return the recommended mixture: what is attended to now, what was all along, the largest values, the prompt.

    Attention of the newest queries keeps what the next tokens need, as SnapKV and VaSE do; attention
    added up over all queries, as H2O does, keeps what was needed long ago; half of the slots go to the
    largest values, twice VaSE's share, which in our measurements keeps facts that were stated once. The
    ends of the prompt stay. Nothing is drawn at random. Below about a hundred slots, VaSE was nearer to the
    full cache; on problems that are answered at length it has not been measured.

    Args:
        budget: slots kept per KV head.
        share: of the budget, for the largest values, the four sinks among them.
        prompt: share of the budget for the prompt; both ends of a longer one stay.
        interval: decoded tokens between two evictions; None evicts at the end of a turn only.
        recent: the last tokens, which always stay, and queries asked; an eighth of the budget, 64 at most, where None.

    Source: none; a mixture of H2O (https://arxiv.org/abs/2306.14048), SnapKV
    (https://arxiv.org/abs/2404.14469), VaSE (https://arxiv.org/abs/2606.03928) and boundary
    protection (arXiv 2605.18053), chosen by measurement.

    >>> recommended(1024)
    Policy(... >> Prompt(share=0.25) >> ValueGuard(share=0.5) >> TopK(1024))
    """
    recent = min(64, max(1, budget // 8)) if recent is None else recent
    before, now = AccumulatedAttention(window_for(interval)), Attention(recent)
    attended = (before >> Normalize("sum")) + (now >> Normalize("sum"))
    return Policy(attended >> Prompt(prompt) >> ValueGuard(share) >> TopK(budget), interval=interval, recent=recent)
