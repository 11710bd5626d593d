"""Count false alarms and misses of the comparison of a run's loss with its model's own.

Builds a tiny model of each of TYPES, loads it as a run does, in float32 and bfloat16, in full, with
LoRA and with QLoRA, and compares the losses as `attnimg train` does before its first step. Then it
compares them with the wrong heads of tests/fixtures/wrong_heads.py. Prints the rates, and writes
the results to docs/measured/own-loss.json.

    python benchmarks/own_loss.py [types]
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/own-loss.json"
sys.path.insert(0, str(ROOT / "tests/fixtures"))

# Types whose output layer TRL 1.16 rebuilds correctly, from their modeling files (2026-11-27).
TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "granite", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "starcoder2", "stablelm", "glm",
    "glm4", "smollm3", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "mpt", "falcon",
    "ernie4_5", "exaone4", "nemotron", "helium", "seed_oss", "mixtral", "qwen2_moe",
    "qwen3_moe", "granitemoe", "olmoe", "deepseek_v3", "lfm2", "afmoe",
)  # fmt: skip
# Types for which it does not, because of a cap, transform, bias or output that it does not know.
MISSED_BY_TRL = ("recurrent_gemma", "xlstm", "modernbert-decoder", "inkling_text", "llama4_text")
PRECISIONS = ("float32", "bfloat16")
WEIGHTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": "lora"},
    "qlora": {"adapter": "qlora", "load_in_4bit": True},
}


def main() -> int:
    """Compare all, write the record, and exit with 1 on a false alarm or a miss."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    types = sys.argv[1:] or [*TYPES, *MISSED_BY_TRL]
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
        **settings(),
        "compared": {},
    }
    for model_type in types:
        found = compare_type(model_type)
        record["compared"][model_type] = found
        print(f"{model_type}: {json.dumps(found)}", flush=True)
    record |= summary(record["compared"])
    for name in ("right", "wrong", "missed_by_trl"):
        print(f"{name}: {json.dumps(record[name])}")
    if not sys.argv[1:]:
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(bool(record["right"]["false_alarms"] or record["wrong"]["missed"]
                    or record["missed_by_trl"]["missed"]))  # fmt: skip


def settings() -> dict[str, Any]:
    """Return the settings of the comparison, for the test that the record is up to date."""
    tolerance = import_module("attnimg.train.loss")
    layer = import_module("attnimg.train.own_loss")
    return {
        "types": list(TYPES),
        "types_missed_by_trl": list(MISSED_BY_TRL),
        "precisions": list(PRECISIONS),
        "weights": list(WEIGHTS),
        "wrong_heads": list(import_module("wrong_heads").WRONG_HEADS),
        "tolerance": {"roundings": tolerance.ROUNDINGS, "sigmas": tolerance.SIGMAS},
        "logits_of_the_output_layer": layer.LOGITS,
    }


def compare_type(model_type: str) -> dict[str, dict[str, Any]]:
    """Compare one type in every precision and kind of weights; and its wrong heads in full."""
    models, heads = import_module("tiny_models"), import_module("wrong_heads")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.tiny_model(model_type).save_pretrained(folder / "model")
        for precision in PRECISIONS:
            for weights, keys in WEIGHTS.items():
                run = f"{precision} {weights}"
                if model_type in MISSED_BY_TRL and weights != "full":
                    continue  # Llama 4's router and xLSTM's cells do not take every adapter
                found[run] = compare(folder, precision=precision, **keys)
            if model_type in TYPES:
                for fault, wrong in heads.WRONG_HEADS.items():
                    found[f"{precision} {fault}"] = compare(
                        folder, precision=precision, wrong=wrong
                    )
    return found


def compare(folder: Path, *, precision: str, wrong: Any = None, **keys: Any) -> dict[str, Any]:
    """Load and compare as a run does; with a wrong head where one is given."""
    errors = import_module("attnimg.errors")
    engines = import_module("tiny_engine")
    own_loss = import_module("attnimg.train.own_loss")
    session = engines.make_session(folder, precision=precision, **keys)
    engine = engines.make_engine(session)
    if wrong is not None:
        engine.model.forward = wrong(engine.model.forward)
    try:
        return figures(
            own_loss.check_loss(engine, session.train, context=session.run.context, sharded=False)
        )
    except errors.AttnimgError as error:
        head = f"refused: {error.what}: {error.why}"
        return {"head": head, "on_data": None, "output_layer": None, "seconds": 0.0}


def figures(check: Any) -> dict[str, Any]:
    """Return the figures of a comparison that the record keeps."""
    layer = check.output_layer
    return {
        "head": check.head if check.compared else f"not compared: {check.why}",
        "on_data": round(min(check.on_data.ratio, 1e9), 3) if check.on_data else None,
        "output_layer": round(min(layer.ratio, 1e9), 3) if layer else None,
        "seconds": check.seconds,
    }


def summary(compared: dict[str, Any]) -> dict[str, Any]:
    """Count right heads that were reported as different, and wrong ones that were not."""
    faults = tuple(import_module("wrong_heads").WRONG_HEADS)
    runs = [(f"{kind} {run}", kind, run, found) for kind, of_type in compared.items()
            for run, found in of_type.items()]  # fmt: skip
    wrong = [item for item in runs if item[2].endswith(faults)]
    missed = [item for item in runs if item[1] in MISSED_BY_TRL]
    right = [item for item in runs if item not in wrong and item not in missed]

    def largest(quantity: str) -> float:
        return max((found[quantity] for *_, found in right if found[quantity] is not None),
                   default=0.0)  # fmt: skip

    return {
        "right": {
            "comparisons": len(right),
            "false_alarms": [name for name, *_, found in right if found["head"] != "chunked"],
            "output_layer_not_compared": [name for name, *_, found in right
                                          if found["output_layer"] is None],
            "largest_difference_in_tolerances": {
                "on_data": largest("on_data"), "output_layer": largest("output_layer"),
            },
            "mean_seconds": round(sum(found["seconds"] for *_, found in right)
                                  / max(len(right), 1), 3),
        },
        "wrong": {
            "comparisons": len(wrong),
            "missed": [name for name, *_, found in wrong if found["head"] != "own"],
        },
        "missed_by_trl": {
            "comparisons": len(missed),
            "missed": [name for name, *_, found in missed if found["head"] != "own"],
        },
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
