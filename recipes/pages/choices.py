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
from itertools import groupby
from typing import Any

from attnimg.backends import all_backends
from attnimg.facts import Finding, Machine, Rank
from attnimg.run_facts import KnownBad, Model, Plan, Problem
from attnimg.selection import known_bad, plan
from attnimg.selection.attention_shapes import read_model
from attnimg.selection.gpus_and_images import (
    Gpu,
    ImageFacts,
    gpu_catalogue,
    image_for,
    image_runs_on,
    machine_with,
)
from attnimg.selection.model_types import find_class, other_layer_kinds
from attnimg.selection.run_findings import QuadraticMemory, check_other_layers, quadratic_memory
from recipes.files import NOTICE
from recipes.pages import markdown_table

_class_named = cache(find_class)

# The day for which known-bad rules are read, so that the pages change only with the recipes.
DAY = date(2026, 11, 26)
# Tokens of a row.
ROW = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuChoice:
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


def choose_on_all_gpus(images: Mapping[str, ImageFacts]) -> list[GpuChoice]:
    """Choose for every GPU of the catalogue and every model.

    Args:
        images: name -> image, stable ones first.
    """
    by_machine: dict[tuple[str, str | None], list[GpuChoice]] = {}
    found = []
    for gpu in gpu_catalogue().values():
        key = (gpu.arch.name, gpu.cpu)
        if key not in by_machine:
            by_machine[key] = choose_on_gpu(gpu, image_for(gpu.arch, images, cpu=gpu.cpu))
        found += [replace(choice, gpu=gpu) for choice in by_machine[key]]
    return found


def choose_on_gpu(gpu: Gpu, image: ImageFacts | None) -> list[GpuChoice]:
    """Choose for one GPU and every model; without an image, all packages are assumed."""
    machine = machine_with(image, gpu.arch, gpu.label, cpu=gpu.cpu)
    return [
        _choice(name, model, gpu=gpu, image=image, machine=machine)
        for name, model in _read_models().items()
    ]


@cache
def _read_models() -> dict[str, Model]:
    return {name: read_model(config) for name, config in models().items()}


@cache
def _rules() -> tuple[KnownBad, ...]:
    return known_bad.load(None, today=DAY)


def _choice(
    name: str, model: Model, *, gpu: Gpu, image: ImageFacts | None, machine: Machine
) -> GpuChoice:
    dtype = plan.training_dtype(bf16="auto", fp16=False, arch=gpu.arch)
    problem = Problem(
        model=model,
        model_class=_class_named(model.type),
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
    return GpuChoice(
        gpu=gpu,
        image=image.name if image else None,
        name=name,
        model=model,
        dtype=dtype,
        plan=chosen,
        refusals=(*check_other_layers(problem, machine)[0], *([mixing] if mixing else ())),
        memory=quadratic_memory(chosen, problem),
    )


def choices_json(found: Iterable[GpuChoice], images: Mapping[str, ImageFacts]) -> str:
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
            + ("{}" if name == head["image"] else _image_cell(gpus[arch], image, own=lines[arch]))
            for name, image in images.items()
        )
        blocks.append(
            f' "{arch}": {{\n  {first},\n  "models": {{\n{models}\n  }},\n'
            f'  "images": {{\n{cells}\n  }}\n }}'
        )
    return f'{{\n "//": "{NOTICE}",\n' + ",\n".join(blocks) + "\n}\n"


def _line(choice: GpuChoice) -> str:
    """Return the chosen backends, and the reason codes of all others."""
    refused = {
        verdict.backend.name: [reason.code for reason in verdict.reasons]
        for verdict in choice.plan.verdicts
        if verdict.reasons
    }
    line: dict[str, Any] = {"takes": backend_names(choice.plan), "refused": refused}
    if choice.refusals:
        line["errors"] = [finding.code for finding in choice.refusals]
    return json.dumps(line)


def _image_cell(gpu: Gpu, image: ImageFacts, *, own: Mapping[str, str]) -> str:
    """Return the choices for a GPU in an image that differ from those in the GPU's own image."""
    if not image_runs_on(image, gpu.arch, cpu=gpu.cpu):
        return '"wrong-image"'
    lines = {choice.name: _line(choice) for choice in choose_on_gpu(gpu, image)}
    changed = [f'    "{model}": {line}' for model, line in lines.items() if line != own[model]]
    return "{\n" + ",\n".join(changed) + "\n   }" if changed else "{}"


def backend_names(found: Plan) -> list[str]:
    """Return the names of the backends of a plan, by group of layers."""
    if found.groups:
        return [choice.verdict.backend.name for choice in found.groups]
    return [found.chosen.backend.name] if found.chosen else ["none"]


_SHORT = {
    "flash_attention_4_generic": "FA4g",
    "flash_attention_4": "FA4",
    "flash_attention_3": "FA3",
    "flash_attention_2": "FA2",
    "flex_attention": "flex",
}

_INTRO = f"""# What `auto` chooses

For packed training in rows of {ROW} tokens, with the packages of the GPU's image; without an image
every package is assumed. GPUs with the same choices share a column. FA2 is `flash_attention_2`,
FA4g `flash_attention_4_generic` (FlashAttention-4 with its generic backward pass), flex
`flex_attention`. Where two are listed, layers of different shape run different ones, in the order
of the table of models; `sdpa` beside another one is called for each document, without a mask. GiB:
memory of one layer that grows with the square of the row length. **packing
refused**: packed documents would mix, in layers without softmax attention, or because transformers
builds the backend's mask without document boundaries (gpt-oss, except on flash kernels); with
`sample_packing: false` it runs. When the choice fails its proof on the GPU, `attnimg train` goes on
to the next candidate.

"""

_SURPRISES = """
## Choices that may surprise

- **Gemma 3 and Gemma 4 on a T4 or V100** run xFormers, not plain sdpa: its kernels for these GPUs
  take a window and any head size that is a multiple of 8, and each document by itself (xformers
  0.0.35, ops/fmha/cutlass.py, 2026-11-26); plain sdpa would score 8192 x 8192 tokens. With either,
  activations of Gemma 3 overflow float16, the only half precision that these GPUs have
  (https://unsloth.ai/blog/gemma3, 2026-11-26): `fp16: false` and `bf16: false` train in float32.
- **Gemma 2 on a T4 or V100** and **gpt-oss** there run eager: no kernel for these GPUs has a soft
  cap or sinks. Memory grows with the square of the row length, as the table says: use short rows.
- **Gemma 2 on MI200 and MI300** runs flex: flash-attn's CK kernels accept a soft cap and silently
  ignore it (csrc/flash_attn_ck/mha_varlen_fwd.cpp:316, 2.8.3.post2, 2026-11-26).
- **gpt-oss on AMD** runs flex: aiter has sinks, and no image has aiter.
- **gpt-oss packs on flash kernels only**: transformers 5.22.2 builds its mask without document
  boundaries (modeling_gpt_oss.py:460, 2026-11-27), so documents would mix in eager and flex.
- **Gemma 2, 3 and 4 at head_dim 256 on B200 and B300** run FA4g. That it beats FlashAttention-2
  is expected, not measured: the published 4.04 ms against 13.98 ms belong to another patch for
  the same gap (flash-attention PR #2749), which is not in 4.0.0b36. It compiles for sm_100 with a
  window, a soft cap, both and neither, and for sm_103 with both (no GPU, 2026-11-26); without the
  variable that chooses it, FlashAttention-4 refuses the first three. The variable is read at each
  backward call, so it holds for all layers of that size in the process.
- **Layers of head_dim 512 (Gemma 4)** run sdpa document by document beside a flash kernel: no flash
  kernel has a backward pass at that size.
- **Llama 4** runs flex, and plain sdpa below sm_80: its class says that it has no flash attention,
  for the chunks that its mask describes (transformers 5.22.2, modeling_llama4.py).
"""

_RANKS = """
## The ranks

`auto` takes the fitting candidate with the lowest rank. Where a backend has a rank for a situation,
it replaces the general one. A config that names a backend gets that backend; flash_attention_2 and
_3 get the first of flash_attention_4, _3, _2 that fits, until there are timings of that GPU.

"""


def choices_page(found: Iterable[GpuChoice]) -> str:
    """Write one row per model and one column per group of GPUs; then the facts behind them."""
    gpu_choices = list(found)
    columns = _columns(gpu_choices)
    rows = []
    for name in dict.fromkeys(choice.name for choice in gpu_choices):
        cells = [next(c for c in column[0] if c.name == name) for column in columns]
        rows.append((name, *(_cell(cell) for cell in cells)))
    heads = [" ".join(f"`{name}`" for name in names) for _, names in columns]
    machines = [
        (" ".join(f"`{name}`" for name in names), f"`{c[0].image}`" if c[0].image else "none",
         c[0].dtype)
        for c, names in columns
    ]  # fmt: skip
    models = {choice.name: choice.model for choice in gpu_choices}
    return (
        f"<!-- {NOTICE} -->\n\n"
        + _INTRO
        + markdown_table(("Model", *heads), rows)
        + "\n"
        + markdown_table(("`--on`", "Image", "Precision"), machines)
        + _SURPRISES
        + _RANKS
        + markdown_table(("Backend", "Rank", "Where", "Why: it ...", "Source"), _rank_rows())
        + "\n## Layers without softmax attention\n\n"
        + markdown_table(
            ("Layers", "Model types", "Needs", "Documents isolated by", "Source"), _kind_rows()
        )
        + "\n## The models\n\n"
        + markdown_table(
            ("Model", "Layers", "Heads / kv_heads", "head_dim", "Other"),
            [row for name, model in models.items() for row in _layer_rows(name, model)],
        )
    )


def _columns(found: list[GpuChoice]) -> list[tuple[list[GpuChoice], list[str]]]:
    """Return the groups of GPUs with the same choices: their choices, and their names."""
    columns: dict[tuple[object, ...], tuple[list[GpuChoice], list[str]]] = {}
    for gpu, group in groupby(found, key=lambda choice: choice.gpu.name):
        own = list(group)
        key = (own[0].image, own[0].dtype, *(_cell(choice) for choice in own))
        columns.setdefault(key, (own, []))[1].append(gpu)
    return list(columns.values())


def _cell(choice: GpuChoice) -> str:
    text = " + ".join(_SHORT.get(name, name) for name in backend_names(choice.plan))
    if choice.memory is not None:
        text += f" ({choice.memory.layer / (1 << 30):.1f} GiB)"
    return text + ("; **packing refused**" if choice.refusals else "")


def _rank_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for backend in all_backends():
        if not backend.automatic:
            continue
        places = [
            Rank(rank=backend.rank, why=backend.rank_why, source=backend.rank_source),
            *backend.ranks,
        ]
        rows += [
            (f"`{backend.name}`", str(place.rank), _where(place), place.why, place.source)
            for place in places
        ]
    return rows


def _where(place: Rank) -> str:
    prefix = {True: "", False: "not "}
    parts = [
        " ".join(sorted(place.archs)),
        f"{prefix[place.packed]}packed" if place.packed is not None else "",
        f"{prefix[place.compiled]}compiled" if place.compiled is not None else "",
        f"{prefix[place.routed]}beside others" if place.routed is not None else "",
        f"head_dim from {place.head_dim[0]}" if place.head_dim else "",
    ]
    return ", ".join(filter(None, parts)) or "in general"


def _kind_rows() -> list[tuple[str, ...]]:
    return [
        (
            row.label,
            " ".join(f"`{name}`" for name in row.types),
            " ".join(f"`{name}`" for name in row.packages) or "-",
            " and ".join(f"`{name}`" for name in row.batch) or "nothing",
            row.source,
        )
        for row in other_layer_kinds().values()
    ]


def _layer_rows(name: str, model: Model) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group in model.layers:
        sizes = dict.fromkeys((group.head_dim_qk, group.head_dim_v))
        features = [
            f"window {group.window}" if group.window else "",
            f"soft cap {group.softcap:g}" if group.softcap else "",
            "sinks" if group.sinks else "",
        ]
        rows.append(
            (
                name,
                str(group.count),
                f"{group.heads} / {group.kv_heads}",
                ", v ".join(map(str, sizes)),
                ", ".join(filter(None, features)) or "-",
            )
        )
    for kind, count in model.other_layers:
        rows.append((name, str(count), "-", "-", f"no softmax attention: {kind}"))
    return rows
