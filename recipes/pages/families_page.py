"""Write docs/model-types.md: which causal language models of transformers train.

The results are those of docs/measured/families.json, which `make families` writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attnimg.select.model_types import read_causal_types
from recipes.files import NOTICE
from recipes.pages.images_and_kernels import table

RECORD = "docs/measured/families.json"

_INTRO = """# Which model types train

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
        (f"`{name}`", classes[name.partition(",")[0]], *(_cell(found[kind]) for kind in found))
        for name, found in types.items()
    ]
    head = ("model type", "class", "one document per row", "packed")
    return (
        f"<!-- {NOTICE} -->\n\n"
        + _INTRO.format(version=record["transformers"], counts=_counts(types))
        + table(head, rows)
        + "\n## Why types are refused\n\n"
        + "".join(
            f"- {reason}: {', '.join(f'`{name}`' for name in names)}\n"
            for reason, names in _reasons(types).items()
        )
    )


def _cell(result: Mapping[str, Any]) -> str:
    return str(result.get("trains", "refused"))


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
