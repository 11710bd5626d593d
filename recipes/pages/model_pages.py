"""Write docs/checkpoints.md and docs/model-types.md: which models train, and how they are saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attnimg.selection.model_types import (
    CausalTypes,
    Quantization,
    position_table,
    quantizations,
    read_causal_types,
)
from recipes.files import NOTICE
from recipes.pages import code_list, markdown_table

RELOAD_RECORD = "docs/measured/reload.json"

_LOADED = {
    "dequantized": "dequantized to the run's precision; the saved model is not quantized",
    "kept": "stays quantized and frozen under an `adapter`; full fine-tuning is refused",
    "refused": "refused",
}
_CHECKPOINTS_PAGE = """# Checkpoints

This page says how `attnimg train` handles quantized weights, vision and audio parts and limits on
positions, and what it saves. It decides from `config.json` and the headers of the weight files,
before any weight is loaded; `attnimg explain CONFIG` reports the same.

Weights have to be safetensors. Pickled ones (`pytorch_model.bin`, `adapter_model.bin`) are refused
(`pickled-weights`); `python -m attnimg.train.pickled_weights FOLDER` converts them and runs no code
in them.

## Quantized weights

The table lists what happens for each `quant_method` of a `quantization_config`. A refusal has the
code `quantized-checkpoint`. Weights in float8 or packed integers without a `quantization_config`,
or without their scales, are refused as well. **tested**: our tests train such a checkpoint.

{quantizations}
`load_in_4bit`, `load_in_8bit` and `adapter: qlora` quantize weights that are not quantized. With a
quantized checkpoint they are refused unless they describe its format.

## Vision and audio parts

Training uses text only. The vision and audio parts of a multimodal checkpoint are frozen, get no
adapter and are saved unchanged, together with the files of the processor (warning `towers-frozen`).
With `model_type: AutoModelForCausalLM` only the language model is loaded and saved, where
transformers supports that (warning `loses-towers`).

These types are loaded that way: {multimodal}.

Other multimodal types are refused (`not-causal-lm`); the error has the `model_type` to set to try
one anyway.

## Positions

A `sequence_len` beyond a model's table of positions is refused (`positions-short`). With RoPE, one
beyond `max_position_embeddings`, or beyond the original length times the factor of the RoPE
scaling, causes a warning (`positions-beyond`).

These types have a table of positions: {tabled}.

## What is saved

The saved model has the class, the tied weights and the settings of the checkpoint, and one dtype.
With `bf16: true`, embeddings and norms are float32 during training and in the checkpoints to resume
from, and bfloat16 in `output_dir`. Weights that the class of a checkpoint does not use, such as
layers for multi-token prediction, are not saved; a warning lists them.

`make test/reload` trains {reloaded} model types, full and with LoRA, in float32 and bfloat16, saves
them and loads them again: the logits are equal.
"""


def checkpoints_page(types: CausalTypes, *, reloaded: str) -> str:
    """Return the text of docs/checkpoints.md.

    Args:
        types: the causal language models of transformers.
        reloaded: content of the record of `make test/reload`.
    """
    head = ("`quant_method`", "what happens", "needs", "tested")
    record = json.loads(reloaded)
    tabled = [name for name in types.causal if position_table(name) is not None]
    return f"<!-- {NOTICE} -->\n\n" + _CHECKPOINTS_PAGE.format(
        quantizations=markdown_table(
            head, [_quantization_row(name, row) for name, row in quantizations().items()]
        ),
        multimodal=code_list(types.text_trained | types.multimodal.keys()),
        tabled=code_list(tabled),
        reloaded=len(record["types"]) + len(record["with other parts"]),
    )


def _quantization_row(name: str, row: Quantization) -> tuple[str, ...]:
    what = _LOADED[row.loaded] + (f": {row.why}" if row.why else "")
    bits = f"{row.bits} bit weights" if row.bits and name == "torchao" else ""
    needs = ", ".join([*(f"`{package}`" for package in row.packages), *([bits] if bits else [])])
    tested = "-" if row.loaded == "refused" else "yes" if row.source.endswith("; tested") else "no"
    return f"`{name}`", what, needs or "-", tested


FAMILIES_RECORD = "docs/measured/families.json"

_FAMILIES_INTRO = """# Which model types train

This page lists, for each model type of `AutoModelForCausalLM` in transformers {version}, whether
`attnimg train` trains it, and the reason if it does not. `make families` builds a tiny model of
each type with random weights and trains it for three steps on a CPU in float32.

- **one document per row**: `sample_packing: false`. **packed**: `sample_packing: true`; before the
  first step, the isolation check compares the logits of documents packed and apart.
- A cell has the backend that `auto` chose on the CPU, or "refused". A type is refused before any
  weights are loaded, and `attnimg explain` reports the same error.
- With packages that were not installed on that CPU (mamba-ssm, causal-conv1d,
  flash-linear-attention, flash-attn) more types can be packed, such as gpt_oss. For your GPU, run
  `attnimg explain --on GPU`.

{counts}

"""


def families_page(text: str) -> str:
    """Write docs/model-types.md.

    Args:
        text: content of the record.
    """
    record = json.loads(text)
    classes = read_causal_types().causal
    types: Mapping[str, Mapping[str, Any]] = record["types"]
    rows = [
        (
            f"`{name}`",
            classes[name.partition(",")[0]],
            *(str(result.get("trains", "refused")) for result in found.values()),
        )
        for name, found in types.items()
    ]
    head = ("model type", "class", "one document per row", "packed")
    return (
        f"<!-- {NOTICE} -->\n\n"
        + _FAMILIES_INTRO.format(version=record["transformers"], counts=_counts(types))
        + markdown_table(head, rows)
        + "\n## Why types are refused\n\n"
        + "".join(
            f"- {reason}: {', '.join(f'`{name}`' for name in names)}\n"
            for reason, names in _reasons(types).items()
        )
    )


def _counts(types: Mapping[str, Mapping[str, Any]]) -> str:
    alone, packed = (
        sum("trains" in found[kind] for found in types.values()) for kind in ("unpacked", "packed")
    )
    return (
        f"Of {len(types)} rows, {alone} train, and {packed} of them also train packed. A type that "
        "attends to later tokens has a second row, for configs with `is_decoder: true`."
    )


def _reasons(types: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Group the refused types by the reason."""
    found: dict[str, list[str]] = {}
    for name, results in types.items():
        for kind, result in results.items():
            if "refused" not in result:
                continue
            names = found.setdefault(f"{result['found']} (`{result['refused']}`)", [])
            if name not in names:
                names.append(name)
            if kind == "unpacked":
                break
    return dict(sorted(found.items()))
