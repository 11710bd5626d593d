"""Write what `attnimg explain` chooses for every GPU that has a name, and what it refuses.

docs/choices.md is for people; tests/unit/golden/choices.json has every reason too, so that a change
of a backend's needs shows whose choice it changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from attnimg import known_bad, plan
from attnimg.facts import Model, Plan, Problem
from attnimg.gpus import Gpu, catalogue
from attnimg.images import ImageFacts, image_for, machine_with, runs_on
from attnimg.model_classes import class_named
from attnimg.problem import read_model
from recipes.files import NOTICE
from recipes.pages import table

# Model types of transformers, each with the defaults of its configuration class.
MODELS = (
    "llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "deepseek_v3",
    "falcon", "gpt2", "phi3", "qwen3_next", "llama4_text",
)  # fmt: skip
# The day for which known-bad rules are read, so that the pages do not change by themselves.
DAY = date(2026, 11, 21)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What `auto` chooses for packed training of a model on a GPU, with its image's packages."""

    gpu: Gpu
    image: str | None
    model: Model
    dtype: str
    plan: Plan


def choices(images: Mapping[str, ImageFacts]) -> list[Choice]:
    """Choose for every GPU of the catalogue and every one of MODELS.

    Args:
        images: name -> image, stable ones first.
    """
    return [
        choice
        for gpu in catalogue().values()
        for choice in choices_on(gpu, image_for(gpu.arch, images, cpu=gpu.cpu))
    ]


def choices_on(gpu: Gpu, image: ImageFacts | None) -> list[Choice]:
    """Choose for one GPU in one image, for every one of MODELS; without one all is assumed."""
    rules = known_bad.load(None, today=DAY)
    machine = machine_with(image, gpu.arch, gpu.label)
    dtype = plan.training_dtype(bf16="auto", fp16=False, arch=gpu.arch)
    found = []
    for name in MODELS:
        model = read_model({"model_type": name})
        problem = Problem(
            model=model,
            model_class=class_named(name),
            dtype=dtype,
            packing=True,
            dropout=0.0,
            compiled=False,
            checkpointing=False,
            sequence_len=8192,
            rows=1,
            autocast=dtype != "float32",
            known_bad=rules,
        )
        chosen = plan.choose(None, machine, problem)
        name_of_image = image.name if image else None
        found.append(Choice(gpu=gpu, image=name_of_image, model=model, dtype=dtype, plan=chosen))
    return found


def choices_json(found: Iterable[Choice], images: Mapping[str, ImageFacts]) -> str:
    """Write every choice with the codes against each other backend, one model a line.

    GPUs of one architecture, which have the same choices, share a block; those whose machines have
    another CPU than amd64 have one of their own, "sm_90 arm64". Under "images" stands every image:
    "wrong-image" where it does not run on the GPU, else the models for which it chooses or refuses
    otherwise than the GPU's own image does.
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
        lines.setdefault(arch, {})[choice.model.type] = _line(choice)
    blocks = []
    for arch, head in heads.items():
        first = json.dumps(head)[1:-1]
        models = ",\n".join(f'   "{model}": {line}' for model, line in lines[arch].items())
        cells = ",\n".join(
            f'   "{name}": {_cell(gpus[arch], image, own=lines[arch])}'
            for name, image in images.items()
        )
        blocks.append(
            f' "{arch}": {{\n  {first},\n  "models": {{\n{models}\n  }},\n'
            f'  "images": {{\n{cells}\n  }}\n }}'
        )
    return f'{{\n "//": "{NOTICE}",\n' + ",\n".join(blocks) + "\n}\n"


def _line(choice: Choice) -> str:
    """Write what a choice takes, and the codes against all that it does not."""
    refused = {
        verdict.backend: [reason.code for reason in verdict.reasons]
        for verdict in choice.plan.verdicts
        if verdict.reasons
    }
    return json.dumps({"takes": _taken(choice.plan), "refused": refused})


def _cell(gpu: Gpu, image: ImageFacts, *, own: Mapping[str, str]) -> str:
    """Write what an image changes for a GPU, compared with the lines of its own one."""
    if not runs_on(image, gpu.arch, cpu=gpu.cpu):
        return '"wrong-image"'
    lines = {choice.model.type: _line(choice) for choice in choices_on(gpu, image)}
    changed = [f'    "{model}": {line}' for model, line in lines.items() if line != own[model]]
    return "{\n" + ",\n".join(changed) + "\n   }" if changed else "{}"


def choices_page(found: Iterable[Choice]) -> str:
    """Write one row a GPU, one column a model: the backends that its layers run."""
    rows: dict[str, list[str]] = {}
    models: dict[str, Model] = {}
    for choice in found:
        models[choice.model.type] = choice.model
        head = [f"`{choice.gpu.name}`", f"`{choice.image}`" if choice.image else "none",
                choice.dtype]  # fmt: skip
        rows.setdefault(choice.gpu.name, head).append(" + ".join(map(_short, _taken(choice.plan))))
    return (
        f"<!-- {NOTICE} -->\n\n# What `auto` chooses\n\n"
        "For packed training of a model with the defaults of its type, in rows of 8192 tokens,\n"
        "with the packages of the GPU's image; without an image every package is assumed. FA2 is\n"
        "`flash_attention_2`, FA4 `flash_attention_4`, flex `flex_attention`. Where two stand,\n"
        "layers of different shape run different ones, in the order of the second table. A proof\n"
        "on the GPU may still move the choice of `attnimg train` on.\n\n"
        + table(("`--on`", "Image", "Precision", *models), [tuple(row) for row in rows.values()])
        + "\n## The models\n\n"
        + table(
            ("Model type", "Layers", "Heads / key heads", "Head size", "Besides"),
            [row for model in models.values() for row in _layer_rows(model)],
        )
    )


def _taken(found: Plan) -> list[str]:
    """Name the backends of a plan, by group of layers."""
    if found.groups:
        return [choice.verdict.backend for choice in found.groups]
    return [found.chosen.backend] if found.chosen else ["none"]


def _short(backend: str) -> str:
    return backend.replace("flash_attention_", "FA").replace("flex_attention", "flex")


def _layer_rows(model: Model) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group in model.layers:
        sizes = dict.fromkeys((group.head_dim_qk, group.head_dim_v))
        besides = [
            f"window {group.window}" if group.window else "",
            f"soft cap {group.softcap:g}" if group.softcap else "",
            "sinks" if group.sinks else "",
        ]
        rows.append(
            (
                model.type,
                str(group.count),
                f"{group.heads} / {group.kv_heads}",
                ", v ".join(map(str, sizes)),
                ", ".join(filter(None, besides)) or "-",
            )
        )
    return rows
