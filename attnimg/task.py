"""Build the task that a backend is selected for: the machine, the model's layers, and the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from attnimg.backends import added_backends, all_backends
from attnimg.config.schema import Config, offloading_mode, rows_of_example
from attnimg.facts import Arch, Finding, LayerKind, Machine
from attnimg.machine import probe
from attnimg.run_facts import Model, Plan, Problem
from attnimg.selection import known_bad, model_config, model_types, plan
from attnimg.selection.attention_shapes import read_attention_dropout, read_model
from attnimg.selection.gpus_and_images import (
    Gpu,
    cpus_of_machines,
    find_image,
    image_for,
    image_runs_on,
    image_text,
    machine_with,
    parse_gpu,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A run that a backend is selected for.

    Attributes:
        machine: the machine of the run.
        problem: what its attention has to compute.
        requested: attn_implementation; None for auto.
        strict: whether no other member of the flash family may replace the requested one.
        kinds: the backend of each kind of layers that attn_backends names.
    """

    machine: Machine
    problem: Problem
    requested: str | None
    strict: bool
    kinds: Mapping[LayerKind, str] | None = None

    def choose(self) -> Plan:
        """Return the plan for this task; its `chosen` may be None."""
        return plan.choose(
            self.requested, self.machine, self.problem, strict=self.strict, kinds=self.kinds
        )


def read_task(config: Config, machine: Machine) -> tuple[Task, dict[str, Any] | None]:
    """Return the task of a run, and its model's config.json; None if it is not on this machine.

    Raises:
        AttnimgError: config.json can't be read, or is invalid.
    """
    if (path := model_file(config)) is None:
        return build_task(config, None, machine), None
    raw = read_model_config(config, path)
    return build_task(config, raw, machine, file=path.name), raw


def read_model_config(config: Config, path: Path) -> dict[str, Any]:
    """Read the model's config.json, changed as the key model_config says.

    Raises:
        AttnimgError: it can't be read.
    """
    raw = model_config.read_config(path)
    return model_config.with_overrides(raw, config.overrides_of_model_config)


def build_task(
    config: Config, raw: Mapping[str, Any] | None, machine: Machine, *, file: str = "config.json"
) -> Task:
    """Return the task of a run.

    Args:
        config: the validated config.
        raw: the model's config.json; None where it is not on this machine.
        machine: the machine of the run.
        file: the name of config.json, for errors.

    Raises:
        AttnimgError: config.json is invalid.
    """
    model, dropout = None, 0.0
    if raw is not None:
        model = read_model(raw, file=file)
        dropout = read_attention_dropout(raw, file=file)
    return Task(
        machine=machine,
        problem=build_problem(config, model=model, dropout=dropout, arch=machine.arch),
        requested=config.attn_implementation,
        strict=config.attn_strict,
        kinds=config.attn_backends,
    )


def build_problem(config: Config, *, model: Model | None, dropout: float, arch: Arch) -> Problem:
    """Return what attention has to compute in the run that a config describes."""
    # data/model_classes.toml does not have classes from a model's own repository.
    known = model is not None and not (model.brings_code and config.trust_remote_code)
    dtype = plan.training_dtype(bf16=config.bf16, fp16=bool(config.fp16), arch=arch)
    has_gpu = arch.vendor != "cpu"
    return Problem(
        model=model,
        model_class=model_types.find_class(model.type) if model is not None and known else None,
        dtype=dtype,
        packing=bool(config.sample_packing) or config.batch_flattening is True,
        dropout=dropout,
        compiled=has_gpu if config.torch_compile == "auto" else bool(config.torch_compile),
        checkpointing=bool(config.gradient_checkpointing),
        forward_only_ok=config.attn_forward_only_ok,
        trusted=bool(config.trust_remote_code),
        sequence_len=config.sequence_len,
        rows=max(config.micro_batch_size, config.eval_batch_size or 0) * rows_of_example(config),
        # With bf16: full the weights are bfloat16 and nothing is cast; DeepSpeed casts the weights
        # too.
        autocast=dtype != "float32" and config.bf16 != "full" and not config.deepspeed,
        known_bad=known_bad.load(config.attn_known_bad, today=date.today()),
    )


def model_file(config: Config) -> Path | None:
    """Return the path of the model's config.json; None when it is not on this machine."""
    if not config.base_model:
        return None
    return model_config.find_config(config.base_model, revision=config.revision_of_model)


def installed_machine() -> Machine:
    """Return this machine, with the versions of all packages that a rule depends on."""
    return probe.this_machine(distributions())


def distributions() -> list[str]:
    """Return every distribution that a backend or a rule depends on; the probe looks for them."""
    needed = [package for backend in all_backends() for package, _, _ in backend.needs.packages]
    for kind in model_types.other_layer_kinds().values():
        needed += kind.packages
    needed += model_types.needed_packages()
    # Rules on known-bad versions also depend on libraries that the backends need.
    needed.append("liger-kernel")
    return [*needed, "kernels", "nvidia-cutlass-dsl", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"]


def find_machine(on: str | None, image: str | None) -> tuple[Machine, str | None]:
    """Return the machine to select for, and the image whose packages it is assumed to have.

    Args:
        on: a GPU's name; None for this machine, or for the image's first GPU.
        image: an image's tag; None for the image of that GPU.

    Raises:
        AttnimgError: no such GPU, or no such image.
    """
    named = find_image(image) if image is not None else None
    if on is None and named is not None:
        on = named.devices[0]
    if on is None:
        return installed_machine(), None
    gpu = parse_gpu(on)
    assumed = named or image_for(gpu.arch, cpu=_cpu(gpu))
    machine = machine_with(assumed, gpu.arch, gpu.label, cpu=_cpu(gpu))
    return machine, assumed.name if assumed else None


def _cpu(gpu: Gpu) -> str | None:
    """Return the CPU architecture of the machines with a GPU; None if there are several."""
    if gpu.cpu is not None:
        return gpu.cpu
    cpus = cpus_of_machines(gpu.arch)
    return next(iter(cpus)) if len(cpus) == 1 else None


def image_warnings(on: str | None, image: str | None) -> tuple[Finding, ...]:
    """Return a warning when the image, or every image, does not run on the GPU.

    Args:
        on: a GPU's name; None for this machine, or for the image's first GPU.
        image: the image that find_machine returned for it.
    """
    if on is None:
        return ()
    gpu = parse_gpu(on)
    right = image_for(gpu.arch, cpu=_cpu(gpu))
    if image is not None:
        named = find_image(image)
        if image_runs_on(named, gpu.arch, cpu=_cpu(gpu)):
            return ()
        why = f"has no kernels for {gpu.arch.name}"
        if image_runs_on(named, gpu.arch, cpu=None):
            why = f"is for {' '.join(named.platforms)}, and {gpu.label} has an {_cpu(gpu)} CPU"
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
    if right is not None:
        return ()
    with_code = image_for(gpu.arch)
    why = f"none has kernels for {gpu.arch.name}"
    if with_code is not None:
        why = f"its CPU is {_cpu(gpu)}, and {with_code.name} is for {' '.join(with_code.platforms)}"
    return (
        Finding(
            code="no-image",
            key=None,
            what=f"no image runs on {gpu.label}: {why}; all packages are assumed",
            do="install torch and the kernels on that machine, and run attnimg explain there",
        ),
    )


def assumed_platform(on: str | None, image: str) -> str:
    """Return the platform of an assumed image, "linux/arm64".

    Args:
        on: a GPU's name; None for the image's first GPU.
        image: the image that find_machine returned for it.
    """
    found = find_image(image)
    platform = f"linux/{_cpu(parse_gpu(on))}" if on is not None else ""
    return platform if platform in found.platforms else found.platforms[0]


def assumed_text(on: str | None, image: str | None) -> str:
    """Return what a sentence ends with for an assumed image, ", in attnimg:hopper"; or "".

    Args:
        on: as in assumed_platform.
        image: as in assumed_platform.
    """
    if image is None:
        return ""
    return f", in {image_text(find_image(image), assumed_platform(on, image))}"


def machine_warnings(machine: Machine) -> tuple[Finding, ...]:
    """Return warnings about this machine: a GPU driver that fails, different GPUs, bad backends."""
    found = [
        Finding(
            code="bad-backend",
            key=None,
            what=f"a backend of another package can't be used: {problem}",
            do="fix or uninstall that package",
        )
        for problem in added_backends().problems
    ]
    if machine.driver_problem:
        found.append(
            Finding(
                code="driver",
                key=None,
                what="the GPU driver does not answer, so this machine counts as a CPU: "
                f"{machine.driver_problem}",
                do="run nvidia-smi; in a container, start it with --gpus all",
            )
        )
    if machine.other_archs:
        found.append(
            Finding(
                code="mixed-gpus",
                key=None,
                what=f"GPUs differ: the plan is for {machine.arch.name}, "
                f"there are also {', '.join(machine.other_archs)}",
                do="select GPUs of one kind with CUDA_VISIBLE_DEVICES",
            )
        )
    return tuple(found)


def cpu_warnings(config: Config, machine: Machine) -> tuple[Finding, ...]:
    """Return a warning for each key of a config that has no effect on a CPU."""
    if machine.arch.vendor != "cpu":
        return ()
    found = []
    if config.fp16:
        found.append(
            Finding(
                code="fp16-on-cpu",
                key="fp16",
                what="fp16: true has no effect on a CPU: the run computes in float32",
                do="remove fp16, or replace it by bf16: true, which works on a CPU",
            )
        )
    if offloading_mode(config):
        key, do = "gradient_checkpointing", "set gradient_checkpointing: true"
        if config.activation_offloading:
            key, do = "activation_offloading", "remove activation_offloading"
        found.append(
            Finding(
                code="hint-not-used",
                key=key,
                what="activations are not offloaded on a CPU: they are in its memory already",
                do=do,
            )
        )
    return tuple(found)


def gpu_text(machine: Machine) -> str:
    """Return a machine's name for messages, "NVIDIA H100 80GB (sm_90)"."""
    name = machine.arch.name
    return name if name in ("cpu", machine.gpu) else f"{machine.gpu} ({name})"
