"""Convert a config of `trl sft --config`.

The meaning of each key is in data/convert/trl.toml.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from attnimg.config.conversion.draft import Draft, ReadRecords
from attnimg.config.conversion.training import convert_precision, convert_training, evaluates

# The formats of TRL's datasets, which it finds from the columns.
# Source: https://huggingface.co/docs/trl/dataset_formats (2026-11-27)
Format = Literal["messages", "conversations", "text", "prompt-completion"]
FORMATS: tuple[Format, ...] = ("messages", "conversations", "text", "prompt-completion")
# The columns that TRL reads, besides those of the formats and tools.
# Source: TRL 1.16, trainer/sft_trainer.py, _prepare_dataset and _set_signature_columns_if_needed,
# and data_utils.py, is_conversational (2026-11-27)
_NOT_CONVERTED = {"chat_template_kwargs", "image", "images", "input_ids", "labels", "seq_lengths",
                  "assistant_masks", "completion_mask", "chosen", "rejected"}  # fmt: skip
# The key of the first message from which TRL recognizes a conversation.
_ROLES: dict[Format, str] = {"messages": "role", "conversations": "from"}

_ENTRY = ("path", "name", "data_files", "split")


def convert_trl(draft: Draft, *, records: ReadRecords, format_of_data: Format | None) -> None:
    """Convert the keys of TRL whose value is not simply that of one of our keys.

    Args:
        draft: the conversion.
        records: reads the records of a dataset.
        format_of_data: the format of the datasets, where their columns can't be read.
    """
    convert_model(draft)
    _tokens(draft)
    _lengths(draft)
    _datasets(draft, records=records, format_of_data=format_of_data)
    loss = draft.get("loss_type")
    if loss in ("nll", "chunked_nll"):
        draft.answer("loss_type", reason="the loss of every run of attnimg")
    else:
        draft.refuse("loss_type", why="attnimg has no other loss than nll", do="set loss_type: nll")
    if draft.get("activation_offloading") and not draft.get("gradient_checkpointing"):
        draft.refuse(
            "activation_offloading", why="attnimg moves the activations of checkpointed layers",
            do="set gradient_checkpointing: true, or remove it",
        )  # fmt: skip


def convert_model(draft: Draft) -> None:
    """Convert the keys that all of TRL's scripts share, besides those of the data."""
    draft.put("base_model", draft.get("model_name_or_path"), "model_name_or_path")
    revision = draft.get("model_revision")
    draft.put("revision_of_model", None if revision == "main" else revision, "model_revision")
    name = draft.get("attn_implementation")
    draft.put("attn_implementation", name, "attn_implementation")
    _adapter(draft)
    convert_training(draft)
    _precision(draft)


def _adapter(draft: Draft) -> None:
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
             "lora_target_parameters", "lora_modules_to_save", "use_rslora",
             "use_dora")  # fmt: skip
    bits = draft.get("load_in_4bit")
    quantization = {
        "bnb_4bit_quant_type": draft.get("bnb_4bit_quant_type"),
        "bnb_4bit_use_double_quant": bool(draft.get("use_bnb_nested_quant")),
    }
    sources = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
    if not draft.get("use_peft"):
        for key in ("use_peft", *names):
            draft.answer(key, reason="use_peft is false, so it has no effect")
        for key in ("load_in_4bit", "load_in_8bit"):
            if draft.get(key):
                draft.refuse(key, why="quantized weights can't be trained without an adapter",
                             do="set use_peft: true, or remove it")  # fmt: skip
    else:
        if not (draft.get("lora_target_modules") or draft.get("lora_target_parameters")):
            why = "PEFT then adapts a few layers by the model type, mostly q_proj and v_proj; "
            why += "attnimg adapts all linear layers if the config names none"
            do = "set lora_target_modules: [q_proj, v_proj], or those of peft's mapping"
            draft.refuse("lora_target_modules", why=why, do=do)
        draft.put("adapter", "qlora" if bits else "lora", "use_peft", "load_in_4bit")
        for key in names:
            ours = {"use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora"}.get(key, key)
            value = draft.get(key)
            if key == "lora_target_modules" and isinstance(value, list) and len(value) == 1:
                value = value[0]  # TRL: one name is a pattern, as all-linear is
            draft.put(ours, value or None if value is False else value, key)
    if bits:
        storage = draft.get("bnb_4bit_quant_storage")
        dtype = str(draft.get("dtype"))
        quantization["bnb_4bit_compute_dtype"] = dtype if dtype != "auto" else "float32"
        if storage is not None:
            quantization["bnb_4bit_quant_storage"] = storage
        draft.put("bnb_config_kwargs", quantization, *sources)
    for key in sources:
        draft.answer(key, reason="" if bits else "load_in_4bit is false")


def _precision(draft: Draft) -> None:
    weights, adapter = str(draft.get("dtype")), draft.values.get("adapter")
    bf16 = draft.get("bf16")
    bf16 = not draft.get("fp16") if bf16 is None else bool(bf16)
    if weights == "float16" or (weights == "bfloat16" and not bf16):
        why = f"attnimg does not train weights in {weights} with bf16: {str(bf16).lower()}"
        draft.refuse("dtype", why=why, do="set dtype: bfloat16 and bf16: true, or dtype: float32")
    elif weights == "auto" and not adapter and bf16:
        why = "it is the precision of the model's file, which is not read here"
        draft.refuse("dtype", why=why, do="set dtype: bfloat16, or dtype: float32")
    elif weights not in ("auto", "bfloat16", "float32"):
        draft.refuse("dtype", why="needed auto, bfloat16 or float32", do="set dtype: float32")
    else:
        convert_precision(draft, bf16=bf16, weights=weights, sources=("bf16", "dtype"))


def _tokens(draft: Draft) -> None:
    tokens = {key: draft.get(key) for key in ("eos_token", "pad_token") if draft.given(key)}
    draft.add_entry("special_tokens", tokens)
    for key in tokens:
        draft.answer(key, to=("special_tokens",))
    path = draft.get("chat_template_path")
    if path is None:
        return
    if str(path).endswith(".jinja"):
        draft.put("chat_template", "jinja", "chat_template_path")
        draft.put("chat_template_jinja", path, "chat_template_path")
    else:
        draft.refuse("chat_template_path", why="attnimg reads templates only from .jinja files",
                     do="save the template to a file whose name ends with .jinja")  # fmt: skip


def _lengths(draft: Draft) -> None:
    length, packing = draft.get("max_length"), bool(draft.get("packing"))
    if "max_length" in draft.old and draft.old["max_length"] is None:
        draft.refuse("max_length", why="null means no limit on the length of documents",
                     do="set max_length to the tokens of the longest document")  # fmt: skip
    draft.put("sequence_len", length, "max_length", reason="longer documents are cut, as in TRL")
    draft.put("sample_packing", packing or None, "packing")
    strategy = draft.get("packing_strategy")
    if packing and strategy not in ("bfd", "bfd_split"):
        why = "parts of documents in a row attend to each other; attnimg isolates documents"
        draft.refuse("packing_strategy", why=why, do="set packing_strategy: bfd")
    elif not packing and draft.get("truncation_mode") != "keep_start":
        draft.refuse("truncation_mode", why="attnimg keeps the start of long documents",
                     do="set truncation_mode: keep_start")  # fmt: skip
    splits = packing and strategy == "bfd_split"
    draft.put("excess_length_strategy", "split" if splits else "truncate", "packing_strategy",
              "truncation_mode")  # fmt: skip
    if packing:
        draft.comments["sample_packing"] = (
            "documents in a row do not attend to each other; rows are filled in another order"
        )
    evaluated = draft.get("eval_packing")
    evaluated = packing if evaluated is None else evaluated
    if evaluates(draft) and packing:
        draft.put("eval_sample_packing", bool(evaluated), "eval_packing")
    elif evaluates(draft) and evaluated:
        draft.refuse("eval_packing", why="attnimg packs evaluation data only if training is packed",
                     do="set eval_packing: false, or packing: true")  # fmt: skip
    draft.answer("eval_packing", reason="" if evaluates(draft) else "the run does not evaluate")


def _datasets(draft: Draft, *, records: ReadRecords, format_of_data: Format | None) -> None:
    specs = read_specs(draft)
    kinds = [(spec.get("path"), _format(draft, _columns(records(spec))[0])) for spec in specs]
    if len({kind for _, kind in kinds if kind}) > 1:
        listed = ", ".join(f"{path} has {kind}" for path, kind in kinds if kind)
        why = f"TRL takes the format of the first record for all datasets, and {listed}"
        draft.refuse("datasets", why=why, do="name only datasets of one format")
        return
    types = [_type(draft, spec, records=records, format_of_data=format_of_data) for spec in specs]
    write_specs(draft, [spec | found for spec, found in zip(specs, types, strict=True) if found],
                complete=None not in types)  # fmt: skip
    draft.answer("dataset_text_field", to=("datasets",) if draft.values.get("datasets") else ())


def read_specs(draft: Draft) -> list[dict[str, Any]]:
    """Return the path, name, files and split of each dataset; none if they can't be converted."""
    entries = draft.get("datasets")
    if not entries:
        name, config = draft.get("dataset_name"), draft.get("dataset_config")
        if name is None:
            draft.errors.append(_missing("dataset_name"))
            return []
        entries = [{"path": name, "name": config, "split": draft.get("dataset_train_split")}]
    elif draft.given("dataset_name"):
        for key in ("dataset_name", "dataset_config"):
            draft.answer(key, reason="datasets takes precedence over it, as in TRL")
    streaming = (
        draft.get("streaming") if draft.given("datasets") else draft.get("dataset_streaming")
    )
    draft.put("streaming", streaming or None, "streaming", "dataset_streaming")
    draft.put("val_set_size", draft.get("test_split_size"), "test_split_size",
              reason="the documents are split differently from TRL")  # fmt: skip
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        draft.refuse("datasets", why="needed a list of mappings, each with path",
                     do="write each dataset as `- path: ...`", code="bad-value")  # fmt: skip
        return []
    specs = []
    for entry in entries:
        for key in entry.keys() - set(_ENTRY):
            if entry[key] is not None:
                why = f"{key} of an entry is not implemented"
                draft.refuse("datasets", why=why, do=f"remove {key}")
        spec = {key: entry[key] for key in _ENTRY if entry.get(key) is not None}
        if spec.get("split") == "train":
            del spec["split"]
        specs.append(spec)
    return specs


def write_specs(draft: Draft, written: list[dict[str, Any]], *, complete: bool) -> None:
    """Set datasets and test_datasets from entries with their types.

    Args:
        draft: the conversion.
        written: the entries.
        complete: whether none of them was refused.
    """
    if not complete or not written:
        return
    sources: tuple[str, ...] = ("datasets",)
    if not draft.get("datasets"):
        sources = ("dataset_name", "dataset_config", "dataset_train_split")
    for key in sources:
        draft.answer(key, to=("datasets",))
    draft.values["datasets"] = written
    if evaluates(draft) and not draft.given("test_split_size") and not draft.given("datasets"):
        split = draft.get("dataset_test_split")
        draft.values["test_datasets"] = [{**entry, "split": split} for entry in written]
        draft.answer("dataset_test_split", to=("test_datasets",))


def _type(
    draft: Draft, spec: dict[str, Any], *, records: ReadRecords, format_of_data: Format | None
) -> dict[str, Any] | None:
    """Return the entry's type and what belongs to it; None if it can't be converted."""
    key = "datasets" if draft.given("datasets") else "dataset_name"
    first, columns = _columns(records(spec))
    kind = _format(draft, first)
    if first is None:
        kind = format_of_data or kind
    elif format_of_data not in (None, kind) and kind is not None:
        why = f"TRL finds the format {kind} in the first record, not {format_of_data}"
        draft.refuse(key, why=why, do=f"pass --dataset-format {kind}")
        return None
    if kind is None:
        why = "its columns decide what is trained, and they can't be read here"
        do = f"pass --dataset-format with one of {', '.join(FORMATS)}"
        if first is not None:
            why = f"found the columns {', '.join(sorted(first))}; needed messages, conversations, "
            why += f"{draft.get('dataset_text_field')}, or prompt and completion"
            do = "set dataset_text_field to the column of the text"
        draft.refuse(key, why=why, do=do)
        for other in ("assistant_only_loss", "completion_only_loss", "dataset_text_field"):
            draft.note(other, "refused", reason=f"it depends on the format of {key}", do=do)
        return None
    if first is not None and not _is_readable(draft, key, kind, first, columns):
        return None
    whole = not draft.get("assistant_only_loss")
    if kind in ("messages", "conversations"):
        draft.put("train_on_inputs", whole, "assistant_only_loss")
        draft.answer("completion_only_loss", reason="the records have no completion")
        if whole:
            draft.comments["train_on_inputs"] = "TRL trains all tokens of a conversation"
        else:
            draft.comments["train_on_inputs"] = (
                "only answers have loss, with the token that ends a turn; in TRL the template "
                "decides whether blanks around them do"
            )
        names = {"field_messages": "conversations",
                 "message_property_mappings": {"role": "from", "content": "value"}}  # fmt: skip
        return {"type": "chat_template", **(names if kind == "conversations" else {})}
    if not whole:
        draft.refuse("assistant_only_loss", why=f"the dataset has the format {kind}",
                     do="remove it: it is for conversations")  # fmt: skip
        return None
    draft.answer("assistant_only_loss", reason="false")
    if kind == "text":
        draft.answer("completion_only_loss", reason="the records have no completion")
        field = draft.get("dataset_text_field")
        return {"type": "completion", **({"field": field} if field != "text" else {})}
    everywhere = draft.get("completion_only_loss") is False
    draft.put("train_on_inputs", everywhere, "completion_only_loss")
    # Prompt and completion, joined without changes.
    return {"type": {"field_instruction": "prompt", "field_output": "completion",
                     "format": "{instruction}", "no_input_format": "{instruction}"}}  # fmt: skip


def _columns(
    records: Iterable[Mapping[str, Any]],
) -> tuple[Mapping[str, Any] | None, set[str]]:
    """Return the first record, and the columns that have a value in any record."""
    first, columns = None, set[str]()
    for record in records:
        first = record if first is None else first
        columns |= {name for name, value in record.items() if value is not None}
    return first, columns


def _format(draft: Draft, first: Mapping[str, Any] | None) -> Format | None:
    """Return the format that TRL finds from the columns of a record, or that a key needs."""
    text = draft.get("dataset_text_field")
    if first is None:
        if draft.get("completion_only_loss") is True:
            return "prompt-completion"
        return "text" if draft.given("dataset_text_field") and text != "messages" else None
    if {"prompt", "completion"} <= first.keys():
        return "prompt-completion"
    # TRL renames conversations to messages, and so replaces a column of that name.
    if _is_chat(first.get("conversations"), "from"):
        return "conversations"
    for name in _ROLES:
        if name in first:
            return name
    return "text" if text in first else None


def _is_readable(
    draft: Draft, key: str, kind: Format, first: Mapping[str, Any], columns: set[str]
) -> bool:
    """Return whether attnimg reads records as TRL does; refuse the key that names them if not."""
    if found := sorted(columns & _NOT_CONVERTED):
        why = f"the records have {', '.join(found)}, which TRL reads and attnimg does not"
        do = "remove the columns from the data, if the run may be trained without them"
        draft.refuse(key, why=why, do=do)
    elif "prompt" in columns and kind != "prompt-completion":
        why = "the records have a column prompt, which TRL reads together with completion"
        draft.refuse(key, why=why, do="rename that column")
    elif "system" in columns and kind != "text":
        why = "the records have a column system, which TRL does not read"
        draft.refuse(key, why=why, do="rename that column")
    elif kind in _ROLES:
        if _is_chat(first.get(kind), _ROLES[kind]):
            return True
        why = f"{kind} of the first record is not a list of messages, each with {_ROLES[kind]}"
        do = "write each record as one conversation, in a column messages"
        draft.refuse(key, why=why, do=do)
    else:
        names: tuple[str, ...] = ("prompt", "completion")
        if kind == "text":
            names = (str(draft.get("dataset_text_field")),)
        if all(isinstance(first.get(name), str) for name in names):
            return True
        why = f"needed text in {' and '.join(names)} of the first record"
        do = "write each record as one conversation, in a column messages"
        draft.refuse(key, why=why, do=do)
    return False


def _is_chat(value: object, role: str) -> bool:
    """Return whether TRL reads a value as a conversation: the first message has a role."""
    return bool(isinstance(value, list) and value
                and isinstance(value[0], Mapping) and role in value[0])  # fmt: skip


def _missing(key: str) -> Any:
    from attnimg.config.schema import make_error

    why = "needed dataset_name or datasets, the data to train on"
    return make_error("missing-key", key, f"{key} is missing", why, f"add a line `{key}: ...`")
