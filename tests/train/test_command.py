"""`attnimg train` as a user runs it: trained on what was planned, or refused before any weights.

The first run is a process of its own, and those under torchrun; the others run in forks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from damages import code_in, flipped
from forked_runs import Fork, free_port
from tiny_models import tiny_model
from tiny_run import losses, make_model, sentences

TESTS = Path(__file__).parents[1]
KERNEL = TESTS / "fixtures" / "flash_attn2"
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LOCAL = {"LOCAL_KERNELS": f"kernels-community/flash-attn2={KERNEL}"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "llama")
    lines = [json.dumps({"text": text}) for text in sentences(60, seed=3)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def leaky(home: Path, model_type: str) -> str:
    """Make a model of a type beside the llama, with the llama's tokenizer."""
    folder = home / model_type
    if not folder.exists():
        tiny_model(model_type, None, vocab_size=400).save_pretrained(folder)
        for file in (home / "llama").glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return model_type


def command(home: Path, out: Path, *settings: str, **keys: Any) -> list[str]:
    """Write a config, and return what stands after `python` to train by it."""
    config = {
        "base_model": str(home / keys.pop("model", "llama")),
        "datasets": [{"path": str(home / "data.jsonl"), "type": "completion"}],
        "learning_rate": 1e-2,
        "sequence_len": 64,
        "sample_packing": True,
        "max_steps": 3,
        "save_strategy": "no",
        "output_dir": str(out / "out"),
        **keys,
    }
    file = out / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["-m", "attnimg", "train", str(file), *settings]


def train(
    home: Path, out: Path, *settings: str, environ: dict[str, str] | None = None, **keys: Any
) -> subprocess.CompletedProcess[str]:
    """Train in a fork."""
    base = {key: value for key, value in os.environ.items() if key != "LOCAL_KERNELS"}
    fork = Fork(command(home, out, *settings, **keys), env=base | QUIET | (environ or {}))
    stdout, stderr = fork.communicate()
    assert fork.returncode is not None
    return subprocess.CompletedProcess([], fork.returncode, stdout, stderr)


def receipt(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "out" / "receipt.json").read_text())
    return found


def test_a_run_says_what_was_asked_and_got_and_leaves_a_receipt(home: Path, tmp_path: Path) -> None:
    words = command(home, tmp_path, "max_steps=2", "learning_rate=1e-3")
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | QUIET,
    )
    assert done.returncode == 0, done.stderr
    for word in ("asked", "auto", "got", "sdpa", "because", "isolated", ">>>", "<<<"):
        assert word in done.stderr
    written = [Path(line) for line in done.stdout.splitlines()]
    assert written
    assert all(path.is_file() for path in written)
    found = receipt(tmp_path)
    assert found["status"] == "done"
    assert found["plan"]["chosen"]["backend"] == "sdpa"
    # The words of `explain --json`, which programs read.
    assert found["plan"].keys() >= {"asked", "because", "do", "chosen", "verdicts", "groups"}
    assert found["config"]["max_steps"] == 2
    assert found["isolation"]["isolated"] is True
    assert found["metrics"]["steps"] == 2


def test_flash_from_a_local_kernel_trains_as_sdpa_does(home: Path, tmp_path: Path) -> None:
    runs = {}
    for name in ("sdpa", "flash_attention_2"):
        out = tmp_path / name
        out.mkdir()
        done = train(home, out, environ=LOCAL, attn_implementation=name)
        assert done.returncode == 0, done.stderr
        assert receipt(out)["plan"]["chosen"]["backend"] == name
        runs[name] = losses(out / "out")
    assert runs["flash_attention_2"] == pytest.approx(runs["sdpa"], abs=1e-5)


@pytest.mark.parametrize("model_type", ["falcon", "bloom"])
def test_a_model_that_leaks_is_not_trained(home: Path, tmp_path: Path, model_type: str) -> None:
    done = train(home, tmp_path, model=leaky(home, model_type))
    assert done.returncode == 2, done.stderr
    assert f"packed documents would mix in {model_type}" in done.stderr
    assert "why:" in done.stderr
    assert "do:" in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_model_that_leaks_by_its_mask_trains_by_boundaries(home: Path, tmp_path: Path) -> None:
    done = train(home, tmp_path, model=leaky(home, "opt"))
    assert done.returncode == 0, done.stderr
    found = receipt(tmp_path)
    assert found["plan"]["chosen"]["backend"] == "sdpa_math"
    assert found["isolation"]["isolated"] is True


def test_a_name_that_leaks_is_refused_and_not_swapped(home: Path, tmp_path: Path) -> None:
    done = train(home, tmp_path, model=leaky(home, "opt"), attn_implementation="sdpa")
    assert done.returncode == 2, done.stderr
    assert "packed documents would mix in opt" in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_model_that_leaks_trains_unpacked(home: Path, tmp_path: Path) -> None:
    done = train(home, tmp_path, model=leaky(home, "falcon"), sample_packing=False)
    assert done.returncode == 0, done.stderr


REFUSED = [
    pytest.param({"attn_implementation": "flash_attention_2"}, 2, "arch-too-old", id="no flash"),
    pytest.param({"attn_implementation": "flash_attention_3"}, 2, "arch-mismatch", id="no FA3"),
    pytest.param({"attn_implementation": "flex_attention"}, 2, "no-backward", id="flex on a CPU"),
    pytest.param({"attn_implementation": "xformers"}, 2, "arch-too-old", id="xformers"),
    pytest.param({"attn_implementation": "fp8", "sample_packing": False}, 2, "fp8", id="fp8"),
    pytest.param({"attn_implementation": "fa2"}, 2, "flash_attention_2", id="an alias"),
    pytest.param({"fsdp": ["full_shard"]}, 2, "fsdp", id="FSDP on a CPU"),
    pytest.param({"base_model": "./nowhere"}, 2, "nowhere", id="no such model"),
    pytest.param({"base_model": "org/not-here"}, 2, "org/not-here", id="a hub model, offline"),
    pytest.param({"datasets": [{"path": "./no.jsonl", "type": "completion"}]}, 2, "no.jsonl",
                 id="no such data"),
    pytest.param({"datasets": [{"path": "org/not-here", "type": "completion"}]}, 2, "org/not-here",
                 id="a hub data set, offline"),
    pytest.param({"resume_from_checkpoint": True}, 2, "no checkpoint", id="nothing to resume"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "code", "says"), REFUSED)
def test_what_cannot_run_is_refused_before_any_weights(
    home: Path, tmp_path: Path, keys: dict[str, Any], code: int, says: str
) -> None:
    done = train(home, tmp_path, **keys)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    for word in (says, "why:", "do:"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_folder_in_use_is_not_overwritten(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    done = train(home, tmp_path)
    assert done.returncode == 2
    assert "precious.txt" in done.stderr
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_a_broken_record_is_named_by_file_and_line_before_any_proof(
    home: Path, tmp_path: Path
) -> None:
    data, proofs = tmp_path / "bad.jsonl", {"ATTNIMG_CACHE": str(tmp_path / "proofs")}
    entry = {"path": str(data), "type": "completion"}
    data.write_text('{"text": "fine"}\n{"text": 3}\n')
    done = train(home, tmp_path, datasets=[entry], environ=proofs)
    assert done.returncode == 2
    assert "bad.jsonl" in done.stderr
    assert "2" in done.stderr
    assert "proof:" not in done.stderr
    assert not [*(tmp_path / "proofs").rglob("*.json")], "no kernel was proven"
    data.write_text('{"text": "fine"}\n{"text": "too"}\n')
    done = train(home, tmp_path, "max_steps=1", datasets=[entry], environ=proofs)
    assert done.returncode == 0, done.stderr
    events = [done.stderr.index(text) for text in ("2 records", "proof: sdpa", "packing: isolated")]
    assert events == sorted(events)
    assert [*(tmp_path / "proofs").rglob("*.json")]


def test_two_processes_train_one_run(home: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = command(home, tmp_path, max_steps=2)
    done = subprocess.run(
        [sys.executable, *torchrun, "--master-port", str(free_port()), *words],
        capture_output=True, text=True, check=False, timeout=200, env=os.environ | QUIET,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = receipt(tmp_path)
    assert found["status"] == "done"
    assert found["world_size"] == 2
    assert done.stdout.count("model.safetensors") == 1


def test_a_resumed_run_refuses_other_records_under_the_same_name(
    home: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(home / "data.jsonl", data)
    keys: dict[str, Any] = {"datasets": [{"path": str(data), "type": "completion"}],
                            "save_strategy": "epoch", "max_steps": 2}  # fmt: skip
    assert train(home, tmp_path, **keys).returncode == 0
    data.write_text(data.read_text().replace("king", "ship", 1))
    done = train(home, tmp_path, **keys, resume_from_checkpoint=True)
    assert done.returncode == 2, done.stderr
    assert "checkpoint-2 can't be resumed with another datasets[0]" in done.stderr
    assert "Loading weights" not in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_resumed(
    home: Path, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    assert train(home, tmp_path, **saving).returncode == 0
    newest = tmp_path / "out/checkpoint-2"
    flipped("model.safetensors")(newest)
    named = train(home, tmp_path, **saving, resume_from_checkpoint=str(newest))
    assert named.returncode == 2
    assert f"attnimg: {newest} is damaged" in named.stderr
    assert "model.safetensors: found SHA-256" in named.stderr
    assert "set resume_from_checkpoint: true, which resumes from checkpoint-1" in named.stderr
    again = train(home, tmp_path, **saving, resume_from_checkpoint=True)
    assert again.returncode == 0, again.stderr
    assert "resuming from checkpoint-1, the newest intact one" in again.stderr
    assert "Traceback" not in named.stderr + again.stderr


def test_pickled_weights_are_refused_before_they_are_loaded(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "llama", home / "pickled")
    (home / "pickled/model.safetensors").unlink()
    code_in("pytorch_model.bin")(home / "pickled")
    done = train(home, tmp_path, model="pickled")
    assert done.returncode == 2
    assert f"do:  run python -m attnimg.train.pickled_weights {home}/pickled" in done.stderr
    assert not (home / "ran").exists()


def test_a_stream_is_read_as_far_as_needed_and_resumed_exactly(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": text}) for text in sentences(600, seed=5)]
    data.write_text("\n".join([*lines, "{broken"]) + "\n")
    keys: dict[str, Any] = {
        "datasets": [{"path": str(data), "type": "completion"}], "streaming": True,
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": "out",
        "streaming_multipack_buffer_size": 16,
    }  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    keys["output_dir"] = str(whole / "out")
    done = train(home, whole, **keys)
    assert done.returncode == 0, done.stderr
    assert receipt(whole)["data"][0]["records"] < 600
    shutil.copytree(whole / "out/checkpoint-2", resumed / "out/checkpoint-2")
    keys |= {"output_dir": str(resumed / "out"), "resume_from_checkpoint": True}
    longer = train(home, resumed, **{**keys, "max_steps": 6})
    assert longer.returncode == 2, longer.stderr
    assert "checkpoint-2 can't be resumed with another max_steps" in longer.stderr
    again = train(home, resumed, **keys)
    assert again.returncode == 0, again.stderr
    assert losses(resumed / "out") == losses(whole / "out")[2:]
    weights = [(folder / "out/model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]
