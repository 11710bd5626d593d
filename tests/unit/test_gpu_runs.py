"""The records of GPU runs: what is incomplete is refused, and the pages claim what they show."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import suite_steps

from attnimg.errors import AttnimgError
from recipes.pages.gpu_runs import (
    NONE,
    REFERENCES,
    Notes,
    find_faults,
    read_notes,
    read_run,
    read_runs,
    runs_page,
    runs_table,
)

ROOT = Path(__file__).resolve().parents[2]


def record(kind, step, state="measured", **rest):
    return {"kind": kind, "step": step, "backend": rest.pop("backend", ""), "machine": "ab",
            "started": "2026-12-01T10:00:00+00:00", "seconds": 1.5, "state": state,
            **rest}  # fmt: skip


START = record(
    "run", "start",
    values={"gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "driver": "580", "rehearsal": False,
            "versions": {"torch": "2.11.0", "python": "3.12.3"}, "smi": {}},
)  # fmt: skip
PROOF = record(
    "proof", "proofs", "passed", backend="sdpa", unit="proofs sdpa",
    values={"dtype": "bfloat16", "head_dims": [64], "packing": True, "probes": 139, "proofs": 1,
            "refused": 0, "proof_seconds": [3.0], "notes": ["proven up to 9 tokens"],
            "versions": {"flash-attn-3": "3.0.0"},
            "figures": [{"quantity": "dq", "error": 1e-3, "allowed": 2e-3},
                        {"quantity": "out", "error": None, "allowed": None}]},
)  # fmt: skip
FAILED = record(
    "proof", "kernels", "crash", backend="flash_attention_3", unit="kernels flash_attention_3",
    code="crash", text="packed: the process ended with | SIGSEGV",
)  # fmt: skip
TRAINED = record(
    "training", "training", "passed", backend="sdpa", unit="training sdpa 1b",
    values={"shape": "1b", "dtype": "bfloat16", "losses": [10.0, 2.5], "difference": None,
            "tokens_per_second": 12345.6, "memory_bytes": 3 << 30, "isolation": "isolated"},
)  # fmt: skip
TIMED = record(
    "timing", "timing", backend="sdpa", unit="timing sdpa",
    values={"head_dim": 128, "length": 8192, "packing": True, "tokens": 16384, "documents": 40,
            "forward_ms": 1.0, "both_ms": 3.5, "both_tflops": 494.7, "share_of_peak": 0.5},
)  # fmt: skip
OTHER = record(
    "timing", "timing", backend="eager", unit="timing eager",
    values={**TIMED["values"], "head_dim": 64, "packing": False, "both_ms": 7.0,
            "both_tflops": 247.3, "share_of_peak": None},
)  # fmt: skip
PLAN = record("plan", "proofs", values={"units": ["proofs sdpa", "training sdpa 1b"]})
END = record("run", "end", values={})
RUN = [START, PLAN, PROOF, TRAINED, TIMED, END]


def test_a_whole_run_has_no_faults():
    assert find_faults(RUN, all_right=True) == []
    # A kernel that fails is a result, except in a rehearsal.
    assert find_faults([*RUN, FAILED], all_right=False) == []


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        pytest.param(RUN[:-1], "no record of the run's end", id="cut off"),
        pytest.param(RUN[1:], "no record of the run's start", id="no start"),
        pytest.param(
            [*RUN[:3], *RUN[4:]], "without a record: training sdpa 1b", id="a unit is gone"
        ),
        pytest.param([*RUN, TRAINED], "more than once: training sdpa 1b", id="twice"),
        pytest.param([START, END], "no proof", id="nothing was proven"),
    ],
)
def test_what_is_incomplete_is_named(records, fault):
    assert any(fault in found for found in find_faults(records, all_right=False))


@pytest.mark.parametrize("state", ["failed", "crash", "timeout", "not reached"])
def test_a_rehearsal_in_which_something_failed_is_refused(state):
    wrong = record("timing", "timing", state, backend="sdpa", unit="t", text="why")
    assert find_faults([*RUN, wrong], all_right=True) == [f"t: {state}: why"]


def test_the_page_shows_what_was_found_and_what_failed():
    page = runs_page({"2026-12-01-h100": [*RUN[:-1], OTHER, FAILED, END]})
    assert "## NVIDIA H100 80GB HBM3, 2026-12-01" in page
    assert "| `sdpa` | torch's own | bfloat16 | 64 | packed and single | passed | 139 |" in page
    assert "- proven up to 9 tokens" in page
    assert "dq 1.0e-03 of 2.0e-03" in page
    assert "| head_dim | rows | packing | `sdpa` | `eager` |" in page
    assert "| 128 | 2 x 8192 | 40 documents | **3.50**; 495, 50 % | - |" in page
    assert "| 64 | 2 x 8192 | one document a row | - | **7.00**; 247 |" in page
    assert "12,346 | 3.0 GiB" in page
    assert (
        "- kernels flash_attention_3: **crash**, packed: the process ended with / SIGSEGV" in page
    )
    assert "It ran to its end" in page


def test_a_run_that_was_cut_off_says_so():
    page = runs_page({"x": RUN[:-1]})
    assert "It was cut off; the last record is that of `timing sdpa`" in page


def test_without_a_run_nothing_is_claimed():
    assert runs_table({}) == NONE
    assert NONE in runs_page({})


def test_the_table_names_what_passed_and_what_failed():
    *_, row = runs_table({"x": [*RUN, FAILED]}).splitlines()
    assert row == (
        "| NVIDIA H100 80GB HBM3, 2026-12-01 | torch 2.11.0 | `sdpa` | `sdpa` |"
        " `flash_attention_3` | [x](#x) |"
    )


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in RUN) + '{"kind": "pro')
    assert read_run(path) == RUN


@pytest.mark.parametrize(
    ("line", "why"),
    [
        pytest.param('{"kind": ', "JSONDecodeError", id="no JSON"),
        pytest.param("[1]", "record 2 lacks backend, kind", id="no object"),
        pytest.param(
            json.dumps({k: v for k, v in START.items() if k != "machine"}),
            "record 2 lacks machine",
            id="without a field",
        ),
    ],
)
def test_a_line_that_is_no_record_is_refused(tmp_path, line, why):
    path = tmp_path / "run.jsonl"
    path.write_text(f"{json.dumps(START)}\n{line}\n{json.dumps(END)}\n")
    with pytest.raises(AttnimgError, match="cannot be read") as refused:
        read_run(path)
    assert why in refused.value.why


def test_records_of_a_run_do_not_change_by_being_shown():
    before = deepcopy(RUN)
    runs_page({"x": RUN})
    assert before == RUN


def test_a_run_may_go_on_from_what_another_proved():
    start = {**START, "values": {**START["values"], "known": "first"}}
    assert find_faults([start, TIMED, END], all_right=False) == []
    assert "It continued `first`" in runs_page({"x": [start, TIMED, END]})


def test_losses_are_compared_with_those_of_the_reference_in_the_same_run():
    def of(backend, losses, state="passed"):
        values = {**TRAINED["values"], "losses": losses}
        return {**TRAINED, "backend": backend, "unit": backend, "state": state, "values": values}

    trained = [of("varlen_attn", [10.0, 2.25]), of("sdpa_math", [9.0, 1.0])]
    page = runs_page({"x": [START, *trained, of("eager", [10.0, 2.5]), END]})
    assert "2.2e" not in page
    assert "| 10.000 to 2.250 | 2.5e-01 from `eager`'s |" in page
    assert "| 10.000 to 2.500 | the reference |" in page
    # One that failed is no reference.
    page = runs_page({"x": [START, *trained, of("eager", [10.0, 2.5], "failed"), END]})
    assert "| 10.000 to 2.250 | 1.2e+00 from `sdpa_math`'s |" in page
    assert "| 10.000 to 2.250 | - |" in runs_page({"x": [START, trained[0], END]})
    assert suite_steps.REFERENCES == REFERENCES


def test_notes_stand_in_the_section_of_their_run_and_name_the_run_before():
    start = {**START, "values": {**START["values"], "known": "run1"}}
    notes = {
        "first": Notes(was="run1", notes=("of the first",)),
        "other": Notes(was="run2", notes=("of the other",)),
    }
    page = runs_page({"first": RUN, "other": [start, TIMED, END]}, notes)
    other, first = page.split('<a id="first">')
    assert "- of the other\n" in other
    assert "- of the first\n" in first
    assert "It continued `first`" in other


def test_every_recorded_run_has_notes_and_no_path_of_its_machine():
    runs = read_runs(ROOT)
    assert set(read_notes(ROOT)) == set(runs)
    for name in runs:
        text = (ROOT / f"docs/gpu-runs/{name}.jsonl").read_text()
        assert not re.search(r"[\"( ]/(work|root|tmp|home)\b", text), name


def test_recorded_runs_are_well_formed():
    for records in read_runs(ROOT).values():
        found = find_faults(records, all_right=False)  # a run on a GPU may have been cut off
        assert [fault for fault in found if "lacks" in fault or "more than once" in fault] == []
