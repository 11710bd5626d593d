"""What explain and train judge: this machine or another one, a model, and the run's problem."""

from __future__ import annotations

from datetime import date

from attnimg import images, known_bad, other_layers, plan, probe, problem
from attnimg.backends import all_backends
from attnimg.facts import Arch, Finding, Machine, Model, Plan, Problem
from attnimg.gpus import arch_from_name, catalogue, parse_gpu
from attnimg.model_classes import class_named
from attnimg.schema import Config


def machine_of(on: str | None, image: str | None) -> tuple[Machine, str | None]:
    """Give the machine to judge for, and the image whose packages it is assumed to have.

    Args:
        on: a GPU's name; None for this machine, or for the image's first GPU.
        image: an image's tag; None for the one made for that GPU.

    Raises:
        AttnimgError: no such GPU, or no such image.
    """
    if on is None and image is None:
        return probe.this_machine(distributions()), None
    named = images.image_named(image) if image is not None else None
    if on is not None:
        arch, label = parse_gpu(on)
    else:
        assert named is not None
        arch = arch_from_name(named.devices[0])
        label = arch.name
    assumed = named or images.image_for(arch)
    return images.machine_with(assumed, arch, label), assumed.name if assumed else None


def image_notes(machine: Machine, image: str | None) -> tuple[Finding, ...]:
    """Say when an image was not made for the GPU it is judged on."""
    if image is None or machine.arch.name in images.image_named(image).devices:
        return ()
    right = images.image_for(machine.arch)
    return (
        Finding(
            code="wrong-image",
            key=None,
            what=f"the image {image} has no kernels for {machine.arch.name}",
            do=f"use the image {right.name}" if right else "no image is made for that GPU",
        ),
    )


def distributions() -> list[str]:
    """Give every distribution that a backend may need, so that the probe looks for them."""
    needed = [package for backend in all_backends() for package, _, _ in backend.needs.packages]
    # Rules on known-bad versions also speak of what the backends' packages stand on.
    needed += [package for kind in other_layers.kinds().values() for package in kind.packages]
    return [*needed, "kernels", "nvidia-cutlass-dsl", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"]


def read_model(values: Config) -> tuple[Model | None, float]:
    """Read the model's geometry and its attention dropout, where its config.json is at hand."""
    path = None
    if values.base_model:
        path = problem.find_config(values.base_model, revision=values.revision_of_model)
    if path is None:
        return None, 0.0
    raw = problem.read_config(path)
    model = problem.read_model(raw, file=path.name)
    return model, problem.attention_dropout(raw, file=path.name)


def problem_of(values: Config, *, model: Model | None, dropout: float, arch: Arch) -> Problem:
    """Say what attention has to do in the run that a config describes."""
    # Code that comes with the model is a class that nobody here knows.
    known = model is not None and not (model.brings_code and values.trust_remote_code)
    dtype = plan.training_dtype(bf16=values.bf16, fp16=bool(values.fp16), arch=arch)
    return Problem(
        model=model,
        model_class=class_named(model.type) if model is not None and known else None,
        dtype=dtype,
        packing=bool(values.sample_packing) or values.batch_flattening is True,
        dropout=dropout,
        compiled=bool(values.torch_compile),
        forward_only_ok=values.attn_forward_only_ok,
        trusted=bool(values.trust_remote_code),
        sequence_len=values.sequence_len,
        rows=values.micro_batch_size,
        # As in train/arguments.py: bf16: full means that nothing is cast on the way.
        autocast=dtype != "float32" and values.bf16 != "full",
        known_bad=known_bad.load(values.attn_known_bad, today=date.today()),
    )


def machine_notes(machine: Machine) -> tuple[Finding, ...]:
    """Say what is odd about this machine: a driver that fails, GPUs that differ."""
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


def memory_of(machine: Machine) -> int | None:
    """Return a device's memory: as probed here, or as the catalogue of GPUs has it."""
    if machine.memory_bytes is not None:
        return machine.memory_bytes
    sold = next((gpu.memory_gb for gpu in catalogue().values() if gpu.label == machine.gpu), None)
    return sold * 10**9 if sold else None


def run_findings(
    found: Plan, task: Problem, machine: Machine
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return errors and warnings that a plan leaves: other layers, quadratic memory."""
    errors, warnings = other_layers.findings_on(task, machine)
    memory = plan.memory_warning(found, task, memory_bytes=memory_of(machine))
    return errors, (*warnings, *([memory] if memory else ()))


def gpu_text(machine: Machine) -> str:
    """Name a machine for people: "NVIDIA H100 80GB (sm_90)"."""
    name = machine.arch.name
    return name if name in ("cpu", machine.gpu) else f"{machine.gpu} ({name})"
