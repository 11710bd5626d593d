"""Build attnimg:cpu on an image made as the public base is, and judge it (`make test/public-base`).

The base is made (tests/public_base/Dockerfile), pushed to Debian's docker-registry on loopback, and
given to the build by its digest. The gates and the tests of tests/image run on the result, which is
attnimg-public:cpu; attnimg:cpu is left as it was. Writes docs/measured/public-base.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RECORD = ROOT / "docs/measured/public-base.json"
IMAGE, KEPT = "attnimg-public:cpu", "attnimg-before:cpu"
DEBIAN = "attnimg-debian:bookworm"
CA = Path("/etc/ssl/certs/ca-certificates.crt")
# Of tests/image: what a base can break. The others are about kernels' builds and records.
TESTS = ("test_running.py", "test_child_images.py", "test_resuming.py")


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def run(*command: object, **env: str) -> str:
    """Run a command that must succeed, and return what it prints."""
    process = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, **env},
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if process.returncode:
        sys.exit(f"public-base: {' '.join(map(str, command[:4]))} failed\n{process.stdout[-4000:]}")
    return process.stdout.strip()


@contextmanager
def registry() -> Iterator[str]:
    """Run a registry in a folder of its own; yield its host and port."""
    if shutil.which("docker-registry") is None:
        sys.exit(
            "public-base: there is no registry\n  why: docker-registry is not installed\n"
            "  do:  apt-get install docker-registry"
        )
    with socket.socket() as sock, tempfile.TemporaryDirectory() as folder:
        sock.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{sock.getsockname()[1]}"
        sock.close()
        config = Path(folder, "config.yml")
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{host}'}}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        )
        command = ["docker-registry", "serve", str(config)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(3)
            yield host
        finally:
            server.terminate()
            server.wait()


def make_base(host: str) -> str:
    """Make the base and push it; return its reference with the digest."""
    tag = f"{host}/python:3.11-slim-bookworm"
    run("docker/base.sh", DEBIAN, "ca-certificates")
    secret = ["--secret", f"id=ca,src={CA}"] if CA.exists() else []
    context = f"debian=docker-image://{DEBIAN}"
    run("docker", "buildx", "build", "--build-context", context, *secret, "--tag", tag, HERE)
    run("docker", "push", "-q", tag)
    digests = run("docker", "image", "inspect", "--format={{json .RepoDigests}}", tag)
    (pinned,) = [text for text in json.loads(digests) if text.startswith(host)]
    run("docker", "image", "rm", "--force", tag)  # the build has to pull it
    return f"{tag}@{pinned.partition('@')[2]}"


def build(base: str) -> dict[str, str]:
    """Build the image on a base, without replacing attnimg:cpu; return its labels."""
    had = subprocess.run(
        ["docker", "tag", "attnimg:cpu", KEPT], stderr=subprocess.DEVNULL, check=False
    )
    run("docker/build.py", "cpu", BASE_IMAGE=base)
    run("docker", "tag", "attnimg:cpu", IMAGE)
    if had.returncode == 0:
        run("docker", "tag", KEPT, "attnimg:cpu")
        run("docker", "image", "rm", KEPT)
    labels: dict[str, str] = json.loads(
        run("docker", "image", "inspect", "--format={{json .Config.Labels}}", IMAGE)
    )
    return labels


def judge() -> dict[str, dict[str, object]]:
    """Return the result of each gate: number of findings and of allowed ones, or why it skips."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "image.tar")
        run("docker", "save", IMAGE, "-o", archive)
        command = [sys.executable, "-m", "recipes", "gate", "cpu", "--archive", str(archive)]
        process = subprocess.run(
            [*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
    gates = json.loads(process.stdout)["gates"]
    for gate in gates:
        for finding in gate["findings"]:
            say(f"public-base: {gate['gate']}: {finding['file']}: found {finding['found']}")
    return {
        gate["gate"]: {
            "findings": len(gate["findings"]),
            "allowed": len(gate["allowed"]),
            "skipped": gate["skip_reason"],
        }
        for gate in gates
    }


def main() -> None:
    """Make, build, judge, test, and write the record; exit with 1 if something fails."""
    with registry() as host:
        base = make_base(host)
        labels = build(base)
    name, _, digest = base.partition("@")
    label = "org.opencontainers.image.base."
    right = (labels[f"{label}name"], labels[f"{label}digest"]) == (name, digest)
    gates = judge()
    command = [sys.executable, "-m", "pytest", *(f"tests/image/{name}" for name in TESTS)]
    tests = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "IMAGE": IMAGE},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    say(tests.stdout[-3000:])
    counts = dict(
        (kind, int(count))
        for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", tests.stdout)
    )
    version = run(
        "docker",
        "run",
        "--rm",
        "--entrypoint=python",
        IMAGE,
        "-c",
        "import platform, sys; print(platform.python_version(), sys.base_prefix)",
    )
    record = {
        "command": "make test/public-base",
        "inputs": inputs(),
        "python": version,
        "labels_name_the_base": right,
        "gates": gates,
        "tests": counts,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    passed = right and tests.returncode == 0 and not any(g["findings"] for g in gates.values())
    say(f"public-base: {'passed' if passed else 'FAILED'}; {RECORD.relative_to(ROOT)}")
    sys.exit(0 if passed else 1)


def inputs() -> str:
    """Return the hash of how the base is made, by which a test finds a record that is too old."""
    texts = [(HERE / name).read_bytes() for name in ("Dockerfile", "requirements.txt")]
    return hashlib.sha256(b"\n".join(texts)).hexdigest()


if __name__ == "__main__":
    main()
