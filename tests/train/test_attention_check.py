"""Test with runs of a tiny model that wrong attention is stopped, and right attention is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from forked_runs import Ranks
from test_torchrun import ENV
from transformers import AttentionInterface

from attnimg.errors import AttnimgError
from attnimg.train.records import FitResult

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
