"""Where value states are large, and by how much: ``python -m benchmarks.quality.values [MODEL ...]``.

VaSE (arXiv 2606.03928) finds a few value states of abnormally large range, and sinks whose range is small.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpolicy.cli.default_model import default_model
from kvpolicy.evaluation import tasks
from kvpolicy.evaluation.table import grid
from kvpolicy.loading import load
from kvpolicy.scorers.tokens import magnitude

SINKS = 4


@dataclass(frozen=True)
class Ranges:
    """Hold the range (max - min) of every value state of one text.

    Attributes:
        model: whose.
        ranges: ``[layers, heads, tokens]`` float32, divided by the median of their layer and head.
        tokens: the text.
    """

    model: str
    ranges: Tensor
    tokens: list[str]


@torch.inference_mode()
def measure(name: str, text: str, length: int) -> Ranges:
    """Return the ranges of a model's values on the first tokens of a text."""
    loaded = load(name, torch.float32, torch.device("cpu"))
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :length]
    cache: Any = DynamicCache(config=loaded.model.config)
    loaded.model(ids, past_key_values=cache, logits_to_keep=1)
    ranges = torch.stack([magnitude(layer.values[0], "range", torch.float32) for layer in cache.layers])
    words = [loaded.tokenizer.decode([token]) for token in ids[0].tolist()]
    return Ranges(Path(name).name, ranges / ranges.median(-1, keepdim=True).values, words)


def by_layer(found: Ranges) -> str:
    """Return a table: for each layer how large values are, of the median of their head."""
    lines = []
    for layer, ranges in enumerate(found.ranges):
        behind = ranges[:, SINKS:]
        lines.append(
            [
                str(layer),
                f"{behind.max():.2f}",
                f"{behind.quantile(0.99):.2f}",
                f"{100 * (behind > 2).float().mean():.2f}",
                f"{ranges[:, 0].mean():.2f}",
                f"{ranges[:, 1:SINKS].mean():.2f}",
            ]
        )
    names = ["layer", "largest", "99th percentile", "above 2, %", "first token", f"tokens 2 to {SINKS}"]
    return grid(names, lines, [False] * len(names))


def largest(found: Ranges, count: int = 12) -> str:
    """Return a table of the largest values: where they are, and of which token."""
    ranges = found.ranges.clone()
    heads, tokens = ranges.shape[1:]
    lines = []
    for index in ranges.flatten().topk(count).indices.tolist():
        layer, head, at = index // (heads * tokens), index // tokens % heads, index % tokens
        lines.append([str(layer), str(head), str(at), repr(found.tokens[at]), f"{ranges[layer, head, at]:.2f}"])
    names = ["layer", "head", "position", "token", "range / median"]
    return grid(names, lines, [name == "token" for name in names])


def said(found: Ranges, share: float = 0.01) -> list[str]:
    """Return in sentences which positions and tokens hold the largest values."""
    tokens = found.ranges.shape[-1]
    count = max(1, round(share * tokens))
    top = found.ranges.topk(count, -1).indices  # of each layer and head
    at = top.flatten()
    per_token = torch.bincount(at, minlength=tokens).float() / (top.shape[0] * top.shape[1])
    words = Counter(found.tokens[i] for i in at.tolist()).most_common(8)
    quarters = [float(((at >= q * tokens // 4) & (at < (q + 1) * tokens // 4)).float().mean()) for q in range(4)]
    return [
        f"Of the largest {100 * share:g} % of values in each layer and head, "
        f"{100 * float((at < SINKS).float().mean()):.1f} % are at the first {SINKS} positions, and the quarters of the "
        "text hold " + ", ".join(f"{100 * one:.0f} %" for one in quarters) + ".",
        f"One token is among them in {100 * float(per_token.max()):.0f} % of layers and heads at most; half of all "
        "tokens that are among them anywhere are in "
        f"{100 * float(per_token[per_token > 0].median()):.1f} % or fewer.",
        "The tokens most often among them: " + ", ".join(f"{word!r} ({times})" for word, times in words) + ".",
    ]


def page(found: Ranges) -> str:
    """Return what was found, in Markdown."""
    layers, heads, tokens = found.ranges.shape
    title = f"### {found.model}: {layers} layers, {heads} KV heads, {tokens:,} tokens\n"
    notes = "".join(f"- {line}\n" for line in said(found))
    return f"{title}\n{by_layer(found)}\n{notes}\n{largest(found)}"


def main() -> None:
    """Print a page for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="folders, or names on the hub; the default model where none")
    parser.add_argument("--text", default="pydoc", help="a task that is read, such as wikitext")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--data", type=Path, help="where data files lie")
    given = parser.parse_args()
    task = tasks.parse(f"{given.text}(length={given.tokens}, count=1)")
    (text,) = task.problems(given.data)
    for name in given.models or [str(default_model())]:
        print(page(measure(name, getattr(text, "text"), given.tokens)))  # noqa: B009 - a text, as the task is read


if __name__ == "__main__":
    main()
