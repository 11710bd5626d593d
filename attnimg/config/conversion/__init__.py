"""Convert the config of another trainer: report on each of its keys, and drop none silently."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from attnimg.config import check_values
from attnimg.config.attention import LEGACY
from attnimg.config.conversion.axolotl import convert_axolotl
from attnimg.config.conversion.draft import ConvertedKey, Draft, ReadRecords
from attnimg.config.conversion.llama_factory import convert_llama_factory
from attnimg.config.conversion.tables import NAMES, OF_TRL, KeyTable, Trainer, key_table
from attnimg.config.conversion.trl import FORMATS, Format, convert_trl
from attnimg.config.conversion.trl_preferences import convert_trl_preferences
from attnimg.config.conversion.write import config_yaml
from attnimg.config.keys import key_answers
from attnimg.config.other_names import OTHER_NAMES
from attnimg.config.read import parse_value
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Finding
from attnimg.redact import MASK, mask_secrets

__all__ = ["FORMATS", "NAMES", "Conversion", "Format", "Trainer", "convert_values", "find_trainer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The result of converting one config.

    Attributes:
        trainer: the trainer that the old config is for.
        values: the new config.
        text: the new config as YAML; "" if there are errors.
        answers: what happened to each key of the old config, in its order.
        added: keys of the new config that are the trainer's defaults.
        errors: why it can't be converted; all of them.
        warnings: what `attnimg check` warns of in the new config.
    """

    trainer: Trainer
    values: Mapping[str, Any]
    text: str
    answers: tuple[ConvertedKey, ...]
    added: Mapping[str, Any]
    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]


def find_trainer(values: Mapping[str, Any]) -> Trainer:
    """Return the trainer that a config is for: the only one that knows all of its keys.

    If there is none, it is the only one with keys that the others do not have, or else the one that
    knows most keys. A config of TRL without keys of preference training is for supervised
    fine-tuning.

    Raises:
        AttnimgError: none, or more than one (code ambiguous-config).
    """
    known = {trainer: _known_keys(trainer) for trainer in NAMES if trainer not in OF_TRL[1:]}
    known["trl"] = set[str]().union(*map(_known_keys, OF_TRL))
    own = {
        trainer: [
            key
            for key in values
            if key in keys and not any(key in k for t, k in known.items() if t != trainer)
        ]
        for trainer, keys in known.items()
    }
    found = [trainer for trainer, keys in own.items() if keys]
    complete = [trainer for trainer in known if known[trainer] >= set(values)]
    for only in (complete, found, _fewest_unknown(known, values)):
        if len(only) == 1:
            return _trainer_of_trl(values) if only[0] == "trl" else only[0]
    why = "found no key that only one of these trainers has"
    if found:
        listed = (f"{', '.join(own[trainer][:3])} of {NAMES[trainer]}" for trainer in found)
        why = f"found {' and '.join(listed)}"
    raise _ambiguous(found or [*known], why)


def _trainer_of_trl(values: Mapping[str, Any]) -> Trainer:
    """Return the trainer of TRL that knows most keys of a config.

    Raises:
        AttnimgError: several of preference training do.
    """
    known = {trainer: _known_keys(trainer) for trainer in OF_TRL}
    fewest = _fewest_unknown(known, values)
    if len(fewest) == 1 or "trl" in fewest:
        return fewest[0]
    shared = [key for key in values if key not in known["trl"]]
    raise _ambiguous(fewest, f"found {', '.join(shared[:3])}, which all of them have")


def _fewest_unknown(known: Mapping[Trainer, set[str]], values: Mapping[str, Any]) -> list[Trainer]:
    """Return the trainers that know the most keys of a config."""
    unknown = {trainer: len(values.keys() - keys) for trainer, keys in known.items()}
    return [trainer for trainer, count in unknown.items() if count == min(unknown.values())]


def _ambiguous(found: list[Trainer], why: str) -> AttnimgError:
    return AttnimgError(
        f"it is not clear which trainer the config is for: "
        f"{' or '.join(NAMES[trainer] for trainer in found)}",
        why=why,
        do=f"pass --from {' or --from '.join(found)}",
        code="ambiguous-config",
    )


def convert_values(
    values: Mapping[str, Any],
    *,
    trainer: Trainer,
    file: str,
    records: ReadRecords,
    format_of_data: Format | None = None,
) -> Conversion:
    """Convert one mapping of keys.

    Args:
        values: the old config.
        trainer: the trainer that it is for.
        file: its path, for messages, and to find files in the same folder.
        records: reads the records of a dataset.
        format_of_data: the format of TRL's datasets, where they can't be read.
    """
    table = key_table(trainer) if trainer != "axolotl" else KeyTable(
        keys={}, renamed={}, templates={}
    )  # fmt: skip
    values, secrets = _mask(values)
    names = {key: table.name(key) for key in values}
    doubled = [key for key, name in names.items() if name != key and name in values]
    names |= {key: key for key in doubled}
    draft = Draft(
        trainer=trainer,
        table=table,
        old={names[key]: value for key, value in values.items()},
        written={name: key for key, name in names.items()},
    )
    for key in doubled:
        why = f"it is the older name of {table.name(key)}, and both are set"
        draft.refuse(key, why=why, do=f"remove {key}", code="bad-value")
    if trainer == "axolotl":
        convert_axolotl(draft, file=file)
        checked_warnings: tuple[Finding, ...] = ()
    else:
        if trainer == "trl":
            convert_trl(draft, records=records, format_of_data=format_of_data)
        elif trainer in OF_TRL:
            convert_trl_preferences(draft, records=records, format_of_data=format_of_data)
        else:
            convert_llama_factory(draft, file=file, records=records)
        draft.finish()
        checked_warnings = _check(draft, file=file)
    for key, path in secrets:
        draft.refuse_secret(names[key], path)
    assert draft.answers.keys() == draft.old.keys()
    head = f"Converted from a config of {draft.name} by attnimg convert."
    added = {key: f"{draft.name}'s default" for key in draft.added}
    text = ""
    if not draft.errors:
        text = config_yaml(draft.values, head=head, comments=draft.comments, added=added)
    return Conversion(
        trainer=trainer,
        values=draft.values,
        text=text,
        answers=tuple(draft.answers[key] for key in draft.old),
        added=draft.added,
        errors=tuple(dict.fromkeys(draft.errors)),
        warnings=checked_warnings,
    )


def _mask(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the values with MASK in place of secrets, and the key and path of each secret."""
    masked, secrets = {}, []
    for key, value in values.items():
        found: list[str] = []
        masked[key] = mask_secrets(value, found, key=key, path=key)
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            # TRL and LLaMA-Factory read mappings from JSON text too.
            with suppress(AttnimgError):
                mask_secrets(parse_value(value), found, key=key, path=key)
            masked[key] = MASK if found else value
        secrets += [(key, path) for path in found]
    return masked, secrets


def _check(draft: Draft, *, file: str) -> tuple[Finding, ...]:
    """Add what `attnimg check` refuses in the new config; return its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        checked = check_values(dict(draft.values), file=file)
    if not draft.errors:  # a refused key may be missing in the new config
        draft.errors += checked.errors
    return checked.warnings


def _known_keys(trainer: Trainer) -> set[str]:
    if trainer == "axolotl":
        return {*Config.model_fields, *LEGACY, *OTHER_NAMES, *key_answers(), "plugins"}
    table = key_table(trainer)
    return {*table.keys, *table.renamed}
