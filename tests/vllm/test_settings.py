"""What a request may ask for, and what it is told where it cannot have it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from kvpolicy import BindError, KVPolicyError, UnsupportedError
from kvpolicy.adapters.vllm import Config, Settings
from tests.vllm.engine import answers, engine, params

POLICY = "vase(64, interval=32, recent=16)"
PROMPTS = [[(i * k) % 512 for i in range(n)] for k, n in ((3, 50), (5, 300), (7, 120))]


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return engine(folder, {"policy": POLICY})


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    return engine(folder)


@pytest.fixture(scope="module")
def roomy(folder: Path) -> LLM:
    return engine(folder, {"policy": "vase(1024)"})


def asked(given: Any, **more: Any) -> Any:
    return SimpleNamespace(extra_args=None if given is None else {"kvpolicy": given}, seed=None, **more)


# What is read


def test_a_request_that_asks_for_nothing_follows_the_engine() -> None:
    config = Config(POLICY)
    assert Settings.of(config, asked(None)) == Settings(*config.default, 0)


def test_a_budget_replaces_that_of_the_policy_alone() -> None:
    found = Settings.of(Config(POLICY), asked({"budget": 40}))
    assert repr(found.policy) == "Policy(ValueGuard() >> Stochastic() >> TopK(40), interval=32, recent=16)"
    assert found.plan.capacity == 72


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("knorm(48, interval=16, recent=8)", "Policy(KeyNorm() >> TopK(48), interval=16, recent=8)"),
        ("Recency() >> Sinks(4) >> TopK(80)", "Policy(Recency() >> Sinks(4) >> TopK(80))"),
    ],
)
def test_a_policy_by_its_text(text: str, expected: str) -> None:
    config = Config("vase(128)", interval=48)
    for given in ({"policy": text}, text, json.dumps({"policy": text})):
        assert repr(Settings.of(config, asked(given)).policy) == expected


def test_a_policy_by_its_name_has_the_budget_of_the_engine() -> None:
    found = Settings.of(Config("vase(256)"), asked({"policy": "knorm"}))
    assert found.plan.budget == 256
    assert Settings.of(Config("vase(256)"), asked({"policy": "knorm", "budget": 100})).plan.budget == 100
    short = Settings.of(Config(POLICY), asked({"policy": "tova"})).policy
    assert repr(short) == "Policy(LastQuery() >> TopK(64), interval=32, recent=1)"
    assert Settings.of(Config(POLICY), asked({"policy": "knorm"})).plan.recent == 16
    window = Settings.of(Config("vase(256)", interval=32), asked({"policy": "snapkv"})).policy
    assert repr(window) == "Policy(Attention(over='all') >> TopK(256), interval=32)"


def test_equal_requests_share_one_policy() -> None:
    config = Config(POLICY)
    first, second = (Settings.of(config, asked({"policy": "knorm(48, interval=16, recent=8)"})) for _ in range(2))
    assert first.policy is second.policy


def test_a_seed_is_the_requests_own_then_that_of_sampling_then_zero() -> None:
    config = Config(POLICY)
    params = asked({"seed": 4})
    params.seed = 9
    assert Settings.of(config, params).seed == 4
    params.extra_args = None
    assert Settings.of(config, params).seed == 9
    params.seed = None
    assert Settings.of(config, params).seed == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bugdet": 40}, "did you mean 'budget'"),
        ({"budget": 4096}, "fills 4128 slots, and the engine sets 96 aside"),
        ({"budget": "40"}, "budget is '40'; write a whole number"),
        ({"budget": 10}, "budget of 10 is not larger than recent=16"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"policy": "vase(64"}, "cannot read"),
        ({"policy": 3}, "policy is 3; write a text"),
        ({"policy": "knorm(40, interval=32, recent=8)", "budget": 9}, "says its budget itself"),
        ({"policy": "KeyNorm() >> TopK(Adaptive(40))"}, "heads budgets of their own"),
        ({"policy": "pyramidkv(40)"}, "layers budgets of their own"),
        ({"policy": "Policy(KeyNorm() >> TopK(40), interval=None, recent=8)"}, "evicts at the end of a turn only"),
        ({"policy": "Policy(Attention(window=99) >> TopK(40), interval=32, recent=8)"}, '"window": 99'),
        ("on", "'on' is not"),
        ({"seed": 2**63}, "from -9223372036854775808 to 9223372036854775807"),
        (["vase"], 'write "off"'),
    ],
)
def test_what_cannot_be_is_said(given: Any, message: str) -> None:
    with pytest.raises(KVPolicyError) as error:
        Settings.of(Config(POLICY), asked(given))
    assert message in str(error.value)


def test_a_key_that_is_nearly_ours_is_not_ignored() -> None:
    for name in ("kv_policy", "kvpolcy", "KVPolicy"):
        with pytest.raises(BindError, match="write 'kvpolicy'"):
            Config.of(SimpleNamespace(additional_config={name: POLICY}))
        with pytest.raises(BindError, match="write 'kvpolicy'"):
            Settings.of(Config(POLICY), SimpleNamespace(extra_args={name: "off"}, seed=None))


def test_off_has_no_room_where_prompts_are_bounded() -> None:
    assert Settings.of(Config(POLICY), asked("off")).off
    assert Settings.of(Config(POLICY), asked('"off"')).off
    with pytest.raises(KVPolicyError, match="bounded memory"):
        Settings.of(Config(POLICY, prefill="bounded"), asked("off"))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"policy": POLICY, "intreval": 3}, BindError, "did you mean 'interval'"),
        ({"interval": 3}, BindError, "write additional_config="),
        (7, BindError, "write additional_config="),
        ({"policy": POLICY, "interval": 0}, BindError, "interval is 0"),
        ({"policy": POLICY, "prefill": "chunked"}, BindError, '"exact" or "bounded"'),
        ({"policy": POLICY, "window": 8}, BindError, "asks for 64 queries"),
        ("snapkv(64, interval=None)", UnsupportedError, "write an interval"),
        ("KeyNorm() >> TopK(PerLayer((64, None, 128)))", UnsupportedError, "layers budgets of their own"),
        ("KeyNorm() >> TopK(Proportional(512, (2.0, 1.0, 1.0)))", UnsupportedError, "layers budgets of their own"),
    ],
)
def test_what_an_engine_cannot_be_asked_for(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as found:
        Config.of(SimpleNamespace(additional_config={"kvpolicy": given}))
    assert message in str(found.value)


def test_an_engine_that_is_not_asked() -> None:
    assert Config.of(SimpleNamespace(additional_config={})) is None
    assert Config.of(SimpleNamespace(additional_config={"other": 1})) is None


# What is done


def test_requests_of_a_batch_have_their_own(llm: LLM) -> None:
    wanted = [{"budget": 40}, {"policy": "knorm(64, interval=32, recent=16)"}, {"seed": 3}]
    alone = [answers(llm, [tokens], params(130, one))[0] for tokens, one in zip(PROMPTS, wanted, strict=True)]
    together = answers(llm, PROMPTS, [params(130, one) for one in wanted])
    assert together == alone
    plainly = answers(llm, PROMPTS, params(130))
    assert all(one != other for one, other in zip(together, plainly, strict=True))


def test_a_budget_beyond_the_text_changes_nothing(roomy: LLM, plain: LLM) -> None:
    assert answers(roomy, PROMPTS, params(130)) == answers(plain, PROMPTS, params(130))


def test_a_seed_says_what_is_forgotten(llm: LLM) -> None:
    prompt = [PROMPTS[1]] * 4
    first, again, other, sampled = answers(
        llm, prompt, [params(150, {"seed": 1}), params(150, {"seed": 1}), params(150), params(150, seed=1)]
    )
    assert first == again == sampled
    assert first != other


def test_off_is_stock_while_neighbours_evict(llm: LLM, plain: LLM) -> None:
    expected = answers(plain, PROMPTS, params(130))
    found = answers(llm, [*PROMPTS, *PROMPTS], [params(130, "off")] * 3 + [params(130)] * 3)
    assert found[:3] == expected
    assert found[3:] != expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bugdet": 40}, "did you mean 'budget'"),
        ({"budget": 4096}, "fills 4128 slots, and the engine sets 96 aside .*; ask for at most 64"),
        ({"budget": "40"}, "budget is '40'; write a whole number"),
        ({"policy": "KeyNorm() >> TopK(Adaptive(40))"}, "heads budgets of their own.*write TopK"),
        ({"policy": "vase(64"}, "cannot read"),
        ({"policy": "Policy(Attention(window=99) >> TopK(40), interval=32, recent=8)"}, 'start it with "window": 99'),
        ({"seed": "one"}, "seed is 'one'; write a whole number"),
        (7, 'write "off"'),
    ],
)
def test_a_wrong_request_is_refused_and_the_engine_goes_on(llm: LLM, given: Any, message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        answers(llm, PROMPTS[:1], params(5, given))
    assert not llm.llm_engine.has_unfinished_requests()
    assert answers(llm, PROMPTS[:1], params(5)) == answers(llm, PROMPTS[:1], params(5, {"seed": 0}))


@pytest.fixture
def board_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request must fit one of the engines of a process: those of other tests do not count here."""
    monkeypatch.setenv("KVPOLICY_VLLM_BOARD", str(tmp_path))


@pytest.mark.usefixtures("board_of_its_own")
def test_an_engine_without_kvpolicy_refuses_who_asks_for_it(plain: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="no engine on this machine was started with it"):
        answers(plain, PROMPTS[:1], params(5, {"budget": 40}))
    assert len(answers(plain, PROMPTS[:1], params(5))[0]) == 5


@pytest.mark.usefixtures("board_of_its_own")
def test_off_is_refused_where_prompts_are_bounded(folder: Path) -> None:
    llm = engine(folder, {"policy": POLICY, "prefill": "bounded"})
    with pytest.raises(VLLMValidationError, match='start it with "prefill": "exact"'):
        answers(llm, PROMPTS[:1], params(5, "off"))
    assert len(answers(llm, PROMPTS[:1], params(5))[0]) == 5
