"""Convert a config of TRL's scripts for DPO, KTO and ORPO.

The meaning of each key is in data/convert/trl-dpo.toml, trl-kto.toml and trl-orpo.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnimg.config.conversion.draft import Draft, ReadRecords
from attnimg.config.conversion.trl import Format, convert_model, read_specs, write_specs
from attnimg.config.preference_rules import SMOOTHED_LOSSES

# Columns that TRL reads too, and attnimg does not.
# Source: TRL 1.16, trainer/dpo_trainer.py and kto_trainer.py, _prepare_dataset (2026-11-27)
_NOT_READ = {"chat_template_kwargs", "image", "images", "tools", "ref_chosen_logps",
             "ref_rejected_logps", "ref_logps", "ref_KL_logps"}  # fmt: skip
_TEXTS = {
    "trl-dpo": ("prompt", "chosen", "rejected"),
    "trl-orpo": ("prompt", "chosen", "rejected"),
    "trl-kto": ("prompt", "completion"),
}


def convert_trl_preferences(
    draft: Draft, *, records: ReadRecords, format_of_data: Format | None
) -> None:
    """Convert the keys whose value is not simply that of one of our keys; see convert_trl."""
    draft.values["rl"] = draft.trainer.removeprefix("trl-")
    convert_model(draft)
    draft.put("rl_beta", draft.get("beta"), "beta")
    if draft.trainer == "trl-dpo":
        _losses(draft)
        if draft.given("pad_token"):
            draft.add_entry("special_tokens", {"pad_token": draft.get("pad_token")})
            draft.answer("pad_token", to=("special_tokens",))
    elif draft.trainer == "trl-kto" and draft.get("loss_type") not in ("kto", ["kto"]):
        draft.refuse("loss_type", why="attnimg has no other loss of KTO", do="set loss_type: kto")
    if "max_length" in draft.old and draft.old["max_length"] is None:
        draft.refuse("max_length", why="null means no limit on the length of pairs",
                     do="set max_length to the tokens of the longest pair")  # fmt: skip
    reason = "the end of a longer answer is cut"
    draft.put("sequence_len", draft.get("max_length"), "max_length", reason=reason)
    sources = ("truncation_mode",) if draft.trainer == "trl-dpo" else ()
    if sources and draft.get("truncation_mode") != "keep_start":
        draft.refuse("truncation_mode", why="attnimg keeps the start of long pairs",
                     do="set truncation_mode: keep_start")  # fmt: skip
    draft.put("excess_length_strategy", "truncate", *sources)
    specs = read_specs(draft)
    types = [_type(draft, spec, records=records, format_of_data=format_of_data) for spec in specs]
    write_specs(draft, [spec | found for spec, found in zip(specs, types, strict=True)
                        if found is not None], complete=None not in types)  # fmt: skip


def _losses(draft: Draft) -> None:
    losses = draft.get("loss_type") or ["sigmoid"]
    losses = [losses] if isinstance(losses, str) else losses
    draft.put("dpo_loss_type", None if losses == ["sigmoid"] else losses, "loss_type")
    if draft.get("loss_weights"):
        draft.values["dpo_loss_type"] = losses
    draft.put("dpo_loss_weights", draft.get("loss_weights"), "loss_weights")
    smoothing = draft.get("label_smoothing")
    if isinstance(losses, list) and set(map(str, losses)) & set(SMOOTHED_LOSSES):
        draft.put("dpo_label_smoothing", smoothing or None, "label_smoothing")
    else:
        draft.answer("label_smoothing", reason="no loss of the run reads it, in TRL neither")
    draft.put("dpo_use_weighting", draft.get("use_weighting") or None, "use_weighting")


def _type(
    draft: Draft, spec: dict[str, Any], *, records: ReadRecords, format_of_data: Format | None
) -> dict[str, Any] | None:
    """Return the type of an entry and what belongs to it; None if it can't be converted."""
    key = "datasets" if draft.given("datasets") else "dataset_name"
    first: Mapping[str, Any] | None = None
    columns = set[str]()
    for record in records(spec):
        first = record if first is None else first
        columns |= {name for name, value in record.items() if value is not None}
    if unread := sorted(columns & (_NOT_READ | {"system"})):
        why = f"the records have {', '.join(unread)}, which TRL and attnimg do not read alike"
        do = "remove the columns from the data, if the run may be trained without them"
        draft.refuse(key, why=why, do=do)
        return None
    needed = _TEXTS[draft.trainer]
    formats: tuple[Format, ...] = ("text", "messages") if draft.trainer == "trl-dpo" else ("text",)
    if first is None:
        if format_of_data not in formats:
            why = "its columns decide what is trained, and they can't be read here"
            do = f"pass --dataset-format {' or --dataset-format '.join(formats)}"
            draft.refuse(key, why=why, do=do)
            return None
        return _of_messages(draft) if format_of_data == "messages" else {}
    if all(isinstance(first.get(name), str) for name in needed):
        return {}
    if draft.trainer == "trl-dpo":
        answers = all(_is_chat(first.get(name)) for name in ("chosen", "rejected"))
        if answers and _is_chat(first.get("prompt")):
            return _of_messages(draft)
        if answers and "prompt" not in columns:
            _explain(draft)
            return {"type": "chat_template.argilla_chat"}
    why = f"found the columns {', '.join(sorted(first))}; needed texts in {', '.join(needed)}"
    if draft.trainer == "trl-dpo":
        why += ", or lists of messages in chosen and rejected"
    draft.refuse(key, why=why, do=f"write each record with texts in {', '.join(needed)}")
    return None


def _of_messages(draft: Draft) -> dict[str, Any]:
    _explain(draft)
    return {"type": "chat_template.default", "field_messages": "prompt"}


def _explain(draft: Draft) -> None:
    draft.comments["datasets"] = (
        "an answer is its text and the token that ends a turn; TRL also trains what the template "
        "writes after that token"
    )


def _is_chat(value: object) -> bool:
    return bool(isinstance(value, list) and value
                and isinstance(value[0], Mapping) and "role" in value[0])  # fmt: skip
