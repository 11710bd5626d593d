"""The image trains: a tiny model, made here, on text made here, packed, saved and loaded again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

CONFIG = {
    "base_model": "model",
    "datasets": [{"path": "data.jsonl", "type": "completion"}],
    "learning_rate": 1e-2,
    "sequence_len": 64,
    "sample_packing": True,
    "micro_batch_size": 2,
    "max_steps": 8,
    "logging_steps": 1,
    "output_dir": "out",
}


def make_inputs(folder: Path) -> None:
    """Write a byte-level tokenizer, a two-layer Llama of random weights, and sentences."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names, things = ("Ann", "Bob", "Eve", "Ida", "Max"), ("sea", "ship", "star", "road", "house")
    texts = [f"{one} and {two} saw the {it}." for one in names for two in names for it in things]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=300, special_tokens=["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    model.save_pretrained(folder / "model")
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts * 4)
    (folder / "data.jsonl").write_text(data)
    (folder / "config.yaml").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, offline: dict[str, str]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("run")
    make_inputs(folder)
    done = subprocess.run(
        ["attnimg", "train", "config.yaml"],
        cwd=folder, env=offline, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return folder / "out", done


def test_it_trains_and_the_loss_falls(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = run
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[-1] < losses[0] - 0.5


def test_it_says_what_it_chose(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output = run[1].stderr
    assert all(word in output for word in ("asked", "got", "because"))


def test_what_it_saved_loads_and_generates(
    run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run[0])
    model = AutoModelForCausalLM.from_pretrained(run[0])
    ids = model.generate(**tokenizer("Ann and", return_tensors="pt"), max_new_tokens=3)
    assert ids.shape[1] > 3
