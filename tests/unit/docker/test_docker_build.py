"""docker/build.py refuses wrong input before it calls Docker."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# The variables that docker/build.py reads.
VARIABLES = (
    *("PLATFORM", "CACHE", "CACHE_WRITE", "WHEELS", "TRIM", "JOBS", "BASE_IMAGE"),
    "TORCH_INDEX",
)


def build(
    *arguments: str, docker: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run docker/build.py with no other of its variables; a docker of `docker` is called."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    path = f"{docker}:{env['PATH']}" if docker else env["PATH"]
    return subprocess.run(
        [sys.executable, "docker/build.py", *arguments],
        cwd=ROOT, env={**env, "PATH": path, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "why", "do"),
    [
        pytest.param(
            "hoper", "known: ampere, ampere-frontier, ", "recipes/images/hoper.toml", id="typo"
        ),
        pytest.param(
            "rocm", "PyTorch's index for ROCm 7.2 was not reached", "make lock", id="no index"
        ),
    ],
)
def test_an_image_that_can_not_be_built_is_refused_in_words(name: str, why: str, do: str) -> None:
    done = build(name, "--check")
    assert done.returncode == 1
    first, second, third = done.stderr.splitlines()
    assert first.startswith("build: ")
    assert why in second
    assert do in third


def test_an_image_that_can_be_built_is_not_refused() -> None:
    done = build("hopper", "--check")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A docker that prints how it was called, in a folder for PATH; its disk is not known."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ "$1" = info ] && echo /nowhere && exit\n'
        'if [ "$1" = image ]; then echo sha256:1234; exit; fi\n'
        'echo "$@"\nenv >"$(dirname "$0")/env"\n'
    )
    program.chmod(0o755)
    fill_wheelhouse(tmp_path / "wheels", "hopper")
    return program.parent


def fill_wheelhouse(folder: Path, image: str) -> None:
    """Write a wheelhouse that fits an image, without wheels."""
    folder.mkdir()
    wanted = json.loads((ROOT / f"docker/images/{image}/wheelhouse.json").read_text())
    kernels = [{"name": name, "key": key} for name, key in wanted["kernels"].items()]
    manifest = json.dumps({"image": image, "abi": wanted["abi"], "kernels": kernels})
    (folder / "manifest.json").write_text(manifest)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  manifest.json\n")


@pytest.mark.parametrize(
    ("arguments", "target", "settings"),
    [
        pytest.param("hopper", "hopper", [], id="an image, with all that it is linked to"),
        pytest.param("hopper-devel", "hopper_devel", [], id="the image with compilers"),
        pytest.param(
            "hopper --stage toolchain",
            "hopper_common",
            ["hopper_common.target=toolchain", "hopper_common.tags=attnimg-toolchain:hopper"],
            id="the toolchain, from a target that is linked to no kernel",
        ),
        pytest.param(
            "hopper --stage fa4-kernels",
            "hopper_fa4-kernels",
            ["hopper_fa4-kernels.tags=attnimg-fa4-kernels:hopper"],
            id="what is compiled ahead of time, from its own target",
        ),
        pytest.param(
            "hopper --kernel flash-attn --stage unit",
            "hopper_flash-attn",
            ["hopper_flash-attn.target=unit", "hopper_flash-attn.tags=attnimg-unit:hopper"],
            id="a stage with the build of one kernel",
        ),
    ],
)
def test_a_stage_is_built_with_the_target_that_has_its_contexts(
    docker: Path, arguments: str, target: str, settings: list[str]
) -> None:
    *command, last = bake(docker, *arguments.split())
    assert last == target
    assert [after for word, after in pairwise(command) if word == "--set"] == settings


def test_wheels_made_earlier_replace_every_kernel_but_what_is_compiled_from_one(
    docker: Path,
) -> None:
    wheels = docker.parent / "wheels"
    command = bake(docker, "hopper", WHEELS=str(wheels))
    replaced = {after for word, after in pairwise(command) if word == "--set"}
    assert replaced == {
        f"hopper.contexts.wheelhouse={wheels}",
        f"hopper_devel.contexts.wheelhouse={wheels}",
        f"hopper_triton-kernels.contexts.wheelhouse={wheels}",
    }


def test_the_registry_of_releases_is_no_part_of_an_engine_s_tags(docker: Path) -> None:
    (docker / "docker").write_text(
        '#!/bin/sh\n[ "$1" = info ] && echo /nowhere && exit\necho "registry: ${REGISTRY-none}"\n'
    )
    assert bake(docker, "turing", REGISTRY="ghcr.io/attnimg") == ["registry:", "none"]


def test_the_labels_say_what_is_used(docker: Path) -> None:
    bake(docker, "hopper")
    env = dict(
        line.split("=", 1) for line in (docker / "env").read_text().splitlines() if "=" in line
    )
    assert env["BASE"] == "docker-image://attnimg-base:bookworm"
    assert (env["BASE_NAME"], env["BASE_DIGEST"]) == ("attnimg-base:bookworm", "sha256:1234")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", env["REVISION"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", env["CREATED"])
    assert env["VERSION"]


def bake(docker: Path, *arguments: str, **variables: str) -> list[str]:
    """Return the words of the one docker command that builds."""
    done = build(*arguments, docker=docker, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


MOUNTED = sorted(
    set(
        re.findall(
            r"--mount=type=bind,source=([^,\s]+)",
            (ROOT / "docker/Dockerfile").read_text(encoding="utf-8"),
        )
    )
)


@pytest.mark.parametrize("path", MOUNTED)
def test_what_the_dockerfile_mounts_is_there(path: str) -> None:
    assert list(ROOT.glob(re.sub(r"\$[A-Z_]+", "*", path))), path


@pytest.mark.parametrize("path", [p for p in MOUNTED if re.fullmatch(r"attnimg/.*[.]py", p)])
def test_a_file_of_attnimg_that_is_mounted_alone_imports_nothing_else_of_it(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported
    assert not [node for node in imported if "attnimg" in ast.unparse(node)]


def stage(name: str) -> str:
    """Return the text of a stage of the Dockerfile."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    first = rf"^FROM (?:--platform=\S+ )?\S+ AS {name}\n"
    (body,) = re.findall(rf"{first}(.*?)(?=^FROM )", text, re.MULTILINE | re.DOTALL)
    return str(body)


def test_images_with_one_lock_file_have_equal_inputs_up_to_the_stack() -> None:
    """So one builder makes the layers of torch and the stack once for all of them."""
    bake = json.loads((ROOT / "docker/docker-bake.json").read_text())["target"]
    taken = set(re.findall(r"^ARG (\w+)", "".join(map(stage, SHARED)), re.MULTILINE))
    assert taken == {"PYTHON", "DEBIAN", "APT_PACKAGES", "ACCELERATOR", "LOCK"}
    given: dict[str, set[str]] = {}
    for name in (name for name in bake if name.endswith("_common")):
        args = bake["image"]["args"] | bake[name]["args"]
        values = json.dumps({key: value for key, value in args.items() if key in taken})
        given.setdefault(args["LOCK"], set()).add(values)
    assert len(given) < sum(name.endswith("_common") for name in bake), "some share a lock file"
    assert {len(values) for values in given.values()} == {1}


@pytest.mark.parametrize("name", ["torch", "native-toolchain", "rocm-toolchain", "unpruned"])
def test_a_stage_installs_the_torch_wheel_that_no_package_index_has(name: str) -> None:
    (install,) = re.findall(r"^/install/install.sh .*-r /torch.txt.*", stage(name), re.MULTILINE)
    assert "--find-links /torch-wheel " in install
    assert "from=torch-wheel,target=/torch-wheel" in stage(name)


def test_no_other_stage_installs_torch() -> None:
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    assert len(re.findall("-r /torch.txt", text)) == 4


SHARED = ("python", "torch", "stack")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        pytest.param(
            "torch",
            {"install.sh", "prune.py", "elf.py", "same_times.sh", "unneeded/torch.toml"},
            id="torch's layer reads five files of docker/install",
        ),
        pytest.param(
            "native-toolchain", {"install.sh", "every_image.txt", "cuda_home.sh"},
            id="the toolchain's, without which kernels are compiled again, three",
        ),
    ],
)  # fmt: skip
def test_a_large_layer_depends_on_what_it_uses_alone(name: str, files: set[str]) -> None:
    mounted = re.findall(r"source=docker/install/?([^,\s]*)", stage(name))
    assert set(mounted) == files


@pytest.mark.parametrize("name", ["python", "torch", "stack", "needs", "kernels", "files"])
def test_the_files_of_a_layer_have_one_time(name: str) -> None:
    *_, last = stage(name).split('<<"EOT"\n')[-1].split("EOT")[0].strip().splitlines()
    assert last == '/install/same_times.sh "$began"'


@pytest.mark.parametrize(
    ("name", "platform", "says"),
    [
        pytest.param(
            "ampere", "linux/arm64", "recipes/images/ampere.toml has linux/amd64", id="not its own"
        ),
        pytest.param(
            "hopper", "arm64", "recipes/images/hopper.toml has linux/amd64, linux/arm64", id="typo"
        ),
        pytest.param("cpu", "linux/arm64", "index for CPUs was not reached", id="no torch"),
    ],
)
def test_a_platform_that_can_not_be_built_is_refused(name: str, platform: str, says: str) -> None:
    done = build(name, "--check", PLATFORM=platform)
    assert done.returncode == 1
    what, why, do = done.stderr.splitlines()
    assert platform in what
    assert says in why
    assert "do:" in do


def test_a_platform_is_chosen_by_its_variables_and_names_its_files(docker: Path) -> None:
    other = "arm64" if os.uname().machine == "x86_64" else "amd64"
    own, end = f"linux/{'amd64' if other == 'arm64' else 'arm64'}", {"amd64": "", "arm64": "-arm64"}
    for platform, tag_end in ((f"linux/{other}", f"-{other}"), (own, "")):
        bake(docker, "hopper", PLATFORM=platform)
        env = dict(line.split("=", 1) for line in (docker / "env").read_text().splitlines())
        files_end = end[platform.partition("/")[2]]
        assert (env["PLATFORM"], env["ARCH"], env["TAG_END"]) == (platform, files_end, tag_end)
    command = bake(docker, "hopper", "--stage", "toolchain", PLATFORM=f"linux/{other}")
    assert f"hopper_common.tags=attnimg-toolchain:hopper-{other}" in command


def test_wheels_of_another_platform_are_refused(docker: Path) -> None:
    wheels = docker.parent / "house"
    wheels.mkdir()
    for platform, abi, needed in (
        ("linux/arm64", "cp311-torch2.14-cu130", "cp311-torch2.14-cu130-arm64"),
        ("linux/amd64", "cp311-torch2.14-cu130-arm64", "cp311-torch2.14-cu130"),
    ):
        manifest = json.dumps({"image": "hopper", "abi": abi, "kernels": []})
        (wheels / "manifest.json").write_text(manifest)
        digest = hashlib.sha256(manifest.encode()).hexdigest()
        (wheels / "SHA256SUMS").write_text(f"{digest}  manifest.json\n")
        done = build("hopper", docker=docker, PLATFORM=platform, WHEELS=str(wheels))
        assert done.returncode == 1
        assert f"found {abi}, needed {needed}\n" in done.stderr
        end = "" if platform.endswith(os.uname().machine.replace("x86_64", "amd64")) else platform
        assert (f"make wheels/hopper PLATFORM={platform} for all" in done.stderr) == bool(end)


def test_without_a_platform_it_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docker")
    import platforms

    from recipes.facts import PLATFORMS, platform_suffix
    from recipes.solve.rules import MACHINES

    monkeypatch.delenv("PLATFORM", raising=False)
    for platform in PLATFORMS:
        machine = os.uname_result(("Linux", "host", "1", "1", MACHINES[platform]))
        monkeypatch.setattr(os, "uname", lambda machine=machine: machine)
        assert platforms.choose_platform("x", PLATFORMS) == platform
        assert platforms.files_end(platform) == platform_suffix(platform)
    machine = os.uname_result(("Linux", "host", "1", "1", "riscv64"))
    monkeypatch.setattr(os, "uname", lambda: machine)
    with pytest.raises(SystemExit, match="this machine's platform, linux/riscv64"):
        platforms.choose_platform("x", PLATFORMS)
