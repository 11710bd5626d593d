"""Write docs/families.md: which causal language models of transformers train.

docs/measured/families.json, which `make families` writes, has what came of a tiny model of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attnimg.model_classes import read_causal_types
from recipes.files import NOTICE
from recipes.pages import table

RECORD = "docs/measured/families.json"

_INTRO = """# Which model types train

Every type that `AutoModelForCausalLM` of transformers {version} knows: built tiny with random
weights, then three steps of `attnimg train` on a CPU in float32 (`make families`). **one document a
row**: `sample_packing: false`. **packed**: `sample_packing: true` on the backend that `auto` takes
there; the isolation check compares the logits of documents packed and apart before the first step.
A cell names the backend. What is refused is refused before any weights are loaded, and
`attnimg explain` says the same. Packages that are missing on that CPU
(mamba-ssm, causal-conv1d, flash-linear-attention, flash-attn) let more types pack, gpt_oss for one:
`attnimg explain --on GPU` says which.

{counts}

"""


def families_page(text: str) -> str:
    """Write docs/families.md.

    Args:
        text: of the record.
    """
    record = json.loads(text)
    classes = read_causal_types().causal
    types: Mapping[str, Mapping[str, Any]] = record["types"]
    rows = [
        (f"`{name}`", classes[name.partition(",")[0]], *(_cell(found[kind]) for kind in found))
        for name, found in types.items()
    ]
    head = ("model type", "class", "one document a row", "packed")
    return (
        f"<!-- {NOTICE} -->\n\n"
        + _INTRO.format(version=record["transformers"], counts=_counts(types))
        + table(head, rows)
        + "\n## Why\n\n"
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
        f"Of {len(types)} rows, {alone} train, {packed} of them packed too. A type that attends to "
        "both sides has a second row, for its decoders."
    )


def _reasons(types: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Group the refused types by what was found of them."""
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
