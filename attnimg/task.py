"""Build the task that a backend is selected for: the machine, the model's layers, and the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from attnimg.backends import all_backends
from attnimg.config.schema import Config
from attnimg.facts import Arch, Finding, Machine, Model, Plan, Problem
from attnimg.machine import probe
from attnimg.selection import known_bad, model_config, model_types, plan
from attnimg.selection import run_findings as findings
from attnimg.selection.attention_shapes import attention_dropout
from attnimg.selection.attention_shapes import read_model as shapes_of
from attnimg.selection.gpus_and_images import (
    cpus_with,
    gpu_catalogue,
    image_catalogue,
    image_for,
    image_named,
    image_runs_on,
    machine_with,
    parse_gpu,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A run that a backend is selected for.

    Attributes:
        machine: the machine of the run.
        problem: what its attention has to compute.
        asked: attn_implementation; None for auto.
        strict: whether no other member of the flash family may replace the requested one.
    """

    machine: Machine
    problem: Problem
    asked: str | None
    strict: bool

    def choose(self) -> Plan:
        """Return the plan for this task; its `chosen` may be None."""
        return plan.choose(self.asked, self.machine, self.problem, strict=self.strict)


def task_of(values: Config, raw: Mapping[str, Any] | None, machine: Machine) -> Task:
    """Return the task of a run.

    Args:
        values: the validated config.
        raw: the model's config.json; None where it is not on this machine.
        machine: the machine of the run.

    Raises:
        AttnimgError: config.json is invalid.
    """
    model = shapes_of(raw) if raw is not None else None
    dropout = attention_dropout(raw) if raw is not None else 0.0
    return Task(
        machine=machine,
        problem=problem_of(values, model=model, dropout=dropout, arch=machine.arch),
        asked=values.attn_implementation,
        strict=values.attn_strict,
    )


def problem_of(values: Config, *, model: Model | None, dropout: float, arch: Arch) -> Problem:
    """Return what attention has to compute in the run that a config describes."""
    gpu = arch.vendor != "cpu"
    # The table of model classes does not have classes from a model's own repository.
    known = model is not None and not (model.brings_code and values.trust_remote_code)
    dtype = plan.training_dtype(bf16=values.bf16, fp16=bool(values.fp16), arch=arch)
    return Problem(
        model=model,
        model_class=model_types.class_named(model.type) if model is not None and known else None,
        dtype=dtype,
        packing=bool(values.sample_packing) or values.batch_flattening is True,
        dropout=dropout,
        compiled=gpu if values.torch_compile == "auto" else bool(values.torch_compile),
        checkpointing=bool(values.gradient_checkpointing),
        forward_only_ok=values.attn_forward_only_ok,
        trusted=bool(values.trust_remote_code),
        sequence_len=values.sequence_len,
        rows=max(values.micro_batch_size, values.eval_batch_size or 0),
        # With bf16: full the weights are bfloat16 and nothing is cast; DeepSpeed casts the weights
        # too.
        autocast=dtype != "float32" and values.bf16 != "full" and not values.deepspeed,
        known_bad=known_bad.load(values.attn_known_bad, today=date.today()),
    )


def model_file(values: Config) -> Path | None:
    """Return the path of the model's config.json; None when it is not on this machine."""
    if not values.base_model:
        return None
    return model_config.find_config(values.base_model, revision=values.revision_of_model)


def read_model(values: Config) -> tuple[Model | None, float]:
    """Return the model and its attention dropout; (None, 0.0) without its config.json."""
    path = model_file(values)
    if path is None:
        return None, 0.0
    raw = model_config.read_config(path)
    model = shapes_of(raw, file=path.name)
    return model, attention_dropout(raw, file=path.name)


def installed_machine() -> Machine:
    """Return this machine, with the versions of all packages that a rule depends on."""
    return probe.this_machine(distributions())


def distributions() -> list[str]:
    """Return every distribution that a backend or a rule depends on; the probe looks for them."""
    needed = [package for backend in all_backends() for package, _, _ in backend.needs.packages]
    needed += [
        package for kind in model_types.other_layer_kinds().values() for package in kind.packages
    ]
    needed += model_types.needed_packages()
    # Rules on known-bad versions also depend on libraries that the backends need.
    return [*needed, "kernels", "nvidia-cutlass-dsl", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"]


def machine_of(on: str | None, image: str | None) -> tuple[Machine, str | None]:
    """Return the machine to select for, and the image whose packages it is assumed to have.

    Args:
        on: a GPU's name; None for this machine, or for the image's first GPU.
        image: an image's tag; None for the image of that GPU.

    Raises:
        AttnimgError: no such GPU, or no such image.
    """
    if on is None and image is None:
        return installed_machine(), None
    named = image_named(image) if image is not None else None
    if on is not None:
        gpu = parse_gpu(on)
    else:
        assert named is not None
        gpu = parse_gpu(named.devices[0])
    assumed = named or image_for(gpu.arch, cpu=gpu.cpu)
    machine = machine_with(assumed, gpu.arch, gpu.label)
    return machine, assumed.name if assumed else None


def image_notes(on: str | None, image: str | None) -> tuple[Finding, ...]:
    """Return a warning when the image, or every image, does not run on the GPU.

    Args:
        on: a GPU's name; None for this machine, or for the image's first GPU.
        image: the image that machine_of returned for it.
    """
    if on is None:
        return ()
    gpu = parse_gpu(on)
    right = image_for(gpu.arch, cpu=gpu.cpu)
    if image is not None:
        asked = image_named(image)
        if image_runs_on(asked, gpu.arch, cpu=gpu.cpu):
            return ()
        why = f"has no kernels for {gpu.arch.name}"
        if image_runs_on(asked, gpu.arch, cpu=None):
            why = f"is for {' '.join(asked.platforms)}, and {gpu.label} has an {gpu.cpu} CPU"
        return (
            Finding(
                code="wrong-image",
                key=None,
                what=f"the image {image} {why}",
                do=f"use the image {right.name}"
                if right
                else "leave --image out: no image runs on that GPU",
            ),
        )
    cpus = {gpu.cpu} if gpu.cpu else cpus_with(gpu.arch)
    if right is not None or cpus != {"arm64"}:
        return ()
    built = sorted(
        {platform for found in image_catalogue().values() for platform in found.platforms}
    )
    return (
        Finding(
            code="no-image",
            key=None,
            what=f"no image runs on {gpu.label}: its CPU is arm64, and every image is built for "
            f"{' '.join(built)}; every package is assumed here",
            do="install torch and the kernels on that machine, and run attnimg explain there",
        ),
    )


def machine_notes(machine: Machine) -> tuple[Finding, ...]:
    """Return warnings about this machine: a GPU driver that fails, different GPUs."""
    notes = []
    if machine.driver_problem:
        notes.append(
            Finding(
                code="driver",
                key=None,
                what=f"the GPU driver does not answer, so this counts as a CPU: "
                f"{machine.driver_problem}",
                do="run nvidia-smi; in a container, start it with --gpus all",
            )
        )
    if machine.other_archs:
        notes.append(
            Finding(
                code="mixed-gpus",
                key=None,
                what=f"GPUs differ: {machine.arch.name} is judged, "
                f"there are also {', '.join(machine.other_archs)}",
                do="choose alike ones with CUDA_VISIBLE_DEVICES",
            )
        )
    return tuple(notes)


def precision_notes(values: Config, machine: Machine) -> tuple[Finding, ...]:
    """Return a warning if a run computes in a precision other than its config names."""
    if not values.fp16 or machine.arch.vendor != "cpu":
        return ()
    return (
        Finding(
            code="fp16-on-cpu",
            key="fp16",
            what="fp16: true has no effect on a CPU: the run computes in float32",
            do="remove fp16, or replace it by bf16: true, which works on a CPU",
        ),
    )


def memory_of(machine: Machine) -> int | None:
    """Return a device's memory in bytes, as detected or from the catalogue of GPUs."""
    if machine.memory_bytes is not None:
        return machine.memory_bytes
    sold = next(
        (gpu.memory_gb for gpu in gpu_catalogue().values() if gpu.label == machine.gpu), None
    )
    return sold * 10**9 if sold else None


def run_findings(
    found: Plan, task: Problem, machine: Machine
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return a plan's errors and warnings: documents that would mix, quadratic memory."""
    errors, warnings = findings.findings_on(task, machine)
    if (mixing := plan.mixing_error(found, task)) is not None:
        errors = (*errors, mixing)
    warning = findings.memory_warning(found, task, memory_bytes=memory_of(machine))
    return errors, (*warnings, *([warning] if warning else ()))


def gpu_text(machine: Machine) -> str:
    """Return a machine's name for messages, "NVIDIA H100 80GB (sm_90)"."""
    name = machine.arch.name
    return name if name in ("cpu", machine.gpu) else f"{machine.gpu} ({name})"
