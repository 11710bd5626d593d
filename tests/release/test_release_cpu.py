"""attnimg:cpu is released as a person would: killed in every step, continued, verified, tagged."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PLAN, ROOT, LocalRegistry, make

from recipes.release import transfer
from recipes.release.record import STEPS

# A test of the pulled image that takes seconds; `make test/cpu` runs all of them on the same image.
TESTS = "tests/image/test_running.py -k doctor"
RECORD = ROOT / "build/release/cpu-rehearsal.json"
DIST = ROOT / "dist/cpu-gates.json"
# In these a release is killed: once in each, while it works.
KILLED_IN = ("push", "test", "attest", "verify", "promote")


def settings(registry: LocalRegistry) -> dict[str, str]:
    return {"REGISTRY": f"{registry.repository.registry}/", "REHEARSAL": "1", "TESTS": TESTS}


def kill_in(step: str, variables: dict[str, str]) -> str:
    """Start a release, kill it and its processes when a step has begun; return its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    process = subprocess.Popen(
        ["make", "-o", ".venv/ready", "release/cpu"],
        cwd=ROOT, env={**env, **variables}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(rf"release: \d of {len(STEPS)}: {step}$", line.strip()):
            break
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return "".join(lines)


@pytest.fixture(scope="module")
def outputs(registry: LocalRegistry) -> Iterator[list[str]]:
    """The output of each release of attnimg:cpu: those that were killed, then the whole one."""
    inspect = ["docker", "image", "inspect", "attnimg:cpu"]
    if subprocess.run(inspect, capture_output=True, check=False).returncode:
        pytest.skip("there is no image attnimg:cpu; make build/cpu")
    RECORD.unlink(missing_ok=True)
    variables = settings(registry)
    found = [kill_in(step, variables) for step in KILLED_IN]
    done = make("release/cpu", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    found.append(done.stdout + done.stderr)
    yield found
    RECORD.unlink()


def record() -> dict:  # type: ignore[type-arg]
    found: dict = json.loads(RECORD.read_text())  # type: ignore[type-arg]
    return found


def test_a_release_that_was_killed_in_any_step_continues(outputs: list[str]) -> None:
    for step, output in zip(KILLED_IN, outputs, strict=False):
        assert f": {step}\n" in output, f"it was not killed in {step}, but before it"
    last = outputs[-1]
    assert "  the gates have checked this image" in last
    assert "  pushed before" in last
    assert "  tested before" in last
    found = record()
    assert list(found["steps"]) == ["push", "test", "attest", "verify", "promote"]
    assert found["checked_in"].startswith("a clean ")


def test_the_rehearsal_tells_what_a_release_would_lack(outputs: list[str]) -> None:
    found = record()
    for warning in found["rehearsal"]:
        assert f"  warning: {warning}" in outputs[-1]
    kind = "rehearsal" if found["rehearsal"] else "release"
    assert f"  {kind} of attnimg:cpu" in outputs[-1]


def test_what_was_pushed_is_the_image_that_was_built_and_checked(
    outputs: list[str], registry: LocalRegistry
) -> None:
    found, gates_result = record(), json.loads(DIST.read_text())
    digest, manifest = transfer.read_manifest(found["reference"], registry.repository)
    assert digest == found["digest"] == gates_result["digest"]
    assert manifest["config"]["digest"] == gates_result["image_id"]
    kinds = {layer["mediaType"] for layer in manifest["layers"]}
    assert kinds == {"application/vnd.oci.image.layer.v1.tar+zstd"}
    # skopeo's own conversion would drop it.
    config = transfer.read_config(found["reference"], registry.repository, gates_result["image_id"])
    assert config["config"]["Healthcheck"]["Test"]


def test_the_size_that_the_gate_measured_is_the_size_in_the_registry(
    outputs: list[str], registry: LocalRegistry
) -> None:
    gates_result = json.loads(DIST.read_text())
    _, manifest = transfer.read_manifest(record()["reference"], registry.repository)
    sizes = [layer["size"] for layer in manifest["layers"]]
    assert sizes == [layer["zstd_bytes"] for layer in gates_result["layers"]]
    assert sum(sizes) == record()["bytes"]
    assert isinstance(PLAN.image.size_max_mb, int)
    assert sum(sizes) / 1e6 <= PLAN.image.size_max_mb


def test_every_tag_names_the_verified_digest_and_nothing_else_is_tagged(
    outputs: list[str], registry: LocalRegistry
) -> None:
    found = record()
    fixed, moving = found["tags"]
    assert moving == "cpu"
    assert fixed.startswith(f"cpu-{found['version']}-torch{PLAN.lock}-{found['revision'][:12]}")
    assert found["listed"] == {PLAN.platform: found["digest"]}
    assert "linux/arm64" in found["left_out"]
    for tag, digest in found["tags"].items():
        name = f"{registry.repository.name}:{tag}"
        assert transfer.read_list(name, registry.repository) == (digest, found["listed"])
    tags = registry.folder / "docker/registry/v2/repositories/rehearsal/attnimg/_manifests/tags"
    own = {path.name for path in tags.iterdir() if not path.name.startswith("sha256-")}
    # The other tests' small images are in this repository too.
    assert own - {"moved"} == {fixed, "cpu"}


def test_anybody_verifies_it_by_its_tag_or_digest(
    outputs: list[str], registry: LocalRegistry, tmp_path: Path
) -> None:
    found = record()
    public = tmp_path / "cosign.pub"
    shutil.copy(ROOT / "build/release/rehearsal.pub", public)
    where = {"REGISTRY": registry.repository.registry, "COSIGN_PUBLIC_KEY": str(public)}
    for which in ({"TAG": "cpu"}, {"DIGEST": found["digest"]}):
        done = make("verify/cpu", **which, **where)
        assert done.returncode == 0, done.stderr
        assert f"verify: {found['reference']} ({PLAN.platform}) is signed (key" in done.stdout
    # A tag of the registry, but not a digest.
    done = make("verify/cpu", DIGEST="cpu", **where)
    assert "found 'cpu', needed sha256: and 64 digits 0-9a-f" in done.stderr


def test_the_commands_of_the_docs_verify_it(
    outputs: list[str], registry: LocalRegistry, tmp_path: Path
) -> None:
    page = (ROOT / "docs/releases.md").read_text()
    found = re.search(r"```bash\n(IMAGE=.*?)```", page, re.S)
    assert found
    commands = found.group(1).replace("$IMAGE:hopper", "$IMAGE:cpu")
    commands = re.sub(r"^IMAGE=[^$]*$", f"IMAGE={registry.repository.name}", commands, flags=re.M)
    key = f"--key {ROOT}/build/release/rehearsal.pub --insecure-ignore-tlog=true"
    commands = re.sub(r"WHO=\(.*?\)\n(?=cosign)", f"WHO=({key})\n", commands, flags=re.S)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    envelope = json.loads((tmp_path / "openvex.json").read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert {one["vulnerability"]["name"] for one in statement["predicate"]["statements"]}
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_a_promotion_over_an_immutable_tag_of_another_image_is_refused(
    outputs: list[str], registry: LocalRegistry, make_small
) -> None:
    found, repository = record(), registry.repository
    other = make_small("another build of the same commit")
    transfer.push(other.layout, other.digest, repository)
    fixed = next(iter(found["tags"]))
    transfer.tag(other.digest, fixed, repository)
    done = make("promote/cpu", **settings(registry))
    assert done.returncode != 0
    assert f"the tag {fixed} is taken" in done.stderr
    transfer.tag(found["tags"]["cpu"], fixed, repository)
    assert make("promote/cpu", **settings(registry)).returncode == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"REHEARSAL": "", "TESTS": ""}, "the image cpu can't be published"),
        ({"REGISTRY": "registry.example.com/team"}, "a rehearsal goes to a registry of this"),
        ({"REGISTRY": "https://127.0.0.1/team"}, "the registry can't be used"),
    ],
    ids=["no rehearsal", "another machine's registry", "an address"],
)
def test_a_push_that_may_not_be_is_refused(
    variables: dict[str, str], message: str, outputs: list[str], registry: LocalRegistry
) -> None:
    if variables.get("REHEARSAL") == "" and not record()["rehearsal"]:
        pytest.skip("nothing is missing here: this image could be published")
    done = make("push/cpu", **(settings(registry) | variables))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_tests_of_another_image_than_the_digest_has_are_refused(
    outputs: list[str], registry: LocalRegistry
) -> None:
    done = make("test/hopper", DIGEST=record()["digest"], REGISTRY=registry.repository.registry)
    assert done.returncode != 0
    assert "found the title attnimg:cpu, needed attnimg:hopper" in done.stderr
