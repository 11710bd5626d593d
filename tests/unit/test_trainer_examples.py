"""The scripts of examples/trainer train with the backend that they say they chose."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "trainer"
TRAINERS = ["transformers_trainer", "trl_sft"]
# The loss of random guesses among the 256 values of a byte is 5.5.
GUESS = 5.0


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return the folder of the scripts' outputs, whose proofs they share."""
    return tmp_path_factory.mktemp("outputs")


def run(*command, cache, folder):
    environment = os.environ | {"ATTNIMG_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def losses_of(text):
    """Return the losses that a script or Trainer printed."""
    return [float(x) for x in re.findall(r"(?:: loss |'loss': ')([\d.]+)", text)]


@pytest.mark.parametrize("name", ["plain_pytorch", "accelerate_loop", *TRAINERS])
def test_a_script_trains_with_its_choice(name, outputs):
    arguments = ["--output-dir", outputs / name] if name in TRAINERS else []
    out, err = run(SCRIPTS / f"{name}.py", *arguments, cache=outputs / "cache", folder=outputs)
    losses = losses_of(out)
    assert len(losses) >= 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < GUESS
    assert re.search(r"got +sdpa", out + err)
    if name != "accelerate_loop":  # it prints the choice itself
        assert "proof: sdpa passed" in err


@pytest.mark.parametrize("name", TRAINERS)
def test_the_choice_is_that_of_the_command_line(name, outputs):
    if not (outputs / name / "attnimg.json").exists():
        pytest.skip("the script above was not run")
    written = json.loads((outputs / name / "attnimg.json").read_text())
    model = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 384,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (outputs / "model").mkdir(exist_ok=True)
    (outputs / "model" / "config.json").write_text(json.dumps(model))
    config = {
        "base_model": str(outputs / "model"),
        "datasets": [{"path": "a.jsonl", "type": "completion"}],
        "sequence_len": 256,
        "sample_packing": True,
        "micro_batch_size": 4,
        "bf16": False,
        "learning_rate": 1e-3,
    }
    path = outputs / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    out, _ = run(
        "-m", "attnimg", "explain", path, "--json", cache=outputs / "cache", folder=outputs
    )
    explained = json.loads(out)
    for key in ("chosen", "candidates", "groups", "on"):
        assert written[key] == explained[key], key
    assert written["verified"] is True
    assert [proof["passed"] for proof in written["proofs"]] == [True]
