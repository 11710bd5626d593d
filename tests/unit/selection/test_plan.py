"""Which backend wins where, and every reason against the others; no GPU needed."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import pytest
from run_facts import a_backend, a_problem

from attnimg.backends import all_backends
from attnimg.facts import DType, LocalKernel, Machine
from attnimg.run_facts import LayerGroup, Model, Plan, Reason
from attnimg.selection import known_bad
from attnimg.selection.gpus_and_images import gpu_catalogue, parse_gpu
from attnimg.selection.judge import reasons_against
from attnimg.selection.plan import choose, find_rank, rule_out, training_dtype


def group(d: int = 128, *, v: int | None = None, **more: object) -> LayerGroup:
    return LayerGroup(
        count=32, heads=32, kv_heads=8, head_dim_qk=d, head_dim_v=v or d,
        **more,  # type: ignore[arg-type]  # a table's cell
    )  # fmt: skip


LLAMA = Model(type="llama", layers=(group(),))
GEMMA2 = Model(
    type="gemma2", layers=(group(256, softcap=50.0), group(256, window=4096, softcap=50.0))
)
GEMMA4 = Model(type="gemma4", layers=(group(256, window=512), group(512)))
GPT_OSS = Model(type="gpt_oss", layers=(group(64, sinks=True), group(64, window=128, sinks=True)))
DEEPSEEK = Model(type="deepseek_v3", layers=(group(192, v=128),))
MLA = Model(
    type="deepseek_v3",
    layers=(LayerGroup(count=61, heads=128, kv_heads=128, head_dim_qk=192, head_dim_v=128),),
)
MISTRAL = Model(type="mistral", layers=(group(128, window=4096),))
ODD = Model(type="odd", layers=(group(100),))


def machine(gpu: str, **more: object) -> Machine:
    target = parse_gpu(gpu)
    arch, label = target.arch, target.label
    return Machine(arch=arch, gpu=label, **more)  # type: ignore[arg-type]  # a table's cell


def plan(
    asked: str | None,
    gpu: str,
    model: Model | None = LLAMA,
    *,
    dtype: DType | None = None,
    strict: bool = False,
    **more: object,
) -> Plan:
    on = machine(gpu)
    dtype = dtype or training_dtype(bf16="auto", fp16=False, arch=on.arch)
    problem = a_problem(model=model, dtype=dtype, **more)  # type: ignore[arg-type]  # a table's cell
    return choose(asked, on, problem, strict=strict)


def got(found: Plan) -> str | None:
    return found.chosen.backend.name if found.chosen else None


def reasons(found: Plan, backend: str) -> list[str]:
    verdict = next(v for v in found.verdicts if v.backend.name == backend)
    return [reason.code for reason in verdict.reasons]


@pytest.mark.parametrize(
    ("gpu", "model", "wins"),
    [
        pytest.param("h100", LLAMA, "flash_attention_3", id="Hopper has FA3"),
        pytest.param("b200", LLAMA, "flash_attention_4", id="Blackwell has FA4"),
        pytest.param("rtx5090", LLAMA, "flash_attention_2", id="RTX 50 trains faster on FA2"),
        pytest.param("a100", LLAMA, "flash_attention_2", id="Ampere has FA2"),
        pytest.param("l4", LLAMA, "flash_attention_2", id="Ada has FA2"),
        pytest.param("mi300x", LLAMA, "flash_attention_2", id="CDNA has FA2"),
        pytest.param("rx7900xtx", LLAMA, "flash_attention_2", id="RDNA has FA2 on Triton"),
        pytest.param("cpu", LLAMA, "sdpa", id="a CPU has sdpa"),
        pytest.param("h100", GEMMA2, "flash_attention_3", id="FA3 caps at head_dim 256"),
        pytest.param("b200", GEMMA2, "flash_attention_4_generic", id="FA4's own does not"),
        pytest.param("a100", GEMMA2, "flash_attention_2", id="FA2 caps"),
        pytest.param("mi300x", GEMMA2, "flex_attention", id="but its CK kernels ignore it"),
        pytest.param("cpu", GEMMA2, "eager", id="sdpa has no soft cap"),
        pytest.param("h100", GPT_OSS, "flash_attention_4", id="FA4 has sinks on Hopper"),
        pytest.param("rtx5090", GPT_OSS, "flex_attention", id="and none on RTX 50"),
        pytest.param("a100", GPT_OSS, "flex_attention", id="FA2 has no sinks, flex has"),
        pytest.param("cpu", GPT_OSS, "eager", id="sinks on a CPU are eager's"),
        pytest.param("h100", DEEPSEEK, "flash_attention_3", id="FA3 takes 192"),
        pytest.param("b200", DEEPSEEK, "flash_attention_2", id="Blackwell's takes no padded 192"),
        pytest.param("rtx5090", DEEPSEEK, "flash_attention_2", id="RTX 50's ends at 160"),
        pytest.param("a100", MISTRAL, "flash_attention_2", id="FA2 has windows"),
        pytest.param("a100", None, "flash_attention_2", id="an unknown model is not held against"),
    ],
)
def test_auto_takes_the_best_rank_packed_or_not(gpu: str, model: Model | None, wins: str) -> None:
    assert got(plan(None, gpu, model, packing=True)) == wins
    assert got(plan("auto", gpu, model)) == wins


@pytest.mark.parametrize(
    ("gpu", "model", "situation", "wins"),
    [
        pytest.param("t4", LLAMA, {}, "sdpa", id="Turing without packing needs no mask"),
        pytest.param("t4", LLAMA, {"packing": True}, "xformers", id="with, a mask of the row"),
        pytest.param("v100", LLAMA, {"packing": True}, "xformers", id="Volta too"),
        pytest.param("t4", GEMMA4, {"packing": True}, "xformers", id="at any head size"),
        pytest.param("h100", GEMMA4, {}, "sdpa", id="no flash kernel takes head_dim 512"),
        pytest.param("h100", GEMMA4, {"packing": True}, "sdpa_efficient", id="packed: no mask"),
        pytest.param("mi300x", GEMMA4, {"packing": True}, "sdpa_efficient", id="on AMD too"),
        pytest.param("a100", ODD, {}, "sdpa", id="head_dim 100 is no multiple of 8"),
        pytest.param("a100", ODD, {"packing": True}, "flex_attention", id="nor packed"),
        pytest.param(
            "rx7900xtx", MISTRAL, {"packing": True}, "flex_attention", id="RDNA's FA2 has no window"
        ),
        pytest.param("rx7900xtx", GEMMA4, {"packing": True}, "sdpa", id="flex is too large at 512"),
        pytest.param("b200", LLAMA, {"compiled": True}, "flash_attention_2", id="FA4 has no op"),
        pytest.param("h100", LLAMA, {"compiled": True}, "flash_attention_3", id="FA3 has one"),
        pytest.param("h100", GPT_OSS, {"compiled": True}, "flex_attention", id="flex is compiled"),
        pytest.param("h100", GPT_OSS, {"compiled": False}, "flash_attention_4", id="only FA4 can"),
        pytest.param("b200", GEMMA2, {"compiled": True}, "flash_attention_2", id="nor FA4g"),
    ],
)
def test_the_situation_sets_the_order(
    gpu: str, model: Model, situation: dict[str, object], wins: str
) -> None:
    assert got(plan(None, gpu, model, **situation)) == wins  # type: ignore[arg-type]


def test_every_place_has_a_reason_and_a_dated_source() -> None:
    for backend in all_backends():
        places = [(backend.rank_why, backend.rank_source)]
        places += [(rank.why, rank.source) for rank in backend.ranks]
        assert all(why and re.search(r"\(2026-\d\d-\d\d\)$", source) for why, source in places)
        assert backend.name


def test_no_two_backends_share_a_place() -> None:
    for gpu in gpu_catalogue():
        on = machine(gpu)
        for packing, compiled in itertools.product((True, False), repeat=2):
            problem = a_problem(model=LLAMA, dtype="float16", packing=packing, compiled=compiled)
            places = [find_rank(backend, on, problem).rank for backend in all_backends()]
            assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("asked", "gpu", "model", "takes"),
    [
        pytest.param("flash_attention_2", "h100", LLAMA, "flash_attention_4", id="2 asks for all"),
        pytest.param("flash_attention_3", "h100", LLAMA, "flash_attention_4", id="so does 3"),
        pytest.param("flash_attention_4", "h100", LLAMA, "flash_attention_4", id="4 for itself"),
        pytest.param("flash_attention_2", "b200", GEMMA2, "flash_attention_2", id="4 does not fit"),
        pytest.param("flash_attention_2", "t4", LLAMA, None, id="too old for 2: no stand-in"),
        pytest.param("flash_attention_3", "a100", LLAMA, None, id="3 off Hopper: no stand-in"),
        pytest.param("flash_attention_4", "a100", LLAMA, None, id="4 below Hopper"),
        pytest.param("flash_attention_4", "b200", DEEPSEEK, None, id="4 is not swapped for 2"),
        pytest.param("sdpa", "h100", LLAMA, "sdpa", id="sdpa asks for itself"),
        pytest.param("sdpa", "h100", GEMMA2, None, id="sdpa is not swapped for eager"),
        pytest.param("eager", "t4", GPT_OSS, "eager", id="eager takes everything"),
        pytest.param("xformers", "t4", LLAMA, "xformers", id="xformers takes Turing"),
        pytest.param("sage", "h100", LLAMA, "sage", id="sage trains, by exact gradients"),
        pytest.param("s2", "cpu", LLAMA, "s2", id="s2 runs on a CPU too"),
        pytest.param("fp8", "h100", LLAMA, None, id="fp8 has no backward pass"),
        pytest.param("org/kernel:fn", "h100", LLAMA, "org/kernel:fn", id="a function of a kernel"),
        pytest.param("kernels-community/flash-attn3", "h100", LLAMA,
                     "kernels-community/flash-attn3", id="a hub path asks for itself"),
        pytest.param("kernels-community/flash-attn3", "b200", LLAMA, None, id="on its own GPUs"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_honoured_or_refused(
    asked: str, gpu: str, model: Model, takes: str | None
) -> None:
    found = plan(asked, gpu, model)
    assert found.requested == asked
    assert got(found) == takes
    assert found.reason
    assert takes or found.remedy


@pytest.mark.parametrize("asked", ["flash_attention_2", "flash_attention_3"])
def test_a_name_of_the_family_names_the_rule_that_it_asks_for(asked: str) -> None:
    found = plan(asked, "h100")
    rule = f"the config names {asked}, which asks for the flash family, whose order is 4, 3, 2"
    assert found.reason.startswith(rule)
    assert got(plan(None, "h100")) == "flash_attention_3", "while auto goes by the GPU"


@pytest.mark.parametrize(("gpu", "value"), [("rx7900xtx", "FALSE"), ("mi300x", "TRUE")])
def test_kernels_that_a_variable_turns_off_are_not_taken(gpu: str, value: str) -> None:
    target = parse_gpu(gpu)
    arch, label = target.arch, target.label
    setting = {"FLASH_ATTENTION_TRITON_AMD_ENABLE": value}
    backend = a_backend("flash_attention_2")
    problem = a_problem(model=LLAMA, dtype="bfloat16")
    machine = Machine(arch=arch, gpu=label, variables=setting)
    (reason,) = reasons_against(backend, machine, problem)
    assert reason.code == "variant"
    assert f"ENABLE={value}" in reason.text


def test_strict_takes_exactly_what_was_asked() -> None:
    assert got(plan("flash_attention_2", "h100", strict=True)) == "flash_attention_2"
    assert got(plan("flash_attention_2", "h100", GEMMA4, strict=True)) is None


@pytest.mark.parametrize(
    ("backend", "gpu", "problem", "codes"),
    [
        ("flash_attention_2", "t4", {}, ["arch-too-old"]),
        ("flash_attention_2", "a100", {"model": GEMMA4}, ["head-dim"]),
        ("flash_attention_2", "a100", {"model": GPT_OSS}, ["sinks", "sinks"]),
        ("flash_attention_2", "a100", {"dtype": "float32"}, ["dtype"]),
        ("flash_attention_2", "rx7900xtx", {"model": MISTRAL}, ["window"]),
        ("flash_attention_2", "rx7900xtx", {"model": GEMMA2}, ["softcap", "softcap", "window"]),
        ("flash_attention_2", "rx7900xtx", {"dropout": 0.1}, ["dropout"]),
        ("flash_attention_2", "mi300x", {"model": MISTRAL, "dropout": 0.1}, []),
        ("flash_attention_2", "mi300x", {"model": GEMMA2}, ["softcap", "softcap"]),
        ("flash_attention_2", "mi300x", {"model": LLAMA, "packing": True}, []),
        ("flash_attention_4_generic", "b200", {"model": GEMMA2, "packing": True}, []),
        ("flash_attention_4_generic", "h100", {"model": GEMMA2}, ["arch-mismatch"]),
        ("flash_attention_4_generic", "rtx5090", {"model": GEMMA2}, ["arch-mismatch"]),
        ("flash_attention_4_generic", "b200", {}, ["head-dim"]),
        ("flash_attention_3", "h100", {"dropout": 0.1}, ["dropout"]),
        ("flash_attention_3", "b200", {}, ["arch-mismatch"]),
        ("flash_attention_4", "b200", {"model": DEEPSEEK}, ["head-dim"]),
        ("flash_attention_4", "b200", {"model": GEMMA2}, ["softcap", "softcap"]),
        ("flash_attention_4", "rtx5090", {"model": GPT_OSS}, ["sinks", "sinks"]),
        ("sdpa", "h100", {"model": GEMMA2}, ["softcap", "softcap"]),
        ("sdpa", "t4", {"dtype": "bfloat16"}, ["dtype"]),
        ("flex_attention", "cpu", {}, ["no-backward"]),
        ("flex_attention", "cpu", {"training": False}, []),
        ("flex_attention", "h100", {"dropout": 0.1}, ["dropout"]),
        ("sage", "b200", {}, ["sage-arch"]),
        (
            "sage",
            "h100",
            {"model": GEMMA2},
            ["softcap", "head-dim", "softcap", "window", "head-dim"],
        ),
        ("fp8", "h100", {"packing": True}, ["fp8-no-backward", "packing-not-isolated"]),
        ("fp8", "a100", {"training": False}, ["fp8-arch"]),
        ("fp8", "h100", {"forward_only_ok": True}, []),
        ("fp8", "h100", {"forward_only_ok": True, "packing": True}, ["packing-not-isolated"]),
        ("flash_attention_4", "b200", {"model": MLA}, []),
        ("flash_attention_4", "rtx5090", {"model": MLA}, ["head-dim"]),
        ("varlen_attn", "a100", {"packing": True}, []),
        ("varlen_attn", "a100", {}, ["not-packed"]),
        ("varlen_attn", "t4", {"packing": True}, ["arch-too-old"]),
        ("varlen_attn", "a100", {"packing": True, "model": GPT_OSS}, ["sinks", "sinks"]),
        ("sdpa_cudnn", "a100", {"model": GEMMA4}, ["window", "head-dim", "head-dim"]),
        ("sdpa_efficient", "t4", {"model": MISTRAL, "packing": True}, []),
        ("sdpa_flash", "t4", {}, ["arch-too-old"]),
        ("s2", "h100", {"model": MISTRAL}, ["s2-not-llama", "window"]),
        ("s2", "h100", {"packing": True}, ["s2-with-packing"]),
        ("xformers", "cpu", {}, ["arch-too-old"]),
        ("xformers", "b200", {"model": Model(type="x", layers=(group(512),))}, ["head-dim"]),
        ("xformers", "b200", {"dtype": "float32"}, ["dtype"]),
        ("xformers", "b200", {"model": MLA}, ["head-dim-v"]),
        ("xformers", "h100", {"model": MLA}, []),
        ("xformers", "a100", {"model": ODD}, ["head-dim"]),
        ("xformers", "t4", {}, []),
        ("flash_attention_2", "a100", {"model": GEMMA2, "dropout": 0.1}, ["dropout"]),
        ("flash_attention_2", "a100", {"model": GEMMA2}, []),
        ("eager", "t4", {"model": GPT_OSS, "packing": True, "dropout": 0.1}, []),
    ],
)
def test_every_reason_is_kept(
    backend: str, gpu: str, problem: dict[str, object], codes: list[str]
) -> None:
    problem = {"model": LLAMA} | problem
    assert reasons(plan(None, gpu, **problem), backend) == codes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("packages", "torch", "codes"),
    [
        ({}, "2.13.0", ["not-installed"]),
        ({"flash-attn": "2.8.3.post2"}, "2.13.0", []),
        ({"flash-attn": "2.0.1"}, "2.13.0", ["version-low"]),
    ],
)
def test_on_this_machine_packages_count(
    packages: dict[str, str], torch: str, codes: list[str]
) -> None:
    on = machine("a100", packages=packages, torch=torch)
    found = choose(None, on, a_problem(model=LLAMA, dtype="bfloat16"))
    assert reasons(found, "flash_attention_2") == codes


def test_a_package_that_another_one_has_overwritten_is_shadowed() -> None:
    packages = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36"}
    on = machine("h100", packages=packages, torch="2.13.0", shadowed=("flash-attn-4",))
    found = choose(None, on, a_problem(model=LLAMA, dtype="bfloat16"))
    assert reasons(found, "flash_attention_4") == ["shadowed"]
    assert got(found) == "flash_attention_2"


@pytest.mark.parametrize(
    ("trusted", "codes"),
    [
        pytest.param(False, ["packing-not-isolated"], id="a hub kernel that nobody has read"),
        pytest.param(True, [], id="with trust it has to prove itself"),
    ],
)
def test_an_unread_hub_kernel_packs_on_trust_and_proof(trusted: bool, codes: list[str]) -> None:
    assert reasons(plan("org/k", "h100", packing=True, trusted=trusted), "org/k") == codes


def local(**more: object) -> LocalKernel:
    facts: dict[str, object] = {
        "repo": "kernels-community/flash-attn2",
        "path": "k",
        "vendor": "cpu",
        "version": "1",
        "exports": frozenset({"flash_attn_func", "flash_attn_varlen_func"}),
    }
    return LocalKernel(**(facts | more))  # type: ignore[arg-type]  # a table's cell


@pytest.mark.parametrize(
    ("kernel", "gpu", "packing", "codes"),
    [
        pytest.param(local(), "cpu", True, [], id="a CPU build fits a CPU, in float32 too"),
        pytest.param(local(), "h100", True, ["arch-mismatch"], id="and no GPU"),
        pytest.param(local(vendor="nvidia"), "cpu", True, ["arch-mismatch"], id="the other way"),
        pytest.param(
            local(exports=frozenset({"flash_attn_func"})),
            "cpu",
            True,
            ["packing-not-isolated"],
            id="packing needs the varlen entry",
        ),
        pytest.param(
            local(exports=frozenset({"flash_attn_func"})), "cpu", False, [], id="dense does not"
        ),
        pytest.param(
            local(exports=frozenset({"rms_norm"})), "cpu", False, ["not-a-kernel"], id="no kernel"
        ),
        pytest.param(
            local(exports=frozenset({"sageattn"})), "cpu", True, [], id="document by document"
        ),
        pytest.param(local(exports=None), "cpu", True, [], id="unread exports are proven later"),
    ],
)
def test_a_local_kernel_is_judged_by_its_own_metadata(
    kernel: LocalKernel, gpu: str, packing: bool, codes: list[str]
) -> None:
    on = machine(gpu, packages={}, local_kernels=(kernel,))
    problem = a_problem(model=LLAMA, dtype="float32", packing=packing)
    found = choose("flash_attention_2", on, problem)
    assert reasons(found, "flash_attention_2") == codes
    assert got(found) == (None if codes else "flash_attention_2")


@pytest.mark.parametrize(
    ("takes", "model", "dropout", "codes"),
    [
        (None, GPT_OSS, 0.1, []),
        (frozenset({"window_size", "s_aux"}), GPT_OSS, 0.0, []),
        (frozenset({"window_size", "learnable_sink"}), GPT_OSS, 0.0, []),
        (frozenset({"window_size"}), GPT_OSS, 0.0, ["sinks"]),
        (frozenset({"softcap"}), GEMMA2, 0.0, ["window"]),
        (frozenset({"window_size"}), GEMMA2, 0.0, ["softcap"]),
        (frozenset({"softcap"}), LLAMA, 0.1, ["dropout"]),
    ],
)
def test_what_a_local_kernel_has_no_argument_for_is_a_reason(
    takes: frozenset[str] | None, model: Model, dropout: float, codes: list[str]
) -> None:
    on = machine("cpu", packages={}, local_kernels=(local(varlen_takes=takes),))
    problem = a_problem(model=model, dtype="float32", dropout=dropout)
    found = choose("flash_attention_2", on, problem)
    assert reasons(found, "flash_attention_2") == codes


@pytest.mark.parametrize(
    ("bf16", "fp16", "gpu", "dtype"),
    [
        ("auto", False, "h100", "bfloat16"),
        ("auto", False, "a100", "bfloat16"),
        ("auto", False, "t4", "float16"),
        ("auto", False, "mi300x", "bfloat16"),
        ("auto", False, "cpu", "float32"),
        (True, False, "cpu", "bfloat16"),
        ("full", False, "h100", "bfloat16"),
        (False, False, "h100", "float32"),
        ("auto", True, "h100", "float16"),
        (False, True, "t4", "float16"),
        (False, True, "cpu", "float32"),
    ],
)
def test_the_precision_follows_the_hardware(
    bf16: bool | str, fp16: bool, gpu: str, dtype: str
) -> None:
    assert training_dtype(bf16=bf16, fp16=fp16, arch=parse_gpu(gpu).arch) == dtype


def test_a_failed_proof_moves_auto_on_and_stops_a_name() -> None:
    leak = Reason(code="packing-not-isolated", text="it leaks")
    following = rule_out(plan(None, "cpu"), "sdpa", leak)
    # eager would get the same mask; this one gets the documents' boundaries.
    assert got(following) == "sdpa_math"
    assert got(rule_out(following, "sdpa_math", leak)) == "eager"
    assert got(rule_out(plan("sdpa", "cpu"), "sdpa", leak)) is None


@pytest.mark.parametrize(
    ("asked", "gpu", "strict", "tried"),
    [
        pytest.param("flash_attention_2", "h100", False, [4, 3, 2], id="2 goes down the family"),
        pytest.param("flash_attention_3", "h100", False, [4, 3, 2], id="3 does, past itself"),
        pytest.param("flash_attention_2", "b200", False, [4, 2], id="by what fits"),
        pytest.param("flash_attention_4", "h100", False, [4], id="4 asks for itself alone"),
        pytest.param("flash_attention_2", "h100", True, [2], id="strictly 2"),
        pytest.param("flash_attention_3", "h100", True, [3], id="strictly 3"),
    ],
)
def test_after_a_failed_proof_the_next_of_the_flash_family_stands_in(
    asked: str, gpu: str, strict: bool, tried: list[int]
) -> None:
    found, names = plan(asked, gpu, strict=strict), []
    wrong = Reason(code="numerics-fwd", text="its output is wrong")
    while (name := got(found)) is not None:
        names.append(name)
        found = rule_out(found, name, wrong)
        assert found.requested == asked
    assert names == [f"flash_attention_{member}" for member in tried]
    assert [v.backend.name for v in found.verdicts if wrong in v.reasons] == names
    assert found.reason
    assert found.remedy


@pytest.mark.parametrize("gpu", gpu_catalogue())
def test_every_backend_is_judged_on_every_gpu(gpu: str) -> None:
    found = plan(None, gpu)
    assert sorted(v.backend.name for v in found.verdicts) == sorted(b.name for b in all_backends())
    assert [v.rank for v in found.verdicts] == list(range(1, len(found.verdicts) + 1))
    assert all(v.fits != bool(v.reasons) for v in found.verdicts)
    assert got(found)


@pytest.mark.parametrize(
    ("gpu", "model", "says"),
    [
        pytest.param("h100", LLAMA, ["of 16 backends fit packed training on sm_90", "sage: only",
            "flash_attention_3 has the best rank of them: it is written for Hopper",
            "flash_attention_4 is not faster than FlashAttention-3 on Hopper [", "PR #2889"],
            id="what was moved behind is named, with the source"),
        pytest.param("h100", GPT_OSS, ["flash_attention_4 has the best rank",
            "flash_attention_3 ranks better, but: 32 layers use attention sinks"],
            id="what would come first is named"),
        pytest.param("rtx5090", LLAMA, ["flash_attention_4 trains slower", "#1981"], id="RTX 50"),
        pytest.param("t4", LLAMA, ["xformers has the best rank",
            "sdpa gets packed rows with a mask"],
            id="Turing"),
        pytest.param("t4", GPT_OSS, ["1 of 16 backends fits packed training on sm_75"],
            id="where there is one"),
    ],
)  # fmt: skip
def test_because_can_be_read_without_seeing_ranks(gpu: str, model: Model, says: list[str]) -> None:
    found = plan(None, gpu, model, packing=True)
    assert [part for part in says if part not in found.reason] == []


@pytest.mark.parametrize("asked", [None, "eager", "xformers"])
def test_a_precision_that_no_backend_takes_is_what_to_change(asked: str | None) -> None:
    found = plan(asked, "t4", dtype="bfloat16")
    assert got(found) is None
    assert "found bfloat16 on sm_75" in found.reason
    assert found.remedy.startswith("set bf16: auto")
    assert got(plan(asked, "t4")) is not None  # plan() takes the precision of bf16: auto


def test_reasons_that_several_backends_share_are_told_once() -> None:
    because = plan(None, "mi300x", GEMMA2).reason
    assert because.count("soft cap") == 1
    assert "flash_attention_2, sdpa, sdpa_flash, sdpa_efficient" in because


@pytest.mark.parametrize(
    ("gpu", "runs"),
    [
        ("h100", ["flash_attention_3", "sdpa"]),
        ("b200", ["flash_attention_4_generic", "sdpa"]),
        ("rtx5090", ["flash_attention_2", "sdpa"]),
        ("mi300x", ["flash_attention_2", "sdpa"]),
        ("t4", []),
    ],
)
def test_groups_of_layers_run_their_own_best(gpu: str, runs: list[str]) -> None:
    found = plan(None, gpu, GEMMA4, packing=True)
    assert [choice.verdict.backend.name for choice in found.groups] == runs
    if runs:
        assert f"32 layers of head_dim 256 with window 512 run {runs[0]}" in found.reason
        assert "32 layers of head_dim 512 run sdpa" in found.reason


def test_a_variable_of_the_process_holds_for_every_layer_that_it_reaches() -> None:
    wide = group(192, v=128)
    three = Model(type="x", layers=(group(256, window=512), group(256), replace(wide, kv_heads=32)))
    found = plan(None, "b200", three, packing=True)
    names = [choice.verdict.backend.name for choice in found.groups]
    # Alone, layers of head_dim 256 without a window would run FlashAttention-4's own kernel.
    assert names == ["flash_attention_4_generic", "flash_attention_4_generic", "flash_attention_4"]


def test_a_variable_that_is_set_against_a_kernel_refuses_it() -> None:
    backend = a_backend("flash_attention_4_generic")
    for value, codes in (("0", ["variant"]), ("1", [])):
        on = machine("b200", variables={"FLASH_ATTENTION_HD256_GENERIC_BWD": value})
        problem = a_problem(model=GEMMA2, dtype="bfloat16")
        assert [r.code for r in reasons_against(backend, on, problem)] == codes


def test_the_generic_kernel_is_chosen_before_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "FLASH_ATTENTION_HD256_GENERIC_BWD"
    monkeypatch.setenv(name, "0")
    seen: list[str | None] = []

    def kernel(*_: object, **__: object) -> SimpleNamespace:
        seen.append(os.environ.get(name))
        return SimpleNamespace()

    monkeypatch.setattr("attnimg.backends._transformers.flash_kernel", kernel)
    backend = a_backend("flash_attention_4_generic")
    assert backend.load_function is not None
    backend.load_function()
    assert seen == ["1"]


@pytest.mark.parametrize(
    ("gpu", "packing", "codes"),
    [("rtx5090", True, ["known-bad"]), ("dgx-spark", True, ["known-bad"]),
     ("rtx5090", False, []), ("rtx4090", True, []), ("h100", True, [])],
)  # fmt: skip
def test_sage_packed_is_refused_where_its_triton_kernel_is_not_usable(
    gpu: str, packing: bool, codes: list[str]
) -> None:
    rules = known_bad.load(None, today=date(2026, 11, 26))
    found = plan("sage", gpu, packing=packing, known_bad=rules)
    assert reasons(found, "sage") == codes
    assert got(found) == (None if codes else "sage")
