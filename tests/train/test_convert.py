"""Train with a config of TRL in TRL, and its conversion in attnimg: the losses are the same.

One batch has all documents, so that their order has no effect.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import make_model, sentences

pytestmark = [pytest.mark.filterwarnings("ignore")]

# All configs in one process. Source: TRL 1.16, scripts/sft.py, dpo.py and kto.py (2026-11-27)
TRL = """
import json, sys
import trl
from datasets import load_dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
for name in sys.argv[1:]:
    method = {"pairwise": "DPO", "labeled": "KTO"}.get(name, "SFT")
    kinds = (ScriptArguments, getattr(trl, f"{method}Config"), ModelConfig, DatasetMixtureConfig)
    words = ["--config", f"{name}.yaml"]
    script, arguments, model, _ = TrlParser(kinds).parse_args_and_config(words)
    arguments.model_init_kwargs = {"dtype": model.dtype}
    data = load_dataset("json", data_files=script.dataset_name, split="train")
    made = getattr(trl, f"{method}Trainer")
    trainer = made(model.model_name_or_path, args=arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print("LOSSES", json.dumps(losses))
"""
ATTNIMG = """
import sys
from attnimg.__main__ import run
for name in sys.argv[1:]:
    assert run(["convert", f"{name}.yaml", "--output", f"{name}-new.yaml"]) == 0
    assert run(["train", f"{name}-new.yaml", f"output_dir={name}-out"]) == 0
"""
DOCUMENTS = 8
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>' }}"
    "{% endfor %}"
)


def texts() -> list[dict[str, Any]]:
    # Some are longer than max_length, and are cut.
    return [{"text": text} for text in sentences(DOCUMENTS, seed=3)]


def pairs() -> list[dict[str, Any]]:
    # The prompt ends where a token ends: attnimg tokenizes prompt and completion by themselves.
    return [
        {"prompt": f"{text[: len(text) // 2].rpartition(' ')[0]}", "completion": f" {text}"}
        for text in sentences(DOCUMENTS, seed=4)
    ]


def chats() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": text[:20]},
                {"role": "assistant", "content": text},
            ]
        }
        for text in sentences(DOCUMENTS, seed=5)
    ]


def pairwise() -> list[dict[str, Any]]:
    texts = sentences(2 * DOCUMENTS, seed=6)
    return [
        {"prompt": "A word:", "chosen": f" {good}", "rejected": f" {bad}"}
        for good, bad in zip(texts[::2], texts[1::2], strict=True)
    ]


def labeled() -> list[dict[str, Any]]:
    return [
        {"prompt": "A word:", "completion": f" {text}", "label": number % 2 == 0}
        for number, text in enumerate(sentences(DOCUMENTS, seed=7))
    ]


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (texts, {"weight_decay": 0.1, "max_length": 24, "gradient_accumulation_steps": 2,
                     "per_device_train_batch_size": DOCUMENTS // 2}),
    "pairs": (pairs, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "chats": (chats, {"optim": "adamw_torch", "adam_beta2": 0.9, "chat_template_path": "t.jinja"}),
    "pairwise": (pairwise, {"beta": 0.2, "label_smoothing": 0.1, "loss_weights": [1.0, 0.3],
                            "loss_type": ["robust", "sft"], "learning_rate": 1e-3}),
    "labeled": (labeled, {"beta": 0.3, "desirable_weight": 1.5, "learning_rate": 1e-3}),
}  # fmt: skip


def write(folder: Path, name: str) -> None:
    make, options = CASES[name]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(record)}\n" for record in make()))
    values = {
        "model_name_or_path": "model", "dataset_name": data.name, "output_dir": f"{name}-trl",
        "per_device_train_batch_size": DOCUMENTS, "learning_rate": 1e-2, "num_train_epochs": 6,
        "max_length": 64, "bf16": False, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "report_to": "none", **options,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


def test_converted_runs_have_the_losses_of_trl(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    for name in CASES:
        write(tmp_path, name)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", *arguments], cwd=tmp_path, capture_output=True, text=True,
            check=False,
            env=os.environ | {"ATTNIMG_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    losses = run(TRL, *CASES).split("LOSSES ")[1:]
    run(ATTNIMG, *CASES)
    for name, text in zip(CASES, losses, strict=True):
        expected = json.loads(text.splitlines()[0])
        lines = (tmp_path / f"{name}-out/metrics.jsonl").read_text().splitlines()
        found = [row["loss"] for row in map(json.loads, lines) if row.get("loss") is not None]
        assert len(found) == len(expected) >= 6, name
        assert expected[-1] < expected[0] - (0.3 if name not in ("pairwise", "labeled") else 0.05)
        assert found == pytest.approx(expected, rel=1e-4), name
