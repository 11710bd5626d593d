"""Write the bake file: one target an image, with every fact that the Dockerfile takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from recipes.facts import Plan, Step
from recipes.files import NOTICE
from recipes.render.labels import labels

# What a Triton kernel is launched through is compiled where it runs.
_APT = {
    "cpu": "tini",
    "cuda": "tini gcc libc6-dev libpython3-dev",
    "rocm": "tini gcc libc6-dev libpython3-dev",
}


def bake_file(plans: tuple[Plan, ...]) -> str:
    """Write docker/docker-bake.json.

    Variables, to be set in the environment: REGISTRY (a prefix of the tags, with its slash),
    VERSION, REVISION and CREATED (for the labels), BASE (another base image), CA (a CA bundle).
    """
    stable = [plan.image.name for plan in plans if plan.image.channel == "stable"]
    frontier = [plan.image.name for plan in plans if plan.image.channel == "frontier"]
    digest = plans[0].image.base_digest
    base = plans[0].image.base + (f"@{digest}" if isinstance(digest, str) else "")
    content = {
        "//": NOTICE,
        "variable": {
            "BASE": {"default": f"docker-image://{base}"},
            "CA": {"default": "/etc/ssl/certs/ca-certificates.crt"},
            "REGISTRY": {"default": ""},
            "VERSION": {"default": "dev"},
            "REVISION": {"default": ""},
            "CREATED": {"default": ""},
        },
        "group": {
            "default": {"targets": ["cpu"]},
            "all": {"targets": stable},
            "frontier": {"targets": frontier},
        },
        "target": {
            "image": {
                "context": ".",
                "dockerfile": "docker/Dockerfile",
                "target": "runtime",
                "contexts": {"base": "${BASE}"},
                "secret": ["id=ca,src=${CA}"],
            },
            **{plan.image.name: _target(plan) for plan in plans},
        },
    }
    return json.dumps(content, indent=2) + "\n"


def _target(plan: Plan) -> dict[str, Any]:
    image = plan.image
    tags = [f"${{REGISTRY}}attnimg:{name}" for name in (image.name, *image.aliases)]
    target: dict[str, Any] = {
        "inherits": ["image"],
        "args": _args(plan),
        "labels": labels(plan),
        "platforms": list(image.platforms),
        "tags": tags,
    }
    if contexts := _sources(plan):
        target["contexts"] = contexts
    return target


def _args(plan: Plan) -> dict[str, str]:
    image = plan.image
    args = {
        "IMAGE": image.name,
        "ACCELERATOR": image.accelerator,
        "LOCK": plan.lock,
        "ABI": plan.abi,
        "APT_PACKAGES": _APT[image.accelerator],
    }
    built = [step for step in plan.steps if step.kernel.form != "wheel"]
    if built:
        args["KEYS"] = " ".join(f"{step.kernel.name}={step.key}" for step in built)
    for step in built:
        args |= _kernel_args(step, image.accelerator)
    return args


def _pairs(env: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(env.items()))


def _job_memory(step: Step, accelerator: str) -> str:
    """Give the memory of one compiler; empty where nothing is compiled."""
    return str(step.kernel.build[accelerator].job_memory_gb) if step.codes else ""


def _kernel_args(step: Step, accelerator: str) -> dict[str, str]:
    """Give one built kernel's arguments; FLASH_ATTN is flash-attn's version, and so on.

    docker/kernel/source.py says what they mean. A kernel that an image lacks has no arguments; a
    git tree comes as a context and has no _SOURCE.
    """
    kernel, wheel = step.kernel, step.prebuilt
    sha256 = wheel.sha256 if wheel else kernel.sha256
    args = {
        "": kernel.version,
        "_SOURCE": kernel.source if kernel.form == "sdist" else "",
        "_SHA256": sha256 if isinstance(sha256, str) else "",
        "_PREBUILT": wheel.source if wheel else "",
        "_DIRECTORY": kernel.subdirectory,
        "_ENV": _pairs(step.env),
        "_TRIM_ENV": _pairs(kernel.trim.env) if kernel.trim else "",
        "_REMOVE": " ".join(removal.path for removal in kernel.remove),
        "_JOB_GB": _job_memory(step, accelerator),
        "_KEY": step.key,
    }
    name = kernel.name.upper().replace("-", "_")
    return {f"{name}{suffix}": value for suffix, value in args.items() if value}


def _sources(plan: Plan) -> dict[str, str]:
    """Name the git trees as contexts NAME-source; BuildKit fetches submodules with them."""
    contexts = {}
    for step in plan.steps:
        if step.kernel.form == "git" and step.prebuilt is None:
            repository, _, commit = step.kernel.source.partition("@")
            url = f"https://github.com/{repository}.git#{commit}"
            contexts[f"{step.kernel.name}-source"] = url
    return contexts
