"""Test with runs of a tiny model that wrong attention is stopped, and right attention is not."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from forked_runs import Ranks
from test_torchrun import ENV
from transformers import AttentionInterface

from attnimg.errors import AttnimgError
from attnimg.train.attention_check import AttentionCheck
from attnimg.train.records import FitResult
from attnimg.verification.process_state import RunState

SDPA = AttentionInterface._global_mapping["sdpa"]
# Attention calls of a training step: two layers.
LAYERS = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention-check")
    tiny_run.make_model(folder / "model")
    return folder


class Kernel:
    """sdpa with a fault in some training calls.

    Args:
        fault: what is wrong.
        wrong: returns whether a call has the fault, from its number, the layer and the tokens.
    """

    def __init__(self, fault: str, wrong: Callable[[int, int, int], bool]) -> None:
        self.fault, self.wrong = fault, wrong
        # The comparison of the losses before the first step calls each layer once.
        self.calls = -LAYERS

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, **arguments: Any) -> Any:
        number, self.calls = self.calls, self.calls + module.training
        wrong = self.fault == "in evaluation" and not module.training
        if module.training and number >= 0:
            wrong = self.wrong(number, module.layer_idx, q.shape[2])
        if wrong and self.fault == "gradients":
            q = q.detach() + 1.5 * (q - q.detach())
        if wrong and self.fault == "no gradient":
            k = k.detach()
        out, weights = SDPA(module, q, k, v, mask, **arguments)
        if wrong and self.fault in ("output", "in evaluation"):
            out = out + 0.2 * out.roll(1, 1)
        if wrong and self.fault == "nan":
            out = out * float("nan")
        return out, weights


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    def set_kernel(kernel: Kernel) -> None:
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", kernel)

    return set_kernel


def run(made: Path, out: Path, **keys: Any) -> FitResult:
    return tiny_run.run(made, out, **{"attn_check_steps": 1, "max_steps": 5, **keys})


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "receipt.json").read_text())["attention_check"]
    return found


LORA = {"adapter": "lora", "lora_r": 2}
RIGHT: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "eager": {"engine": {"attention": "eager"}},
    "rows of one document": {"sample_packing": False},
    "float16 or bfloat16 under autocast": {"engine": {"precision": "bfloat16"}, "bf16": True},
    "bfloat16 weights": {"engine": {"precision": "bfloat16"}, "bf16": "full"},
    "eager under autocast": {
        "engine": {"precision": "bfloat16", "attention": "eager"}, "bf16": True
    },
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulated, evaluated": {
        "gradient_accumulation_steps": 2, "val_set_size": 0.1, "eval_steps": 2
    },
    "LoRA on q and v": {**LORA, "lora_target_modules": ["q_proj", "v_proj"]},
    "LoRA on v of the second layer": {**LORA, "lora_target_modules": r".*layers\.1\..*v_proj"},
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_attention_is_checked_and_not_stopped(made: Path, tmp_path: Path, name: str) -> None:
    result = run(made, tmp_path / "out", **RIGHT[name])
    found = record(tmp_path / "out")
    assert result.steps == 5
    assert (found["checks"], found["last_passed"]) == (5, 5), found
    assert (found["skipped"], found["doubtful"]) == ({}, 0)
    assert 0 < found["worst_margin"] < 1
    assert found["worst"].rpartition(" at ")[0]
    lines = [line for line in tiny_run.lines(tmp_path / "out") if "loss" in line]
    assert [line["attn_checks"] for line in lines] == [1] * 5
    assert max(line["attn_margin"] for line in lines) == found["worst_margin"]


def test_a_check_changes_no_loss(made: Path, tmp_path: Path) -> None:
    for name, steps in (("on", 1), ("off", 0)):
        run(made, tmp_path / name, attn_check_steps=steps, gradient_checkpointing=True)
    assert tiny_run.losses(tmp_path / "on") == tiny_run.losses(tmp_path / "off")
    assert record(tmp_path / "off")["checks"] == 0


WRONG: dict[str, tuple[Kernel, str, str]] = {
    "from the seventh call on": (
        Kernel("output", lambda n, *_: n >= 6), "layer 1 at step 4", "numerics-fwd: out is"
    ),
    "in the backward pass alone": (
        Kernel("gradients", lambda n, *_: n >= 4), "layer 0 at step 3", "numerics-bwd: dq is"
    ),
    "in the second layer alone": (
        Kernel("output", lambda _, layer, __: layer == 1), "layer 1 at step 2", "out is"
    ),
    "no gradient for k": (
        Kernel("no gradient", lambda n, *_: n >= 4), "layer 0 at step 3", "no gradient reaches k"
    ),
    "NaN": (Kernel("nan", lambda n, *_: n >= 4), "layer 0 at step 3", "100% of out is NaN"),
    "in two calls that are right when made again": (
        Kernel("output", lambda n, *_: n in (3, 5)), "layer 0 at step 3", "the second call of this"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_attention_is_stopped_by_name(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None], name: str
) -> None:
    kernel, where, text = WRONG[name]
    serve(kernel)
    with pytest.raises(AttnimgError) as caught:
        run(made, tmp_path / "out", save_steps=1)
    error = caught.value
    assert (error.code, error.exit_code) == ("kernel-wrong-at-run", 1)
    assert error.what == f"attention by sdpa is wrong in {where}"
    assert text in error.why
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert (receipt["status"], receipt["error"]["code"]) == ("failed", "kernel-wrong-at-run")


def test_wrong_at_one_length_is_stopped(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None]
) -> None:
    lengths: set[int] = set()
    serve(Kernel("output", lambda *call: bool(lengths.add(call[2]))))
    run(made, tmp_path / "seen", sample_packing=False, max_steps=8, attn_check_steps=0)
    length = max(lengths)
    serve(Kernel("output", lambda *call: call[2] == length))
    with pytest.raises(AttnimgError, match="attention by sdpa is wrong") as caught:
        run(made, tmp_path / "out", sample_packing=False, max_steps=8)
    assert f"tokens 0 to {length - 1}" in caught.value.why


def test_the_advice_resumes_from_the_last_good_checkpoint(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None]
) -> None:
    """Checks at steps 1, 3 and 6, wrong from step 5 on: checkpoint-3 is known to be good."""
    serve(Kernel("output", lambda n, *_: n >= 3 * LAYERS + 2))
    keys = {"attn_check_steps": 3, "save_steps": 1, "max_steps": 8}
    with pytest.raises(AttnimgError) as caught:
        run(made, tmp_path / "out", **keys)
    good = tmp_path / "out/checkpoint-3"
    assert "the check at step 3 passed" in caught.value.why
    assert caught.value.do.splitlines() == [
        "set attn_implementation: eager",
        f"set resume_from_checkpoint: {good}",
        "set another output_dir",
    ]
    followed = {**keys, "resume_from_checkpoint": str(good), "engine": {"attention": "eager"}}
    assert run(made, tmp_path / "another", **followed).steps == 8


def test_a_call_that_is_wrong_once_is_a_warning(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None], capfd: pytest.CaptureFixture[str]
) -> None:
    serve(Kernel("output", lambda n, *_: n == 4))
    assert run(made, tmp_path / "out").steps == 5
    assert record(tmp_path / "out")["doubtful"] == 1
    err = capfd.readouterr().err
    assert "warning: attention by sdpa in layer 0 was wrong at step 3, and correct when" in err


@pytest.mark.parametrize("steps", [0, 4])
def test_steps_between_checks_are_not_checked(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None], steps: int
) -> None:
    serve(Kernel("output", lambda n, *_: n // LAYERS in (1, 2)))
    assert run(made, tmp_path / "out", attn_check_steps=steps).steps == 5


def test_evaluation_is_not_checked(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None]
) -> None:
    serve(Kernel("in evaluation", lambda *_: False))
    assert run(made, tmp_path / "out", val_set_size=0.1, eval_steps=2).steps == 5


def test_a_fault_on_one_rank_stops_all(made: Path, tmp_path: Path) -> None:
    program = tmp_path / "wrong_rank.py"
    program.write_text(f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(tiny_run.__file__).parent)]!r}
import test_attention_check as checks, tiny_run
from pathlib import Path
from attnimg.train.distributed import end_process
wrong = os.environ["RANK"] == "1"
checks.AttentionInterface._global_mapping["sdpa"] = checks.Kernel(
    "output", lambda n, *_: wrong and n >= 4)
end_process(tiny_run.main(Path(sys.argv[1]), sys.argv[2:]))
""")
    keys = {"attn_check_steps": 1, "max_steps": 6, "save_steps": 1, "micro_batch_size": 1,
            "output_dir": str(tmp_path / "out")}  # fmt: skip
    settings = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    process = Ranks([program, made, *settings], env=ENV)
    said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    # Each of the two processes prints the error.
    assert said.count("is wrong in layer 0 at step 3 on rank 1") == 2, said
    assert f"the last good checkpoint is {tmp_path / 'out/checkpoint-2'}" in said
    assert "did not answer" not in said


def test_a_session_that_is_wrong_at_once_names_the_checkpoint_it_resumed_from(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None]
) -> None:
    keys = {"save_steps": 2, "max_steps": 8, "resume_from_checkpoint": True}
    run(made, tmp_path / "out", save_steps=2, max_steps=4)
    serve(Kernel("output", lambda *_: True))
    with pytest.raises(AttnimgError, match="at step 5") as caught:
        run(made, tmp_path / "out", **keys)
    good = tmp_path / "out/checkpoint-4"
    said = ["set attn_implementation: eager", f"set resume_from_checkpoint: {good}"]
    assert caught.value.do.splitlines() == said
    followed = {**keys, "resume_from_checkpoint": str(good), "engine": {"attention": "eager"}}
    assert run(made, tmp_path / "out", **followed).steps == 8


def test_a_run_that_is_wrong_at_once_has_no_checkpoint_to_resume_from(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None]
) -> None:
    serve(Kernel("output", lambda *_: True))
    with pytest.raises(AttnimgError, match="at step 1") as caught:
        run(made, tmp_path / "out")
    said = ["set attn_implementation: eager", "set another output_dir"]
    assert caught.value.do.splitlines() == said


class Changing(Kernel):
    """sdpa that changes the process in its fifth training call."""

    def __init__(self, change: Callable[[], object]) -> None:
        super().__init__("none", lambda *_: False)
        self.change = change

    def __call__(self, module: Any, *arguments: Any, **named: Any) -> Any:
        if module.training and self.calls == 4:
            self.change()
        return super().__call__(module, *arguments, **named)


CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "working directory": (lambda: os.chdir("/"), "working directory was "),
    "umask": (lambda: os.umask(0o27), "umask was 0022, is 0027"),
    "SIGTERM": (
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "signal handler of SIGTERM"
    ),
    "matmul precision": (
        lambda: torch.set_float32_matmul_precision("medium"), "float32 matmul precision was "
    ),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True), "deterministic algorithms"
    ),
    "a function of torch": (
        lambda: setattr(torch.nn.functional, "gelu", torch.nn.functional.relu),
        "torch.nn.functional: gelu was replaced",
    ),
    "an optimizer": (
        lambda: setattr(torch.optim.AdamW, "step", print_nothing),
        "torch.optim.adamw.AdamW: step was replaced by code of",
    ),
    "the root logger": (
        lambda: logging.getLogger().setLevel(logging.ERROR), "root logger",
    ),
    "a variable": (
        lambda: os.environ.update(CUDA_VISIBLE_DEVICES="7"), "CUDA_VISIBLE_DEVICES changed"
    ),
    "a hook of all modules": (
        lambda: torch.nn.modules.module.register_module_forward_hook(print_nothing),
        "global module hooks",
    ),
}  # fmt: skip


def print_nothing(*_: object) -> None:
    """Stand for a hook of a kernel."""


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo the changes after the test."""
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.AdamW.step)
    monkeypatch.setattr(torch.nn.functional, "gelu", torch.nn.functional.gelu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    umask, handler = os.umask(0o22), signal.getsignal(signal.SIGTERM)
    precision, level = torch.get_float32_matmul_precision(), logging.getLogger().level
    yield
    os.umask(umask)
    signal.signal(signal.SIGTERM, handler)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    logging.getLogger().setLevel(level)
    torch.nn.modules.module._global_forward_hooks.clear()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", CHANGES)
def test_a_process_that_a_kernel_changes_late_is_stopped_by_name(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None], name: str
) -> None:
    """The checks at steps 1 and 2 pass; the change is made in step 3."""
    change, text = CHANGES[name]
    serve(Changing(change))
    with pytest.raises(AttnimgError) as caught:
        run(made, tmp_path / "out", attn_check_steps=2, save_steps=1, max_steps=8)
    error = caught.value
    assert (error.code, error.exit_code) == ("process-state", 1)
    assert error.what == "the process was changed during training, found at step 4"
    assert text in error.why
    assert "needed the same state as at step 2" in error.why
    assert f"set resume_from_checkpoint: {tmp_path / 'out/checkpoint-2'}" in error.do


@pytest.mark.usefixtures("restored")
def test_a_change_is_found_where_no_call_can_be_compared(tmp_path: Path) -> None:
    check = AttentionCheck(
        2, lambda *_: pytest.fail("no call is compared"), why_not="attention_dropout",
        alternatives=(), log=print,
    )  # fmt: skip
    for step in (1, 2):
        with check.checking(step, tmp_path):
            pass
    os.umask(0o27)
    with check.checking(3, tmp_path):
        pass
    with (
        pytest.raises(AttnimgError, match="found at step 4") as caught,
        check.checking(4, tmp_path),
    ):
        pass
    assert "umask was 0022, is 0027" in caught.value.why
    assert "find the code that changes it" in caught.value.do


def test_a_step_counts_as_unchanged_where_all_ranks_were_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank compares by its own clock."""
    others: list[list[str] | None] = [[], None, ["umask was 0022, is 0027"]]
    check = AttentionCheck(
        1, lambda *_: pytest.fail("no call is compared"), why_not="attention_dropout",
        alternatives=(), log=print,
    )  # fmt: skip
    monkeypatch.setattr(
        "attnimg.train.attention_check.gather_objects", lambda own: [own, (None, others.pop(0))]
    )
    for step in (1, 2):
        with check.checking(step, tmp_path):
            pass
    with pytest.raises(AttnimgError) as caught, check.checking(3, tmp_path):
        pass
    assert "umask was 0022, is 0027" in caught.value.why
    assert "needed the same state as at step 1" in caught.value.why


@pytest.mark.usefixtures("restored")
def test_with_no_checks_the_process_is_not_compared(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None]
) -> None:
    serve(Changing(lambda: os.umask(0o27)))
    assert run(made, tmp_path / "out", attn_check_steps=0).steps == 5


def test_the_comparison_of_the_process_is_fast(made: Path) -> None:
    """Once in 30 seconds: 20 ms are 0.07 %. The best of five, as other processes disturb it."""
    state, seconds = RunState(), []
    for _ in range(5):
        began = time.process_time()
        assert state.changes() == []
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.02


@pytest.mark.usefixtures("restored")
def test_a_run_with_few_checks_is_compared_once_in_a_while_and_at_its_end(
    made: Path, tmp_path: Path, serve: Callable[[Kernel], None]
) -> None:
    serve(Changing(lambda: os.umask(0o27)))
    with pytest.raises(AttnimgError, match="found at step 5") as caught:
        run(made, tmp_path / "out", attn_check_steps=200, save_steps=2)
    assert caught.value.code == "process-state"
    check = AttentionCheck(
        200, lambda *_: pytest.fail("no call is compared"), why_not="attention_dropout",
        alternatives=(), log=print,
    )  # fmt: skip
    with check.checking(1, tmp_path):
        pass
    os.umask(0o22)
    # Less than COMPARE_EVERY_S later.
    with check.checking(200, tmp_path):
        pass
    with pytest.raises(AttnimgError, match="found at step 201") as caught:
        check.require_unchanged(201, tmp_path)
    assert "needed the same state as at step 1:" in caught.value.why
