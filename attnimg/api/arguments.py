"""Check the arguments of the API, and read what is known about a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from attnimg import application
from attnimg.config.attention import name_errors
from attnimg.errors import AttnimgError, bad_value
from attnimg.facts import DType, LayerKind
from attnimg.run_facts import Model, ModelClass
from attnimg.selection import model_config, model_types
from attnimg.selection import plan as planning
from attnimg.selection.attention_shapes import read_attention_dropout, read_model


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """The facts about a model: its attention, class, name and the dtype of its weights."""

    model: Model
    model_class: ModelClass | None
    dropout: float
    name: str
    weights: DType | None = None


def backend_name(name: str) -> str | None:
    """Return the requested backend, None for "auto"; raise for a name that is not a backend."""
    for error in name_errors(name):
        raise AttnimgError(error.what, why=error.why, do=error.do, code=error.code, key="backend")
    return None if name == planning.AUTO else name


def require_kinds(backends: Mapping[LayerKind, str] | None, backend: str) -> None:
    """Raise unless `backends` names backends for known kinds of layers, and `backend` is "auto"."""
    if not backends:
        return
    if not isinstance(backends, Mapping):
        raise _bad_value("backends", "is not a dict", backends, '{"sliding": NAME, "full": NAME}')
    if unknown := backends.keys() - {*get_args(LayerKind)}:
        raise bad_value(
            "backends",
            f"backends has an unknown kind of layers: {min(map(str, unknown))}",
            why=f"known are {', '.join(get_args(LayerKind))}",
            do='pass backends={"sliding": NAME, "full": NAME}',
        )
    for name in backends.values():
        backend_name(name)
    if backend != planning.AUTO:
        why = f"found backend={backend!r} and backends={dict(backends)!r}"
        what = "backends and backend exclude each other"
        raise bad_value("backends", what, why=why, do="leave backend out")


def require_counts(**counts: int | None) -> None:
    """Raise unless each is a whole number of at least 1, or None for an unknown sequence_len."""
    for key, count in counts.items():
        unknown = count is None and key == "sequence_len"
        if not unknown and (type(count) is not int or count < 1):
            raise _bad_value(key, "is not a whole number of at least 1", count, "8192")


def require_flags(**flags: object) -> None:
    """Raise unless each is True or False, or None for autocast."""
    for key, flag in flags.items():
        if not isinstance(flag, bool) and not (flag is None and key == "autocast"):
            raise _bad_value(key, "is neither True nor False", flag, "True")


def require_names(**names: object) -> None:
    """Raise unless each is a string, or None."""
    for key, name in names.items():
        if name is not None and not isinstance(name, str):
            example = {"on": '"h100"', "image": '"hopper"'}[key]
            raise _bad_value(key, "is not a string", name, example)


def _bad_value(key: str, what: str, found: object, example: str) -> AttnimgError:
    do = f"pass {key}={example}, or leave it out"
    return bad_value(key, f"{key} {what}", why=f"found {found!r}", do=do)


# The names that trainers' arguments have for them.
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def read_dtype(given: Any, facts: ModelFacts, arch: Any) -> DType:
    """Return the precision of q, k and v."""
    name = str(given).removeprefix("torch.")
    name = _DTYPE_NAMES.get(name, name)
    if name == "auto":
        return (
            _autocast_dtype(arch)
            or facts.weights
            or planning.training_dtype(bf16="auto", fp16=False, arch=arch)
        )
    if name not in get_args(DType):
        raise _bad_value(
            "dtype", f"is not one of {', '.join(get_args(DType))}", given, '"bfloat16"'
        )
    found: DType = name  # type: ignore[assignment]  # checked in the line above
    return found


def _autocast_dtype(arch: Any) -> DType | None:
    """Return the dtype of the torch.autocast block around the call; None outside of one."""
    import sys

    if (torch := sys.modules.get("torch")) is None:
        return None
    device = "cpu" if arch.vendor == "cpu" else "cuda"
    if not torch.is_autocast_enabled(device):
        return None
    name: DType = str(torch.get_autocast_dtype(device)).removeprefix("torch.")  # type: ignore[assignment]  # torch's own name
    return name


def read_facts(model: object) -> ModelFacts:
    """Read what is known about a model.

    Raises:
        AttnimgError: its config can't be read, or is not on this machine.
    """
    if isinstance(model, str | os.PathLike):
        return _named_model(os.fspath(model))
    if isinstance(model, Mapping):
        facts = _from_config(model, name=str(model.get("_name_or_path") or "the model"))
        _require_attention(model, facts)
        return facts
    config = getattr(model, "config", model)
    if not hasattr(config, "to_dict"):
        raise AttnimgError(
            "this is not a model",
            why=f"found {type(model).__name__}",
            do="pass a model, a transformers config, a dict as in config.json, a folder or a name",
            code="bad-model",
            key="model",
        )
    raw = config.to_dict()
    facts = _from_config(raw, name=str(getattr(config, "_name_or_path", "") or "the model"))
    if config is model:
        return facts
    weights = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return replace(
        facts,
        model_class=application.read_class_limits(type(application.inner_model(model))),
        weights=weights if weights in get_args(DType) else None,  # type: ignore[arg-type]  # checked
    )


def _require_attention(raw: Mapping[str, Any], facts: ModelFacts) -> None:
    """Raise if a dict lacks what is needed to know the attention layers of its model."""
    if facts.model.layers or facts.model.other_layers or facts.model_class is not None:
        return
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    missing = [
        name
        for name in needed
        if not any(raw.get(key) for key in (name, *model_config.ALIASES.get(name, ())))
    ]
    found = f"found {', '.join(map(str, raw)) or 'nothing'}"
    raise AttnimgError(
        "the dict does not describe the attention of a model",
        why=f"{found}; needed {', '.join(missing)}, or a known model_type",
        do=f"add {', '.join(missing)} as in config.json, or pass the model's folder or name",
        code="bad-model",
        key="model",
    )


def _named_model(name: str) -> ModelFacts:
    path = model_config.find_config(name)
    if path is None and (missing := model_config.missing_folder(name)) is not None:
        raise missing
    if path is None:
        do = f"run hf download {name} config.json, or pass the loaded model"
        if model_config.may_be_path(name):
            do = f"pass the path of the model's folder; if {name} is a name on the hub, {do}"
        raise AttnimgError(
            f"the config.json of {name} is not on this machine",
            why="found neither a folder of that name nor a snapshot in the Hugging Face cache",
            do=do,
            code="model-not-at-hand",
            key="model",
        )
    return _from_config(model_config.read_config(path), name=name, file=Path(path).name)


def _from_config(raw: Mapping[str, Any], *, name: str, file: str = "config.json") -> ModelFacts:
    model = read_model(raw, file=file)
    return ModelFacts(
        model=model,
        model_class=model_types.find_class(model.type),
        dropout=read_attention_dropout(raw, file=file),
        name=name,
    )
