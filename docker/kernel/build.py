"""Build the wheel of one kernel into WHEELS (/wheels), and write how that went beside it.

    python -m kernel.build KERNEL.json

KERNEL.json is docker/images/IMAGE/kernels/NAME.json, see source.py. Patches lie in PATCHES
(/patches), a git tree in SOURCE (/source). Two files come out: the wheel, and NAME.json with the
time, the jobs and the objects that it took.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kernel import jobs, source

WHEELS = Path(os.environ.get("WHEELS", "/wheels"))


def compiled(project: Path, *, env: dict[str, str], memory_gb: float) -> dict[str, Any]:
    """Run pip on a project until its wheel is there, with fewer jobs after each one that died.

    Args:
        project: the folder of its setup.py or pyproject.toml.
        env: the environment of the build.
        memory_gb: what one job may need, in GB.

    Returns:
        How it went: jobs, attempts, objects compiled and reused.
    """
    command = [*source.PIP, "wheel", "-v", "--no-deps", "--no-build-isolation"]
    command += [f"--wheel-dir={WHEELS}", str(project)]
    count = jobs.count(memory_gb)
    before = jobs.cache_counts(env)
    for attempt in range(1, 9):
        print(f"kernel: {count} jobs at a time, {memory_gb} GB each", flush=True)
        done = jobs.run(command, env={**env, "MAX_JOBS": str(count)})
        if done.code == 0:
            after = jobs.cache_counts(env)
            used = {key: after[key] - before[key] for key in after}
            return {"jobs": count, "attempts": attempt, **used}
        if not done.out_of_memory:
            source.fail("the wheel was not built", done.last_words, "read the words above")
        if count == 1:
            break
        count //= 2
        print(f"kernel: a compiler died of memory; again with {count} jobs", flush=True)
    return source.fail(
        "the wheel was not built",
        f"a compiler died of memory, alone; {jobs.memory_bytes() / 1e9:.1f} GB are free",
        "give the build more memory",
    )


def main(build_file: Path) -> None:
    """Build one wheel, or take the prebuilt one that the recipe names."""
    build = source.read_build(build_file)
    WHEELS.mkdir(parents=True, exist_ok=True)
    source.WORK.mkdir(parents=True)
    began = time.monotonic()
    if build.prebuilt:
        took: dict[str, Any] = {"prebuilt": build.prebuilt}
        source.take_prebuilt(build, WHEELS)
    else:
        project = source.prepare(build)
        env = source.environment(build)
        took = compiled(project, env=env, memory_gb=build.job_memory_gb)
    wheel = next(WHEELS.glob("*.whl"))
    report = {
        "name": build.name,
        "version": build.version,
        "key": build.key,
        "trimmed": build.trimmed,
        "wheel": wheel.name,
        "bytes": wheel.stat().st_size,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime),
        **took,
    }
    (WHEELS / f"{build.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"kernel: {json.dumps(report)}")
    shutil.rmtree(source.WORK)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        source.fail("a step of the build failed", str(error), "read its words above")
