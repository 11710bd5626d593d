"""Write the pages of images, kernels, backends by image, gates and precompiled models."""

from __future__ import annotations

from collections.abc import Iterable

from attnimg.backends import all_backends, runs_on
from attnimg.facts import Backend
from attnimg.selection.gpus_and_images import arch_from_name, gpu_catalogue
from recipes.archs import device_name
from recipes.facts import (
    Allowance,
    Base,
    ImagePlan,
    Kernel,
    TrainedModel,
    on_all_platforms,
    steps_and_platforms,
)
from recipes.files import NOTICE
from recipes.gates import Gate
from recipes.pages import markdown_table
from recipes.render.precompiled import coverage

_IMAGE_HEAD = (
    *("Tag", "GPUs", "Platforms", "Machine code", "torch", "CUDA", "Driver", "Kernels"),
    "Size limit",
)


def images_page(plans: tuple[ImagePlan, ...]) -> str:
    """Write one row per image, one per GPU with a name, and the unresolved values of images."""
    base = plans[0].base
    unresolved: dict[str, list[str]] = {}
    for plan in on_all_platforms(plans):
        for key, reason in plan.unresolved.items():
            image, _, field = key.rpartition(": ")
            where = unresolved.setdefault(f"{field}: {reason}", [])
            where += [text for text in (f"`{image}`",) if text not in where]
    return (
        f"<!-- {NOTICE} -->\n\n# Images\n\n"
        f"Every image has Python {base.python} on Debian {base.debian}, and the same versions on\n"
        "all its platforms. The table marks kernels that a platform lacks.\n"
        "The size limit is that of the compressed image. `frontier` images have a newer torch and\n"
        "CUDA.\n\n"
        f"{markdown_table(_IMAGE_HEAD, [_image_row(plan) for plan in plans])}"
        "\n## Which image for which GPU\n\n"
        f"{markdown_table(('GPU', '`--on`', 'Image'), _gpu_rows(plans))}"
        "\n[Kernels built](kernels-built.md) lists what was built, with sizes and times.\n"
        "\n## Base image\n\n"
        f"{_base_text(base)}"
        "\n## Unresolved values\n\n"
        "An image with an unresolved value can be built, but is not published.\n\n"
        + "".join(f"- {text} ({', '.join(where)})\n" for text, where in unresolved.items())
    )


def _base_text(base: Base) -> str:
    """Return which base all images have, and until when it gets fixes."""
    pinned = base.digest if isinstance(base.digest, str) else "no digest yet, see below"
    return (
        f"`{base.reference}`, {pinned}. Its Python {base.python} gets security fixes until\n"
        f"{base.python_fixes_until:%B %Y}, Debian {base.debian} until "
        f"{base.debian_fixes_until:%B %Y}. [How to move to a newer base]"
        "(build-images.md#a-newer-base).\n"
    )


def _image_row(plan: ImagePlan) -> tuple[str, ...]:
    image = plan.image
    limit = image.size_max_mb
    kernels = []
    for step, platforms in steps_and_platforms(plan).values():
        missing = [one for one in image.platforms if one not in platforms]
        without = f" (not on {' '.join(missing)})" if missing else ""
        kernels.append(f"{step.kernel.summary} {step.kernel.version}{without}")
    return (
        ", ".join(f"`{name}`" for name in (image.name, *image.aliases)),
        image.summary,
        " ".join(image.platforms),
        " ".join(image.archs),
        str(image.torch),
        f"ROCm {plan.toolkit}" if image.accelerator == "rocm" else str(plan.toolkit or "-"),
        str(plan.driver_min or "-"),
        ", ".join(kernels) or "-",
        f"{limit} MB" if isinstance(limit, int) else str(limit),
    )


def _gpu_rows(plans: tuple[ImagePlan, ...]) -> list[tuple[str, ...]]:
    """Return the stable image of every GPU of the catalogue."""
    images = {
        device_name(arch): plan.image
        for plan in plans
        if plan.image.channel == "stable"
        for arch in plan.image.archs
    }
    rows: list[tuple[str, ...]] = []
    for name, gpu in gpu_catalogue().items():
        image = images.get(gpu.arch.name)
        text = f"`{image.name}`" if image else "none"
        if image and f"linux/{gpu.cpu}" not in image.platforms:
            text = f"none: its CPU is {gpu.cpu}"
        elif image and gpu.cpu != "amd64":
            text += f", its linux/{gpu.cpu} build"
        rows.append((gpu.label, f"`{name}`", text))
    return rows


def support_page(plans: tuple[ImagePlan, ...]) -> str:
    """Write a row per backend and a column per image: where it runs, and whether it can train."""
    stable = [plan for plan in plans if plan.image.channel == "stable"]
    rows = [
        (_name(backend), *(_cell(backend, plan) for plan in stable)) for backend in all_backends()
    ]
    head = ("attn_implementation", *(plan.image.name for plan in stable))
    return (
        f"<!-- {NOTICE} -->\n\n# Which backend runs in which image\n\n"
        "T: training; I: inference only; -: not available. Where a backend supports only some of\n"
        "an image's architectures, they are listed. `attnimg explain` also considers the model.\n\n"
        + markdown_table(head, rows)
    )


def gates_page(gates: Iterable[Gate], allowances: Iterable[Allowance]) -> str:
    """Write the description of each gate, and the findings that are accepted."""
    parts = [
        f"<!-- {NOTICE} -->\n\n# Gates\n\n"
        "Gates check a finished image or wheelhouse before it is published. They need no GPU and\n"
        "no Docker daemon, and run nothing of it.\n\n"
        "- `make gate/cpu` checks the image `attnimg:cpu`;\n"
        "- `make gate/cpu ARCHIVE=FILE` checks a file from `docker save`, an OCI archive or the\n"
        "  folder of an unpacked image;\n"
        "- `make gate/hopper WHEELS=dist/hopper` checks a wheelhouse, with `ARCHIVE` as if\n"
        "  it were installed in that image;\n"
        "- `make gate/cpu CHILD=IMAGE` checks an image that is made FROM `attnimg:cpu`: what it\n"
        "  adds is named; another torch or kernel, and a secret outside packages, are refused.\n\n"
        "Each finding lists what was found, what is needed and what to do; `GATE_ARGS=--json`\n"
        "writes them as JSON. An image's SBOM and licences are written to `dist/`.\n"
    ]
    parts += [f"\n## `{gate.name}`\n\n{gate.description.strip()}\n" for gate in gates]
    rows = [(f"`{one.gate}`", f"`{one.file}`", one.reason) for one in allowances]
    parts.append(f"\n## Allowed\n\n{markdown_table(('Gate', 'File', 'Reason'), rows)}")
    return "".join(parts)


def _name(backend: Backend) -> str:
    return f"`{backend.name}`" if backend.in_config else f"{backend.name} (only with `auto`)"


def _cell(backend: Backend, plan: ImagePlan) -> str:
    """Return whether a backend trains (T) or only infers (I) in an image, or neither (-)."""
    steps = {step.kernel.name: step for step in plan.steps}
    archs = []
    for arch in plan.image.archs:
        device = arch_from_name(device_name(arch))
        kernels = [steps.get(package) for package, _, _ in backend.needs.packages]
        if runs_on(backend.needs, device) and all(k and arch in k.archs for k in kernels):
            archs.append(device)
    if not archs:
        return "-"
    trains = all(arch.vendor in backend.needs.backward for arch in archs)
    only = "" if len(archs) == len(plan.image.archs) else f" ({' '.join(a.name for a in archs)})"
    return ("T" if trains else "I") + only


def fa4_models_page(kernel: Kernel) -> str:
    """Write docs/precompiled-models.md: models with precompiled kernels, and for which GPUs."""
    kernel_set = kernel.ahead_of_time
    assert kernel_set is not None
    archs = list(kernel.archs)
    rows = [
        (
            f"`{model.model}`",
            _describe(model),
            *(coverage(model, arch, backend=kernel.backends[0]) for arch in archs),
        )
        for model in kernel_set.models
    ]
    head = ("Model", "Attention", *(f"`{device_name(arch)}`" for arch in archs))
    sources = [
        f"- {', '.join(f'`{m.model}`' for m in kernel_set.models if m.source == name)}: {where}\n"
        for name, where in kernel_set.sources.items()
    ]
    return (
        f"<!-- {NOTICE} -->\n\n# Models whose FlashAttention-4 kernels are precompiled\n\n"
        "Attention: query heads/key-value heads x head_dim of q and k (/of v, where it differs).\n"
        "A kernel depends on head_dim, the number of query heads per key/value head, the soft\n"
        "cap, and whether the layer has a window or sinks: any model that equals one of these in\n"
        "all of them uses the same kernels. `-`: FlashAttention-4 does not support the model on\n"
        "that GPU.\n\n"
        f"{markdown_table(head, rows)}"
        "\n## Sources (2026-11-26)\n\n" + "".join(sources)
    )


def _describe(model: TrainedModel) -> str:
    size = f"{model.head_dim}"
    if model.head_dim_v not in (None, model.head_dim):
        size += f"/{model.head_dim_v}"
    parts = [f"{model.heads}/{model.kv_heads} x {size}"]
    if windows := [str(window) for window in model.windows if window]:
        parts.append(f"window {' '.join(windows)}" + (" and full" if 0 in model.windows else ""))
    parts += [f"soft cap {model.softcap:g}"] if model.softcap else []
    parts += ["sinks"] if model.sinks else []
    return ", ".join(parts)


def kernels_page(kernels: Iterable[Kernel]) -> str:
    """Write a section per kernel: its source, the changes to it and why, its small build."""
    return (
        f"<!-- {NOTICE} -->\n\n# Kernels\n\n"
        "The source of each kernel package, and the changes to it before the build. `make\n"
        "wheels/NAME` builds those of an image; `TRIM=1` makes the small builds, which test all\n"
        "steps on a small machine and are never published.\n"
        + "".join(_kernel_section(kernel) for kernel in kernels)
    )


def _kernel_section(kernel: Kernel) -> str:
    how = "comes as a wheel" if kernel.form == "wheel" else "is built from source"
    pins = [kernel.source, *(f"{path}: {pin}" for path, pin in kernel.submodules.items())]
    changes = [(f"patch `{patch.name}`", patch.reason) for patch in kernel.patches]
    changes += [(f"without `{removal.path}`", removal.reason) for removal in kernel.remove]
    lines = [
        f"\n## {kernel.summary} {kernel.version}\n",
        f"`{kernel.name}` {how}: {', '.join(f'`{pin}`' for pin in pins)}.",
        f"For torch {kernel.torch}, Python {kernel.python}"
        + (f", nvcc {kernel.nvcc}." if kernel.nvcc else "."),
        f"Supports {' '.join(kernel.archs)}.",
        *([""] if changes or kernel.trim else []),
    ]
    lines += [f"- {change}: {reason}" for change, reason in changes]
    if kernel.trim:
        lines.append(f"- small build: {kernel.trim.summary}")
    return "\n".join(lines) + "\n"
