"""`make wheels/NAME` compiles kernel by kernel; a killed run leaves the old wheels or the new."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "docker"))
import kernel_wheels  # noqa: E402  # it runs beside docker/build.py, which is no package

NAME = "ampere"
WANTED = json.loads((ROOT / f"docker/images/{NAME}/wheelhouse.json").read_text())
KEYS: dict[str, str] = WANTED["kernels"]
FIRST, SECOND, THIRD = KEYS
# What docker/build.py reads from the environment.
VARIABLES = ("CACHE", "CACHE_WRITE", "WHEELS", "TRIM", "JOBS", "BASE_IMAGE", "TORCH_INDEX")

# A docker whose build of a kernel writes a real wheel and its report, as the kernel's stage does.
DOCKER = """#!{python}
import hashlib, json, os, sys, zipfile
from pathlib import Path
if sys.argv[1] == "info":
    print("/nowhere"); sys.exit()
if sys.argv[1] == "image":
    print("sha256:1234"); sys.exit()
here = Path(sys.argv[0]).parent
with (here / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
dest = "".join(word.partition("dest=")[2] for word in sys.argv if "type=local,dest=" in word)
if not dest:
    sys.exit()  # an image
text = sys.stdin.read() if sys.argv[-1] == "-" else ""
kernel = text.partition("attnimg-kernels:")[2].rsplit("-", 2)[0] or sys.argv[-1].partition("_")[2]
if kernel == os.environ.get("FAILS"):
    sys.exit(7)
if kernel == os.environ.get("KILLED"):
    os.kill(os.getppid(), 9)
    sys.exit(1)
keys = json.loads(Path("docker/images/{name}/wheelhouse.json").read_text())["kernels"]
build = json.loads(Path(f"docker/images/{name}/kernels/{{kernel}}.json").read_text())
trimmed = bool(os.environ.get("TRIM") and build["trim_env"])
wheels = Path(dest, "wheels")
wheels.mkdir(parents=True)
wheel = wheels / f"{{kernel.replace('-', '_')}}-1-cp311-cp311-linux_x86_64.whl"
with zipfile.ZipFile(wheel, "w") as archive:
    archive.writestr("a.py", os.environ.get("CONTENT", "") + kernel)
report = dict(name=kernel, version="1", key=keys[kernel], trimmed=trimmed, wheel=wheel.name,
              sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
(wheels / f"{{kernel}}.json").write_text(json.dumps(report))
"""


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """The folder of that docker, for PATH."""
    program = tmp_path / "bin/docker"
    program.parent.mkdir()
    program.write_text(DOCKER.format(python=sys.executable, name=NAME))
    program.chmod(0o755)
    return program.parent


def wheels(docker: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run docker/build.py as `make wheels/ampere` does; the wheelhouse is beside `docker`."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env |= {"PATH": f"{docker}:{env['PATH']}", **variables}
    command = [sys.executable, "docker/build.py", NAME, "--wheels-to", str(house(docker))]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done


def house(docker: Path) -> Path:
    return docker.parent / "dist" / NAME


def compiled(docker: Path) -> list[str]:
    """Return the targets that were built, in order."""
    calls = docker / "calls"
    return [line.split()[-1] for line in calls.read_text().splitlines()] if calls.exists() else []


def built(folder: Path) -> list[str]:
    """Return the kernels of a wheelhouse, all of whose hashes must be right."""
    sums = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder)
    assert sums.returncode == 0
    kernels = json.loads((folder / "manifest.json").read_text())["kernels"]
    assert sorted(path.name for path in folder.glob("*.whl")) == sorted(k["wheel"] for k in kernels)
    for kernel in kernels:
        wheel = (folder / kernel["wheel"]).read_bytes()
        assert hashlib.sha256(wheel).hexdigest() == kernel["sha256"]
    return [kernel["name"] for kernel in kernels]


def test_one_kernel_is_merged_beside_the_others(docker: Path) -> None:
    done = wheels(docker, "--kernel", SECOND)
    assert (done.returncode, compiled(docker)) == (0, [f"{NAME}_{SECOND}"])
    assert built(house(docker)) == [SECOND]
    assert f"has no {FIRST}, {THIRD} yet: make wheels/{NAME}" in done.stdout
    assert wheels(docker, "--kernel", FIRST).returncode == 0
    assert built(house(docker)) == sorted([FIRST, SECOND])


def test_without_a_name_what_is_missing_is_compiled_kernel_by_kernel(docker: Path) -> None:
    wheels(docker, "--kernel", SECOND)
    done = wheels(docker)
    assert compiled(docker)[1:] == [f"{NAME}_{FIRST}", f"{NAME}_{THIRD}"]
    assert [line for line in done.stdout.splitlines() if " of 2: " in line] == [
        f"wheels: 1 of 2: {FIRST}",
        f"wheels: 2 of 2: {THIRD}",
    ]
    assert built(house(docker)) == sorted(KEYS)
    again = wheels(docker)
    assert (again.returncode, len(compiled(docker))) == (0, 3)
    assert f"has all {len(KEYS)} kernels" in again.stdout


def test_a_named_kernel_is_compiled_again(docker: Path) -> None:
    wheels(docker)
    before = {path.name: path.read_bytes() for path in house(docker).glob("*.whl")}
    assert wheels(docker, "--kernel", FIRST, CONTENT="new").returncode == 0
    after = {path.name: path.read_bytes() for path in house(docker).glob("*.whl")}
    changed = [name for name in after if before[name] != after[name]]
    assert [name.partition("-")[0] for name in changed] == [FIRST.replace("-", "_")]
    assert built(house(docker)) == sorted(KEYS)


@pytest.mark.parametrize("how", ["FAILS", "KILLED"])
def test_what_was_finished_before_a_failure_or_a_kill_stays(docker: Path, how: str) -> None:
    done = wheels(docker, **{how: SECOND})
    assert done.returncode == (7 if how == "FAILS" else -signal.SIGKILL)
    assert built(house(docker)) == [FIRST]
    assert wheels(docker).returncode == 0
    assert compiled(docker) == [f"{NAME}_{name}" for name in (FIRST, SECOND, SECOND, THIRD)]
    assert built(house(docker)) == sorted(KEYS)
    assert [path.name for path in house(docker).parent.iterdir()] == [NAME]


def edit(folder: Path, **changes: object) -> None:
    """Change what the manifest says of the first kernel."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    (kernel,) = (one for one in manifest["kernels"] if one["name"] == FIRST)
    kernel.update(changes)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {"key": "0" * 16}, f"it was built from recipe {'0' * 16}, now ", id="a recipe changed"
        ),
        pytest.param({"trimmed": True}, "it is a small build", id="a small build"),
        pytest.param({"sha256": "0" * 64}, "its wheel was changed or removed", id="another wheel"),
        pytest.param({"name": "other"}, "it is not a kernel of ampere", id="an unknown kernel"),
        pytest.param({"wheel": "../../x"}, "its wheel was changed or removed", id="a path"),
    ],
)
def test_a_wheel_that_no_recipe_builds_any_more_is_dropped_with_the_reason(
    docker: Path, changes: dict[str, object], reason: str
) -> None:
    wheels(docker)
    edit(house(docker), **changes)
    done = wheels(docker, "--kernel", SECOND)
    assert f"wheels: {changes.get('name', FIRST)} is not kept: {reason}" in done.stdout
    assert built(house(docker)) == sorted(KEYS.keys() - {FIRST})
    assert wheels(docker).returncode == 0
    assert built(house(docker)) == sorted(KEYS)


def test_a_kernel_too_many_is_removed_when_nothing_is_missing(docker: Path) -> None:
    wheels(docker)
    manifest = json.loads((house(docker) / "manifest.json").read_text())
    manifest["kernels"].append({**manifest["kernels"][0], "name": "other"})
    (house(docker) / "manifest.json").write_text(json.dumps(manifest))
    done = wheels(docker)
    assert "other is not kept" in done.stdout
    assert built(house(docker)) == sorted(KEYS)


@pytest.mark.parametrize("text", ["", "[]", '{"kernels": [1]}', '{"kernels": [{}]}', "\xff"])
def test_a_manifest_that_can_not_be_read_keeps_no_wheel(docker: Path, text: str) -> None:
    wheels(docker)
    (house(docker) / "manifest.json").write_bytes(text.encode("latin-1"))
    done = wheels(docker, "--kernel", FIRST)
    assert (done.returncode, built(house(docker))) == (0, [FIRST])
    assert "its manifest.json can't be read" in done.stdout


def test_small_builds_are_no_part_of_a_whole_wheelhouse(docker: Path) -> None:
    wheels(docker, TRIM="1")
    done = wheels(docker)
    small = [name for name in KEYS if json.loads(kernel_file(name).read_text())["trim_env"]]
    assert small
    assert compiled(docker)[len(KEYS) :] == [f"{NAME}_{name}" for name in small]
    assert not [
        one["name"]
        for one in json.loads((house(docker) / "manifest.json").read_text())["kernels"]
        if one["trimmed"]
    ]
    assert done.returncode == 0


def kernel_file(name: str) -> Path:
    return ROOT / f"docker/images/{NAME}/kernels/{name}.json"


def test_an_unknown_kernel_is_refused_with_the_names(docker: Path) -> None:
    done = wheels(docker, "--kernel", "flash-atn")
    assert (done.returncode, compiled(docker)) == (1, [])
    what, why, do = done.stderr.splitlines()
    assert what == f"build: there is no such kernel to build for {NAME}"
    assert why.endswith(f"built for it: {', '.join(KEYS)}")
    assert do.startswith("  do:  name one of these")


def test_a_kernel_of_the_cache_is_taken_from_there(docker: Path) -> None:
    """`docker buildx imagetools inspect` answers for every kernel: the fake docker ends with 0."""
    program = docker / "docker"
    program.write_text(
        program.read_text().replace(
            'if sys.argv[1] == "image":', 'if sys.argv[1] == "image" or "imagetools" in sys.argv:'
        )
    )
    done = wheels(docker, CACHE="registry.example.com/team")
    assert (done.returncode, built(house(docker))) == (0, sorted(KEYS))
    assert set(compiled(docker)) == {"-"}


def install(docker: Path, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build an image from the wheelhouse."""
    env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    env |= {"PATH": f"{docker}:{env['PATH']}", "WHEELS": str(house(docker)), **variables}
    command = [sys.executable, "docker/build.py", name]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_an_image_is_not_built_from_a_part_of_its_wheels(docker: Path) -> None:
    wheels(docker, "--kernel", FIRST)
    before = len(compiled(docker))
    done = install(docker, NAME)
    assert (done.returncode, len(compiled(docker))) == (1, before)
    what, *why, do = done.stderr.splitlines()
    assert what == f"build: {house(docker)} can't be used for the image {NAME}"
    assert [line.split("the kernel ")[1] for line in why] == [
        f"{name} is missing" for name in (SECOND, THIRD)
    ]
    assert f"make wheels/{NAME} KERNEL={SECOND}" in do
    wheels(docker)
    assert install(docker, NAME).returncode == 0
    assert compiled(docker)[-1] == NAME


# Kills the process at the event NUMBER that Python's audit hooks see: an open, a rename, a removal.
KILL = """
import os, signal, sys
sys.path.insert(0, "docker")
import kernel_wheels
from pathlib import Path
left = [int(sys.argv[1])]
def count(event, arguments):
    if event in {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "ctypes.dlsym",
                 "ctypes.dlopen", "shutil.rmtree", "shutil.copyfile", "fcntl.flock"}:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
wanted = kernel_wheels.wanted_wheels(sys.argv[4], trim=False)
if sys.argv[5] == "two steps":
    kernel_wheels._replace = lambda folder, part: (
        kernel_wheels.replace_in_two_steps(folder, part) if folder.exists() else part.rename(folder)
    )
sys.addaudithook(count)
kernel_wheels.merge(Path(sys.argv[2]), Path(sys.argv[3]), wanted)
"""


def state(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("how", ["exchanged", "two steps"])
def test_a_merge_that_is_killed_anywhere_leaves_the_old_wheels_or_the_new(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(ROOT)
    wanted = kernel_wheels.wanted_wheels(NAME, trim=False)
    made = tmp_path / "made"
    wheels(docker)
    shutil.copytree(house(docker), tmp_path / "old")
    wheels(docker, "--kernel", FIRST, CONTENT="new")
    new = state(house(docker))
    made.mkdir()
    (report,) = (
        one
        for one in json.loads((house(docker) / "manifest.json").read_text())["kernels"]
        if one["name"] == FIRST
    )
    shutil.copy(house(docker) / report["wheel"], made)
    (made / f"{FIRST}.json").write_text(json.dumps(report))
    old = state(tmp_path / "old")
    seen: set[str] = set()
    for number in range(200):
        shutil.rmtree(house(docker).parent)
        shutil.copytree(tmp_path / "old", house(docker))
        command = [
            sys.executable,
            "-c",
            KILL,
            str(number),
            str(house(docker)),
            str(made),
            NAME,
            how,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        folder = house(docker)
        if how == "two steps" and not folder.exists():
            folder = folder.with_name(f"{NAME}.old")
        assert state(folder) in (old, new), number
        seen.add("old" if state(folder) == old else "new")
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert kernel_wheels.merge(house(docker), made, wanted) == []
        assert state(house(docker)) == new
    assert number > 10
    assert seen == {"old", "new"}
    assert [path.name for path in house(docker).parent.iterdir()] == [NAME]


def test_a_wheelhouse_that_another_run_replaces_is_not_put_back(tmp_path: Path) -> None:
    """In two steps, as where the file system can't exchange folders."""
    folder, old = tmp_path / NAME, tmp_path / f"{NAME}.old"
    old.mkdir()
    with kernel_wheels._locked(tmp_path):
        other = threading.Thread(target=kernel_wheels.recover, args=(folder,))
        other.start()
        other.join(0.2)
        assert other.is_alive()
        assert not folder.exists()
        folder.mkdir()
        old.rmdir()
    other.join()
    kernel_wheels.recover(tmp_path / "not there" / NAME)
    old.mkdir()
    folder.rmdir()
    kernel_wheels.recover(folder)
    assert folder.exists()
