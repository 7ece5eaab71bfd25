"""Files of data sets on the Hugging Face hub, where it can be reached."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpolicy.hub import unreachable

__all__ = ["FILES", "HubFile", "fetch"]


@dataclass(frozen=True)
class HubFile:
    """Name a file of a data set on the hub."""

    repository: str
    file: str


FILES = {
    ("gsm8k", "test.jsonl"): HubFile("openai/gsm8k", "main/test-00000-of-00001.parquet"),
    ("gsm8k", "train.jsonl"): HubFile("openai/gsm8k", "main/train-00000-of-00001.parquet"),
    ("math500", "test.jsonl"): HubFile("HuggingFaceH4/MATH-500", "test.jsonl"),
    ("aime24", "test.jsonl"): HubFile("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet"),
    ("aime25", "test.jsonl"): HubFile("math-ai/aime25", "test.jsonl"),
    ("wikitext2", "test.txt"): HubFile("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}


def fetch(name: str, files: Sequence[str]) -> tuple[Path | None, str]:
    """Return where the first known one of some files lies in the local cache, fetched if need be.

    Returns:
        the path, or None, and then why there is none, in a few words.
    """
    known = next((FILES[name, file] for file in files if (name, file) in FILES), None)
    if known is None:
        return None, "no copy is known there"
    if known.file.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
        return None, f"{known.repository} holds parquet, which needs pyarrow"
    if importlib.util.find_spec("huggingface_hub") is None:
        return None, "huggingface_hub is not installed"
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(known.repository, known.file, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached), ""
    why = unreachable()
    if why:
        return None, f"{known.repository}: {why}"
    try:
        return Path(hf_hub_download(known.repository, known.file, repo_type="dataset")), ""
    except Exception as error:  # whatever the network, the hub or a proxy does is passed on as the reason
        return None, f"{known.repository}: {type(error).__name__}"
