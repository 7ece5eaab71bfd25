"""The benchmarks of a CUDA device run without one, say what they should, and stop for nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import decode, eviction, kernels, suite
from benchmarks.gpu.__main__ import SECTIONS, main
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.decoder import SHAPES, Cache, Decoder
from benchmarks.gpu.full import Concatenating, Preallocated
from benchmarks.gpu.page import PAGE, RESULTS, filled, section_text
from benchmarks.gpu.stepper import Stepper
from benchmarks.stores import Shape, grow, logits_of
from benchmarks.stores import filled as full_store
from kvpolicy.adapters.flash_attn import FlashCache, select_backend
from kvpolicy.adapters.flash_attn.backends.reference import Reference
from kvpolicy.eviction import evict
from kvpolicy.policies import random_eviction, vase

ROOT = Path(__file__).resolve().parents[2]
CPU, TINY = torch.device("cpu"), SHAPES["tiny"]
QUICK = ["--device", "cpu", "--quick"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a quick run of every section has left its results and its page."""
    path = tmp_path_factory.mktemp("gpu")
    threads = torch.get_num_threads()
    main([*QUICK, "--json", str(path / "gpu.json"), "--page", str(path / "page.md")])
    assert torch.get_num_threads() == threads
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text("utf-8"))


@pytest.fixture
def deadline() -> Deadline:
    return Deadline(60, CPU)


# The run


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_has_rows_of_finite_numbers(found: dict[str, Any], name: str) -> None:
    section = found["sections"][name]
    assert section["rows"]
    for row in section["rows"]:
        assert all(isinstance(n, str) or math.isfinite(n) for n in row.values()), row
    said = json.dumps(section)
    assert not any(word in said for word in ("failed:", "skipped:", "out of memory", "stopped:")), said


def test_the_environment_is_written_down(found: dict[str, Any]) -> None:
    assert {"date", "commit", "device", "torch", "flash-attn", "kvpolicy"} <= set(found["environment"])
    assert found["options"] == {"quick": True, "minutes": 9.0}


def test_kernels_are_compared_in_every_layout(found: dict[str, Any]) -> None:
    section = found["sections"]["kernels"]
    assert {row["layout"] for row in section["rows"] if row["backend"] == "reference"} == set(kernels.LAYOUTS)
    assert all(target["holds"] for target in section["targets"])


def test_decoding_compares_both_forms_of_a_full_cache(found: dict[str, Any]) -> None:
    rows = found["sections"]["decode_4b"]["rows"]
    names = [decode.PREALLOCATED, decode.CONCATENATING, "vase(16)", "vase_dkv(16)"]
    assert [row["cache"] for row in rows] == names
    preallocated, concatenating, ours, _ = rows
    assert ours["to preallocated"] == pytest.approx(ours["tokens/s"] / preallocated["tokens/s"])
    assert ours["to concatenating"] == pytest.approx(ours["tokens/s"] / concatenating["tokens/s"])
    assert preallocated["tokens/s"] == pytest.approx(2 / preallocated["ms a step"] * 1e3)  # a batch of two


def test_layers_are_evicted_alone_and_together(found: dict[str, Any]) -> None:
    rows = found["sections"]["eviction"]["rows"]
    assert {(row["policy"].partition(",")[0], row["layers"]) for row in rows} == {
        (name, layers) for name in ("vase", "snapkv", "random") for layers in (1, TINY.layers)
    }


def test_sections_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["eviction", *QUICK])
    shown = capsys.readouterr().out
    assert "## eviction" in shown
    assert "## kernels" not in shown
    with pytest.raises(SystemExit):
        main(["speed", *QUICK])
    assert "no section 'speed'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_device_is_told_what_to_write() -> None:
    with pytest.raises(SystemExit, match="--device cpu --quick"):
        main(["kernels"])


# Stopping for nothing


def test_cases_that_do_not_fit_into_the_time_are_skipped(deadline: Deadline) -> None:
    assert deadline.attempt(lambda: 1) == 1
    assert deadline.attempt(lambda: 1, at_least=3600).startswith("skipped: ")
    deadline.longest = 3600.0
    assert deadline.attempt(lambda: 1).startswith("skipped: ")
    assert Deadline(0, CPU).attempt(lambda: 1).startswith("skipped: 0 s left")


def test_a_run_without_time_says_so_of_every_section(tmp_path: Path) -> None:
    main([*QUICK, "--minutes", "0", "--json", str(tmp_path / "gpu.json")])
    sections = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["sections"]
    assert list(sections) == list(SECTIONS)
    assert all(section["notes"][0].startswith("skipped: ") and not section["rows"] for section in sections.values())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("no\nkernel"), "failed: RuntimeError: no kernel"),
    ],
)
def test_a_case_that_raises_is_a_row_and_the_rest_goes_on(
    error: Exception, said: str, deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Preallocated, length: int) -> None:
        raise error

    monkeypatch.setattr(Preallocated, "fill", fill)
    sizes = decode.Sizes([1], [24], [16], interval=8, steps=2, warm_up=1)
    section = decode.run("decode", "tiny", TINY, sizes, torch.float32, deadline)
    first, second, ours, _ = (dict(zip(section.columns, row, strict=True)) for row in section.rows)
    assert first["tokens/s"] == said
    assert second["tokens/s"] > 0
    assert (ours["to preallocated"], ours["to concatenating"] > 0) == ("–", True)


# What is measured


def llama(decoder: Decoder) -> Any:
    """Return transformers' Llama with a decoder's weights."""
    shape = decoder.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config).double().eval()
    names = ("q_proj", "k_proj", "v_proj")
    sizes = [heads * shape.head_dim for heads in (shape.query_heads, shape.heads, shape.heads)]
    model.model.embed_tokens.weight.copy_(decoder.embedding)
    model.model.norm.weight.copy_(decoder.norm)
    for layer, weights in zip(model.model.layers, decoder.layers, strict=True):
        layer.input_layernorm.weight.copy_(weights.attention_norm)
        layer.post_attention_layernorm.weight.copy_(weights.mlp_norm)
        for name, part in zip(names, weights.qkv.split(sizes), strict=True):
            getattr(layer.self_attn, name).weight.copy_(part)
        layer.self_attn.o_proj.weight.copy_(weights.out)
        gate, up = weights.gate_up.chunk(2)
        layer.mlp.gate_proj.weight.copy_(gate)
        layer.mlp.up_proj.weight.copy_(up)
        layer.mlp.down_proj.weight.copy_(weights.down)
    return model


def sharp(device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Decoder:
    """Return a decoder whose attention and norms matter."""
    torch.manual_seed(0)
    decoder = Decoder(TINY, dtype, device)
    for weights in decoder.layers:
        for weight in (weights.qkv, weights.out, weights.down):
            weight.mul_(15)
        weights.attention_norm.uniform_(0.5, 1.5)
        weights.mlp_norm.uniform_(0.5, 1.5)
    return decoder


def caches(decoder: Decoder, batch: int, slots: int) -> dict[str, Cache]:
    """Return every cache, with room for everything."""
    shape, dtype, device = decoder.shape, decoder.dtype, decoder.device
    backend = select_backend(device=device, dtype=dtype, head_dim=shape.head_dim)
    return {
        "preallocated": Preallocated(shape, batch, slots, dtype, device, backend),
        "concatenating": Concatenating(shape, batch, dtype, device, backend),
        "evicting": decode.evicting(decoder, batch, vase(slots, interval=8, recent=8), backend),
    }


NAMES = ("preallocated", "concatenating", "evicting")


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_is_a_llama_with_every_cache(name: str) -> None:
    decoder = sharp()
    tokens = torch.randint(TINY.vocabulary, (2, 24))
    expected = llama(decoder)(tokens).logits  # norms and rotations in float32
    atol = 1e-5 * float(expected.abs().max())
    cache = caches(decoder, 2, 64)[name]
    first = 0
    for width in (12, 5, 1, 1, 4, 1):
        last = first + width
        positions = torch.arange(first, last).expand(2, -1)
        logits = decoder.forward(tokens[:, first:last], positions, cache)
        torch.testing.assert_close(logits, expected[:, last - 1], atol=atol, rtol=0)
        first = last


def steps_are_forward_passes(decoder: Decoder, name: str) -> None:
    stepper, cache, other = Stepper(decoder, 2), caches(decoder, 2, 64)[name], caches(decoder, 2, 64)[name]
    stepper.start(0)
    for position, token in enumerate(torch.randint(TINY.vocabulary, (12, 2, 1), device=decoder.device)):
        logits = decoder.forward(token, torch.full_like(token, position), other)
        stepper.tokens.copy_(token)
        stepper.step(cache)
        cache.step()
        torch.testing.assert_close(decoder.logits(stepper.x), logits, atol=1e-12, rtol=1e-9)
        assert torch.equal(stepper.tokens, logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_a_forward_pass(name: str) -> None:
    steps_are_forward_passes(sharp(), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_graphs_is_a_forward_pass(name: str) -> None:
    steps_are_forward_passes(sharp(torch.device("cuda")), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quick_sections_run_on_the_device(tmp_path: Path) -> None:
    names = [name for name in SECTIONS if name != "suite"]  # which runs this test
    main([*names, "--quick", "--json", str(tmp_path / "gpu.json")])
    assert "failed:" not in (tmp_path / "gpu.json").read_text("utf-8")


def test_an_evicting_cache_is_timed_over_one_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FlashCache] = []

    def make(*args: Any, **kwargs: Any) -> FlashCache:
        made.append(FlashCache(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(decode, "FlashCache", make)
    decoder = sharp()
    backend = select_backend(device=CPU, dtype=decoder.dtype, head_dim=TINY.head_dim)
    decode._evicting(Stepper(decoder, 2), 2, vase(16, interval=8, recent=8), backend)
    receipt = made[0].receipt()
    assert set(receipt.evictions) == {2}  # the first one warms up
    assert set(receipt.slots) == {16}


def test_full_caches_hold_what_they_are_said_to() -> None:
    for name in ("preallocated", "concatenating"):
        cache: Any = caches(sharp(), 2, 64)[name]
        cache.fill(40)
        assert cache.lengths.tolist() == [40, 40]
        q, k, v = (torch.randn(2, 1, heads, TINY.head_dim).double() for heads in (4, 2, 2))
        for layer in range(TINY.layers):
            cache.attend(layer, q, k, v)
        cache.step()
        assert cache.lengths.tolist() == [41, 41]


@pytest.mark.parametrize("layout", kernels.LAYOUTS)
def test_a_wrong_kernel_is_seen(layout: str, deadline: Deadline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that lets every new token see all of them."""
    method, causal = ("_varlen", 10) if layout == "ragged" else ("_with_kvcache", 8)
    right: Any = getattr(Reference, method)

    def wrong(self: Reference, *args: Any) -> Any:
        assert args[causal] is True
        return right(self, *args[:causal], False, *args[causal + 1 :])

    monkeypatch.setattr(Reference, method, wrong)
    section = kernels.run(2, 2, [16], 512, deadline)
    missed = {tuple(target.what.split(", ")[1:4:2]) for target in section.targets if not target.holds}
    broken = {"ragged"} if layout == "ragged" else set(kernels.LAYOUTS) - {"ragged"}
    assert missed == {(one, f"9 new: {what}") for one in broken for what in ("error to own", "error of lse")}


def test_the_bytes_that_must_move_by_hand() -> None:
    """One layer, one request, two heads of 16 in float32; random eviction asks nothing and keeps the newest."""
    policy, shape = random_eviction(32, interval=16, recent=16), Shape(2, 2, 16)
    store = full_store(policy, shape, range(1))
    grow(store)
    found = eviction._must_move(policy, store, partial(evict, store, [True], logits_of(store)))
    slots, moved = 2 * 48, 2 * 16  # of both heads: the newest 16 stay, and lie where slots are given up
    assert found == slots * 12 + 2 * moved * (2 * 16 * 4 + 4)
    asking = vase(32, interval=16, recent=16)
    store = full_store(asking, shape, range(1))
    grow(store)
    found = eviction._must_move(asking, store, partial(evict, store, [True], logits_of(store)))
    queries = 4 * store.window.size * 16 * 4
    values = 2 * 16 * 16 * 4
    assert found == slots * 12 + 2 * moved * (2 * 16 * 4 + 4) + slots * 16 * 4 + queries + values


# The tests of a device


def test_the_suite_counts_what_pytest_says(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_a():\n    pass\n"
        "@pytest.mark.gpu\ndef test_b():\n    assert False\n"
        "@pytest.mark.gpu\n@pytest.mark.skip\ndef test_c():\n    pass\n"
        "def test_d():\n    assert False\n",
        "utf-8",
    )
    section = suite.run(Deadline(60, CPU), [str(tmp_path)])
    assert section.rows == [[1, 1, 1, 0]]
    assert any("test_b" in note for note in section.notes)
    assert not any("test_d" in note for note in section.notes)


def test_the_suite_ends_with_the_time(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\ndef test_a():\n    time.sleep(60)\n", "utf-8"
    )
    section = suite.run(Deadline(0, CPU), [str(tmp_path)])
    assert section.rows == []
    assert section.notes[0].startswith("stopped: ")


# The script and the page


def test_the_script_runs_and_a_quick_run_is_no_result(tmp_path: Path) -> None:
    written = [(path, path.read_text("utf-8") if path.exists() else None) for path in (PAGE, RESULTS)]
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "kernels", *QUICK],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "## kernels" in done.stdout
    assert all((path.read_text("utf-8") if path.exists() else None) == text for path, text in written)


@pytest.mark.parametrize("wheel", ["", "some.whl"])
def test_the_script_installs_a_wheel_only_where_it_is_named(wheel: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n', "utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "--minutes", "3"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "FLASH_ATTN_WHEEL": wheel},
        capture_output=True,
        text=True,
        check=True,
    )
    *installs, runs = done.stdout.splitlines()
    assert installs == ([f"-m pip install --no-deps --no-index {wheel}"] if wheel else [])
    assert runs == f"-m benchmarks.gpu --json {RESULTS} --page {PAGE} --minutes 3"


def test_the_page_says_what_was_measured_or_that_nothing_was() -> None:
    page = PAGE.read_text("utf-8")
    assert page == filled(page), "run python -m benchmarks.gpu.page"
    assert all(f"<!-- results: {name} -->" in page for name in SECTIONS)
    assert ("Not measured yet" in page) == (not RESULTS.exists())


@pytest.mark.skipif(not RESULTS.exists(), reason="nothing was measured yet")
def test_results_are_of_a_whole_run_on_a_device() -> None:
    found = json.loads(RESULTS.read_text("utf-8"))
    assert not found["options"]["quick"]
    assert found["environment"]["device"] != "cpu"


def test_a_run_fills_the_page(folder: Path, found: dict[str, Any]) -> None:
    page = (folder / "page.md").read_text("utf-8")
    assert "Not measured yet" not in page
    assert all(section_text(section) in page for section in found["sections"].values())
    assert f"commit: {found['environment']['commit']}" in page


def test_a_section_shows_the_targets_that_it_missed() -> None:
    target: dict[str, Any] = {"what": "speed", "value": 3.0, "at_most": 2.0, "holds": False}
    section = {"title": "t", "rows": [{"a": 1}], "targets": [target], "notes": ["left out"]}
    assert section_text(section).endswith("0 of 1 targets hold.\n\n* missed: speed: 3, at most 2\n\n* left out")
