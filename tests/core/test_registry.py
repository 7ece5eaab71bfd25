"""A third party's stage and recipe are known by name, as the built-ins are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpolicy import ParseError, Policy, PolicyError, registry


def package(folder: Path, name: str, module: str, points: str) -> None:
    """Write what pip would install: a module, and metadata with entry points."""
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


MODULE = '''
from dataclasses import dataclass
from kvpolicy import Policy, Scorer, Scores, TopK

@dataclass(frozen=True)
class Oldest(Scorer):
    """Score a token by its age."""
    weight: float = 1.0
    def score(self, view, state):
        return Scores.of(view, -self.weight * view.positions, weights=False)

def keep_oldest(budget):
    """Return the policy that keeps the oldest tokens."""
    return Policy(Oldest() >> TopK(budget))
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    registry.stages.cache_clear()
    registry.policies.cache_clear()
    yield tmp_path
    registry.stages.cache_clear()
    registry.policies.cache_clear()
    for name in ("thirdparty", "rival", "broken"):
        sys.modules.pop(name, None)


def test_a_third_party_is_known_by_name(site: Path) -> None:
    points = (
        "[kvpolicy.stages]\nOldest = thirdparty:Oldest\n[kvpolicy.policies]\nkeep_oldest = thirdparty:keep_oldest\n"
    )
    package(site, "thirdparty", MODULE, points)
    policy = Policy.parse("keep_oldest(128)")
    assert repr(policy) == "Policy(Oldest() >> TopK(128))"
    assert Policy.parse(repr(policy)) == policy
    assert Policy.parse("Oldest(weight=2.0) >> TopK(128)") != policy
    found = registry.stages()["Oldest"]
    assert (found.distribution, found.role) == ("thirdparty", "scorer")
    assert registry.stages()["Attention"].distribution == "kvpolicy"
    assert registry.policies()["keep_oldest"].role == "policy"
    with pytest.raises(ParseError, match=r"'Oldst' is not known \(did you mean 'Oldest'\?\)"):
        Policy.parse("Oldst() >> TopK(128)")


def test_two_packages_cannot_share_a_name(site: Path) -> None:
    package(site, "rival", MODULE, "[kvpolicy.stages]\nAttention = rival:Oldest\n")
    with pytest.raises(PolicyError, match="two packages declare 'Attention'"):
        Policy.parse("Attention() >> TopK(128)")


@pytest.mark.parametrize("points", ["broken:Absent", "absent_module:Oldest"])
def test_what_cannot_be_loaded_names_its_package(site: Path, points: str) -> None:
    package(site, "broken", MODULE, f"[kvpolicy.stages]\nAbsent = {points}\n")
    with pytest.raises(PolicyError, match="Absent is declared by the package 'broken'"):
        Policy.parse("Absent() >> TopK(128)")
    Policy.parse("vase(128)")  # the rest goes on


def test_every_built_in_is_declared_and_loads() -> None:
    import kvpolicy
    from kvpolicy import policies

    own = {name: entry for name, entry in registry.stages().items() if entry.distribution == "kvpolicy"}
    for name, entry in own.items():
        assert entry.load() is getattr(kvpolicy, name)
    recipes = {name for name, entry in registry.policies().items() if entry.distribution == "kvpolicy"}
    assert recipes == set(policies.__all__)
