"""Train with use_kernels: a local kernel computes the norms, and a wrong one is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from served_kernels import serve

from attnimg.__main__ import run as attnimg
from attnimg.train.checkpoint import read_run_state

SOURCE = Path(__file__).parents[1] / "fixtures/hub_norms/kernel.py"
REPO = "kernels-community/liger-kernels"
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub-layers")
    tiny_run.make_model(folder / "model")
    texts = tiny_run.sentences(12, seed=3)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


@pytest.fixture
def run(made: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs attnimg, and returns its exit code and what it printed."""

    def started(name: str, *, command: str = "train", fault: str | None = None, **keys: Any
                ) -> tuple[int, str]:  # fmt: skip
        values = {
            "base_model": str(made / "model"), "output_dir": str(made / name), "bf16": False,
            "datasets": [{"path": str(made / "data.jsonl"), "type": "completion"}],
            "learning_rate": 1e-3, "sequence_len": 16, "max_steps": 2, "save_strategy": "no",
            "attn_implementation": "sdpa", "attn_check_steps": 0, "val_set_size": 0.2,
            "eval_steps": 1, **keys,
        }  # fmt: skip
        (made / f"{name}.yaml").write_text(yaml.safe_dump(values))
        monkeypatch.setenv("ATTNIMG_CACHE", str(made / "cache"))
        if fault is not None:
            kernel = serve(made / f"kernel-{name}", fault, source=SOURCE)
            monkeypatch.setenv("LOCAL_KERNELS", f"{REPO}={kernel}")
            monkeypatch.setenv("HUB_NORMS_CALLS", str(made / f"{name}.calls"))
        code = attnimg([command, str(made / f"{name}.yaml")])
        captured = capfd.readouterr()
        return code, " ".join((captured.out + captured.err).split())

    return started


def calls(made: Path, name: str) -> list[str]:
    """Return the calls of a kernel in this process, which trains; proofs run in another one."""
    path = made / f"{name}.calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(f"{os.getpid()} ")]


def receipt(made: Path, name: str) -> Any:
    return json.loads((made / name / "receipt.json").read_text())


def test_a_right_kernel_computes_the_norms_of_a_run(made: Path, run: Run) -> None:
    code, said = run("own", use_kernels=True)
    assert (code, receipt(made, "own")["use_kernels"]) == (0, {}), said
    assert f"warning hint-not-used: use_kernels has no kernel for training RMSNorm ({REPO})" in said
    keys = {"save_strategy": "steps", "save_steps": 2}
    code, said = run("kernel", fault="none", use_kernels=True, **keys)
    assert code == 0, said
    assert "hint-not-used" not in said
    name = f"{REPO}:LigerRMSNorm"
    assert f"use_kernels: {name} computes 5 LlamaRMSNorm" in said
    found = receipt(made, "kernel")
    record = found["use_kernels"][name]
    assert (record["layers"], record["revision"]) == ("5 LlamaRMSNorm", "local")
    assert len(record["kernel"]) == 64
    identity = read_run_state(made / "kernel/checkpoint-2")["identity"]
    assert identity["kernels"][name] == {"kernel": record["kernel"], "revision": "local"}
    assert [(p["backend"], p["reasons"]) for p in found["other_proofs"]] == [(name, [])]
    assert tiny_run.losses(made / "kernel") == pytest.approx(
        tiny_run.losses(made / "own"), rel=1e-4)  # fmt: skip
    # Each norm is called, in steps and in evaluations.
    assert len(calls(made, "kernel")) >= 5 * 4
    assert len(calls(made, "kernel")) % 5 == 0


@pytest.mark.parametrize(("fault", "code"), [
    ("dx lacks its second term", "numerics-bwd"), ("epsilon is left out", "numerics-fwd"),
    ("the last columns are left out", "numerics-fwd")])  # fmt: skip
def test_a_wrong_kernel_is_refused_by_name_before_the_first_step(
    made: Path, run: Run, fault: str, code: str
) -> None:
    name = fault.replace(" ", "-")
    returned, said = run(name, fault=fault, use_kernels=True)
    assert returned == 1, said
    assert f"attnimg: {REPO}:LigerRMSNorm failed its proof on this machine" in said
    assert f"found {code}: " in said
    assert f"do: set use_kernels: false, and report it to {REPO}" in said
    assert calls(made, name) == []


def test_check_and_explain_say_what_train_does(run: Run) -> None:
    code, said = run("checked", command="check", use_kernels=True)
    assert (code, "warning" in said) == (0, False), said
    code, said = run("explained", command="explain", use_kernels=True)
    assert code == 0
    assert f"use_kernels has no kernel for training RMSNorm ({REPO}) on cpu" in said
    code, said = run("explained-local", command="explain", fault="none", use_kernels=True)
    assert (code, "warning" in said, "use_kernels has no kernel" in said) == (0, False, False), said
