"""Draw what each method keeps of one text: ``python -m benchmarks.pictures FOLDER [METHOD ...]``.

One picture a method, for its page: tokens from left to right, time from top to bottom, a point where
a token is still held, the darker the more of the layer's heads hold it.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpolicy import Policy, registry
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.cli.default_model import default_model
from kvpolicy.loading import load

LENGTH, PROMPT, BUDGET, INTERVAL = 512, 64, 96, 16
LAYER = 15  #: in the middle of the default model
#: What the first page shows.
TOGETHER = {"streaming_llm": "StreamingLLM", "snapkv": "SnapKV", "vase": "VaSE", "recommended": "recommended"}
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"  #: which everybody has


#: What a method is given beside the sizes: half of the heads of the default model retrieve.
MORE: dict[str, dict[str, Any]] = {
    "duo_attention": {"retrieval": tuple((layer % 2 == 0, True, False) for layer in range(30)), "sinks": 4},
    "lagkv": {"lag": 16},  # which is 128 for budgets in the thousands
}


def small(name: str) -> Policy:
    """Return a registered method with the sizes of the pictures, as far as it leaves them open."""
    recipe = registry.policies()[name].load()
    asked = {"interval": INTERVAL, "recent": INTERVAL, "window": INTERVAL}
    known = inspect.signature(recipe).parameters
    made = recipe(BUDGET, **{word: size for word, size in asked.items() if word in known}, **MORE.get(name, {}))
    assert isinstance(made, Policy)
    return made


@torch.inference_mode()
def held(model: Any, ids: torch.Tensor, policy: Policy) -> NDArray[np.float32]:
    """Return ``[evictions, tokens]``: which share of a layer's heads holds a token behind each eviction.

    Tokens are fed as many at once as an interval has, which evicts as often as decoding them would.
    """
    rows = []
    with EvictionCache(model, policy, max_new_tokens=LENGTH) as cache:
        model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        for at in range(PROMPT, ids.shape[1], INTERVAL):
            model(ids[:, at : at + INTERVAL], past_key_values=cache, logits_to_keep=1)
            positions = cache.receipt().positions(LAYER)[0]
            row = torch.zeros(ids.shape[1])
            for head in positions:
                row[head[head >= 0].long()] += 1 / len(positions)
            rows.append(row)
    return torch.stack(rows).numpy()


def draw(pictures: dict[str, NDArray[np.float32]], file: Path) -> None:
    """Write pictures one above another, readable on light and dark pages; named where there are several."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    grey = "#808080"
    figure = Figure(figsize=(7, 0.4 + 1.3 * len(pictures)), dpi=110, layout="constrained")
    every = figure.subplots(len(pictures), sharex=True, squeeze=False)[:, 0]
    for (name, kept), axes in zip(pictures.items(), every, strict=True):
        colours = colormaps["Blues"](0.3 + 0.5 * kept)
        colours[..., 3] = kept > 0
        axes.imshow(colours, aspect="auto", interpolation="nearest", extent=(0, kept.shape[1], len(kept), 0))
        axes.set_yticks([])
        axes.set_ylabel("time →", color=grey, fontsize=8, rotation=270, labelpad=10)
        axes.tick_params(colors=grey, labelsize=7)
        for side in axes.spines.values():
            side.set_color(grey)
        if len(pictures) > 1:
            axes.text(0.99, 0.93, name, ha="right", va="top", transform=axes.transAxes, color=grey, fontsize=9)
    every[-1].set_xlabel("position of the token", color=grey, fontsize=8)
    figure.savefig(file, transparent=True, metadata={"Software": None})


def main() -> None:
    """Draw all methods that are installed, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*")
    asked = parser.parse_args()
    loaded = load(str(default_model()), torch.float32, torch.device("cpu"))
    ids = loaded.tokenizer(TEXT.read_text("utf-8"), return_tensors="pt").input_ids[:, :LENGTH]
    asked.folder.mkdir(parents=True, exist_ok=True)
    names = asked.methods or list(registry.policies())
    every = {}
    for name in names:
        every[name] = held(loaded.model, ids, small(name))
        draw({name: every[name]}, asked.folder / f"{name}.png")
        print(name, flush=True)
    if set(TOGETHER) <= set(every):
        draw({title: every[name] for name, title in TOGETHER.items()}, asked.folder / "together.png")


if __name__ == "__main__":
    main()
