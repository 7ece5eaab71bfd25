"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads.

https://arxiv.org/abs/2410.10819
"""

from collections.abc import Sequence

from kvpolicy import Attention, ParameterError, PerHead, Policy, Sinks, TopK

__all__ = ["duo_attention"]


def duo_attention(
    budget: int,
    retrieval: Sequence[Sequence[bool]],
    *,
    sinks: int = 128,
    interval: int | None = 64,
    recent: int = 256,
) -> Policy:
    """Return DuoAttention: keep much in retrieval heads, and the first and last tokens alone in streaming heads.

    Which heads retrieve is measured for each model; the official repository has patterns of some. Where a
    retrieval head comes to its budget, the attention of the newest queries decides.

    Args:
        budget: slots of a retrieval head. The paper lets these keep everything: give a budget beyond the longest text.
        retrieval: for each layer that may evict, and each of its KV heads, whether it is a retrieval head.
        sinks: first tokens that every head keeps.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which every head keeps.

    Raises:
        ParameterError: ``retrieval`` is not one row of booleans for each layer.

    Source: https://arxiv.org/abs/2410.10819, section 2; sizes are those of kvpress'
    DuoAttentionPress (https://github.com/NVIDIA/kvpress) where it measures the split itself; the official patterns,
    https://github.com/mit-han-lab/duo-attention, bring their own. Published, a streaming head's window moves at each
    token; here it has up to ``interval`` tokens more.

    >>> from kvpolicy import ModelSpec
    >>> policy = duo_attention(2048, ((True, False), (False, False), (False, True)))
    >>> [layer.heads for layer in policy.plan(ModelSpec(num_layers=3)).layers]
    [(2048, 384), (384, 384), (384, 2048)]
    """
    layers = [tuple(one) for one in retrieval if isinstance(one, Sequence)] if isinstance(retrieval, Sequence) else []
    if not layers or len(layers) < len(retrieval) or not all(isinstance(one, bool) for row in layers for one in row):
        raise ParameterError(
            f"duo_attention(retrieval={retrieval!r}): write a row of booleans for each layer, one for each KV head: "
            "((True, False), (False, False))"
        )
    heads = tuple(tuple(budget if one else sinks + recent for one in row) for row in layers)
    return Policy(Attention() >> Sinks(sinks) >> TopK(PerHead(heads)), interval=interval, recent=recent)
