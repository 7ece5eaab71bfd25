"""lm_eval's model `kvpolicy` scores and answers as its own model does, and forgets by the policy."""

from __future__ import annotations

import functools
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpolicy import BudgetError, ParseError, Policy, UnsupportedError, UsageError
from kvpolicy.adapters.hf import EvictionCache, replay
from kvpolicy.cli.app import run
from kvpolicy.evaluation.scoring import score
from tests.models import default_folder, real, tiny, tokenizer

VOCABULARY = 97
MISSING = [name for name in ("datasets", "dill", "evaluate", "pytablewriter", "sqlitedict") if find_spec(name) is None]
SMALL = "vase(24, interval=8, recent=8)"
LARGE = "vase(4096)"
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: make test-harness")


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PAIRS = [(ids(n, n), ids(m, 100 + m)) for n, m in ((40, 21), (12, 33), (61, 1), (5, 9))]


# What scores a continuation


@pytest.mark.parametrize("pair", PAIRS[:2])
def test_a_score_is_that_of_a_replay(pair: tuple[list[int], list[int]]) -> None:
    model, policy = tiny("llama", torch.float64), Policy.parse(SMALL)
    known = replay(model, policy, torch.tensor([pair[0] + pair[1]]), len(pair[0]), seeds=[3])
    (found,) = score(model, policy, [pair], seed=3)
    assert found.log_prob == pytest.approx(known.log_probs.sum().item(), abs=1e-9)
    assert found.evictions > 0
    (full,) = score(model, Policy.parse(LARGE), [pair])
    assert abs(found.log_prob - full.log_prob) > 1e-3


def test_a_batch_scores_as_its_rows_do_alone() -> None:
    model, policy = tiny("llama", torch.float64), Policy.parse(SMALL)
    together = score(model, policy, PAIRS)
    alone = [score(model, policy, [pair])[0] for pair in PAIRS]
    for one, other in zip(together, alone, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-9)
        assert (one.greedy, one.evictions) == (other.greedy, other.evictions)


def test_one_token_is_predicted_before_its_context_is_cut() -> None:
    model = tiny("llama", torch.float64)
    (found,), (full,) = (score(model, Policy.parse(text), PAIRS[2:3]) for text in (SMALL, LARGE))
    assert found.log_prob == pytest.approx(full.log_prob, abs=1e-9)
    assert found.evictions == 0


def test_what_the_model_would_say_is_greedy() -> None:
    model, policy, context = tiny("llama"), Policy.parse(SMALL), ids(40, 1)
    with EvictionCache(model, policy) as cache, torch.no_grad():
        given = torch.tensor([context])
        said = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            past_key_values=cache,
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
        )[0, 40:].tolist()
    other = [*said[:-1], (said[-1] + 1) % VOCABULARY]
    assert [one.greedy for one in score(model, policy, [(context, said), (context, other)])] == [True, False]


# lm_eval

TEXTS = [
    ("The first line of a poem is about the sea.\n" * 6 + "The second line is", " about the wind and the waves of it."),
    ("One, two, three, four,", " five, six, seven, eight, nine, ten."),
    ("", "A text without a context."),
]


@functools.cache
def both(policy: str) -> tuple[Any, Any]:
    """Return lm_eval's own model and ours, of the default model."""
    from lm_eval.models.huggingface import HFLM

    from kvpolicy.evaluation.harness import PolicyLM

    options: dict[str, Any] = {"tokenizer": tokenizer(), "batch_size": 3, "max_length": 512}
    return HFLM(real(), **options), PolicyLM(real(), policy, **options)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@needs_lm_eval
@pytest.mark.model
def test_a_budget_beyond_the_text_scores_as_lm_eval_does() -> None:
    plain, ours = both(LARGE)
    given = asked("loglikelihood", *TEXTS)
    known, found = (one.loglikelihood(given, disable_tqdm=True) for one in (plain, ours))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in known]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in known], abs=1e-4)
    given = asked("loglikelihood_rolling", (TEXTS[0][0],), (TEXTS[1][1],))
    known, found = (one.loglikelihood_rolling(given, disable_tqdm=True) for one in (plain, ours))
    assert found == pytest.approx(known, abs=1e-4, rel=1e-6)


@needs_lm_eval
@pytest.mark.model
def test_a_budget_beyond_the_text_answers_as_lm_eval_does() -> None:
    plain, ours = both(LARGE)
    given = [(text, {"until": ["\n"], "max_gen_toks": 12}) for text, _ in TEXTS[:2]]
    known = plain.generate_until(asked("generate_until", *given), disable_tqdm=True)
    assert ours.generate_until(asked("generate_until", *given), disable_tqdm=True) == known
    assert ours.get_model_info()["kvpolicy"]["cut"] == 0


@needs_lm_eval
@pytest.mark.model
def test_a_small_budget_scores_as_a_replay_and_says_that_it_evicted() -> None:
    _, ours = both(SMALL)
    context, continuation = ours._encode_pair(*TEXTS[0])
    known = replay(real(), ours.policy, torch.tensor([context + continuation]), len(context)).log_probs.sum().item()
    found = ours.loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True)
    assert found[0][0] == pytest.approx(known, abs=1e-3)
    told = ours.get_model_info()["kvpolicy"]
    assert (told["requests"], told["cut"]) == (3, 1)
    assert told["policy"] == ours.policy.text(full=True)


@needs_lm_eval
@pytest.mark.model
def test_a_text_is_read_as_if_the_model_had_written_it() -> None:
    _, ours = both(SMALL)
    tokens = torch.tensor([[ours.prefix_token_id, *ours.tok_encode(TEXTS[0][0])]])
    known = replay(real(), ours.policy, tokens, 1).log_probs.sum().item()
    (found,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXTS[0][0],)), disable_tqdm=True)
    assert found == pytest.approx(known, abs=1e-2)


@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": ""}, UsageError, "there is no policy"),
        ({"policy": "vase(64"}, ParseError, "cannot read"),
        ({"policy": "vase(16, recent=32)"}, BudgetError, "recent=32"),
        ({"policy": LARGE, "mixed_precision_dtype": "bfloat16"}, UnsupportedError, "write dtype=bfloat16"),
    ],
)
def test_what_cannot_run_is_refused_before_a_task_is_loaded(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    from kvpolicy.evaluation.harness import PolicyLM

    with pytest.raises(error, match=message):
        PolicyLM(tiny("llama"), tokenizer=tokenizer(), **options)


@needs_lm_eval
@pytest.mark.skipif(bool(MISSING), reason=f"tasks need {MISSING}: make test-harness LM_EVAL_DEPS=1")
@pytest.mark.model
def test_the_command_runs_a_task_and_the_results_tell_of_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"question": f"1 + {n} =", "answer": str(n + 1)}) + "\n" for n in range(2))
    )
    (tmp_path / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Answer with a number and nothing else, please.\\n\\n{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 30, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
    )
    arguments = f"pretrained={default_folder()},dtype=float32,policy=vase(12, interval=4, recent=4)"
    words = ["run", "--model", "kvpolicy", "--tasks", "sums", "--device", "cpu", "--batch_size", "2"]
    before = list(sys.argv)
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "found.json"), "--model_args", arguments]
    assert run(["lm-eval", *words]) == 0
    assert sys.argv == before
    assert "exact_match" in capfd.readouterr().out
    (results,) = tmp_path.glob("found_*.json")
    told = json.loads(results.read_text())["config"]["kvpolicy"]
    assert (told["requests"], told["cut"]) == (2, 2)


def test_without_lm_eval_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(["lm-eval", "--help"]) == 1
    assert "pip install 'kvpolicy[harness]'" in capsys.readouterr().err
