"""Compare the forecast with the peaks that benchmarks/memory.py and the GPU runs measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnimg.memory.forecast import CPU_BASE, PROCESS_ERROR, TENSOR_ERROR
from benchmarks import memory

# The sizes of Llama 3.1 8B, as copies of its config.json have them; the original asks for a login
# (2026-11-27).
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
RECORD = json.loads(memory.RECORD.read_text(encoding="utf-8"))
ROWS = memory.compare(RECORD)
PAGE = (memory.ROOT / "docs/will-it-fit.md").read_text(encoding="utf-8")


def test_the_record_is_of_the_benchmark_s_runs() -> None:
    for name, run in RECORD["runs"].items():
        part, model, keys = memory.RUNS[name]
        assert (run["part"], run["model"], run["keys"]) == (part, model, keys), name
        assert run["peak"] == max(run["peaks"].values())
    parts = [run["part"] for run in RECORD["runs"].values()]
    assert parts.count("calibrate") >= 8
    assert parts.count("validate") >= 8


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_the_forecast_is_within_its_stated_error(row: dict[str, Any]) -> None:
    assert row["forecast"]["why"] == ""
    assert abs(row["errors"]["peak"]) <= PROCESS_ERROR
    assert abs(row["errors"]["tensors"]) <= TENSOR_ERROR


def test_the_base_of_a_process_is_that_of_the_tiny_runs() -> None:
    peaks = [run["peak"] for run in RECORD["runs"].values() if run["part"] == "base"]
    assert peaks
    assert all(abs(peak - CPU_BASE) <= 0.03 * CPU_BASE for peak in peaks)


def test_the_forecast_of_a_gpu_is_near_the_peaks_of_the_gpu_runs() -> None:
    rows = memory.gpu_comparisons()
    assert {row["backend"] for row in rows} == set(memory.GPU_BACKENDS)
    for row in rows:
        assert row["forecast"] == pytest.approx(row["measured"], rel=0.03), row


def test_the_page_quotes_the_record() -> None:
    for line in (*memory.table(RECORD), *memory.summary_rows(RECORD), *memory.gpu_rows()):
        assert line in PAGE


def test_the_readme_quotes_the_record() -> None:
    readme = (memory.ROOT / "README.md").read_text(encoding="utf-8")
    runs = [row for row in ROWS if row["part"] != "base"]
    largest = max(abs(row["errors"]["peak"]) for row in runs)
    assert f"within {largest:.0%} of the peaks of {len(runs)} runs" in " ".join(readme.split())


def test_the_page_shows_what_explain_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnimg.cli.explain import explain

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "d", "type": "completion"}],
            "learning_rate": 1e-4, "sequence_len": 4096, "micro_batch_size": 2,
            "sample_packing": True, "adapter": "lora", "lora_r": 16,
            "lora_target_linear": True}  # fmt: skip
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(keys))
    with pytest.raises(SystemExit):
        explain(str(run), [], "l4", None, False)
    shown = capsys.readouterr().out
    lines = shown[shown.index("  memory ") :].rstrip()
    assert f"```\n{lines}\n```" in PAGE
