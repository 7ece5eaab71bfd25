"""A cache of one row that is too slow and simple to be wrong: lists of floats, attention at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from kvpolicy import Policy
from kvpolicy.testing.replay import Script, StoreCache, Tokens

SCRIPT = Script(turns=(((20,), 13),), layers=1, heads=2, group=2, dtype=torch.float64)
SCALING = 0.5  #: what StoreCache's attention does to logits

Vector = list[float]


@dataclass
class Token:
    """A token of one head, and what a method remembers about it."""

    position: int
    key: Vector
    value: Vector
    memory: dict[str, float] = field(default_factory=dict)


@dataclass
class Query:
    """A query of one position: one vector for each head of the group."""

    position: int
    vectors: list[Vector]


Change = Callable[[Query, int, Token, float], float]


@dataclass
class Head:
    """The tokens that one KV head holds, and the queries it was asked, oldest first."""

    index: int
    tokens: list[Token] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)
    seen: int = 0
    prompt: int = 0

    def attention(self, query: Query, change: Change | None = None) -> dict[int, float]:
        """The probability of each token that is no newer, the mean over the group."""
        held = [token for token in self.tokens if token.position <= query.position]
        mean = {token.position: 0.0 for token in held}
        for member, vector in enumerate(query.vectors):
            powers = {}
            for token in held:
                logit = SCALING * dot(vector, token.key)
                powers[token.position] = math.exp(logit if change is None else change(query, member, token, logit))
            total = sum(powers.values())
            for position, power in powers.items():
                mean[position] += power / total / len(query.vectors)
        return mean

    def mean_attention(self, window: int) -> dict[int, float]:
        """The mean over the newest queries."""
        asked = self.queries[-window:]
        total = {token.position: 0.0 for token in self.tokens}
        for query in asked:
            for position, p in self.attention(query).items():
                total[position] += p / len(asked)
        return total


Scores = dict[int, float]


@dataclass
class Method:
    """A method, written out: what it does at each query, and how it scores at an eviction.

    ``guarded`` returns the tokens that stay before all others, the last ``recent`` apart.
    """

    budget: int
    recent: int
    score: Callable[[Head], Scores]
    at_query: Callable[[Head, Query], None] = lambda head, query: None
    guarded: Callable[[Head, Scores], set[int]] = lambda head, scores: set()
    window: int = 64


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def conversations(policy: Policy, method: Method, script: Script = SCRIPT) -> Iterator[tuple[list[set[int]], ...]]:
    """Tell both the same conversation; yield what each kept, a set for each head, after every eviction."""
    random = torch.Generator().manual_seed(script.generator)
    cache = StoreCache(policy, script)
    heads = [Head(index) for index in range(script.heads)]
    seen = 0
    for counts, decoding in script.steps():
        tokens = Tokens.of(script, max(counts), random)
        # Sharper than random numbers are, so that some tokens are attended to and others are not; values of all sizes.
        sizes = torch.exp(0.8 * torch.randn(tokens.values.shape[:-1], generator=random, dtype=script.dtype))
        tokens = Tokens(tokens.keys, tokens.values * sizes[..., None], 3 * tokens.queries)
        event = cache.step(tokens, counts, decoding)
        for head in heads:
            for column in range(counts[0]):
                key, value = (x[0, 0, head.index, column].tolist() for x in (tokens.keys, tokens.values))
                head.tokens.append(Token(seen + column, key, value))
            head.seen = seen + counts[0]
            head.prompt = head.prompt if decoding else head.seen
            for column in range(max(0, counts[0] - method.window), counts[0]):
                first = head.index * script.group
                vectors = tokens.queries[0, 0, first : first + script.group, column].tolist()
                head.queries.append(Query(seen + column, vectors))
                method.at_query(head, head.queries[-1])
        seen += counts[0]
        if event.due[0]:
            for head in heads:
                evict(head, method)
            yield [set(kept) for kept in cache.kept(0, 0)], [{t.position for t in head.tokens} for head in heads]


def evict(head: Head, method: Method) -> None:
    """Keep the last ``recent``, what is guarded, and then the highest, the more recent first among equals."""
    scores = method.score(head)
    newest = {t.position for t in head.tokens if t.position >= head.seen - method.recent}
    first = newest | {p for p in method.guarded(head, scores) if p not in newest}
    ranked = sorted(scores, key=lambda p: (p in newest, p in first, scores[p], p), reverse=True)
    kept = set(ranked[: method.budget])
    head.tokens = [t for t in head.tokens if t.position in kept]
