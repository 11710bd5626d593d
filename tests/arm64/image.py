"""Build attnimg:cpu for linux/arm64 on an amd64 machine, and run it (`make test/arm64`).

What goes into the image runs under qemu-user. Where no index with torch's CPU build for arm64 was
reached (requirements/images/torch-*-cpu-arm64.txt lacks it), everything else is built: all stages
of docker/Dockerfile, the stack, attnimg itself; and the commands that need no torch are run. Where
`make lock` has found torch, the same command builds the whole image. Writes
docs/measured/arm64.json; with --built, for an image that an earlier run has built.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import base_image

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs/measured/arm64.json"
PLACE = ROOT / "build/arm64"
IMAGE, PLATFORM = "attnimg-test:cpu-arm64", "linux/arm64"
# What the build reads, as in docker/Dockerfile.dockerignore.
CONTEXT = ("attnimg", "docker", "pyproject.toml", "requirements/images", "tests/image/inside")
# Of docker/install/compile_used.py: what can be imported where there is no torch.
WITHOUT_TORCH = (
    "datasets.packaged_modules.json.json", "matplotlib.backends.backend_agg", "matplotlib.figure",
    "pydantic", "rich.console", "yaml", "pytest",
)  # fmt: skip
COMMANDS = (
    ("check", "examples/demo/demo.yaml"),
    ("explain", "examples/demo/demo.yaml"),
    ("doctor",),
)


def say(text: str) -> None:
    """Print a line at once: steps take minutes."""
    sys.stdout.write(f"arm64: {text}\n")
    sys.stdout.flush()


def read_record() -> dict[str, Any]:
    """Return the record; empty if there is none."""
    found: dict[str, Any] = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    return found


def merge_record(part: str, content: dict[str, Any]) -> None:
    """Write a part of the record; the others stay."""
    record = read_record()
    record = {**record, part: {"day": time.strftime("%Y-%m-%d"), **content}}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    say(f"wrote {RECORD.relative_to(ROOT)}")


def target_of(name: str, **env: str) -> dict[str, Any]:
    """Return a target of the bake file for linux/arm64, with its variables resolved."""
    printed = subprocess.run(
        ["docker", "buildx", "bake", "-f", "docker/docker-bake.json", "--print", name],
        cwd=ROOT, env={**os.environ, "PLATFORM": PLATFORM, **env}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(printed.stdout)["target"][name]
    return {**found, "platforms": [PLATFORM]}


def bases() -> dict[str, str]:
    """Return the contexts of the base for this machine's platform and for arm64."""
    own = base_image.fetch_base()
    other = base_image.for_platform(own, PLATFORM)
    return {
        "base": own.context,
        "base::linux/amd64": own.context,
        f"base::{PLATFORM}": other.context,
    }


def bake(target: dict[str, Any], log: Path) -> float:
    """Build a target; return the seconds. What docker prints goes to a file."""
    PLACE.mkdir(parents=True, exist_ok=True)
    file = PLACE / "bake.json"
    file.write_text(json.dumps({"target": {"arm64": target}}), encoding="utf-8")
    began = time.monotonic()
    with log.open("w") as out:
        command = ["docker", "buildx", "bake", "--progress=plain", "-f", str(file), "arm64"]
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        sys.exit("\n".join(["arm64: the build failed", *lines[-15:], f"  all of it: {log}"]))
    return time.monotonic() - began


def copy_context(folder: Path, *, has_torch: bool) -> None:
    """Copy what the build reads; without torch, only modules that need none are compiled."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in CONTEXT:
        source, to = ROOT / name, folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, to)
    if not has_torch:
        used = folder / "docker/install/compile_used.py"
        before, _, rest = used.read_text(encoding="utf-8").partition("USED = (\n")
        names = "".join(f'    "{name}",\n' for name in WITHOUT_TORCH)
        used.write_text(f"{before}USED = (\n{names}){rest.partition(')')[2]}", encoding="utf-8")


def run_command(words: tuple[str, ...]) -> dict[str, Any]:
    """Run a command of the image, and return how it ended."""
    command = ["docker", "run", "--rm", "--platform", PLATFORM, "--network", "none"]
    command += ["-v", f"{ROOT / 'examples'}:/workspace/examples:ro", IMAGE, *words]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = round(time.monotonic() - began, 1)
    lines = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    say(f"{' '.join(words)}: exit code {done.returncode}, {seconds} s")
    return {"exit_code": done.returncode, "seconds": seconds, "output": lines}


def main() -> None:
    """Build, run, record; exit with 1 if a command does not do what it should."""
    if platform.machine() == "aarch64":
        sys.exit("arm64: this machine is one: make build/cpu test/cpu")
    contexts = bases()
    target = target_of("cpu")
    locks = {
        layer: (ROOT / f"requirements/images/{layer}-{target['args']['LOCK']}.txt").read_text()
        for layer in ("torch", "stack")
    }
    has_torch = "\ntorch==" in locks["torch"]
    if not has_torch:
        say(
            "without torch: no index that was reached has its CPU build for arm64; "
            "where one is, make lock writes its hash, and this builds all of it"
        )
    context = PLACE / "context"
    copy_context(context, has_torch=has_torch)
    target |= {
        "context": str(context),
        "dockerfile": "docker/Dockerfile",
        "contexts": {**target.get("contexts", {}), **contexts},
        "tags": [IMAGE],
        # The time is that of all stages.
        "no-cache": True,
    }
    if "--built" in sys.argv:
        seconds = read_record()["image"]["build_seconds"]
    else:
        say(f"building {IMAGE}: 15 minutes on two idle cores; log: build/arm64/image.log")
        seconds = bake(target, PLACE / "image.log")
        say(f"built in {seconds:.0f} s")
    inspected = subprocess.run(
        ["docker", "image", "inspect", IMAGE], capture_output=True, text=True, check=True
    )
    (found,) = json.loads(inspected.stdout)
    ran = {" ".join(words): run_command(words) for words in COMMANDS}
    machine = run_command(("python", "-c", "import platform; print(platform.machine())"))
    merge_record(
        "image",
        {
            "built_on": f"{os.cpu_count()} cores, {platform.machine()}, under qemu-user",
            "torch": has_torch,
            "packages": sum(text.count("==") for text in locks.values()),
            "build_seconds": round(seconds),
            "architecture": found["Architecture"],
            "machine": machine["output"],
            "bytes": found["Size"],
            "commands": ran,
        },
    )
    wrong = [name for name, result in ran.items() if result["exit_code"]]
    if wrong or machine["output"] != ["aarch64"]:
        sys.exit(f"arm64: failed: {', '.join(wrong) or machine['output']}")


if __name__ == "__main__":
    main()
