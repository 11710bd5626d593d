"""Turn an image's facts into a whole plan, or refuse with every reason and what is nearest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from graphlib import TopologicalSorter

from attnimg.errors import AttnimgError
from recipes.facts import Choice, Image, Kernel, Plan, Prebuilt, Recipes, Step, Unresolved
from recipes.solve.nearest import nearest
from recipes.solve.rules import reasons_against, served


def solve(image: Image, recipes: Recipes) -> Plan:
    """Plan one image.

    Raises:
        AttnimgError: it can't be built; `why` has every reason, `do` the nearest that works.
    """
    if reasons := reasons_against(image, recipes):
        raise AttnimgError(
            f"the image {image.name} can't be built",
            why="\n".join(reason.text for reason in reasons),
            do=nearest(image, recipes),
            code="no-solution",
        )
    abi = _abi(image)
    steps = tuple(_step(image, choice, recipes, abi=abi) for choice in _ordered(image, recipes))
    toolkit = recipes.cuda.get(str(image.toolkit))
    return Plan(
        image=image,
        steps=steps,
        unresolved=_unresolved(image, steps),
        abi=abi,
        lock=_lock(image),
        nvcc=toolkit.nvcc if toolkit else "",
    )


def solve_all(recipes: Recipes) -> tuple[Plan, ...]:
    """Plan every image, stable ones first.

    Raises:
        AttnimgError: as solve, for the first one that can't be built; or images differ in their
            base, which is one context for all of them.
    """
    if len(bases := {(image.base, image.base_digest) for image in recipes.images.values()}) > 1:
        raise AttnimgError(
            "images stand on different bases",
            why="\n".join(sorted(f"found {base}, digest {digest}" for base, digest in bases)),
            do="give every file of recipes/images the same base and base_digest",
            code="bases-differ",
        )
    plans = [solve(image, recipes) for image in recipes.images.values()]
    return tuple(sorted(plans, key=lambda plan: (plan.image.channel != "stable", plan.image.name)))


def refuse_unresolved(plan: Plan) -> None:
    """Let only a plan without open values be published.

    Raises:
        AttnimgError: a value is unresolved (code "unresolved").
    """
    if plan.unresolved:
        raise AttnimgError(
            f"the image {plan.image.name} can't be published",
            why="\n".join(f"{key} is unresolved: {why}" for key, why in plan.unresolved.items()),
            do="write these values into recipes/, from where they can be found out; make render",
            code="unresolved",
        )


def cache_key(
    kernel: Kernel, archs: tuple[str, ...], *, abi: str, env: Mapping[str, str] | None = None
) -> str:
    """Name a kernel's wheel in a cache: the hash of what goes into its build, and of no more.

    A reason that is worded anew, an architecture that another image adds, the small build: none of
    these may cost hours of compiling.

    Args:
        kernel: its recipe.
        archs: what it is built for; their order does not matter.
        abi: what the machine code is bound to.
        env: its build environment.
    """
    recipe = {
        "source": [
            kernel.version,
            kernel.source,
            str(kernel.sha256),
            kernel.subdirectory,
            list(kernel.paths),
        ],
        "submodules": dict(kernel.submodules),
        "removed": [removal.path for removal in kernel.remove],
        "patches": [patch.diff for patch in kernel.patches if not patch.name.startswith("trim/")],
        "archs": {arch: [kernel.archs[arch].token, kernel.archs[arch].code] for arch in archs},
        "abi": abi,
        "env": dict(env or {}),
    }
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _step(image: Image, choice: Choice, recipes: Recipes, *, abi: str) -> Step:
    kernel = recipes.kernels[choice.name]
    archs = served(image, choice)
    build = kernel.build[image.accelerator]
    tokens = _once(kernel.archs[arch].token for arch in archs)
    env = dict(build.env)
    if build.arch_variable:
        env[build.arch_variable] = ";".join(tokens)
    codes = _once(kernel.archs[arch].code for arch in archs)
    return Step(
        kernel=kernel,
        archs=archs,
        tokens=tokens,
        codes=codes,
        env=env,
        prebuilt=_fitting(kernel, codes, abi=abi),
        key=cache_key(kernel, archs, abi="" if kernel.abi == "python" else abi, env=env),
    )


def _fitting(kernel: Kernel, codes: tuple[str, ...], *, abi: str) -> Prebuilt | None:
    """Find a public wheel with just this machine code, for this torch, CUDA and Python."""
    for wheel in kernel.prebuilt:
        if set(wheel.codes) == set(codes) and wheel.abi in ("", abi):
            return wheel
    return None


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    """Give each text once, in order, without empty ones."""
    return tuple(dict.fromkeys(text for text in texts if text))


def _ordered(image: Image, recipes: Recipes) -> list[Choice]:
    """Order kernels so that each comes after those it needs and those whose files it owns."""
    choices = {choice.name: choice for choice in image.kernels}
    graph: dict[str, set[str]] = {name: set() for name in sorted(choices)}
    for name in choices:
        kernel = recipes.kernels[name]
        graph[name] |= {need.kernel for need in kernel.needs} & set(choices)
        for other in set(choices) - {name}:
            if set(kernel.owns) & set(recipes.kernels[other].ships):
                graph[name].add(other)
    return [choices[name] for name in TopologicalSorter(graph).static_order()]


def _abi(image: Image) -> str:
    python = f"cp{image.python.replace('.', '')}"
    if isinstance(image.torch, Unresolved):
        return f"{python}-torch-unresolved"
    minor = ".".join(image.torch.split(".")[:2])
    return f"{python}-torch{minor}-{_flavour(image)}"


def _lock(image: Image) -> str:
    torch = "unresolved" if isinstance(image.torch, Unresolved) else image.torch
    return f"{torch}-{_flavour(image)}"


def _flavour(image: Image) -> str:
    if image.accelerator == "cuda":
        return f"cu{str(image.toolkit).replace('.', '')}"
    return image.accelerator


def _unresolved(image: Image, steps: tuple[Step, ...]) -> dict[str, str]:
    values: list[tuple[str, Image | Kernel]]
    values = [(f"images/{image.name}: {item.name}", image) for item in fields(image)]
    values += [(f"kernels/{step.kernel.name}: sha256", step.kernel) for step in steps]
    found = ((key, getattr(facts, key.rpartition(": ")[2])) for key, facts in values)
    return {key: value.reason for key, value in found if isinstance(value, Unresolved)}
