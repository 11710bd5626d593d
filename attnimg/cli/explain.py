"""Run `attnimg explain`: check every backend for a config or a model, here or on another GPU."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from attnimg import config
from attnimg.cli import json_line
from attnimg.cli.check import checked_json
from attnimg.config.schema import CheckResult, Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Finding, Machine
from attnimg.memory.report import MemoryReport, memory_dict, memory_warning, report_memory
from attnimg.run_facts import Model, Plan
from attnimg.selection.model_config import read_config
from attnimg.selection.plan import plan_dict
from attnimg.selection.run_findings import other_layers, quadratic_memory, run_findings
from attnimg.task import (
    Task,
    assumed_platform,
    assumed_text,
    build_task,
    find_machine,
    gpu_text,
    image_warnings,
    machine_warnings,
    read_task,
)
from attnimg.train.base_model import count_stored_weights, judge_base_model

Findings = tuple[tuple[Finding, ...], tuple[Finding, ...]]

# Errors about the choice of a backend: this command explains them, and its exit code is 0.
_EXPLAINED = frozenset(
    {"arch-too-old", "arch-mismatch", "sage-arch", "fp8-arch", "fp8-torch", "flex-torch"}
    | {"s2-with-packing", "packing-not-isolated", "not-causal-lm", "not-trainable", "loss-differs"}
    | {"quantized-checkpoint", "positions-short"}
)
# Findings that depend on sequence_len, which only a config has.
_LENGTH_CODES = frozenset({"positions-short", "positions-beyond"})
# org/name; a name that ends in .yaml is a missing config.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/(?!.*\.ya?ml$)[\w.-]+", re.ASCII)
# Errors about a name that is not a backend, with which nothing can be chosen.
_NOT_A_BACKEND = frozenset({"unknown-backend", "alias-rejected", "not-a-string"})


def explain(
    target: str, settings: list[str], on: str | None, image: str | None, as_json_lines: bool
) -> None:
    """Explain which backend would run, why, and the reasons against each other one."""
    overrides = tuple(settings)
    machine, assumed = find_machine(on, image)
    arch = machine.arch if on is not None or image is not None else None
    is_model = _is_model(target)
    check = _check_model if is_model else config.check_file
    checked = check(target, on=arch, overrides=overrides)
    errors, warnings = [*checked.errors], [*checked.warnings]
    plan = task = memory = None
    if (values := checked.config) is not None:
        try:
            task, raw = read_task(values, machine)
            warnings += _model_warnings(values, task.problem.model)
        except AttnimgError as error:
            task, raw = build_task(values, None, machine), None
            errors.append(_as_finding(error))
        if is_model and not _sets(
            "sequence_len", overrides
        ):  # the row length is not known without a config
            task = replace(task, problem=replace(task.problem, sequence_len=None))
        plan = task.choose()
        if _NOT_A_BACKEND & {error.code for error in checked.errors}:
            plan = _without_choice(plan, checked.requested)
        found = [run_findings(plan, task.problem, machine)]
        if raw is not None and task.problem.sequence_len is not None:
            memory = _report_memory(
                values, raw, task, plan, lambda more: check(target, on=arch, overrides=more).ok,
                overrides=overrides,
            )  # fmt: skip
            if (too_large := memory_warning(memory)) is not None:
                warnings.append(too_large)
        if raw is not None:
            judge = _judge_without_config if is_model else _judge_base_model
            found.append(judge(values, raw, machine))
        for more_errors, more_warnings in found:
            errors += more_errors
            warnings += more_warnings
    warnings += [*machine_warnings(machine), *image_warnings(on, assumed)]
    checked = replace(checked, errors=tuple(errors), warnings=tuple(warnings))
    if as_json_lines:
        found_json = _json(checked, plan, task, machine=machine, on=on, image=assumed)
        print(json_line(found_json | {"memory": memory and memory_dict(memory)}))
    else:
        where = f"{gpu_text(machine)}{assumed_text(on, assumed)}"
        _print(checked, plan, task, memory, where=where)
    invalid = any(error.code not in _EXPLAINED for error in errors)
    raise SystemExit(2 if invalid else 0)


def _report_memory(
    values: Config,
    raw: Mapping[str, Any],
    task: Task,
    plan: Plan,
    is_valid: Callable[[tuple[str, ...]], bool],
    *,
    overrides: tuple[str, ...],
) -> MemoryReport:
    """Return the forecast of the run's memory, and changes with which it fits."""

    def accepts(changes: Mapping[str, Any]) -> bool:
        return is_valid((*overrides, *(f"{key}={json.dumps(v)}" for key, v in changes.items())))

    return report_memory(
        values,
        raw,
        problem=task.problem,
        plan=plan,
        machine=task.machine,
        is_valid=accepts,
        stored_weights=count_stored_weights(values),
    )


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


def _sets(key: str, overrides: Iterable[str]) -> bool:
    return any(text.partition("=")[0].strip() == key for text in overrides)


def _check_model(model: str, *, on: Arch | None, overrides: tuple[str, ...]) -> CheckResult:
    """Check a config that has only base_model and the settings of the command line."""
    values = {"base_model": model, "learning_rate": 1.0, "datasets": [{"path": model}]}
    checked = config.check_values(config.with_overrides(values, overrides), file=model, on=on)
    assert checked.config is not None
    # These two keys were set only so that the config is valid.
    unset = {"learning_rate": None, "datasets": None}
    return replace(checked, config=checked.config.model_copy(update=unset))


def _model_warnings(values: Config, model: Model | None) -> list[Finding]:
    """Return a warning if no attention layer of the model is known."""
    if model is None:
        return [
            Finding(
                code="model-not-at-hand",
                key="base_model",
                what=f"the config.json of {values.base_model} is not on this machine: "
                "its layers are not known",
                do="pass the model's folder as base_model, or download the model first",
            )
        ]
    if model.layers:
        return []
    reason = "; ".join(model.unknown) or "it has no softmax attention"
    return [
        Finding(
            code="no-attention-layers",
            key="base_model",
            what=f"no attention layer was found in {values.base_model}: {reason}",
            do="nothing, if the model has no attention; otherwise report its config.json",
        )
    ]


def _judge_base_model(values: Config, raw: Mapping[str, Any], machine: Machine) -> Findings:
    """Return the errors and the warnings of `train` about the base model."""
    errors, warnings = judge_base_model(values, raw, machine)
    return tuple(_as_finding(error) for error in errors), tuple(warnings)


def _judge_without_config(values: Config, raw: Mapping[str, Any], machine: Machine) -> Findings:
    """Return the findings about a model without a config, for training with or without an adapter.

    Errors of full fine-tuning only are returned as warnings.
    """
    full, notes = _judge_base_model(values, raw, machine)
    lora, _ = _judge_base_model(values.model_copy(update={"adapter": "lora"}), raw, machine)
    errors = [error for error in full if error in lora]
    warnings = [error for error in full if error not in lora]
    return tuple(e for e in errors if e.code not in _LENGTH_CODES), tuple(
        warning for warning in (*warnings, *notes) if warning.code not in _LENGTH_CODES
    )


def _as_finding(error: AttnimgError) -> Finding:
    return Finding(code=error.code, key=error.key, what=error.what, why=error.why, do=error.do)


def _without_choice(plan: Plan, requested: str | None) -> Plan:
    """Return a plan that chooses nothing, because the config names no existing backend."""
    return Plan(
        requested=requested or "?",
        chosen=None,
        reason="the config names no backend",
        verdicts=plan.verdicts,
        remedy="write one of the candidates below",
    )


def _json(
    checked: CheckResult,
    plan: Plan | None,
    task: Task | None,
    *,
    machine: Machine,
    on: str | None,
    image: str | None,
) -> dict[str, Any]:
    """Return the object that `explain --json` prints."""
    model = task.problem.model if task else None
    memory = quadratic_memory(plan, task.problem) if plan and task else None
    chosen = plan_dict(plan) if plan else {"candidates": [], "chosen": None, "groups": []}
    return checked_json(checked) | {
        "on": machine.arch.name,
        "image": image,
        "platform": image and assumed_platform(on, image),
        "model": model and _model_json(model),
        "layers": [asdict(group) for group in model.layers] if model else [],
        "candidates": chosen["candidates"],
        "chosen": chosen["chosen"],
        "groups": chosen["groups"],
        "other_layers": [asdict(layers) for layers in other_layers(model, machine)],
        "quadratic_memory": asdict(memory) if memory else None,
    }


def _model_json(model: Model) -> dict[str, Any]:
    return {
        "type": model.type,
        "parameters": model.parameters,
        "other_layers": sum(count for _, count in model.other_layers),
        "unknown": list(model.unknown),
    }


def _print(
    checked: CheckResult,
    plan: Plan | None,
    task: Task | None,
    memory: MemoryReport | None,
    *,
    where: str,
) -> None:
    from attnimg.cli import as_text

    if plan is not None and task is not None:
        out = as_text.console(sys.stdout)
        with out.capture() as captured:
            as_text.print_explained(
                plan,
                gpu=where,
                model=task.problem.model,
                problem=task.problem,
                others=other_layers(task.problem.model, task.machine),
                out=out,
            )
            if memory is not None:
                as_text.print_memory(memory, out=out)
            out.print()
        # rich fills the lines of a table with blanks.
        sys.stdout.write(re.sub(r" +$", "", captured.get(), flags=re.MULTILINE))
    as_text.print_findings(checked, err=as_text.console(sys.stderr))
