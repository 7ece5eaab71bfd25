"""What composes, what does not and why, and that text and object are one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

import kvpolicy
from kvpolicy import (
    AccumulatedAttention,
    Attention,
    AttentionCount,
    BudgetError,
    Chain,
    CompositionError,
    Constant,
    DecayedAttention,
    KeyDifference,
    KeyNorm,
    KVPolicyError,
    LastAttended,
    LastQuery,
    Leverage,
    ModelSpec,
    Normalize,
    OutputError,
    ParameterError,
    ParseError,
    PerLayer,
    PerturbedAttention,
    Policy,
    Prompt,
    Pyramid,
    Recency,
    Recurrence,
    Redundancy,
    ScoreGuard,
    Scorer,
    Sinks,
    Stochastic,
    TopK,
    Uniform,
    ValueGuard,
    ValueNorm,
    maximum,
)
from kvpolicy.policies import vase

BUILT_IN = [
    Attention(), AccumulatedAttention(), LastQuery(), KeyNorm(), ValueNorm(), KeyDifference(), Redundancy(),
    Leverage(), Recency(), Constant(), ValueGuard(), Sinks(4), Prompt(), Normalize("z"), Stochastic(), TopK(128),
    AttentionCount(400), LastAttended(share=0.5), Recurrence(threshold=1e-4), DecayedAttention(), PerturbedAttention(),
    ScoreGuard(0.5), OutputError(fast=True),
]  # fmt: skip

POLICIES = [
    Policy(TopK(1024)),
    Policy(TopK(Uniform(1024)), interval=None),
    Policy(ValueGuard() >> Stochastic(1.0) >> TopK(1024)),
    Policy(Attention(reduce="max") >> TopK(128), interval=1, recent=2),
    Policy(0.5 * Attention() + 0.5 * Redundancy() >> TopK(128)),
    Policy(Attention() + (KeyNorm() + Recency()) >> Sinks(4) >> TopK(128)),
    Policy((Attention() >> Normalize("z")) + -1.0 * (KeyNorm() >> Normalize("z")) >> TopK(128)),
    Policy(maximum(2.0 * (3 * ValueNorm("l2")), Constant() >> Prompt(0.25)) >> Stochastic(0.5, 7, False) >> TopK(128)),
    Policy(2.0 * (KeyNorm() + Constant()) >> TopK(128)),
    Policy(Attention() * ValueNorm("l1") >> Sinks(4) >> TopK(128)),
    Policy(0.5 * Attention() * ValueNorm() * (Constant() * KeyNorm()) + Recency() >> TopK(128)),
    Policy(0.5 * (Attention() * ValueNorm()) >> TopK(128)),
    Policy(Attention() * (2.0 * ValueNorm()) * (Attention() >> Normalize("softmax")) >> TopK(128)),
    Policy((Attention() + ValueNorm()) * maximum(Attention(), Constant()) >> OutputError() >> TopK(128)),
    Policy(TopK(PerLayer((512, None, 256)))),
    Policy(TopK(PerLayer((512,)))),
    Policy(TopK(Pyramid(1024))),
    Policy(TopK(Pyramid(1024, 2.5))),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_text_of_a_policy_is_the_policy(policy: Policy) -> None:
    names = vars(kvpolicy)
    for text in (repr(policy), policy.text(full=True)):
        assert eval(text, dict(names)) == policy
        assert Policy.parse(text) == policy
    assert repr(Policy.parse(repr(policy))) == repr(policy)
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)
    assert hash(policy) == hash(copy.deepcopy(policy))


def test_the_line_of_the_readme_is_vase() -> None:
    policy = Policy(ValueGuard() >> Stochastic(tau=1.0) >> TopK(1024))
    assert policy == vase(1024) == Policy(Attention() >> ValueGuard() >> Stochastic() >> TopK(1024))
    assert repr(policy) == "Policy(ValueGuard() >> Stochastic() >> TopK(1024))"
    assert Policy.parse("ValueGuard() >> Stochastic(1.0) >> TopK(1024)") == policy
    assert Policy.parse(" vase( budget = 1024 ) ") == policy


def test_how_a_chain_is_bracketed_changes_nothing() -> None:
    guard, sampler, top = ValueGuard(), Stochastic(), TopK(9)
    parts = Attention(8), guard, sampler, top
    a, b, c, d = parts
    same = [
        a >> b >> c >> d,
        a >> (b >> c) >> d,
        a >> (b >> (c >> d)),
        (a >> b) >> (c >> d),
        a >> ((b >> c) >> d),
    ]
    assert len(set(same)) == 1
    assert isinstance(same[0], Chain)
    assert [type(leaf).__name__ for leaf in Policy(same[0]).stages] == [
        "Attention",
        "ValueGuard",
        "Stochastic",
        "TopK",
    ]


@pytest.mark.parametrize("stage", BUILT_IN, ids=repr)
def test_stages_are_frozen_values(stage: Any) -> None:
    assert stage == copy.deepcopy(stage)
    assert hash(stage) == hash(copy.deepcopy(stage))
    assert eval(repr(stage), dict(vars(kvpolicy))) == stage
    assert eval(stage.text(full=True), dict(vars(kvpolicy))) == stage
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        stage.window = 3


@pytest.mark.parametrize(
    ("compose", "message"),
    [
        (
            lambda: TopK(9) >> ValueGuard(),
            r"TopK\(9\) >> ValueGuard\(\): TopK\(9\) is a selector, and a selector ends",
        ),
        (
            lambda: Attention() >> KeyNorm(),
            r"Attention\(\) >> KeyNorm\(\): both are scorers; mix them with \+",
        ),
        (
            lambda: ValueGuard() >> KeyNorm(),
            r"a scorer begins a chain; write KeyNorm\(\) >> ValueGuard\(\)",
        ),
        (lambda: ValueGuard() >> 256, r"write >> TopK\(256\)"),
        (lambda: ValueGuard() >> TopK, r"the class TopK \(write TopK\(\) with brackets\)"),
        (lambda: ValueGuard >> TopK(9), r"the class ValueGuard \(write ValueGuard\(\) with brackets\)"),
        (lambda: 5 >> TopK(9), r"5 of type int >> TopK\(9\): only a stage can stand here"),
        (lambda: ValueGuard() >> "x", r"'x' of type str: only a stage can follow"),
        (lambda: (Attention() >> TopK(9)) >> TopK(9), r"a chain has one selector"),
        (lambda: Attention() and KeyNorm(), r"neither true nor false"),
        (
            lambda: Attention() >> (KeyNorm() >> TopK(9)),
            r"begins with a scorer of its own; mix the two with \+",
        ),
        (lambda: ValueGuard() >> (KeyNorm() >> TopK(9)), r"a scorer begins a chain"),
        (
            lambda: Attention() + ValueGuard(),
            r"Attention\(\) \+ ValueGuard\(\): \+ mixes two scorers",
        ),
        (lambda: Attention() + 1, r"\+ mixes two scorers"),
        (lambda: Attention() * "2", r"multiplied by a number or by another scorer"),
        (lambda: Attention() * ValueGuard(), r"Attention\(\) \* ValueGuard\(\): a scorer is multiplied by a number"),
        (lambda: True * Attention(), r"multiplied by a number"),
        (
            lambda: maximum(Attention(), Sinks(4)),
            r"maximum\(Attention\(\), Sinks\(4\)\): both must be scorers",
        ),
        (
            lambda: Policy(ValueGuard()),
            r"no selector ends it; write ValueGuard\(\) >> TopK\(budget\)",
        ),
        (lambda: Policy(Attention() >> ValueGuard()), r"no selector ends it"),
        (lambda: Policy(256), r"Policy\(256 of type int\): a policy takes a chain"),
        (lambda: Policy(vase(9)), r"a policy takes a chain"),
    ],
)
def test_what_cannot_compose_names_both(compose: Any, message: str) -> None:
    with pytest.raises(CompositionError, match=message) as caught:
        compose()
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(window=0), r"Attention\(window=0\): window must be at least 1"),
        (lambda: Attention(window=2.5), r"window is a whole number, found float"),
        (lambda: Attention(pool=4), r"pool must be odd, such as 5"),
        (
            lambda: Attention(reduce="median"),
            r"reduce is one of 'mean', 'max' \(did you mean|reduce is one of 'mean', 'max'",
        ),
        (lambda: Attention(over="candidate"), r"did you mean 'candidates'"),
        (lambda: Attention(temperature=0), r"temperature must be above 0"),
        (lambda: Attention(temperature=float("nan")), r"temperature must be finite"),
        (lambda: ValueNorm("l3"), r"norm is one of 'range', 'l2', 'absmax', 'var', 'l1'"),
        (lambda: ValueGuard(share=0), r"share must be above 0 and at most 1"),
        (lambda: ValueGuard(share=1.5), r"share must be above 0 and at most 1"),
        (lambda: ValueGuard(sinks=-1), r"sinks must be at least 0"),
        (lambda: ScoreGuard(0), r"share must be above 0 and at most 1"),
        (lambda: LastAttended(threshold=0.1, share=0.5), r"write one of them"),
        (lambda: AttentionCount(threshold=0), r"threshold must be above 0"),
        (lambda: Recurrence(share=2), r"share must be above 0 and at most 1"),
        (lambda: DecayedAttention(decay=1.5), r"decay must be at least 0 and at most 1"),
        (lambda: DecayedAttention(pool=2), r"pool must be odd, such as 3"),
        (lambda: PerturbedAttention(highest=0.5), r"highest must be at least 1.0"),
        (lambda: OutputError(fast=1), r"fast is True or False"),
        (lambda: Sinks(-1), r"n must be at least 0"),
        (lambda: Sinks(True), r"n is a whole number, found bool"),
        (lambda: Prompt("all"), r"share is a number, found str"),
        (lambda: Normalize("l2"), r"kind is one of"),
        (lambda: Stochastic(-1), r"tau must be at least 0"),
        (lambda: Stochastic(float("inf")), r"tau must be finite"),
        (lambda: Stochastic(seed=-1), r"seed must be at least 0"),
        (lambda: Stochastic(redraw=1), r"redraw is True or False"),
        (lambda: Leverage(rank=0), r"rank must be at least 1"),
        (lambda: TopK(0), r"TopK\(budget=0\): budget must be at least 1"),
        (lambda: TopK(2.0), r"write a number of slots, such as TopK\(1024\)"),
        (lambda: TopK(True), r"budget is a whole number, found bool"),
        (lambda: TopK(Uniform), r"or an allocator"),
        (lambda: PerLayer(512), r"write one budget for each layer, such as PerLayer\(\(512, None, 256\)\)"),
        (lambda: PerLayer((512, 0)), r"layers\[1\] must be at least 1"),
        (lambda: PerLayer((512, 2.5)), r"layers\[1\] is a whole number, found float"),
        (lambda: PerLayer((None, None)), r"leaves every layer alone"),
        (lambda: Pyramid(0), r"budget must be at least 1"),
        (lambda: Pyramid(1024, 0.5), r"beta must be at least 1"),
        (lambda: float("nan") * Attention(), r"the factor must be finite"),
        (lambda: Policy(TopK(9), interval=0), r"Policy\(interval=0\): interval must be at least 1"),
        (lambda: Policy(TopK(9), recent=0), r"recent must be at least 1"),
    ],
)
def test_parameters_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the policy text is empty"),
        ("ValueGuard( >> TopK(9)", "cannot read .*character"),
        (
            "ValueGaurd() >> TopK(9)",
            r"'ValueGaurd' is not known \(did you mean 'ValueGuard'\?\); kvpolicy list names all$",
        ),
        (
            "ValueGuard(shar=0.5) >> TopK(9)",
            r"no parameter 'shar' \(did you mean 'share'\?\): it has share, norm, sinks",
        ),
        ("ValueGuard >> TopK(9)", r"write ValueGuard\(\) with brackets"),
        ("vase", r"write vase\(1024\) with brackets"),
        ("Sinks >> TopK(9)", r"write Sinks\(4\) with brackets"),
        ("nonsense", r"^'nonsense' is not known; kvpolicy list names all$"),
        ("topk(9)", r"did you mean 'TopK'"),
        ("vase(b)", "^'b' stands for the budget in kvpolicy eval only; write a number$"),
        ("vase(99, recent=b // 8)", "^'b' stands for the budget"),
        ("ValueGuard()", r"has no selector; write ValueGuard\(\) >> TopK\(budget\)"),
        ("Attention() >> KeyNorm() >> TopK(9)", "both are scorers"),
        ("TopK(budget=9, budget=8)", "cannot read|given a parameter twice"),
        ("TopK()", r"^TopK needs budget: TopK\(1024\); kvpolicy show TopK tells more$"),
        ("vase(recent=9)", r"^vase needs budget: vase\(1024\)"),
        (
            "duo_attention(1024)",
            r"^duo_attention needs retrieval: "
            r"duo_attention\(2048, \(\(True, False\), \(False, False\), \(False, True\)\)\); "
            r"kvpolicy show duo_attention tells more$",
        ),
        ("duo_attention()", "^duo_attention needs budget and retrieval: "),
        ("Policy()", r"^Policy needs chain: Policy\(.*\)$"),
        ("vase(9, budget=9)", "multiple values for argument 'budget'"),
        ("TopK(1, 2)", "too many positional arguments"),
        ("TopK(*[9])", "write every argument out"),
        ("TopK(**{'budget': 9})", "write every argument out"),
        ("5", "is not a policy but 5"),
        ("TopK(9) if True else TopK(8)", "stages, numbers, strings, >>, "),
        ("__import__('os').system('true')", "cannot read"),
        ("(lambda: TopK(9))()", "cannot read"),
        ("TopK(9).__class__", "cannot read"),
        ("1 + 2", r"\+ mixes scorers, and 1 is none"),
        ("'a' * 99999999", r"\* mixes scorers"),
        ("Attention() * TopK(9)", "a scorer is multiplied by a number or by another scorer"),
        ("vase(9, share=2)", "share must be above 0"),
        ("vase('9')", "write a number of slots"),
        ("Stochastic(1e999) >> TopK(9)", "tau must be finite"),
        ("(" * 500 + "TopK(9)" + ")" * 500, "cannot read"),
        ("TopK(9)\nTopK(9)", "cannot read"),
        ("TopK(9); TopK(9)", "cannot read"),
        ("KeyNorm() - Recency() >> TopK(9)", "cannot read"),
        ("TopK(1\x00)", "cannot read"),
    ],
)
def test_texts_that_are_no_policy(text: str, message: str) -> None:
    with pytest.raises(KVPolicyError, match=message):
        Policy.parse(text)


def test_only_text_is_parsed() -> None:
    with pytest.raises(ParseError, match="a policy text is a string, found Policy"):
        Policy.parse(vase(128))


def test_plans() -> None:
    plan = Policy(ValueGuard() >> TopK(256), interval=32).plan(ModelSpec(3))
    assert len(plan.layers) == 3
    first = plan.layers[0]
    assert first is not None
    assert (first.budget, first.capacity, first.interval, first.recent, first.window) == (
        256,
        288,
        32,
        64,
        64,
    )
    once = Policy(KeyNorm() >> TopK(256), interval=None).plan(ModelSpec(1, max_new_tokens=100)).layers[0]
    assert once is not None
    assert (once.capacity, once.interval, once.window) == (356, None, 0)
    wide = Policy(AccumulatedAttention(100) >> TopK(256), interval=100).plan(ModelSpec(1)).layers[0]
    assert wide is not None
    assert wide.window == 100  # every query since the last eviction
    for scorer in (AccumulatedAttention(), LastAttended(), Recurrence(), PerturbedAttention()):
        with pytest.raises(BudgetError, match=r"its window holds 64 of the 65 of an interval; write \w+\(window=65\)"):
            Policy(scorer >> TopK(256), interval=65).plan(ModelSpec(1))
    with pytest.raises(BudgetError, match="not larger than recent=64"):
        vase(64).plan(ModelSpec(1))


def test_a_stage_that_is_no_dataclass_says_so() -> None:
    class Bare(Scorer):
        pass

    with pytest.raises(CompositionError, match=r"write @dataclass\(frozen=True\) above class Bare"):
        Bare() >> TopK(9)


def test_what_is_public_is_what_is_listed() -> None:
    public = {name for name in vars(kvpolicy) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(kvpolicy, name)).__name__ == "module"}
    assert public - modules == set(kvpolicy.__all__) - {"__version__"}
