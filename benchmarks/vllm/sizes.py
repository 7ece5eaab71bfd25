"""How large a load is: :class:`Sizes`, and models that need no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.decoder import ModelShape

__all__ = ["Sizes", "write_config"]


@dataclass(frozen=True)
class Sizes:
    """Say what is asked of an engine, and what a policy leaves of it.

    Attributes:
        requests: all of them are there at once.
        prompt: tokens of each.
        output: tokens of each.
        budget: of the policy.
        interval: tokens between two evictions.
        block: slots of a block.
    """

    requests: int
    prompt: int
    output: int
    budget: int
    interval: int
    block: int = 32

    @property
    def context(self) -> int:
        """Return the tokens of a request in the end."""
        return self.prompt + self.output

    def policy(self, name: str = "vase", interval: int | None = None) -> str:
        """Return a policy, as text; its interval is that of the sizes by default."""
        recent = min(64, self.budget // 2)
        return f"{name}({self.budget}, interval={interval or self.interval}, recent={recent})"

    def blocks(self, share: float = 1.0) -> int:
        """Return a share of the blocks that all requests need without eviction, and the one that vLLM keeps."""
        return int(share * self.requests * -(-self.context // self.block)) + 1

    def described(self) -> str:
        """Return the load in words."""
        return f"{self.requests} requests of {self.prompt} + {self.output} tokens, blocks of {self.block} slots"


def write_config(folder: Path, shape: ModelShape, dtype: str) -> Path:
    """Write the configuration of a Llama into a folder; vLLM fills it with random weights."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder
