"""CI's jobs come from the recipes, what is not run is written down, and workflows are sound."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.release.record import RECORDED

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MATRIX = json.loads((ROOT / ".github" / "matrix.json").read_text())
RECIPES = {path.stem for path in (ROOT / "recipes" / "images").glob("*.toml")}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".github" / "matrix.py"), *arguments]
    env = {key: value for key, value in os.environ.items() if not key.startswith("GITHUB")}
    env.pop("REGISTRY", None)
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env={**env, **variables}
    )


def part(*arguments: str, **variables: str) -> str:
    done = run(*arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def load_matrix() -> Any:
    """The module .github/matrix.py."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".github" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(text: str) -> set[tuple[str, ...]]:
    """The rows of a Markdown table."""
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines()
    ]
    return set(rows[2:])


def test_every_recipe_is_built_or_recorded_as_skipped_with_its_reason() -> None:
    built = {(entry["image"], entry["platform"]) for entry in json.loads(part("images"))}
    skipped = {(image, platform): reason for image, platform, reason in table(part("skipped"))}
    assert {image for image, _ in built | set(skipped)} >= RECIPES
    assert not built & set(skipped)
    assert "PyPI has no torch for ROCm" in skipped["rocm", "linux/amd64"]
    assert ("hopper", "linux/amd64") in built
    assert "no runner" in skipped["hopper", "linux/arm64"]


def test_an_image_that_is_skipped_has_no_job_of_any_kind() -> None:
    for name in ("images", "layers", "kernels", "gpu", "published"):
        assert "rocm" not in {entry["image"] for entry in json.loads(part(name))}
    assert "rocm" not in part("releases").split()


def test_each_kernel_is_compiled_once() -> None:
    kernels = [
        (entry["image"], entry["kernel"], entry["platform"])
        for entry in json.loads(part("kernels"))
    ]
    assert ("hopper", "flash-attn-3", "linux/amd64") in kernels
    assert "torchao" not in {kernel for _, kernel, _ in kernels}  # a public wheel
    images = json.loads((ROOT / "attnimg/data/images.json").read_text())["images"]
    keys = [
        (images[image]["torch"], kernel["keys"][platform])
        for image, name, platform in kernels
        for kernel in images[image]["kernels"]
        if kernel["name"] == name
    ]
    assert len(keys) == len(set(keys)) == len(kernels)


def test_the_layers_of_each_torch_are_built_once() -> None:
    locks = [entry["lock"] for entry in json.loads(part("layers"))]
    assert len(locks) == len(set(locks))
    files = {
        path.stem.removeprefix("torch-") for path in (ROOT / "requirements/images").glob("torch-*")
    }
    # No runner builds those of linux/arm64.
    files = {lock for lock in files if not lock.endswith("-arm64")}
    assert set(locks) == {lock for lock in files if not lock.startswith("unresolved")}


def test_one_image_can_be_asked_for_with_its_aliases() -> None:
    [entry] = json.loads(part("images", "ampere"))
    assert (entry["image"], entry["aliases"], entry["kernels"]) == ("ampere", ["ada"], True)
    [entry] = json.loads(part("images", "cpu"))
    assert entry["kernels"] is False
    assert json.loads(part("images", "rocm")) == []


def test_a_gpu_without_a_runner_is_recorded_and_not_run() -> None:
    assert all(entry["runner"] for entry in json.loads(part("gpu")))
    tested = {(entry["image"], entry["arch"]) for entry in json.loads(part("gpu"))}
    recorded = {row[:2] for row in table(part("untested"))}
    assert tested | recorded == {(entry["image"], entry["arch"]) for entry in MATRIX["gpu"]}
    assert not tested & recorded


def test_published_images_are_tested_by_digest_and_others_are_recorded() -> None:
    matrix = load_matrix()
    gpu = [
        {"image": "hopper", "arch": "sm_90", "runner": "h100", "skip": ""},
        {"image": "turing", "arch": "sm_75", "runner": "t4", "skip": ""},
        {"image": "ampere", "arch": "sm_80", "runner": None, "skip": "no runner"},
    ]
    published = {"hopper": "host/team/attnimg@sha256:12", "ampere": "host/team/attnimg@sha256:34"}
    [entry] = json.loads(matrix.part("published", {"gpu": gpu}, published))
    assert (entry["image"], entry["runner"], entry["digest"]) == ("hopper", "h100", "sha256:12")
    assert table(matrix.part("unpublished", {"gpu": gpu}, published)) == {
        ("turing", "sm_75", "not published"),
        ("ampere", "sm_80", "no runner"),
    }
    pushed = json.loads(matrix.part("pushed", {"gpu": gpu}, published))
    assert {entry["reference"] for entry in pushed} == set(published.values())


def test_a_release_needs_a_recipe_without_open_values() -> None:
    unresolved = {entry["image"] for entry in MATRIX["images"] if not entry["publish"]}
    assert not unresolved & set(part("releases").split())


def test_a_fork_has_no_registry() -> None:
    content = tomllib.loads((ROOT / "recipes/registry.toml").read_text())
    own = content["source"].removeprefix("https://github.com/")
    assert part("registry", GITHUB_REPOSITORY=own) == content["registry"]
    assert part("registry", GITHUB_REPOSITORY="someone/attnimg") == ""
    assert part("registry") == ""
    assert part("registry", REGISTRY="host:5000/team/") == "host:5000/team"


@pytest.mark.parametrize(
    ("arguments", "known"),
    [(["images2"], "images, layers"), ([], "images, layers"), (["images", "hoper"], "hopper")],
)
def test_what_does_not_exist_is_refused_in_three_parts(arguments: list[str], known: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert [mark in done.stderr for mark in ("why:", "do:", "Traceback", known)] == [
        True, True, False, True,
    ]  # fmt: skip


def test_a_runner_has_the_disk_that_a_build_needs_or_is_prepared() -> None:
    runners = tomllib.loads((ROOT / "recipes/runners.toml").read_text())["build"]
    text = (ROOT / "docker/build.py").read_text()
    needed = dict(re.findall(r'"(cpu|cuda|rocm)": (\d+)', text))
    assert set(needed) >= set(runners)
    for accelerator, runner in runners.items():
        assert runner["disk_gb"] >= int(needed[accelerator]) or runner["prepare"], accelerator


def test_only_a_hosted_runner_is_prepared() -> None:
    done = subprocess.run(
        ["/bin/bash", str(ROOT / ".github/prepare_runner.sh")],
        env={"PATH": "/nowhere"},  # nothing could be deleted
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "not a GitHub-hosted runner" in done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    pins = re.findall(r"uses: (\S+)", path.read_text())
    assert pins
    assert [pin for pin in pins if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", pin)] == []


def test_an_action_has_one_pin() -> None:
    pins = {pin for path in WORKFLOWS for pin in re.findall(r"uses: (\S+)", path.read_text())}
    names = [pin.partition("@")[0] for pin in pins]
    assert len(names) == len(set(names))


def make_targets(text: str) -> set[str]:
    """The targets that a script makes; a variable stands for any image."""
    return set(re.findall(r"\bmake \"?([a-z][\w-]*(?:/[\w$-]+)?)", re.sub("#.*", "", text)))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_step_is_a_make_target_that_exists(path: Path) -> None:
    targets = set(re.findall(r"^([\w./%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = make_targets(path.read_text())
    known = {target.split("/")[0] for target in targets} | PIPELINE
    assert [name for name in wanted if name.split("/")[0] not in known] == []


# recipes/release makes them.
PIPELINE: set[str] = {"tested", "attest", "verify", "promote"}


def test_ci_yml_and_the_script_for_a_laptop_make_the_same_targets() -> None:
    script = make_targets((ROOT / ".ci/run").read_text())
    workflow = make_targets((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow - {"engine"} == script


def jobs(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / ".github/workflows" / name).read_text())
    found: dict[str, Any] = content["jobs"]
    return found


def text_of(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def needs(name: str, found: dict[str, Any]) -> set[str]:
    """All jobs that a job waits for."""
    direct = found[name].get("needs", [])
    direct = [direct] if isinstance(direct, str) else direct
    return set(direct).union(*(needs(other, found) for other in direct))


def test_a_release_runs_its_steps_in_order_on_one_digest() -> None:
    found = jobs("release.yml")
    steps = ["push", "test", "attest", "verify", "promote"]
    for step in steps:  # those that record what they did, as `promote` needs it
        target = RECORDED[step]
        assert f'make "{target}/$IMAGE"' in text_of(found[step]), step
    for earlier, later in pairwise(steps):
        assert earlier in needs(later, found)
    assert "gpu" in needs("attest", found)
    for earlier, name in pairwise(steps):
        # The state says which; verify DIGEST= and test DIGEST= record nothing.
        assert "DIGEST" not in found[name]["env"]
        assert states(found[name], "download") == [f"state-{earlier}"]
        assert states(found[earlier], "upload") == [f"state-{earlier}"]
    for name in ("test", "gpu"):  # what was pushed, never built again
        assert 'make "build' not in text_of(found[name])
    assert 'DIGEST="$DIGEST"' in text_of(found["gpu"])
    assert found["gpu"]["env"]["DIGEST"] == "${{ needs.push.outputs.digest }}"


def states(job: dict[str, Any], direction: str) -> list[str]:
    """The artifacts that a job uploads or downloads."""
    action = f"actions/{direction}-artifact@"
    return [s["with"]["name"] for s in job["steps"] if s.get("uses", "").startswith(action)]


def test_only_the_job_that_signs_may_ask_for_an_identity() -> None:
    may = {
        (path.name, name)
        for path in WORKFLOWS
        for name, job in jobs(path.name).items()
        if "id-token" in job.get("permissions", {})
    }
    assert may == {("release.yml", "attest"), ("pages.yml", "deploy")}
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {}


def test_only_a_release_and_the_cache_write_packages() -> None:
    may = {
        (path.name, name)
        for path in WORKFLOWS
        for name, job in jobs(path.name).items()
        if job.get("permissions", {}).get("packages") == "write"
    }
    assert may == {
        *(("release.yml", name) for name in ("push", "attest", "promote")),
        *(("images.yml", name) for name in ("layers", "kernels", "image")),
    }


def test_gpu_tests_pull_what_is_published() -> None:
    text = (ROOT / ".github/workflows/gpu.yml").read_text()
    assert 'make "gpu/$IMAGE" DIGEST="$DIGEST"' in text
    assert 'make "build' not in text
