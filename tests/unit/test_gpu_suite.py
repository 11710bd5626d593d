"""A GPU run loses nothing: whatever a unit does, its record is there and the next unit runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import suite
from suite_steps import STEPS, Progress, Sizes, pending
from suite_units import KINDS
from suite_workers import Pool, Unit

SUITE = Path(__file__).parents[1] / "gpu" / "suite.py"
# A worker that does what the kind of a unit says; "pid" tells which process it is.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    kind = json.loads(line)["kind"]
    print(json.dumps({"stage": "working"}), flush=True)
    if kind == "hang":
        time.sleep(60)
    if kind == "segfault":
        os.kill(os.getpid(), 11)
    if kind == "exit":
        sys.exit("no kernel image is available")
    outcome = {"state": "passed", "pid": os.getpid()}
    if kind == "broken":
        outcome = {"state": "failed", "code": "AcceleratorError", "replace": True}
    print(json.dumps({"outcome": outcome}), flush=True)
"""


@pytest.fixture
def run(tmp_path):
    """Run units of some kinds; outcomes by the units' kinds and numbers."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    pool = Pool(dict(os.environ), script=script)

    def run(*kinds, workers=1, seconds=30.0, limit_s=1.0):
        found = []
        pool.run(
            [
                Unit(step="s", kind=kind, what=str(n), limit_s=limit_s)
                for n, kind in enumerate(kinds)
            ],
            workers=workers,
            deadline=time.monotonic() + seconds,
            record=lambda unit, _begun, outcome: found.append((unit.kind, outcome)),
        )
        return found

    yield run
    pool.restart()


@pytest.mark.parametrize(
    ("kind", "state", "text"),
    [
        ("hang", "timeout", "working: still running after"),
        ("segfault", "crash", "working: the process ended with SIGSEGV"),
        ("exit", "crash", "no kernel image is available"),
    ],
)
def test_a_lost_worker_costs_its_unit_alone(run, kind, state, text):
    (_, before), (_, lost), (_, after) = run("ok", kind, "ok")
    assert lost["state"] == state
    assert text in lost["text"]
    assert before["state"] == after["state"] == "passed"
    assert before["pid"] != after["pid"]


def test_a_broken_context_is_left_behind(run):
    (_, before), (_, broken), (_, after) = run("ok", "broken", "ok")
    assert broken == {"state": "failed", "code": "AcceleratorError"}
    assert before["pid"] != after["pid"]


def test_right_units_share_a_process_also_from_one_call_to_the_next(run):
    found = [*run("ok", "ok"), *run("ok")]
    assert len({outcome["pid"] for _, outcome in found}) == 1


def test_workers_run_side_by_side(run):
    assert len({outcome["pid"] for _, outcome in run(*["ok"] * 40, workers=2)}) <= 2
    begun = time.monotonic()
    run("hang", "hang", "hang", workers=3, limit_s=1.0)
    assert time.monotonic() - begun < 2.5


def test_no_unit_begins_when_the_time_is_up(run):
    assert run("ok", seconds=4.0) == []


def progress(*records, kernels=None):
    return Progress(
        native=["sdpa", "s2"],
        kernels=kernels or {"flash_attention_3": "flash-attn-3", "sage": "sageattention"},
        records=records,
        in_config={"sdpa", "flash_attention_3"},
        packing={"sdpa": "mask", "eager": "mask", "sdpa_math": "native", "s2": "none",
                 "flash_attention_3": "native", "sage": "native",
                 "flash_attention_4": "native", "flex_attention": "native",
                 "varlen_attn": "native"},
    )  # fmt: skip


def proof(backend, state="passed", *, step="proofs", head_dims=(64, 128, 256), **more):
    values = {"dtype": "bfloat16", "head_dims": list(head_dims), "packing": True}
    dims = "+".join(map(str, head_dims))
    unit = f"{step} {backend} bfloat16 head_dim {dims}"
    return {"kind": "proof", "step": step, "backend": backend, "unit": unit, "state": state,
            "values": values, **more}  # fmt: skip


def installed(package):
    return {"kind": "kernel", "step": "kernels", "backend": package, "state": "passed"}


def backends(step, *records, waiting=False, sizes=None):
    units = pending(step, progress(*records), sizes or Sizes.gpu(), waiting=waiting)
    return [unit.backend for unit in units]


def test_a_kernel_joins_when_it_is_ready():
    assert backends("kernels", waiting=True) == []
    assert set(backends("kernels", installed("flash-attn-3"), waiting=True)) == {
        "flash_attention_3"
    }
    # Nothing is compiled any more: what was not installed has a record that says so.
    assert set(backends("kernels")) == {"flash_attention_3", "sage"}


STUB = """
import json, sys, time
from pathlib import Path

path = Path(sys.argv[sys.argv.index("--to") + 1]) / "status.jsonl"
line = {"kernel": "flash-attn-3", "state": "installed", "seconds": 2.0, "error": None}
with path.open("a") as file:
    file.write(json.dumps({**line, "state": "compiling"}) + "\\n" + json.dumps(line)[:9])
    file.flush()
    time.sleep(0.3)
    file.write(json.dumps(line)[9:] + "\\n")
"""


def test_states_of_kernels_are_read_whole_and_once(tmp_path):
    script, kit = tmp_path / "compile.py", tmp_path / "kit"
    script.write_text(STUB)
    kit.mkdir()
    for _ in range(2):  # the second run meets the states of the first
        kernels = suite.Kernels(kit, tmp_path / "to", keep=None, script=script)
        states = []
        while kernels.busy():
            states += kernels.new_states()
        states += kernels.new_states()
        assert [state["state"] for state in states] == ["compiling", "installed"]


def test_what_compiles_during_its_proof_comes_late_and_only_when_it_is_there():
    native = replace(progress(), native=["sdpa", "flex_attention"])
    native = replace(native, kernels={"flash_attention_4": "flash-attn-4"})
    slow = [unit.backend for unit in pending("slow", native, Sizes.gpu(), waiting=True)]
    assert slow == ["flex_attention"]
    slow = [unit.backend for unit in pending("slow", native, Sizes.gpu(), waiting=False)]
    assert slow == ["flash_attention_4", "flex_attention"]
    assert not pending("kernels", native, Sizes.gpu(), waiting=False)


def test_without_a_kit_the_run_says_so(tmp_path):
    kernels = suite.Kernels(tmp_path / "none", tmp_path / "to", keep=None)
    assert "make gpu-kit" in kernels.missing
    assert not kernels.busy()
    assert kernels.new_states() == []


def test_what_an_earlier_run_proved_counts_once_its_kernel_is_installed():
    known = [proof("sdpa"), proof("flash_attention_3", step="kernels", head_dims=[64])]
    before = replace(progress(), known=known)
    assert set(before.proven("bfloat16")) == {"sdpa"}
    after = replace(progress(installed("flash-attn-3")), known=known)
    assert set(after.proven("bfloat16")) == {"sdpa", "flash_attention_3"}


def test_what_was_refused_is_proven_repeatedly_too():
    assert backends("repeats", proof("sdpa"), proof("varlen_attn", "failed")) == [
        "varlen_attn",
        "sdpa",
    ]


def test_what_was_recorded_is_not_run_again():
    units = pending("proofs", progress(), Sizes.gpu(), waiting=False)
    records = [{"kind": "proof", "step": "proofs", "backend": unit.backend, "unit": unit.name,
                "state": "not here"} for unit in units]  # fmt: skip
    assert pending("proofs", progress(*records), Sizes.gpu(), waiting=False) == []


def test_where_a_proof_of_all_head_sizes_failed_each_is_proven_alone():
    units = pending("proofs", progress(proof("sdpa", "failed")), Sizes.gpu(), waiting=False)
    alone = [unit.values["head_dims"] for unit in units if unit.backend == "sdpa"]
    assert alone[:3] == [[64], [128], [256]]


def test_only_proven_backends_are_trained_and_timed():
    records = [proof("sdpa"), proof("sage", "failed", step="kernels")]
    assert set(backends("training", *records)) == {"sdpa"}
    assert set(backends("timing", *records)) == {"sdpa"}
    small = proof("flash_attention_3", step="kernels", head_dims=[64])
    timed = pending("timing", progress(*records, small), Sizes.gpu(), waiting=False)
    of_small = {u.values["head_dim"] for u in timed if u.backend == "flash_attention_3"}
    assert of_small == {64}


def trained(backend, shape="tiny", state="passed"):
    values = {"shape": shape, "losses": [2.0, 1.0], "tokens_per_second": 9.0}
    return {"kind": "training", "step": "training", "backend": backend, "state": state,
            "unit": f"training {backend} {shape}", "values": values}  # fmt: skip


def test_sdpa_trains_first_and_the_others_are_compared_with_it():
    proven = [proof("sdpa"), proof("flash_attention_3", step="kernels", head_dims=[64])]
    first = pending("training", progress(*proven), Sizes.gpu(), waiting=False)
    assert [unit.backend for unit in first] == ["sdpa", "sdpa"]
    then = pending("training", progress(*proven, trained("sdpa")), Sizes.gpu(), waiting=False)
    found = {unit.name: unit.values["reference"] for unit in then}
    assert found["training flash_attention_3 tiny"] == ("sdpa", [2.0, 1.0])


def test_without_sdpa_the_others_are_compared_with_eager():
    proven = [proof("varlen_attn"), proof("sdpa_math"), proof("eager"), proof("sdpa", "timeout")]
    assert backends("training", *proven) == ["eager", "eager"]
    then = pending("training", progress(*proven, trained("eager")), Sizes.gpu(), waiting=False)
    found = {unit.name: unit.values["reference"] for unit in then}
    assert found["training varlen_attn tiny"] == ("eager", [2.0, 1.0])
    # One that failed is no reference: the next one is trained.
    lost = trained("eager", state="crash")
    assert backends("training", *proven, lost) == ["sdpa_math", "eager"]
    # With none of them, the rest is trained all the same.
    assert set(backends("training", proof("varlen_attn"))) == {"varlen_attn"}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_units_or_says_that_it_has_none(step):
    assert isinstance(pending(step, progress(proof("sdpa")), Sizes.gpu(), waiting=False), list)


class OtherPool:
    """A pool that records an outcome for each unit and runs none."""

    def __init__(self, _environment):
        self.names = []

    def run(self, units, *, record, **_limits):
        for unit in units:
            self.names.append(unit.name)
            record(unit, time.monotonic(), self.outcome(unit))

    def outcome(self, unit):
        values = {**unit.values, "losses": [2.0, 1.0], "tokens_per_second": 9.0}
        return {"state": self.state if unit.kind == "proof" else "passed", "values": values}

    def restart(self):
        pass


class OtherKernels:
    """FlashAttention-3, installed from the start, and nothing else."""

    folder = Path("none")

    def __init__(self):
        self.states = [{"kernel": "flash-attn-3", "state": "installed", "seconds": 1.0}]

    def busy(self):
        return False

    def new_states(self):
        found, self.states = self.states, []
        return found


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Run suite.py's scheduler over all steps with the sizes of a GPU; its records."""

    def rehearse(state):
        monkeypatch.setattr(suite, "Pool", type("Pool", (OtherPool,), {"state": state}))
        monkeypatch.setattr(suite.os, "fsync", lambda _: None)
        records = suite.Records(tmp_path / f"{state}.jsonl", machine="m")
        options = SimpleNamespace(rehearsal=False, known=None, steps=list(STEPS))
        with records.file:
            suite._run(options, records, OtherKernels(), deadline=time.monotonic() + 60)
        return records.made

    return rehearse


def test_a_full_disk_leaves_the_records_in_the_log(tmp_path, monkeypatch, capsys):
    def full(_file):
        raise OSError(28, "No space left on device")

    records = suite.Records(tmp_path / "records.jsonl", machine="m")
    monkeypatch.setattr(suite.os, "fsync", full)
    with records.file:
        records.add("proof", "proofs", seconds=1.0, state="passed", unit="proofs sdpa")
    written = (
        capsys.readouterr()
        .out.splitlines()[0]
        .removeprefix("not written (No space left on device): ")
    )
    assert json.loads(written) == records.made[0]


@pytest.mark.parametrize("state", ["passed", "failed", "crash", "timeout", "not here"])
def test_every_step_is_scheduled_whatever_becomes_of_proofs_of_several_head_sizes(rehearse, state):
    made = rehearse(state)
    assert {record["kind"] for record in made} <= set(KINDS) | {"plan", "kernel"}
    units = [record["unit"] for record in made if "unit" in record]
    assert len(units) == len(set(units))
    alone = "proofs varlen_attn bfloat16 head_dim 256"
    assert (alone in units) == (state not in ("passed", "not here"))
    assert ("training sdpa 1b" in units) == (state == "passed")


def test_a_fault_in_scheduling_one_step_is_a_record_and_costs_no_other(rehearse, monkeypatch):
    def broken(step, *args, **kwargs):
        if step == "training":
            raise KeyError("")
        return pending(step, *args, **kwargs)

    monkeypatch.setattr(suite, "pending", broken)
    made = rehearse("passed")
    (fault,) = [record for record in made if record["state"] == "crash"]
    assert (fault["step"], fault["code"], fault["text"]) == (
        "training",
        "scheduling",
        "KeyError: ''",
    )
    assert {record["step"] for record in made} >= {"proofs", "kernels", "repeats", "timing"}


def test_a_run_that_is_killed_leaves_whole_records(tmp_path):
    out = tmp_path / "run.jsonl"
    command = [sys.executable, str(SUITE), "--rehearsal", "--steps", "machine", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "start" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records[0]["step"] == "start"
    assert "torch" in records[0]["values"]["versions"]
