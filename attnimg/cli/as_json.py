"""Build the JSON that check and explain print, one object per line."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnimg.facts import Finding, Model, Plan

if TYPE_CHECKING:
    from attnimg.config.schema import Checked
    from attnimg.selection.run_findings import OtherLayers

_FLAGS = (
    "attn_implementation",
    "attn_supports_packing",
    "attn_uses_flash_lib",
    "attn_needs_dtype_cast",
)


def line(value: dict[str, Any]) -> str:
    """Return a JSON object as one line, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # JSON itself escapes only those below U+0020.
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found.group()):04x}", text)


def checked_json(checked: Checked) -> dict[str, Any]:
    """Return the object that `check --json` prints for one file."""
    attn = config = None
    if checked.config is not None:
        # pydantic's JSON has null for NaN and infinity, which JSON does not have.
        config = json.loads(checked.config.model_dump_json(exclude_none=True))
        flags = {key: getattr(checked.config, key) for key in _FLAGS}
        config |= flags
        attn = {"requested": checked.requested} | flags
    return {
        "file": checked.file,
        "ok": checked.ok,
        "on": checked.on,
        "attn": attn,
        "config": config,
        "errors": [_error(finding) for finding in checked.errors],
        "warnings": [_warning(finding) for finding in checked.warnings],
    }


def explained_json(
    checked: Checked,
    *,
    model: Model | None,
    plan: Plan | None,
    on: str,
    image: str | None = None,
    others: tuple[OtherLayers, ...] = (),
    memory: Any = None,
) -> dict[str, Any]:
    """Return the object that `explain --json` prints.

    Args:
        checked: the result of `check`.
        model: its model; None when its config.json is not available.
        plan: all candidates and the choice; None when the file could not be read.
        on: the architecture it was checked for.
        image: the image whose packages were assumed; None for the installed packages.
        others: the model's layers without softmax attention.
        memory: a dataclass of the memory that is quadratic in the row length; None for none.
    """
    from attnimg.selection.plan import (
        plan_dict,  # imported here because check --json does not need it
    )

    return checked_json(checked) | {
        "on": on,
        "image": image,
        "model": model and _model(model),
        "layers": [asdict(group) for group in model.layers] if model else [],
        "candidates": plan_dict(plan)["candidates"] if plan else [],
        "chosen": plan_dict(plan)["chosen"] if plan else None,
        "groups": plan_dict(plan)["groups"] if plan else [],
        "other_layers": [asdict(layers) for layers in others],
        "quadratic_memory": asdict(memory) if memory else None,
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "type": model.type,
        "parameters": model.parameters,
        "other_layers": sum(count for _, count in model.other_layers),
        "unknown": list(model.unknown),
    }


def _error(finding: Finding) -> dict[str, Any]:
    return asdict(finding)


def _warning(finding: Finding) -> dict[str, Any]:
    values = asdict(finding)
    del values["why"]
    return values
