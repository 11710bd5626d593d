"""Write what `attnimg explain` chooses for every GPU that has a name, and what it refuses.

docs/what-auto-chooses.md has the choices; tests/unit/golden/choices.json also has every reason, so
that a test shows which choices a change of a backend's needs changes.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from importlib import resources
from typing import Any

from attnimg.facts import Finding, KnownBad, Machine, Model, Plan, Problem
from attnimg.select import known_bad, plan
from attnimg.select.attention_shapes import read_model
from attnimg.select.gpus import Gpu, catalogue
from attnimg.select.images import ImageFacts, image_for, machine_with, runs_on
from attnimg.select.memory import QuadraticMemory, quadratic_memory
from attnimg.select.model_types import class_named
from attnimg.select.other_layers import findings_on
from recipes.files import NOTICE

_class_of = cache(class_named)

# The day for which known-bad rules are read, so that the pages do not change by themselves.
DAY = date(2026, 11, 26)
# Tokens of a row.
ROW = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What `auto` chooses for packed training of a model on a GPU, with its image's packages.

    Attributes:
        name: the model's, as in recipes/models.toml.
        refusals: why training is refused anyway.
        memory: of the choice, if it is quadratic in the length of the row; else None.
    """

    gpu: Gpu
    image: str | None
    name: str
    model: Model
    dtype: str
    plan: Plan
    refusals: tuple[Finding, ...]
    memory: QuadraticMemory | None


@cache
def models() -> dict[str, dict[str, Any]]:
    """Read recipes/models.toml: name -> the fields of its config.json."""
    text = resources.files("recipes").joinpath("models.toml").read_text("utf-8")
    return {name: entry["config"] for name, entry in tomllib.loads(text).items()}


def choices(images: Mapping[str, ImageFacts]) -> list[Choice]:
    """Choose for every GPU of the catalogue and every model.

    Args:
        images: name -> image, stable ones first.
    """
    by_machine: dict[tuple[str, str | None], list[Choice]] = {}
    found = []
    for gpu in catalogue().values():
        key = (gpu.arch.name, gpu.cpu)
        if key not in by_machine:
            by_machine[key] = choices_on(gpu, image_for(gpu.arch, images, cpu=gpu.cpu))
        found += [replace(choice, gpu=gpu) for choice in by_machine[key]]
    return found


def choices_on(gpu: Gpu, image: ImageFacts | None) -> list[Choice]:
    """Choose for one GPU and every model; without an image, all packages are assumed."""
    machine = machine_with(image, gpu.arch, gpu.label)
    return [
        _choice(name, model, gpu=gpu, image=image, machine=machine)
        for name, model in _geometries().items()
    ]


@cache
def _geometries() -> dict[str, Model]:
    return {name: read_model(config) for name, config in models().items()}


@cache
def _rules() -> tuple[KnownBad, ...]:
    return known_bad.load(None, today=DAY)


def _choice(
    name: str, model: Model, *, gpu: Gpu, image: ImageFacts | None, machine: Machine
) -> Choice:
    dtype = plan.training_dtype(bf16="auto", fp16=False, arch=gpu.arch)
    problem = Problem(
        model=model,
        model_class=_class_of(model.type),
        dtype=dtype,
        packing=True,
        dropout=0.0,
        compiled=False,
        checkpointing=False,
        sequence_len=ROW,
        rows=1,
        autocast=dtype != "float32",
        known_bad=_rules(),
    )
    chosen = plan.choose(None, machine, problem)
    mixing = plan.mixing_error(chosen, problem)
    return Choice(
        gpu=gpu,
        image=image.name if image else None,
        name=name,
        model=model,
        dtype=dtype,
        plan=chosen,
        refusals=(*findings_on(problem, machine)[0], *([mixing] if mixing else ())),
        memory=quadratic_memory(chosen, problem),
    )


def choices_json(found: Iterable[Choice], images: Mapping[str, ImageFacts]) -> str:
    """Return every choice with the reason codes of each other backend, one model per line.

    GPUs of one architecture, which have the same choices, share a block; those whose machines have
    another CPU than amd64 have one of their own, "sm_90 arm64". "images" has every image:
    "wrong-image" if it does not run on the GPU, else the models whose choice or refusal differs
    from that in the GPU's own image.
    """
    lines: dict[str, dict[str, str]] = {}
    heads: dict[str, dict[str, Any]] = {}
    gpus: dict[str, Gpu] = {}
    for choice in found:
        cpu = choice.gpu.cpu
        arch = choice.gpu.arch.name + (f" {cpu}" if cpu != "amd64" else "")
        gpus.setdefault(arch, choice.gpu)
        head: dict[str, Any] = {"image": choice.image, "dtype": choice.dtype, "gpus": []}
        names = heads.setdefault(arch, head)["gpus"]
        if choice.gpu.name not in names:
            names.append(choice.gpu.name)
        lines.setdefault(arch, {})[choice.name] = _line(choice)
    blocks = []
    for arch, head in heads.items():
        first = json.dumps(head)[1:-1]
        models = ",\n".join(f'   "{model}": {line}' for model, line in lines[arch].items())
        cells = ",\n".join(
            f'   "{name}": '
            + ("{}" if name == head["image"] else _cell(gpus[arch], image, own=lines[arch]))
            for name, image in images.items()
        )
        blocks.append(
            f' "{arch}": {{\n  {first},\n  "models": {{\n{models}\n  }},\n'
            f'  "images": {{\n{cells}\n  }}\n }}'
        )
    return f'{{\n "//": "{NOTICE}",\n' + ",\n".join(blocks) + "\n}\n"


def _line(choice: Choice) -> str:
    """Return the backends that a choice takes, and the reason codes of all others."""
    refused = {
        verdict.backend.name: [reason.code for reason in verdict.reasons]
        for verdict in choice.plan.verdicts
        if verdict.reasons
    }
    line: dict[str, Any] = {"takes": taken(choice.plan), "refused": refused}
    if choice.refusals:
        line["errors"] = [finding.code for finding in choice.refusals]
    return json.dumps(line)


def _cell(gpu: Gpu, image: ImageFacts, *, own: Mapping[str, str]) -> str:
    """Return the choices for a GPU that differ in an image from those in the GPU's own image."""
    if not runs_on(image, gpu.arch, cpu=gpu.cpu):
        return '"wrong-image"'
    lines = {choice.name: _line(choice) for choice in choices_on(gpu, image)}
    changed = [f'    "{model}": {line}' for model, line in lines.items() if line != own[model]]
    return "{\n" + ",\n".join(changed) + "\n   }" if changed else "{}"


def taken(found: Plan) -> list[str]:
    """Return the names of the backends of a plan, by group of layers."""
    if found.groups:
        return [choice.verdict.backend.name for choice in found.groups]
    return [found.chosen.backend.name] if found.chosen else ["none"]
