"""Rewrite a config of axolotl with current names, and without keys that have no effect."""

from __future__ import annotations

import warnings
from dataclasses import replace

from attnimg.config import check_values
from attnimg.config.attention import LEGACY
from attnimg.config.conversion.draft import Draft
from attnimg.config.keys import COMPUTED
from attnimg.config.other_names import OTHER_NAMES, replace_other_names
from attnimg.config.schema import Config

# Older name -> name, where both are keys of the schema.
_RENAMED = {"dataset_processes": "dataset_num_proc", "liger_swiglu": "liger_glu_activation"}


def convert_axolotl(draft: Draft, *, file: str) -> None:
    """Convert the keys of axolotl: each has the answer that `attnimg check` has for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        checked = check_values(draft.old, file=file)
    draft.errors += checked.errors
    found = {finding.key: finding for finding in (*checked.warnings, *checked.errors)}
    present, _, _ = replace_other_names({k: v for k, v in draft.old.items() if v is not None})
    enabled = next((key for key in LEGACY if present.get(key)), None)
    for key, value in draft.old.items():
        finding = found.get(key)
        name = OTHER_NAMES.get(key) or _RENAMED.get(key) or key
        if finding is not None and finding.why:
            draft.note(key, "refused", reason=finding.why, do=finding.do)
        elif value is None:
            draft.answer(key, reason="null: not set")
        elif key in LEGACY:
            _legacy(draft, key, enabled)
        elif finding is not None and finding.code in ("done-otherwise", "hint-not-used"):
            if name in Config.model_fields and key != "batch_size":
                draft.values[name] = value
            draft.note(key, finding.code, reason=finding.what, do=finding.do)  # type: ignore[arg-type]  # a code that is an answer
        elif name in Config.model_fields and name not in COMPUTED:
            draft.values[name] = present.get(name, value)
            reason = "" if name == key else f"the older name of {name}"
            draft.answer(key, to=(name,), reason=reason)
        else:
            draft.answer(key, reason="its value requests nothing")
    if draft.given("batch_size") and checked.config is not None:
        steps = checked.config.gradient_accumulation_steps
        draft.values["gradient_accumulation_steps"] = steps
        answer = draft.answers["batch_size"]
        draft.answers["batch_size"] = replace(answer, to=("gradient_accumulation_steps",))


def _legacy(draft: Draft, key: str, enabled: str | None) -> None:
    name = LEGACY[key]
    if key == enabled:
        draft.values["attn_implementation"] = name
        draft.answer(key, to=("attn_implementation",), reason=f"the older form of {name}")
    elif draft.old[key]:
        reason = f"{enabled} takes precedence over it, as in axolotl"
        draft.note(key, "done-otherwise", reason=reason)
    else:
        draft.answer(key, reason="false: not set")
