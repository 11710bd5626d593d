"""Rules on known-bad backends: what they match, and what a broken file is told."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from run_facts import a_backend, a_problem

from attnimg.backends import all_backends
from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.run_facts import LayerGroup, Model, Problem
from attnimg.selection import known_bad, plan
from attnimg.selection.gpus_and_images import parse_gpu

TODAY = date(2026, 11, 21)
LAYER = LayerGroup(count=2, heads=8, kv_heads=2, head_dim_qk=256, head_dim_v=256)
RUN = a_problem(
    model=Model(type="llama", layers=(LAYER,)),
    dtype="bfloat16",
    dropout=0.1,
    known_bad=known_bad.load(None, today=TODAY),
)
RULE = """
[[rule]]
id = "mine"
backends = ["sdpa"]
effect = "it is slow"
link = "https://example.org/1"
date = 2026-11-01
"""


def machine(gpu: str, **packages: str) -> Machine:
    arch = parse_gpu(gpu).arch
    return Machine(arch=arch, gpu=gpu, packages=packages or None, torch="2.13.0")


def codes(backend: str, on: Machine, problem: Problem) -> list[str]:
    named = a_backend(backend)
    return [r.text.split(":")[0] for r in known_bad.reasons_against(named, on, problem)]


NO_DROPOUT = replace(RUN, dropout=0.0)
LONG = replace(NO_DROPOUT, packing=True, sequence_len=1 << 17, rows=2)
NARROW = replace(RUN, model=Model(type="llama", layers=(replace(LAYER, head_dim_qk=128),)))


@pytest.mark.parametrize(
    ("backend", "on", "problem", "rules"),
    [
        pytest.param("flash_attention_2", machine("l4"), RUN, ["kb24"],
                     id="FA2, head_dim 256, dropout on 99 KB of shared memory"),
        pytest.param("flash_attention_2", machine("rtx5090"), RUN, ["kb24"], id="also on sm_120"),
        pytest.param("flash_attention_2", machine("a100"), RUN, [], id="not on an A100"),
        pytest.param("flash_attention_2", machine("l4"), NO_DROPOUT, [], id="not without dropout"),
        pytest.param("flash_attention_2", machine("l4"), NARROW, [], id="not with head_dim 128"),
        pytest.param("sdpa", machine("l4"), RUN, [], id="not another backend"),
        pytest.param("flash_attention_2", machine("a100", **{"flash-attn": "2.8.3.post1"}), LONG,
                     ["kb03"], id="two packed rows are one long one to FA2"),
        pytest.param("flash_attention_2", machine("a100", **{"flash-attn": "2.8.3.post1"}),
                     replace(LONG, rows=1), [], id="one alone is shorter"),
        pytest.param("flash_attention_2", machine("a100", **{"flash-attn": "2.8.3.post2"}), LONG,
                     [], id="fixed in post2"),
        pytest.param("flash_attention_4", machine("rtx5090", **{"flash-attn-4": "4.0.0b29"}),
                     replace(RUN, packing=True), ["kb05"], id="a beta within the bounds"),
        pytest.param("flash_attention_4", machine("rtx5090", **{"flash-attn-4": "4.0.0b36"}),
                     replace(RUN, packing=True), [], id="a later beta"),
        pytest.param("flash_attention_4", machine("rtx5090"), replace(RUN, packing=True), [],
                     id="no version is known, so no rule about versions"),
    ],
)  # fmt: skip
def test_a_rule_holds_where_all_of_it_holds(
    backend: str, on: Machine, problem: Problem, rules: list[str]
) -> None:
    assert codes(backend, on, problem) == rules


def test_a_plan_tells_the_rule_its_effect_and_its_link() -> None:
    found = plan.choose("flash_attention_2", machine("l4"), RUN, strict=True)
    verdict = next(v for v in found.verdicts if v.backend.name == "flash_attention_2")
    (reason,) = [r for r in verdict.reasons if r.code == "known-bad"]
    assert reason.text.startswith("kb24: the backward pass launches nothing")
    assert "reported" in reason.text
    assert "https://" in reason.text
    assert found.chosen is None


def test_the_packages_rules_speak_of_backends_that_exist() -> None:
    names = {backend.name for backend in all_backends()}
    for rule in known_bad.load(None, today=TODAY):
        assert {name for name in rule.backends if "/" not in name} <= names, rule.id
        assert rule.status == "reported"


def test_a_users_file_adds_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(RULE + RULE.replace('"mine"', '"kb24"'))
    rules = {rule.id: rule for rule in known_bad.load(str(file), today=TODAY)}
    assert rules["kb24"].backends == rules["mine"].backends == {"sdpa"}
    assert "kb05" in rules
    with_rules = replace(RUN, known_bad=tuple(rules.values()))
    assert codes("sdpa", machine("l4"), with_rules) == ["kb24", "mine"]


@pytest.mark.parametrize(
    ("expires", "counts"),
    [("2026-11-22", True), ("2026-11-21", False)],
    ids=["tomorrow", "today"],
)
def test_a_rule_expires(tmp_path: Path, expires: str, counts: bool) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(RULE + f"expires = {expires}\n")
    assert ("mine" in {r.id for r in known_bad.load(str(file), today=TODAY)}) is counts


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("[[rule]", "not TOML", id="not TOML"),
        pytest.param("[rules]\n", "found rules", id="another table"),
        pytest.param("rule = 3\n", "needed tables", id="no tables"),
        pytest.param(RULE.replace("effect", "efect"), "found efect", id="an unknown field"),
        pytest.param(RULE.replace('"mine"', "7"),
                     "found id = 7: input should be a valid string", id="a number for a text"),
        pytest.param(RULE.replace('link = "https://example.org/1"\n', ""), "found no link",
                     id="a field missing"),
        pytest.param(RULE.replace('["sdpa"]', "[]"), "found no backends", id="no backend"),
        pytest.param(RULE.replace('["sdpa"]', "[3]"),
                     "found backends.0 = 3: input should be a valid string",
                     id="a number for a backend"),
        pytest.param(RULE.replace("2026-11-01", '"soon"'),
                     "found date = 'soon': input should be a valid date", id="no date"),
        pytest.param(RULE + 'dtypes = ["fp8"]\n',
                     "found dtypes.0 = 'fp8': input should be 'float32'",
                     id="an unknown precision"),
        pytest.param(RULE + "features = { windows = true }\n",
                     "found features.windows = 'windows': input should be 'packing'",
                     id="an unknown feature"),
        pytest.param(RULE + "features = { window = 3 }\n",
                     "found features.window = 3: input should be a valid boolean",
                     id="a feature that is a number"),
        pytest.param(RULE + "head_dim_qk = [64]\n", "found no head_dim_qk.1", id="one bound"),
        pytest.param(RULE + "head_dim_qk = [64, 32]\n", "needed [lowest, highest]",
                     id="bounds upside down"),
        pytest.param(RULE + 'packages = { torch = "newer" }\n', "needed versions",
                     id="no versions"),
        pytest.param(RULE + "packages = { torch = 2 }\n", "found packages.torch = 2",
                     id="a version that is a number"),
        pytest.param(RULE + RULE, "two rules with the id mine", id="an id twice"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(AttnimgError) as caught:
        known_bad.load(str(file), today=TODAY)
    assert told in caught.value.why
    assert str(file) in caught.value.why
    assert (caught.value.key, caught.value.exit_code) == ("attn_known_bad", 2)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["no file", "no text"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mine.toml"
    if content:
        file.write_bytes(content)
    with pytest.raises(AttnimgError, match="could not be read"):
        known_bad.load(str(file), today=TODAY)
