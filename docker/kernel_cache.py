"""Cache compiled kernels and layers in a registry, so that each is built once.

CACHE=host/namespace names the registry. A kernel is the image attnimg-kernels:KERNEL-KEY-TOOLCHAIN,
with its wheel in /wheels: KEY is the hash of its recipe, TOOLCHAIN that of what compiles it. It
replaces the target that would compile the kernel. Layers are in attnimg-cache: those of torch and
the stack under the name of the lock file that images share, the others under the image's name.

Whoever may push there decides what images contain: only the workflows on main may.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Targets = Mapping[str, Mapping[str, Any]]


class CacheError(Exception):
    """The registry did not answer; the arguments are what, why, do."""


def kernel_names(name: str, targets: Targets) -> list[str]:
    """Return the kernels that are built for an image."""
    found = [targets[key].get("args", {}).get("KERNEL") for key in targets if key != name]
    return [kernel for kernel in found if kernel]


def kernel_reference(name: str, kernel: str, targets: Targets, cache: str) -> str:
    """Return where the cache has a kernel of an image."""
    arguments = targets[f"{name}_common"]["args"]
    files_name, lock = arguments["IMAGE"], arguments["LOCK"]
    build = json.loads(Path(f"docker/images/{files_name}/kernels/{kernel}.json").read_text())
    files = sorted(Path("docker/kernel").glob("*.py"))
    args = targets[f"{name}_{kernel}"]["args"]
    if args["BUILDER"] != "packaging":
        files += [
            Path(f"requirements/images/{layer}-{lock}.txt") for layer in ("toolchain", "torch")
        ]
    else:
        files.append(Path("docker/tools.txt"))
    # AMD's compiler is named by the arguments of its stage.
    rocm = "".join(f"{key}={args[key]}" for key in sorted(args) if key.startswith("ROCM_")).encode()
    read = b"\0".join(path.read_bytes() for path in files)
    toolchain = hashlib.sha256(read + rocm).hexdigest()[:12]
    # An image of one platform is not found for another, also where the wheel in it is the same.
    end = files_name.removeprefix(name)
    return f"{cache.rstrip('/')}/attnimg-kernels:{kernel}-{build['key']}-{toolchain}{end}"


def find_kernels(name: str, targets: Targets, cache: str) -> dict[str, str]:
    """Return the kernels of an image that the cache has: name -> reference.

    Raises:
        CacheError: the registry does not answer. Nothing is compiled instead: it would take hours.
    """
    found = {}
    for kernel in kernel_names(name, targets):
        reference = kernel_reference(name, kernel, targets, cache)
        command = ["docker", "buildx", "imagetools", "inspect", "--raw", reference]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode == 0:
            found[kernel] = reference
        elif not re.search(r"not found|unknown", process.stderr, re.IGNORECASE):
            last = (process.stderr.strip() or "docker buildx imagetools fails").splitlines()[-1]
            raise CacheError(
                f"the cache of kernels can't be read: {cache}",
                last,
                f"docker login {cache.partition('/')[0]}, or omit CACHE to compile them",
            )
    return found


def replaced_contexts(
    name: str, targets: Targets, found: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Yield (target, context, place) for the contexts that a kernel of the cache replaces."""
    places = {f"target:{name}_{kernel}": reference for kernel, reference in found.items()}
    for target, content in targets.items():
        for context, place in content.get("contexts", {}).items():
            if place in places:
                yield target, context, f"docker-image://{places[place]}"


def layer_settings(
    name: str, target: str, targets: Targets, cache: str, *, write: bool
) -> list[str]:
    """Return bake's --set arguments for the cache of layers.

    Args:
        name: the image.
        target: what is built: NAME, or NAME_common for the layers that images share.
        targets: of the image.
        cache: the registry and its namespace.
        write: whether to write the cache too; needs the engine's containerd image store.
    """
    place = f"type=registry,ref={cache.rstrip('/')}/attnimg-cache"
    shared = targets[f"{name}_common"]["args"]["LOCK"]
    own = targets[f"{name}_common"]["args"]["IMAGE"] if target == name else shared
    settings = [f"{target}.cache-from={place}:{tag}" for tag in dict.fromkeys((own, shared))]
    if write:
        # The layers of the image alone (mode=min): no build reads the toolchain's 6 GB from there.
        options = "mode=min,image-manifest=true,oci-mediatypes=true,compression=zstd"
        settings.append(f"{target}.cache-to={place}:{own},{options}")
    return [word for setting in settings for word in ("--set", setting)]
