"""Each way of calling a model trains three steps; none of them is refused on a CPU.

CONTEXTS=all runs the full product. Without it every pair of values occurs once among the uncompiled
rows, and a few are compiled. Compiled rows use aot_eager, which traces as inductor does and writes
no C++; with CONTEXTS=all those few use inductor as well.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from tiny_run import losses, make_tokenizer, sentences

from attnimg import config, pipeline
from attnimg.cli.train import PrintedReport
from attnimg.task import installed_machine
from attnimg.train import run as training
from attnimg.train.distributed import StopFlag
from attnimg.train.environment import silence_libraries

KERNEL = Path(__file__).parents[1] / "fixtures" / "flash_attn2"
EVERY = os.environ.get("CONTEXTS") == "all"
# torch.compile says what it thinks of a small machine.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900 if EVERY else 300)]

AXES: dict[str, dict[str, dict[str, Any]]] = {
    "rows": {
        "unpacked": {"sample_packing": False, "attn_implementation": "sdpa"},
        "packed by sdpa's mask": {"sample_packing": True, "attn_implementation": "sdpa"},
        "packed by eager's mask": {"sample_packing": True, "attn_implementation": "eager"},
        "packed by varlen": {"sample_packing": True, "attn_implementation": "flash_attention_2"},
        "unpacked on flash": {"sample_packing": False, "attn_implementation": "flash_attention_2"},
    },
    "precision": {
        "float32": {"bf16": False},
        "bfloat16": {"bf16": True},
        "float16": {"bf16": False, "fp16": True},
        "bfloat16 weights": {"bf16": "full"},
    },
    "weights": {
        "full": {},
        "lora": {"adapter": "lora"},
        "qlora": {"adapter": "qlora", "load_in_4bit": True},
    },
    "activations": {"kept": {}, "checkpointed": {"gradient_checkpointing": True}},
    "code": {
        "eager code": {},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        "compiled by inductor": {"torch_compile": True, "torch_compile_backend": "inductor"},
    },
}
# On a CPU there is no float16 to train in: accelerate casts nothing there.
DTYPE = {"float32": "float32", "float16": "float32"}


# torch.compile takes 15 s on one core, so few rows of the usual run have it.
COMPILED = [
    ("packed by sdpa's mask", "bfloat16", "full", "kept", "compiled"),
    ("packed by varlen", "float32", "lora", "checkpointed", "compiled"),
]


def pairs(row: tuple[str, ...]) -> set[tuple[str, str]]:
    return set(itertools.combinations(row, 2))


def pairwise() -> list[tuple[str, ...]]:
    """Choose uncompiled rows in which every pair of values of two axes occurs."""
    every = [row for row in itertools.product(*AXES.values()) if row[-1] == "eager code"]
    missing = set().union(*map(pairs, every))
    rows: list[tuple[str, ...]] = []
    while missing:
        gains = [len(missing & pairs(row)) for row in every]
        rows.append(every[gains.index(max(gains))])
        missing -= pairs(rows[-1])
    return rows


def product() -> list[tuple[str, ...]]:
    """Return every row, those of COMPILED by inductor too."""
    every = [row for row in itertools.product(*AXES.values()) if row[-1] != "compiled by inductor"]
    return every + [(*row[:-1], "compiled by inductor") for row in COMPILED]


ROWS = product() if EVERY else [*pairwise(), *COMPILED]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("contexts")
    tokenizer = make_tokenizer(folder / "llama")
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder / "llama")
    lines = [json.dumps({"text": text}) for text in sentences(40, seed=3)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve the kernel, and take back what transformers leaves in the environment."""
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={KERNEL}")
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    torch._dynamo.reset()


def run(home: Path, out: Path, **keys: Any) -> dict[str, Any]:
    """Train as the command does after the kernel's proof; return the receipt."""
    values = {
        "base_model": str(home / "llama"),
        "datasets": [{"path": str(home / "data.jsonl"), "type": "completion"}],
        "learning_rate": 1e-2,
        "sequence_len": 48,
        "micro_batch_size": 2,
        "max_steps": 3,
        "save_strategy": "no",
        "output_dir": str(out),
        **keys,
    }
    checked = config.check_values(values, file="run.yaml")
    assert checked.config is not None, checked.errors
    assert checked.ok, checked.errors
    silence_libraries()
    report = PrintedReport(Console(quiet=True))
    with mock.patch.object(pipeline, "verify_plan", lambda plan, task, report: (plan, ())):
        training.train(checked.config, installed_machine(), report=report, stop=StopFlag())
    receipt: dict[str, Any] = json.loads((out / "receipt.json").read_text())
    return receipt


def dtypes_of_q(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Collect the precisions in which the first layer's q is computed while training."""
    from attnimg.train import model as loading

    found: set[torch.dtype] = set()
    load = loading.load_model

    def load_and_watch(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        for name, module in model.named_modules():
            if name.endswith("layers.0.self_attn.q_proj"):
                module.register_forward_hook(
                    lambda module, _, q: found.add(q.dtype) if module.training else None
                )
        return model

    monkeypatch.setattr(loading, "load_model", load_and_watch)
    return found


@pytest.mark.parametrize("row", [pytest.param(row, id=", ".join(row)) for row in ROWS])
def test_it_trains_as_the_receipt_tells(
    home: Path, tmp_path: Path, row: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {}
    for axis, value in zip(AXES.values(), row, strict=True):
        keys |= axis[value]
    of_q = dtypes_of_q(monkeypatch) if row[-1] == "eager code" else None
    receipt = run(home, tmp_path / "out", **keys)
    found = losses(tmp_path / "out")
    assert len(found) == 3
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]
    assert receipt["dtype"] == DTYPE.get(row[1], "bfloat16")
    if of_q is not None:
        assert of_q == {getattr(torch, receipt["dtype"])}
    assert receipt["context"]["autocast"] == ("bfloat16" if row[1] == "bfloat16" else None)
    assert receipt["context"]["compiled"] is (row[-1] != "eager code")
    assert receipt["context"]["checkpointing"] is (row[3] == "checkpointed")
    if "unpacked" in row[0]:
        assert receipt["isolation"] is None
    else:
        assert receipt["isolation"]["isolated"] is True
        assert receipt["isolation"]["context"] == receipt["context"]
        assert receipt["context"]["padding_free"] is (row[0] == "packed by varlen")
