"""Run `attnimg explain`: check every backend for a config or a model, here or on another GPU."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from attnimg import config
from attnimg.cli import JSON, ON, argument, as_json
from attnimg.config.schema import Checked, Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Finding, Machine, Model, Plan, Problem
from attnimg.selection import plan
from attnimg.selection.model_config import read_config
from attnimg.selection.run_findings import other_layers, quadratic_memory
from attnimg.task import (
    gpu_text,
    image_notes,
    machine_notes,
    machine_of,
    model_file,
    problem_of,
    read_model,
    run_findings,
)
from attnimg.train.base_model import judge_base_model

# Errors about the choice of a backend, which this command explains instead of stopping.
_JUDGEMENTS = frozenset(
    {"arch-too-old", "arch-mismatch", "sage-arch", "fp8-arch", "fp8-torch", "flex-torch"}
    | {"s2-with-packing", "packing-not-isolated", "not-causal-lm", "not-trainable", "loss-differs"}
    | {"quantized-checkpoint", "positions-short"}
)
# Findings that depend on sequence_len, which only a config has.
_LENGTH_CODES = frozenset({"positions-short", "positions-beyond"})
# org/name; a name that ends in .yaml is a missing config.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/(?!.*\.ya?ml$)[\w.-]+", re.ASCII)
# Errors about a name that is not a backend, with which nothing can be chosen.
_NO_NAME = frozenset({"unknown-backend", "alias-rejected", "not-a-string"})


ARGUMENTS = (
    argument("target", metavar="CONFIG_OR_MODEL", help="A YAML, a model folder, config.json."),
    ON,
    argument("--image", metavar="NAME", help="Assume this image's packages: hopper, ada, cpu."),
    JSON,
)


def explain(target: str, on: str | None, image: str | None, as_json_lines: bool) -> None:
    """Explain which backend would run, why, and the reasons against each other one."""
    machine, assumed = machine_of(on, image)
    checked = _checked(target, on=machine.arch if on is not None or image is not None else None)
    model = found = task = None
    if (values := checked.config) is not None:
        checked, model, dropout = _with_model(checked, values)
        task = problem_of(values, model=model, dropout=dropout, arch=machine.arch)
        if _is_model(target):  # the row length is not known without a config
            task = replace(task, sequence_len=None)
        asked = values.attn_implementation
        found = plan.choose(asked, machine, task, strict=values.attn_strict)
        if _NO_NAME & {error.code for error in checked.errors}:
            found = _no_name(checked, found)
        errors, notes = run_findings(found, task, machine)
        if model is not None:
            judge = _for_some_run if _is_model(target) else _judge_base_model
            refusals, warnings = judge(values, machine)
            errors, notes = (*errors, *refusals), (*notes, *warnings)
        checked = replace(
            checked,
            errors=(*checked.errors, *errors),
            warnings=(*checked.warnings, *notes),
        )
    checked = replace(
        checked,
        warnings=(*checked.warnings, *machine_notes(machine), *image_notes(on, assumed)),
    )
    if as_json_lines:
        shown = as_json.explained_json(
            checked,
            model=model,
            plan=found,
            on=machine.arch.name,
            image=assumed,
            others=other_layers(model, machine),
            memory=quadratic_memory(found, task) if found and task else None,
        )
        print(as_json.line(shown))
    else:
        _print(checked, found, machine=machine, model=model, task=task)
    invalid = any(error.code not in _JUDGEMENTS for error in checked.errors)
    raise SystemExit(2 if invalid else 0)


def _checked(target: str, *, on: Arch | None) -> Checked:
    """Check a config; for a model, check a config that has only base_model."""
    if not _is_model(target):
        return config.check_file(target, on=on)
    values = {"base_model": target, "learning_rate": 1.0, "datasets": [{"path": target}]}
    checked = config.check_values(values, file=target, on=on)
    assert checked.config is not None
    # These two keys are only set to pass the check.
    unsaid = {"learning_rate": None, "datasets": None}
    return replace(checked, config=checked.config.model_copy(update=unsaid))


def _is_model(target: str) -> bool:
    path = Path(target)
    if path.is_file():
        # A run's config may be JSON too; it has other keys than a model's config.json.
        return path.suffix == ".json" and not {"datasets", "learning_rate"} & _json_keys(path)
    return path.is_dir() or _HUB_NAME.fullmatch(target) is not None


def _json_keys(path: Path) -> set[str]:
    try:
        return set(read_config(path))
    except AttnimgError:
        return set()


def _with_model(checked: Checked, values: Config) -> tuple[Checked, Model | None, float]:
    """Read the model, and add errors and warnings about it."""
    try:
        model, dropout = read_model(values)
    except AttnimgError as error:
        return replace(checked, errors=(*checked.errors, _as_finding(error))), None, 0.0
    note = None
    if model is None:
        note = Finding(
            code="model-not-at-hand",
            key="base_model",
            what=f"the config.json of {values.base_model} is not on this machine: "
            "no layer could be judged",
            do="pass the model's folder as base_model, or download the model first",
        )
    elif not model.layers:
        why = "; ".join(model.unknown) or "it has no softmax attention"
        note = Finding(
            code="no-attention-layers",
            key="base_model",
            what=f"no attention layer was found in {values.base_model}: {why}",
            do="read the choice as one without any layer to judge",
        )
    warnings = (*checked.warnings, note) if note else checked.warnings
    return replace(checked, warnings=warnings), model, dropout


def _judge_base_model(
    values: Config, machine: Machine
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return the errors and the warnings of `train` about the base model."""
    path = model_file(values)
    assert path is not None
    errors, warnings = judge_base_model(values, read_config(path), machine)
    return tuple(_as_finding(error) for error in errors), tuple(warnings)


def _for_some_run(
    values: Config, machine: Machine
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return the findings about a model without a config, for training with or without an adapter.

    Errors of full fine-tuning only are returned as warnings.
    """
    full, notes = _judge_base_model(values, machine)
    lora, _ = _judge_base_model(values.model_copy(update={"adapter": "lora"}), machine)
    errors = tuple(error for error in full if error in lora)
    warnings = tuple(error for error in full if error not in lora)
    return tuple(e for e in errors if e.code not in _LENGTH_CODES), tuple(
        note for note in (*warnings, *notes) if note.code not in _LENGTH_CODES
    )


def _as_finding(error: AttnimgError) -> Finding:
    return Finding(code=error.code, key=error.key, what=error.what, why=error.why, do=error.do)


def _no_name(checked: Checked, found: Plan) -> Plan:
    return Plan(
        asked=checked.requested or "?",
        chosen=None,
        because="attn_implementation names no backend",
        verdicts=found.verdicts,
        do="write one of the candidates below",
    )


def _print(
    checked: Checked,
    found: Plan | None,
    *,
    machine: Machine,
    model: Model | None,
    task: Problem | None,
) -> None:
    from attnimg.cli import as_text

    out, err = as_text.console(sys.stdout), as_text.console(sys.stderr)
    if found is not None and task is not None:
        as_text.print_explained(
            found,
            gpu=gpu_text(machine),
            model=model,
            problem=task,
            others=other_layers(model, machine),
            out=out,
        )
        out.print()
    as_text.print_findings(checked, err=err)
