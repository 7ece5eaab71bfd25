"""Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution.

https://arxiv.org/abs/2510.00636
"""

from kvpolicy import ExpectedAttention, Policy, Sinks, TopK

__all__ = ["expected_attention"]


def expected_attention(
    budget: int,
    *,
    window: int = 128,
    future: int = 512,
    covariance: bool = True,
    epsilon: float = 0.0,
    sinks: int = 4,
    interval: int | None = 64,
    recent: int = 64,
) -> Policy:
    """Return Expected Attention: keep what queries to come are expected to attend to, weighed by the values' norms.

    It rotates queries back by their positions, so that it runs in transformers alone, with models of plain
    rotary embeddings.

    Args:
        budget: slots kept per KV head.
        window: queries whose mean and covariance stand for those to come.
        future: positions to come.
        covariance: use the covariance, or the mean alone.
        epsilon: added to the attention before it is multiplied.
        sinks: first tokens that always stay.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay; the code has no such rule.

    Source: https://arxiv.org/abs/2510.00636, section 3; formula and defaults were read in
    ExpectedAttentionPress of https://github.com/NVIDIA/kvpress, by its authors. There mean and covariance are of all
    hidden states of the prompt behind the first four, and models that normalise queries are refused; here of the
    newest ``window`` queries as the model made them, so that those models run, too.

    >>> expected_attention(1024)
    Policy(ExpectedAttention() >> Sinks(4) >> TopK(1024))
    """
    scorer = ExpectedAttention(window, future, sinks, covariance, epsilon)
    return Policy(scorer >> Sinks(sinks) >> TopK(budget), interval=interval, recent=recent)
