"""Convert the stages dpo and kto of LLaMA-Factory: the loss, and the types of their datasets.

Source: LLaMA-Factory 00052690, src/llamafactory/train/dpo/trainer.py and kto/trainer.py;
data/processor/pairwise.py and feedback.py; data/converter.py (read 2026-11-27)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attnimg.config.conversion.draft import Draft

INFO = "dataset_info.json"
STAGES = ("dpo", "kto")
# pref_loss -> attnimg's dpo_loss_type.
_LOSSES = {"sigmoid": None, "hinge": ["hinge"], "ipo": ["ipo"]}
# pref_loss -> why it is refused. TRL's ORPO: trl 1.16, experimental/orpo/orpo_trainer.py,
# concatenated_forward: "computed over the full prompt and response" (2026-11-28).
_REFUSED = {
    "orpo": "rl: orpo trains another loss, TRL's: it has the prompts too, averaged over all tokens "
    "of a batch; LLaMA-Factory's has only the chosen answers, averaged by answer. A config that "
    "was converted with sigmoid trains TRL's with rl: orpo in place of rl: dpo",
    "simpo": "SimPO compares mean log-probabilities without a reference, with the margin "
    "simpo_gamma; attnimg has no such loss",
}
_OF_KTO = {"kto_chosen_weight": "kto_desirable_weight",
           "kto_rejected_weight": "kto_undesirable_weight"}  # fmt: skip


def convert_preferences(draft: Draft) -> None:
    """Convert the keys on the loss of the stages dpo and kto."""
    stage = str(draft.get("stage"))
    if stage not in STAGES:
        return
    draft.values["rl"] = stage
    draft.answer("stage", to=("rl",))
    draft.put("rl_beta", draft.get("pref_beta"), "pref_beta")
    if stage == "kto":
        for key, ours in _OF_KTO.items():
            draft.put(ours, draft.get(key), key)
        draft.comments["rl"] = (
            "LLaMA-Factory estimates the KL term from a record of its own for each, attnimg from "
            "the other answers of a batch, as TRL does"
        )
        return
    loss = draft.get("pref_loss")
    if isinstance(loss, str) and loss in _LOSSES:
        draft.put("dpo_loss_type", _LOSSES[loss], "pref_loss")
        return
    why = f"needed one of {', '.join(_LOSSES)}; attnimg has no other loss of LLaMA-Factory"
    if isinstance(loss, str):
        why = _REFUSED.get(loss, why)
    draft.refuse("pref_loss", why=why, do="set pref_loss: sigmoid")


def type_of_pairs(
    draft: Draft,
    key: str,
    name: str,
    found: Mapping[str, Any],
    template: Mapping[str, str] | None,
) -> dict[str, Any] | None:
    """Return the type of a dataset of the stages dpo and kto, and what belongs to it.

    Args:
        draft: the conversion.
        key: the key that names the dataset.
        name: its name in dataset_info.json.
        found: its description there.
        template: the texts of the config's template; None without one.

    Returns:
        Keys of an entry; None if it can't be converted.
    """
    columns, stage = found.get("columns") or {}, draft.get("stage")
    needed = ("kto_tag",) if stage == "kto" else ("chosen", "rejected")
    if not all(columns.get(column) for column in needed):
        listed = " and ".join(f"columns.{column}" for column in needed)
        draft.refuse(key, why=f"the stage {stage} needs {listed} of {name} in {INFO}",
                     do=f"add them to {INFO}, or remove {name} from {key}")  # fmt: skip
        return None
    if stage == "dpo" and not found.get("ranking"):
        draft.refuse(key, why=f"{name} has no `ranking: true` in {INFO}, so that LLaMA-Factory "
                     "reads no pairs from it",
                     do=f"add it to {INFO}, or remove {name} from {key}")  # fmt: skip
        return None
    if found.get("formatting", "alpaca") in ("sharegpt", "openai"):
        if stage == "dpo":
            return {"type": "chat_template.default", "field_chosen": columns["chosen"],
                    "field_rejected": columns["rejected"]}  # fmt: skip
        draft.refuse(key, why=f"{name} has conversations, and attnimg reads texts with labels",
                     do=f"write the records of {name} with instruction and output")  # fmt: skip
        return None
    if template is None or "{eos}" in template["user"] + template["system"]:
        if template is not None or not draft.given("template"):
            why = f"{name} has the format alpaca, which needs a template without end tokens in it"
            choices = " or ".join(list(draft.table.templates)[:3])
            draft.refuse(key, why=why, do=f"set template: {choices}")
        return None
    if template["end"].endswith("\n"):
        draft.comments["datasets"] = "LLaMA-Factory also trains the newline after an answer"
    return {"type": _format(columns, template, stage=str(stage))}


def _format(
    columns: Mapping[str, Any], template: Mapping[str, str], *, stage: str
) -> dict[str, str]:
    system = ""
    if default := template.get("default_system"):
        system = _escaped(template["system"].replace("{content}", default))
    user, end = template["user"].split("{content}")
    kind = {
        "field_prompt": str(columns.get("prompt") or "instruction"),
        "prompt_format": f"{system}{_escaped(user)}{{prompt}}{_escaped(end)}",
    }
    if stage == "kto":
        completion = str(columns.get("response") or "output")
        return {**kind, "field_completion": completion, "field_label": columns["kto_tag"]}
    return {**kind, "field_chosen": columns["chosen"], "field_rejected": columns["rejected"]}


def _escaped(text: str) -> str:
    """Return a text for a format, in which braces enclose names."""
    return text.replace("{", "{{").replace("}", "}}")


def refuse_unread(
    draft: Draft,
    key: str,
    name: str,
    found: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
) -> None:
    """Refuse pairs with an input or a system message, which attnimg does not read in such data."""
    columns, given = found.get("columns") or {}, "columns" in found
    read = {"system": columns.get("system"), "tools": columns.get("tools"),
            "query": columns.get("query", None if given else "input")}  # fmt: skip
    number = 0
    for number, record in enumerate(records, start=1):
        for column in filter(None, read.values()):
            if record.get(column):
                why = f"record {number} of {name} has {column}, which attnimg does not read in "
                why += "preference data"
                draft.refuse(key, why=why, do=f"move the text of {column} to the prompt")
                return
    if not number and any(read.values()):
        listed = ", ".join(f"columns.{part}" for part, column in read.items() if column)
        why = f"the records of {name} can't be read here, and may have {listed}"
        draft.refuse(key, why=why, do=f"name only the columns that they have in {INFO}")
