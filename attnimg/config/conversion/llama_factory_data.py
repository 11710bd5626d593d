"""Convert the datasets and the chat template of LLaMA-Factory, which dataset_info.json describes.

Source: LLaMA-Factory ff6d4d12, src/llamafactory/data: parser.py, converter.py, template.py and
processor/*.py (read 2026-11-27)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from attnimg.config.conversion.draft import Draft, ReadRecords
from attnimg.config.conversion.llama_factory_preferences import (
    INFO,
    STAGES,
    refuse_unread,
    type_of_pairs,
)
from attnimg.config.schema import ROLES, make_error
from attnimg.files import read_regular

_INFO_BYTES = 8_000_000
# Columns of records that change the text in ways that are not converted.
_COLUMNS_REFUSED = ("images", "videos", "audios", "history")
_OF_PREFERENCES = ("chosen", "rejected", "kto_tag")
_ENTRY_REFUSED = ("num_samples", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name",
                  "folder", "ranking")  # fmt: skip
_ENTRY = {"file_name", "hf_hub_url", "formatting", "subset", "split", "columns", "tags"}
# Keys of attnimg's entries that say where records are.
_SOURCE = {"path", "name", "split"}
# A column that no record has: naming it turns off a default column.
_NONE = "(none)"
# LLaMA-Factory's keys with names of datasets -> attnimg's keys.
_OURS = {"dataset": "datasets", "eval_dataset": "test_datasets"}
# The names in braces of a template.
_NAMES = re.compile(r"(\{(?:content|bos|eos)\})")


def convert_datasets(draft: Draft, *, file: str, records: ReadRecords) -> None:
    """Convert the datasets of a config, and its template; see convert_llama_factory."""
    folder, stage = draft.get("dataset_dir"), str(draft.get("stage"))
    template = _template(draft)
    info, root = _read_info(draft, str(folder), file=file)
    if info is None:
        return
    most = _max_samples(draft)
    chats = False
    for key, ours in _OURS.items():
        specs = []
        for name in listed(draft.get(key)) or ():
            found = info.get(name)
            if not isinstance(found, dict) or not all(
                isinstance(found.get(part) or {}, dict) for part in ("columns", "tags")
            ):
                draft.refuse(key, why=f"{INFO} has no dataset {name!r}",
                             do=f"correct {key}, or {INFO}")  # fmt: skip
                continue
            spec = _entry(draft, key, name, found, root, template, stage=stage)
            if spec is None:
                continue
            is_chat = str(spec["type"]).startswith("chat_template")
            chats = chats or is_chat
            source = {k: v for k, v in spec.items() if k in _SOURCE}
            if stage in STAGES:
                refuse_unread(draft, key, name, found, records(source))
            elif is_chat:
                spec |= _unread_columns(draft, key, name, found, records(source))
            if isinstance(spec["type"], dict) and stage not in STAGES:
                _refuse_joined(draft, key, name, spec["type"], islice(records(source), most))
            if most is not None:
                count = sum(1 for _ in islice(records(source), most + 1))
                if not count or count > most:
                    spec["split"] = f"{spec.get('split', 'train')}[:{most}]"
            specs.append(spec)
        if specs:
            draft.values[ours] = specs
            draft.answer(key, to=(ours,), reason=f"read from {INFO}")
    draft.answer("max_samples", to=("datasets",),
                 reason=f"{most}, for each dataset that has more")  # fmt: skip
    draft.answer("dataset_dir", to=("datasets",))
    if not draft.given("dataset"):
        why = "needed names of datasets in " + INFO
        draft.errors.append(
            make_error("missing-key", "dataset", "dataset is missing", why, "add `dataset: NAME`")
        )
    if stage == "pt":
        for key in ("template", "default_system"):
            draft.answer(key, reason="the stage pt trains plain text, without a template")
        return
    if template is not None:
        if chats:
            draft.put("chat_template", "jinja", "template")
            draft.put("chat_template_jinja", chat_template(template), "template", "default_system",
                      comment=f"LLaMA-Factory's template {draft.get('template')}; it also trains "
                      "the newline after an answer, which has no loss here")  # fmt: skip
        else:
            draft.answer("template", to=("datasets",))
            draft.answer("default_system", to=("datasets",))
        if eos := template.get("eos"):
            draft.add_entry("special_tokens", {"eos_token": eos})
            draft.comments["special_tokens"] = (
                f"LLaMA-Factory's template {draft.get('template')} makes it the end token"
            )
            draft.answer("template", to=("special_tokens",))


def _max_samples(draft: Draft) -> int | None:
    """Return the most records of each dataset; None for all of them."""
    most = draft.get("max_samples")
    if most is None or (type(most) is int and most > 0):
        return most
    why = "needed a number of records"
    if type(most) is int:
        why = "LLaMA-Factory trains no record then"
    draft.refuse("max_samples", why=why, do="remove it")
    return None


def _refuse_joined(
    draft: Draft, key: str, name: str, kind: Mapping[str, str], records: Iterable[Mapping[str, Any]]
) -> None:
    """Refuse records with an input alone: LLaMA-Factory puts no newline before it.

    Source: LLaMA-Factory, src/llamafactory/data/converter.py, AlpacaDatasetConverter (2026-11-27)
    """
    prompt, query = kind["field_instruction"], kind["field_input"]
    for number, record in enumerate(records, start=1):
        if not record.get(prompt) and record.get(query):
            why = f"record {number} of {name} has {query} and an empty {prompt}; attnimg puts a "
            why += "newline between the two, LLaMA-Factory does not"
            do = f"move the text of {query} to {prompt} in such records"
            draft.refuse(key, why=why, do=do)
            return


def _unread_columns(
    draft: Draft,
    key: str,
    name: str,
    found: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
) -> dict[str, str]:
    """Return the keys that turn off columns of conversations that LLaMA-Factory does not read.

    attnimg reads the columns system and tools by default. Tools are refused, since LLaMA-Factory's
    templates write them in a format of their own.
    """
    columns, seen, readable = found.get("columns") or {}, set[str](), False
    for record in records:
        readable = True
        seen |= {column for column, value in record.items() if value}
    tools = columns.get("tools")
    if tools and (tools in seen or not readable):
        why = f"{name} has a column of tools, {tools}, which LLaMA-Factory writes in its own form"
        draft.refuse(key, why=why, do=f"remove {name} from {key}, or rewrite its records")
    off = {
        ours: _NONE
        for ours, column in (("field_system", "system"), ("field_tools", "tools"))
        if not columns.get(column) and (column in seen or not readable)
    }
    if off:
        listed = " and ".join(off)
        comment = f"no record has a column {_NONE}, so that {listed} read none"
        before = draft.comments.get(_OURS[key])
        draft.comments[_OURS[key]] = f"{before}; {comment}" if before else comment
    return off


def _read_info(draft: Draft, folder: str, *, file: str) -> tuple[dict[str, Any] | None, str]:
    """Read dataset_info.json: below the current folder, or beside the config."""
    beside = Path(file).parent
    places = [Path(folder), beside / folder, beside]
    if folder.startswith("REMOTE:") or folder == "ONLINE":
        draft.refuse("dataset_dir", why=f"needed a folder with {INFO}",
                     do=f"download {INFO}, and set dataset_dir to its folder")  # fmt: skip
        return None, ""
    for place in places:
        path = place / INFO
        if not path.exists():
            continue
        try:
            found = json.loads(read_regular(path, at_most=_INFO_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"it is not JSON ({type(error).__name__})"
            draft.refuse("dataset_dir", why=f"{path} can't be read: {reason}", do="correct it")
            return None, ""
        if isinstance(found, dict):
            return found, str(place)
    looked = ", ".join(str(place / INFO) for place in places)
    why = f"found none of {looked}, which describe the datasets"
    draft.refuse("dataset_dir", why=why, do=f"set dataset_dir to the folder of {INFO}")
    return None, ""


def _entry(
    draft: Draft,
    key: str,
    name: str,
    found: dict[str, Any],
    root: str,
    template: Mapping[str, str] | None,
    *,
    stage: str,
) -> dict[str, Any] | None:
    """Return the entry of a dataset; None if it can't be converted."""
    columns, tags = found.get("columns") or {}, found.get("tags") or {}
    has_url = isinstance(found.get("hf_hub_url"), str)
    refused = [entry for entry in _ENTRY_REFUSED
               if found.get(entry) and not (has_url and entry.endswith("hub_url"))]  # fmt: skip
    if stage in STAGES:
        refused = [entry for entry in refused if entry != "ranking"]
    others = () if stage in STAGES else _OF_PREFERENCES
    refused += [f"columns.{column}" for column in (*_COLUMNS_REFUSED, *others)
                if columns.get(column)]  # fmt: skip
    refused += [entry for entry in found if entry not in {*_ENTRY, *_ENTRY_REFUSED}]
    if refused:
        draft.refuse(key, why=f"{name} has {', '.join(refused)} in {INFO}, which is not converted",
                     do=f"remove {name} from {key}, or rewrite its records")  # fmt: skip
        return None
    no_names = [f"{part}.{field}" for part, fields in (("columns", columns), ("tags", tags))
                for field, value in fields.items()
                if value is not None and not isinstance(value, str)]  # fmt: skip
    if no_names:
        draft.refuse(key, why=f"needed a name as {' and '.join(no_names)} of {name} in {INFO}",
                     do=f"correct {INFO}")  # fmt: skip
        return None
    path = found.get("hf_hub_url") if has_url else None
    if path is None and isinstance(found.get("file_name"), str):
        path = os.path.normpath(str(Path(root) / found["file_name"]))
    if path is None:
        draft.refuse(key, why=f"{name} has neither file_name nor hf_hub_url in {INFO}",
                     do=f"correct {INFO}")  # fmt: skip
        return None
    spec: dict[str, Any] = {"path": path}
    if found.get("subset"):
        spec["name"] = found["subset"]
    if found.get("split", "train") != "train":
        spec["split"] = found["split"]
    formatting = found.get("formatting", "alpaca")
    if stage == "pt":
        return _of_text(draft, key, name, spec, columns, formatting)
    if stage in STAGES:
        pairs = type_of_pairs(draft, key, name, found, template)
        if pairs is None or isinstance(pairs["type"], dict):
            return pairs and spec | pairs
        messages = _of_messages(spec, columns, tags, given="columns" in found,
                                tagged="tags" in found)  # fmt: skip
        messages.pop("field_system", None)
        return messages | pairs
    if formatting == "alpaca":
        return _of_alpaca(draft, key, name, spec, columns, template, given="columns" in found)
    if formatting in ("sharegpt", "openai"):
        return _of_messages(spec, columns, tags, given="columns" in found, tagged="tags" in found)
    draft.refuse(key, why=f"{name} has the formatting {formatting!r} in {INFO}",
                 do="needed alpaca, sharegpt or openai")  # fmt: skip
    return None


def _of_text(
    draft: Draft,
    key: str,
    name: str,
    spec: dict[str, Any],
    columns: dict[str, Any],
    formatting: str,
) -> dict[str, Any] | None:
    field = columns.get("prompt")
    if formatting != "alpaca" or field is None or columns.get("query"):
        draft.refuse(key, why=f"{name} is not plain text: the stage pt needs columns.prompt alone",
                     do=f"set columns: {{prompt: text}} of {name} in {INFO}")  # fmt: skip
        return None
    return {**spec, "type": "completion", **({"field": field} if field != "text" else {})}


def _of_alpaca(
    draft: Draft,
    key: str,
    name: str,
    spec: dict[str, Any],
    columns: dict[str, Any],
    template: Mapping[str, str] | None,
    *,
    given: bool,
) -> dict[str, Any] | None:
    """Return the entry of records with instruction, input and output: a prompt in the template."""
    if template is None:
        if not draft.given("template"):
            why = f"{name} has the format alpaca, which needs a template"
            choices = " or ".join(list(draft.table.templates)[:3])
            draft.refuse(key, why=why, do=f"set template: {choices}")
        return None
    prompt = columns.get("prompt", None if given else "instruction")
    query = columns.get("query", None if given else "input")
    response = columns.get("response", None if given else "output")
    if not prompt or not response:
        draft.refuse(key, why=f"{name} has no columns.prompt or columns.response in {INFO}",
                     do=f"add them to {INFO}")  # fmt: skip
        return None
    user = template["user"]
    notes = []
    if not query or not columns.get("system"):
        notes.append(f"no record has a column {_NONE}: LLaMA-Factory reads none there")
    if template["end"].endswith("\n"):
        notes.append("LLaMA-Factory also trains the newline after an answer")
    if notes:
        draft.comments[_OURS[key]] = "; ".join(notes)
    kind = {
        "field_instruction": prompt,
        "field_input": query or _NONE,
        "field_output": response,
        "format": user.replace("{content}", "{instruction}\n{input}"),
        "no_input_format": user.replace("{content}", "{instruction}"),
        "system_format": template["system"].replace("{content}", "{system}"),
        "field_system": columns.get("system") or _NONE,
    }
    if default := template.get("default_system"):
        kind["system_prompt"] = default
    if "{eos}" in template["user"] + template["system"]:
        draft.refuse(key, why=f"{name} has the format alpaca, and the template writes the "
                     "tokenizer's end token inside a prompt",
                     do=f"write the records of {name} as messages (sharegpt)")  # fmt: skip
        return None
    return {**spec, "type": kind}


def _of_messages(
    spec: dict[str, Any],
    columns: dict[str, Any],
    tags: dict[str, Any],
    *,
    given: bool,
    tagged: bool,
) -> dict[str, Any]:
    """Return the entry of conversations: sharegpt's names, or those of dataset_info.json."""

    def tag(name: str, default: str) -> str:
        return str((tags.get(name) if tagged else default) or default)

    spec = {**spec, "type": "chat_template"}
    field = columns.get("messages") if given else "conversations"
    if field and field != "messages":
        spec["field_messages"] = field
    names = {"role": tag("role_tag", "from"), "content": tag("content_tag", "value")}
    if names != {"role": "role", "content": "content"}:
        spec["message_property_mappings"] = names
    roles = {
        "user": tag("user_tag", "human"),
        "assistant": tag("assistant_tag", "gpt"),
        "system": tag("system_tag", "system"),
    }
    other = {role: [name] for role, name in roles.items() if ROLES.get(name) != role}
    if other:
        spec["roles"] = other
    if columns.get("system"):
        spec["field_system"] = columns["system"]
    return spec


def listed(value: Any) -> list[str] | None:
    """Return names from a list, or from a text in which commas separate them."""
    if value is None:
        return None
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _template(draft: Draft) -> Mapping[str, str] | None:
    """Return the texts of the config's template; None for the tokenizer's own, or a refused one."""
    name = draft.get("template")
    if name is None:
        return None
    texts = draft.table.templates.get(str(name))
    if texts is None:
        known = ", ".join(draft.table.templates)
        why = f"needed one of {known}; the text of others is not known here"
        do = "remove template, if the tokenizer's own chat template is the same"
        if f"{name}_nothink" in draft.table.templates:
            do = f"set template: {name}_nothink, if the answers have no reasoning"
        draft.refuse("template", why=why, do=do)
        return None
    system = draft.get("default_system")
    if system is not None and not isinstance(system, str):
        draft.refuse("default_system", why="needed a text", do='set default_system: "Be brief."')
        return None
    return {**texts, "default_system": system} if system is not None else texts


def chat_template(texts: Mapping[str, str]) -> str:
    """Return a template of LLaMA-Factory in Jinja."""
    system = _expression(texts["system"], "messages[0]['content']")
    lines = [_expression(texts.get("prefix", ""), "")]
    lines.append("{%- if messages[0]['role'] == 'system' -%}" + system)
    if default := texts.get("default_system"):
        lines.append("{%- else -%}" + _expression(texts["system"], _literal(default)))
    lines.append("{%- endif -%}")
    lines.append("{%- for message in messages -%}")
    user = _expression(texts["user"], "message['content']")
    lines.append("{%- if message['role'] == 'user' -%}" + user)
    answer = _expression("{content}" + texts["end"], "message['content']")
    lines.append("{%- elif message['role'] == 'assistant' -%}" + answer)
    lines.append("{%- elif message['role'] != 'system' or not loop.first -%}")
    lines.append("{{- raise_exception('unknown role: ' + message['role']) -}}")
    lines += ["{%- endif -%}", "{%- endfor -%}"]
    return "\n".join(line for line in lines if line)


def _expression(text: str, content: str) -> str:
    """Return the Jinja expression of a text with {content}, {bos} and {eos} in it."""
    names = {"{content}": content, "{bos}": "bos_token", "{eos}": "eos_token"}
    parts = (part for part in _NAMES.split(text) if part)
    joined = " + ".join(names.get(part) or _literal(part) for part in parts)
    return f"{{{{- {joined} -}}}}" if joined else ""


def _literal(text: str) -> str:
    """Return a text as a literal of Jinja, which reads the two escapes of an emoji wrongly."""
    return json.dumps(text, ensure_ascii=False)
