"""A run leaves transformers' registries as they were, so that another may follow in the process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from attnimg.__main__ import run as attnimg

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.append(str(FIXTURES))
CONFIG = """
base_model: ./model
output_dir: ./out
learning_rate: 1e-3
sequence_len: 64
bf16: false
max_steps: 2
save_strategy: "no"
datasets: [{path: d.jsonl, type: completion}]
"""


def registries() -> tuple[Any, ...]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as flash

    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        {name: value for name, value in vars(flash).items() if name.startswith("_")},
    )


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_run import make_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNIMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    served = f"kernels-community/flash-attn2={FIXTURES / 'flash_attn2'}"
    monkeypatch.setenv("LOCAL_KERNELS", served)
    make_model(Path("model"))
    Path("c.yaml").write_text(CONFIG)
    Path("d.jsonl").write_text('{"text": "a day at sea"}\n' * 20)


@pytest.mark.parametrize(
    ("backend", "whole"),
    [
        pytest.param("s2", True, id="after a registered function"),
        pytest.param("flash_attention_2", True, id="after a flash kernel"),
        pytest.param("s2", False, id="after a run that fails at the weights"),
    ],
)
def test_the_registries_are_as_before(backend: str, whole: bool) -> None:
    if not whole:
        Path("model/model.safetensors").write_bytes(b"no weights")
    before = registries()
    code = attnimg(["train", "c.yaml", f"attn_implementation={backend}"])
    assert code == (0 if whole else 2)
    assert registries() == before
