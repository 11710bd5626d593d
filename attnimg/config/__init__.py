"""Check the config of a run: YAML -> Config.

Only the config's values are read: no model, GPU, package, network or other file.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any, get_args

from pydantic import ValidationError

from attnimg.backends import find_backend
from attnimg.config import keys
from attnimg.config.attention import (
    AUTO,
    AttentionSettings,
    attention_findings,
    layer_kind_findings,
    name_errors,
    replace_legacy_keys,
    variable_findings,
)
from attnimg.config.other_names import (
    EMPTY_IN_ENTRY_IS_UNSET,
    replace_batch_size,
    replace_other_names,
    with_written_name,
    without_unset,
)
from attnimg.config.read import parse_value, read_yaml, split_settings, with_overrides
from attnimg.config.rules import value_errors
from attnimg.config.schema import (
    CheckResult,
    Config,
    DatasetSpec,
    Qat,
    SpecialToken,
    make_error,
    make_warning,
)
from attnimg.config.without_effect import value_warnings
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Backend, Finding
from attnimg.redact import is_secret_key, mask_secrets, redact

__all__ = ["check_file", "check_values", "parse_torch", "split_settings", "with_overrides"]

# Keys without a default, or with one that is refused.
_WITHOUT_DEFAULT = (
    "base_model", "learning_rate", "datasets", "pretraining_dataset", "qat.weight_dtype",
)  # fmt: skip
# What data/keys.toml advises for memory.
_MEMORY = "gradient_checkpointing: true, a smaller micro_batch_size or adapter: qlora"
# The values in pydantic's message, quoted if they are text.
_VALUES = re.compile(r"'([^']*)'|(\d+)")
_DATASET_LISTS = ("datasets", "pretraining_dataset", "test_datasets")
# Keys of a dataset entry, of special_tokens, and of qat.
_NULLABLE = DatasetSpec.model_fields.keys() | set(get_args(SpecialToken)) | {"weight_dtype"}


def check_file(
    path: str,
    *,
    on: Arch | None = None,
    torch: str | None = None,
    overrides: tuple[str, ...] = (),
    variable: str = "",
) -> CheckResult:
    """Check one file; all errors are in the result, none is raised.

    Args:
        path: a YAML file, as the user typed it.
        on: the GPU to check for; None skips the rules on GPUs.
        torch: the torch version to check for; None skips the rules on versions.
        overrides: key=value arguments; see with_overrides.
        variable: the value of ATTNIMG_BACKEND; "" skips the rules on it.
    """
    try:
        values = with_overrides(read_yaml(path), overrides)
    except AttnimgError as error:
        return CheckResult(
            file=path,
            on=on.name if on else None,
            config=None,
            requested=None,
            errors=(make_error(error.code, error.key, error.what, error.why, error.do),),
            warnings=(),
        )
    return check_values(values, file=path, on=on, torch=torch, variable=variable)


def check_values(
    values: dict[str, Any],
    *,
    file: str,
    on: Arch | None = None,
    torch: str | None = None,
    variable: str = "",
) -> CheckResult:
    """Check one mapping of config keys; see check_file."""
    secrets: list[str] = []
    present = without_unset(mask_secrets(values, secrets))
    errors = [_secret_key(path) for path in secrets]
    errors += [_computed_key(key) for key in keys.COMPUTED if key in present]
    present, written, renamed = replace_other_names(present)
    values, legacy = replace_legacy_keys(
        {key: value for key, value in present.items() if key not in keys.COMPUTED}
    )
    name = values.pop("attn_implementation", None)
    bad_name = list(name_errors(name)) if name is not None else []
    config, bad_values, failed = _validate(values)
    bad_values = [error for error in bad_values if error.key not in secrets]
    config, accumulation = replace_batch_size(config)
    renamed += accumulation
    backend = find_backend(name) if isinstance(name, str) and not bad_name else None
    settings = AttentionSettings(
        config=config,
        backend=backend,
        resolved=not bad_name and name != AUTO,
        on=on,
        torch=parse_torch(torch) if torch is not None else None,
    )
    attention = list(attention_findings(settings))
    if config.attn_backends:
        attention += layer_kind_findings(config.attn_backends, settings, name)
    elif name in (None, AUTO) and variable:
        attention += variable_findings(variable, settings)
    attention = list(dict.fromkeys(attention))
    errors += [finding for finding in (*legacy, *renamed) if finding.why]
    errors += [*bad_name, *_missing_keys(values), *bad_values]
    errors += [finding for finding in attention if finding.why]
    errors += value_errors(config, failed)
    others = _other_keys(values, failed={error.key for error in errors})
    errors += [finding for finding in others if finding.why]
    errors = [with_written_name(error, written) for error in errors]
    found = (*legacy, *renamed, *attention, *others)
    warnings = [finding for finding in found if not finding.why]
    return CheckResult(
        file=file,
        on=on.name if on else None,
        config=config.model_copy(update=_flags(name, backend, bad=bool(bad_name))),
        requested=name if isinstance(name, str) else None,
        errors=tuple(errors),
        warnings=(*warnings, *value_warnings(config, failed)),
    )


def parse_torch(version: str) -> tuple[int, int]:
    """Return the major and minor version of torch.

    Raises:
        AttnimgError: the text is not a version.
    """
    from packaging.version import InvalidVersion, Version

    release: tuple[int, ...] = ()
    if version[:1].isdigit():  # packaging also accepts blanks and v before the number
        with suppress(InvalidVersion):
            release = Version(version).release
    if len(release) < 2:
        what = f"{version!r} is not a version of torch"
        why = "needed MAJOR.MINOR, such as 2.13 or 2.13.0+cpu"
        do = "pass --torch 2.13.0"
        raise AttnimgError(what, why=why, do=do, code="bad-value")
    return release[0], release[1]


def _validate(values: dict[str, Any]) -> tuple[Config, list[Finding], set[str]]:
    """Return the config with the valid keys, the errors of the others, and keys without a value.

    Of a dataset entry with an error, the valid keys are kept if the others are only unknown, else
    its path and type, so that the rules on datasets also find its errors and those of the others.
    """
    known = {key: _without_nulls(v) for key, v in values.items() if key in Config.model_fields}
    try:
        return Config.model_validate(known), [], set()
    except ValidationError as error:
        items = error.errors(include_url=False)
    found: dict[str, Finding] = {}
    for item in items:
        flag = any(i["loc"][:1] == item["loc"][:1] and "bool" in i["type"] for i in items)
        wrong = _schema_error(item, flag=flag)
        found.setdefault(wrong.key or "", wrong)
    rest, failed = dict(known), set[str]()
    for key in {str(item["loc"][0]) for item in items}:
        entries = _valid_entries(key, known[key], [i for i in items if i["loc"][0] == key])
        if entries is None:
            failed.add(key)
            del rest[key]
        else:
            rest[key] = entries
    return Config.model_validate(rest), list(found.values()), failed


def _valid_entries(key: str, value: Any, items: list[Any]) -> list[dict[str, Any]] | None:
    """Return dataset entries without what is invalid; None where it is not a list of mappings."""
    if key not in _DATASET_LISTS or not isinstance(value, list) or not value:
        return None
    entries = []
    for index, entry in enumerate(value):
        wrong = [item for item in items if item["loc"][1:2] == (index,)]
        if not isinstance(entry, dict):
            return None
        bad = {item["loc"][2] for item in wrong if len(item["loc"]) > 2}
        if not all(item["type"] == "extra_forbidden" and len(item["loc"]) == 3 for item in wrong):
            bad |= entry.keys() - {"path", "type"}
        entry = {name: item for name, item in entry.items() if name not in bad}
        entries.append({"path": "unknown", **entry})
    return entries


def _schema_error(item: Any, *, flag: bool) -> Finding:
    """Return the finding for one of pydantic's errors; flag: whether the key also takes a flag."""
    top, *rest = item["loc"]
    key = str(top)
    if top in _DATASET_LISTS and rest and isinstance(rest[0], int):
        key = f"{top}[{rest[0]}]" + (f".{rest[1]}" if len(rest) > 1 else "")
        if len(rest) > 3:  # type, the kind of type, and a key of the prompt
            key += f".{rest[3]}"
    elif top == "qat" and rest:
        key = f"qat.{rest[0]}"
        if item["type"] == "extra_forbidden":
            why = f"qat has {', '.join(Qat.model_fields)}"
            return make_error("unknown-key", key, f"{key} is not a known key", why, f"remove {key}")
    if item["type"] == "extra_forbidden":
        name = str(rest[-1])
        answer = keys.dataset_key_answers().get(name)
        if answer is None or len(rest) > 3:
            return _unknown_key(key, name)
        return _answered(key, item["input"], answer)
    if item["type"] == "missing":
        return _missing_key(key, "it has no default")
    if item["type"] == "literal_error":
        return _literal_error(key, item, flag=flag)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("dict_type", "model_type"):
        message = "needed a mapping of keys"
    why = f"found {_short(item['input'])}; {message[0].lower()}{message[1:]}"
    do = f"set {key} to a valid value"
    if isinstance(item["input"], str) and _is_quoted(item["input"]):
        do = f"set {key}: {item['input']}, without quotes"
    elif key not in _WITHOUT_DEFAULT and not key.endswith(("]", ".path")):
        do += ", or remove it for its default"
    return make_error("bad-value", key, f"{key} has an invalid value", why, do)


def _is_quoted(text: str) -> bool:
    """Return whether a text is what YAML reads as a number or a flag without quotes."""
    try:
        return not isinstance(parse_value(text), str | list | dict | None)
    except AttnimgError:
        return False


def _literal_error(key: str, item: Any, *, flag: bool) -> Finding:
    """Return the error for a value that is not one of those of its key, the nearest first."""
    value, names = str(item["input"]), [a or b for a, b in _VALUES.findall(item["ctx"]["expected"])]
    similarity = {name: SequenceMatcher(None, value, name).ratio() for name in names}
    names.sort(key=similarity.__getitem__, reverse=True)
    needed = f"needed one of {', '.join([*names, *(('true', 'false') if flag else ())])}"
    if item["loc"][-1] == "[key]":
        do = f"write {names[0]} in place of {value} in {key}"
        return make_error(
            "bad-value", key, f"{key} has an unknown name", f"found {value}; {needed}", do
        )
    field = Config.model_fields.get(key)
    nearest = names[0]
    if similarity[nearest] < 0.5 and field is not None and field.default in names:
        nearest = field.default
    do = f"set {key}: {nearest}"
    if value in keys.other_values(key):
        why = f"axolotl has {value}, attnimg does not; {needed}"
        return make_error("bad-value", key, f"{key}: {value} is not implemented", why, do)
    why = f"found {_short(item['input'])}; {needed}"
    return make_error("bad-value", key, f"{key} has an invalid value", why, do)


def _missing_keys(values: dict[str, Any]) -> list[Finding]:
    found = []
    if "base_model" not in values:
        found.append(_missing_key("base_model", "it names the model: a folder or a hub name"))
    if "learning_rate" not in values:
        found.append(_missing_key("learning_rate", "it has no default; 2e-4 is common with LoRA"))
    if not {"datasets", "pretraining_dataset"} & values.keys():
        why = "needed datasets or pretraining_dataset, the data to train on"
        found.append(_missing_key("datasets", why))
    return found


def _other_keys(values: dict[str, Any], *, failed: set[str | None]) -> list[Finding]:
    """Return findings on keys that the schema does not have, unless they already have an error."""
    found = list(keys.expert_kernel_errors(values))
    for key, value in values.items():
        if key in failed or (key in Config.model_fields and key not in keys.IN_SCHEMA):
            continue
        if key == "plugins":
            found += [_fitting(finding, values) for finding in _plugins(value)]
        elif (answer := keys.key_answers().get(key)) is not None:
            allowed = keys.allowed_values(key)
            if allowed and str(value).lower() not in allowed:
                why = f"found {_short(value)}; needed one of {', '.join(allowed)}, as in axolotl"
                what = f"{key} has an invalid value"
                found.append(make_error("bad-value", key, what, why, f"remove {key}"))
            elif (error := _wrong_options(key, value)) is not None:
                found.append(error)
            elif answer.applies(value):
                found.append(_fitting(_answered(key, value, answer), values))
        elif not key.startswith("lora_"):
            found.append(_unknown_key(key, key))
        elif value is not False:  # adapter keys of axolotl's plugins have no effect if false
            found.append(replace(_unknown_key(key, key), code="unsupported-key"))
    return found


def _wrong_options(key: str, value: Any) -> Finding | None:
    """Return the error for a mapping with names that axolotl refuses; None without any."""
    allowed = keys.allowed_options(key)
    if not allowed or not value or (isinstance(value, dict) and value.keys() <= {*allowed}):
        return None
    why = (
        f"found {_short(value)}; needed a mapping with some of {', '.join(allowed)}, as in axolotl"
    )
    return make_error("bad-value", key, f"{key} has an invalid value", why, f"remove {key}")


def _fitting(finding: Finding, values: dict[str, Any]) -> Finding:
    """Return a hint whose advice on memory names only what the config does not have already."""
    options = []
    if not values.get("gradient_checkpointing"):
        options.append("gradient_checkpointing: true")
    batch = values.get("micro_batch_size", 1)
    options.append(f"a smaller {'sequence_len' if batch == 1 else 'micro_batch_size'}")
    if values.get("adapter") != "qlora":
        options.append("adapter: qlora")
    text = " or ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    return replace(finding, do=finding.do.replace(_MEMORY, text))


def _plugins(value: Any) -> list[Finding]:
    """Return a finding on each of axolotl's plugins that the config names."""
    if not value:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        why = f"found {_short(value)}, needed a list of names of classes"
        return [make_error("bad-value", "plugins", "plugins has an invalid value", why,
                           "remove plugins")]  # fmt: skip
    return [
        _answered("plugins", name, keys.plugin_answers().get(name, _OTHER_PLUGIN), what=name)
        for name in dict.fromkeys(names)
    ]


_OTHER_PLUGIN = keys.KeyAnswer(
    answer="refused",
    reason="it runs code that attnimg does not know, in axolotl's trainer",
    do="remove it from plugins",
)


def _answered(key: str, value: Any, answer: keys.KeyAnswer, *, what: str | None = None) -> Finding:
    """Return the error or the warning for a key of axolotl that the schema does not have."""
    name = what or key
    if answer.answer == "refused":
        why = f"found {_short(value)}; {answer.reason}"
        return make_error("unsupported-key", key, f"{name} is not implemented", why, answer.do)
    verb = "is not used" if answer.answer == "hint-not-used" else "is done by other means"
    return make_warning(answer.answer, key, f"{name} {verb}: {answer.reason}", answer.do)


def _computed_key(key: str) -> Finding:
    what, why = f"{key} cannot be set", "it is computed from attn_implementation"
    return make_error("computed-flag", key, what, why, f"remove {key}")


def _missing_key(key: str, why: str) -> Finding:
    return make_error("missing-key", key, f"{key} is missing", why, f"add a line `{key}: ...`")


# The variables from which libraries read secrets that axolotl's users write in configs.
# Source: huggingface_hub 1.x, constants.py; wandb 0.31, env.py; mlflow 3.17,
# environment_variables.py (2026-11-27)
_VARIABLES = {
    "hf_use_auth_token": "HF_TOKEN",
    "hub_token": "HF_TOKEN",
    "mlflow_tracking_password": "MLFLOW_TRACKING_PASSWORD",
    "mlflow_tracking_uri": "MLFLOW_TRACKING_URI",
    "push_to_hub_token": "HF_TOKEN",
    "wandb_api_key": "WANDB_API_KEY",
}


def _secret_key(path: str) -> Finding:
    """Return the error for a key that has a secret; the value is not in it."""
    top = path.partition(".")[0].partition("[")[0]
    known = top in Config.model_fields and top not in keys.IN_SCHEMA
    code = "bad-value" if known else "unknown-key"
    if top in keys.key_answers():
        code = "unsupported-key"
    why = "found a value, which is not shown here; receipts and checkpoints keep the config"
    name = path.rpartition(".")[2].partition("[")[0]
    if variable := _VARIABLES.get(name.lower()):
        do = f"remove it, and set the environment variable {variable}"
    elif is_secret_key(name) or not known:
        do = f"remove {path}"
    else:
        do = "write it without a user, a password or a token"
    what = f"{path} has a secret, which can't be in a config"
    return make_error(code, path, what, why, do)


def _unknown_key(key: str, name: str) -> Finding:
    similar = keys.nearest_key(name, dataset=key != name)
    what = f"{key if key.isprintable() and key else repr(key)} is not a known key"
    why = "neither attnimg nor axolotl knows it, and it would have no effect"
    do = f"did you mean {similar}?" if similar else "remove it; docs/config-keys.md lists the keys"
    return make_error("unknown-key", key, what, why, do)


def _flags(name: Any, backend: Backend | None, *, bad: bool) -> dict[str, Any]:
    unknown = bad or name == AUTO
    return {
        "attn_implementation": None if bad else name,
        "attn_supports_packing": None if unknown else bool(backend and backend.packing == "native"),
        "attn_uses_flash_lib": None if unknown else bool(backend and backend.uses_flash_lib),
        "attn_needs_dtype_cast": None if unknown else bool(backend and backend.needs_dtype_cast),
    }


def _without_nulls(value: Any) -> Any:
    """Return a value without nulls in dataset entries, special_tokens and qat: null means absent.

    So does a text without characters, in the keys of a dataset entry that axolotl tests by their
    truth.
    """
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict) and value.keys() & _NULLABLE:
        return {
            key: item
            for key, item in value.items()
            if item is not None
            and not (item is False and key in keys.dataset_key_answers())
            and not (item == "" and key in EMPTY_IN_ENTRY_IS_UNSET)
        }
    return value


def _short(value: Any) -> str:
    text = redact(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
