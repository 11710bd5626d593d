"""Write the bake file: targets for each image, its kernels, and the stages between them.

    NAME_KERNEL, one each -> NAME_wheels -> NAME_wheelhouse -> NAME
    NAME_KERNEL -> NAME_fa4-kernels -> NAME           [ahead_of_time] in the kernel's recipe
    NAME_wheelhouse -> NAME_triton-kernels -> NAME    [triton] in the kernel's recipe

    NAME_devel                                        NAME, with compilers: attnimg:NAME-devel

An arrow is a named context: BuildKit builds the target on its left first, and again only if its
inputs have changed. NAME_common has the arguments that all of them share.

A target is for one platform, PLATFORM. ARCH follows from it: the suffix of its files' names
("-arm64"; empty for the first platform), which is in the arguments IMAGE and LOCK.
"""

from __future__ import annotations

import json
from typing import Any

from recipes.archs import torch_arch
from recipes.facts import PLATFORMS, ImagePlan, Step, platform_suffix, steps_and_platforms
from recipes.files import generated_json

# git, for `pip install git+https://...` and for trackers that record a commit; curl, less and
# procps (ps, top), for people in a shell: 18 MB together (docs/figures.md).
_TOOLS = "tini git curl less procps"
# gcc, since Triton compiles the launcher of a kernel on the machine where it runs. libibverbs and
# its drivers, such as libmlx5, which NCCL and RCCL load: without them they connect machines by TCP.
_GPU = f"{_TOOLS} gcc libc6-dev libpython3-dev libibverbs1 ibverbs-providers"
_APT = {"cpu": _TOOLS, "cuda": _GPU, "rocm": _GPU}


def bake_file(plans: tuple[ImagePlan, ...]) -> str:
    """Write docker/docker-bake.json.

    docker/build.py sets the variables in the environment: PLATFORM, ARCH, TAG_END (of the tags,
    where PLATFORM is not this machine's), BASE (the base image that is used), BASE_ARM64 or
    BASE_AMD64 (of a PLATFORM that is not this machine's), BASE_NAME, BASE_DIGEST, VERSION,
    REVISION, CREATED (for the labels), CA (a CA bundle), TRIM and JOBS (for the kernels: small
    builds, compilers at a time). A build without docker/build.py says `dev`, and nothing of its
    base.
    """
    stable = [plan.image.name for plan in plans if plan.image.channel == "stable"]
    frontier = [plan.image.name for plan in plans if plan.image.channel == "frontier"]
    base, ends = plans[0].base, [platform_suffix(platform) for platform in PLATFORMS]
    pinned = f"@{base.digest}" if isinstance(base.digest, str) else ""
    content = {
        "variable": {
            "PLATFORM": {"default": PLATFORMS[0]},
            "ARCH": {"default": f'${{PLATFORM == "{PLATFORMS[0]}" ? "" : "{ends[1]}"}}'},
            "TAG_END": {"default": ""},
            "BASE": {"default": f"docker-image://{base.reference}{pinned}"},
            **{_base_of(platform): {"default": "${BASE}"} for platform in PLATFORMS},
            "BASE_NAME": {"default": ""},
            "BASE_DIGEST": {"default": ""},
            "CA": {"default": "/etc/ssl/certs/ca-certificates.crt"},
            "VERSION": {"default": "dev"},
            "REVISION": {"default": ""},
            "CREATED": {"default": ""},
            "TRIM": {"default": ""},
            "JOBS": {"default": ""},
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
                # BuildKit takes the second where a stage is for that platform.
                "contexts": {
                    "base": "${BASE}",
                    **{f"base::{p}": f"${{{_base_of(p)}}}" for p in PLATFORMS},
                },
                "secret": ["id=ca,src=${CA}"],
                "args": {
                    "PYTHON": base.python,
                    "DEBIAN": base.debian,
                    "TRIM": "${TRIM}",
                    "JOBS": "${JOBS}",
                },
            },
            **{name: target for plan in plans for name, target in _targets(plan).items()},
        },
    }
    return generated_json(content, indent=2)


def _base_of(platform: str) -> str:
    """Return the variable with the base for a platform: "BASE_ARM64"."""
    return f"BASE_{platform.rpartition('/')[2].upper()}"


def _targets(plan: ImagePlan) -> dict[str, dict[str, Any]]:
    """Return the targets of one image, as shown in the module's docstring."""
    image, common = plan.image, f"{plan.image.name}_common"
    built = [step for step in plan.steps if step.kernel.form != "wheel"]
    targets: dict[str, dict[str, Any]] = {
        common: {
            "inherits": ["image"],
            "args": {
                "IMAGE": f"{image.name}${{ARCH}}",
                "ACCELERATOR": image.accelerator,
                "LOCK": f"{_without_platform(plan.lock, plan)}${{ARCH}}",
                "APT_PACKAGES": _APT[image.accelerator],
                "VISIBLE_DEVICES": "all" if image.accelerator == "cuda" else "void",
            },
            "platforms": ["${PLATFORM}"],
        }
    }

    def add(name: str, stage: str, contexts: dict[str, str], **rest: Any) -> str:
        """Add the target NAME_name; return the context by which other targets use it."""
        target = {"inherits": [common], "target": stage, "contexts": contexts, **rest}
        targets[f"{image.name}_{name}"] = target
        return f"target:{image.name}_{name}"

    contexts: dict[str, str] = {}
    wheels: dict[str, str] = {}
    for step in built:
        name = step.kernel.name
        args = {"KERNEL": name, **_builder(plan, step)}
        wheels[name] = add(name, "kernel", _source(step), args=args)
        if step.kernel.ahead_of_time:
            contexts["fa4-kernels"] = add("fa4-kernels", "fa4-compiled", {"wheel": wheels[name]})
    if built:
        copies = "".join(f"COPY --from={name} /wheels /wheels\n" for name in wheels)
        targets[f"{image.name}_wheels"] = {
            "context": ".",
            "dockerfile-inline": f"FROM scratch\n{copies}",
            "contexts": wheels,
            "platforms": ["${PLATFORM}"],
        }
        kernel_wheels = {"kernel-wheels": f"target:{image.name}_wheels"}
        contexts["wheelhouse"] = add("wheelhouse", "wheelhouse", kernel_wheels)
    if any(step.kernel.triton for step in built):
        wheelhouse = {"wheelhouse": contexts["wheelhouse"]}
        contexts["triton-kernels"] = add("triton-kernels", "triton-compiled", wheelhouse)
    targets[image.name] = {
        "inherits": [common],
        "target": "runtime",
        "contexts": contexts,
        # Also in image.json, since a process in the image can't read its labels.
        "args": {"VERSION": "${VERSION}", "REVISION": "${REVISION}"},
        "labels": labels(plan),
        "tags": [f"attnimg:{name}${{TAG_END}}" for name in (image.name, *image.aliases)],
    }
    if image.accelerator != "rocm":  # its toolchain is AMD's apt
        targets[f"{image.name}_devel"] = _devel(plan, targets[image.name])
    return targets


def _builder(plan: ImagePlan, step: Step) -> dict[str, str]:
    """Return the stage that builds a kernel, with its arguments."""
    if not step.codes:
        return {"BUILDER": "packaging"}  # without machine code it needs no compiler
    if plan.rocm is None:
        return {"BUILDER": "toolchain"}
    return {
        "BUILDER": "rocm-toolchain",
        "ROCM_APT": plan.rocm.apt,
        "ROCM_KEY": plan.rocm.apt_key,
        "ROCM_KEY_FINGERPRINT": plan.rocm.apt_key_fingerprint,
        "ROCM_PACKAGES": " ".join(plan.rocm.packages),
    }


def _devel(plan: ImagePlan, runtime: dict[str, Any]) -> dict[str, Any]:
    """Return the target of attnimg:NAME-devel: the image, with compilers and headers."""
    title = f"attnimg:{plan.image.name}-devel"
    cuda = {
        "CUDA_HOME": "/usr/local/cuda",
        "TORCH_CUDA_ARCH_LIST": " ".join(torch_arch(arch) for arch in plan.image.archs),
    }
    return {
        **runtime,
        "target": "devel",
        "args": cuda if plan.image.accelerator == "cuda" else {},
        "labels": {**runtime["labels"], "org.opencontainers.image.title": title},
        "tags": [f"{title}${{TAG_END}}"],
    }


def _source(step: Step) -> dict[str, str]:
    """Return the contexts of a kernel's build: its git tree, and the folder of its patches."""
    contexts = {}
    if step.kernel.form == "git" and step.prebuilt is None:
        repository, _, commit = step.kernel.source.partition("@")
        # BuildKit fetches submodules too.
        contexts["source"] = f"https://github.com/{repository}.git#{commit}"
    if step.kernel.patches:
        contexts["patches"] = f"recipes/patches/{step.kernel.name}"
    return contexts


def labels(plan: ImagePlan) -> dict[str, str]:
    """Return the labels of an image; ${...} are variables of the bake file.

    Source of OCI's: https://github.com/opencontainers/image-spec, annotations.md (2026-11-21).
    """
    image = plan.image
    return {
        "org.opencontainers.image.title": f"attnimg:{image.name}",
        "org.opencontainers.image.description": f"Attention kernels for {image.summary}",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": "${VERSION}",
        "org.opencontainers.image.revision": "${REVISION}",
        "org.opencontainers.image.created": "${CREATED}",
        "org.opencontainers.image.base.name": "${BASE_NAME}",
        "org.opencontainers.image.base.digest": "${BASE_DIGEST}",
        "attnimg.arch": " ".join(image.archs),
        "attnimg.kernels": _kernels_label(plan),
        "attnimg.driver_min": str(plan.driver_min or ""),
        "attnimg.torch": str(image.torch),
        "attnimg.abi": f"{_without_platform(plan.abi, plan)}${{ARCH}}",
    }


def _without_platform(text: str, plan: ImagePlan) -> str:
    return text.removesuffix(platform_suffix(plan.platform))


def _kernels_label(plan: ImagePlan) -> str:
    """Return the kernels of an image; those that not every platform has, as an expression."""
    texts = []
    for step, platforms in steps_and_platforms(plan).values():
        text = f" {step.kernel.name}=={step.kernel.version}"
        if platforms != plan.image.platforms:
            text = f'${{contains({json.dumps(platforms)}, PLATFORM) ? "{text}" : ""}}'
        texts.append(text)
    return "".join(texts).removeprefix(" ")
