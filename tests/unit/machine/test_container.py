"""Which folders and driver files a process uses, in the layouts of container runtimes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from attnimg.machine import container
from attnimg.machine.container import choose_folders, find_runtime, library_path

UID = os.geteuid()
OTHER = 12345
ROOT_ONLY = pytest.mark.skipif(UID != 0, reason="only root can give a folder to another user")


class Layout:
    """The folders of a container, below a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("cache", "work", "tmp", "shm", "alice"):
            (root / name).mkdir()
        # Of an image: HOME is in the volume.
        self.environment = {
            "ATTNIMG_CACHE": str(root / "cache"),
            "HOME": str(root / "cache" / "home"),
        }

    def block(self, *names: str) -> None:
        """Make folders unusable for everybody, also for root: a file stands there."""
        for name in names:
            (self.root / name).rmdir()
            (self.root / name).write_text("")

    def choose(self, **variables: str) -> container.FolderSettings:
        return choose_folders(
            {**self.environment, **variables},
            uid=UID, working_folder=self.root / "work", tmp=self.root / "tmp",
            shm=self.root / "shm",
        )  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def own(folder: Path) -> dict[str, str]:
    return {name: str(folder / f"{label}-{UID}") for name, label in container.CACHES.items()}


def test_docker_with_a_volume(layout: Layout) -> None:
    assert layout.choose().variables == own(layout.root / "cache")


def test_what_is_set_is_kept(layout: Layout) -> None:
    chosen = layout.choose(HF_HOME="/models", HOME=str(layout.root / "alice")).variables
    assert chosen == {
        name: at for name, at in own(layout.root / "cache").items() if name != "HF_HOME"
    }


def test_choosing_again_changes_nothing(layout: Layout) -> None:
    for blocked in ("cache", "work", "tmp"):
        chosen = layout.choose()
        again = layout.choose(**chosen.variables)
        assert again.variables == {}
        # attnimg.pth sets the variables, then attnimg creates the folders.
        assert set(again.folders) == set(chosen.folders)
        layout.block(blocked)


@pytest.mark.parametrize(
    ("blocked", "used"),
    [
        pytest.param(("cache",), "work/.cache", id="the working folder"),
        pytest.param(("cache", "work"), f"tmp/attnimg-{UID}", id="the temporary folder"),
        pytest.param(("cache", "work", "tmp"), f"shm/attnimg-{UID}", id="shared memory"),
    ],
)
def test_without_a_writable_volume(layout: Layout, blocked: tuple[str, ...], used: str) -> None:
    layout.block(*blocked)
    base = layout.root / used
    wanted = {
        **own(base),
        "ATTNIMG_CACHE": str(base),
        "ATTNIMG_CACHE_INSTEAD_OF": str(layout.root / "cache"),
        "HOME": str(base / f"home-{UID}"),
    }
    if "tmp" in blocked:
        wanted["TMPDIR"] = str(base / f"tmp-{UID}")
    assert layout.choose().variables == wanted


def test_nowhere(layout: Layout) -> None:
    layout.block("cache", "work", "tmp", "shm")
    chosen = layout.choose()
    assert chosen.variables == {}
    assert layout.root / "shm" / f"attnimg-{UID}" in chosen.tried


def test_the_temporary_folder_of_a_job_is_used(layout: Layout) -> None:
    layout.block("cache", "work", "tmp", "shm")
    chosen = layout.choose(TMPDIR=str(layout.root / "alice"))
    assert chosen.tried == ()
    assert chosen.variables["ATTNIMG_CACHE"] == str(layout.root / "alice" / f"attnimg-{UID}")
    assert "TMPDIR" not in chosen.variables


@pytest.mark.parametrize(
    ("given", "used"), [("c", "work/c"), ("./c/d", "work/c/d"), ("~/c", "alice/c"), ("~", "alice")]
)
def test_a_relative_cache_becomes_absolute(layout: Layout, given: str, used: str) -> None:
    chosen = layout.choose(ATTNIMG_CACHE=given, HOME=str(layout.root / "alice")).variables
    assert chosen == {**own(layout.root / used), "ATTNIMG_CACHE": str(layout.root / used)}
    later = layout.choose(HOME=str(layout.root / "alice"), **chosen)
    assert later.variables == {}, "also in another working folder"


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "TMPDIR"])
def test_no_folder_is_relative(layout: Layout, variable: str) -> None:
    layout.block("cache")
    layout.environment["HOME"] = "/dev/null/home"
    chosen = layout.choose(**{variable: "c"})
    assert all(Path(value).is_absolute() for value in chosen.variables.values())
    assert all(folder.is_absolute() for folder in chosen.folders)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + "/b", "b/" + "a" * 300, "a/" * 2500])
def test_a_name_that_is_too_long_is_not_used(layout: Layout, name: str) -> None:
    named = str(layout.root / name)
    chosen = layout.choose(ATTNIMG_CACHE=named, HOME="/dev/null/home").variables
    assert chosen["ATTNIMG_CACHE"] == str(layout.root / "work" / ".cache")


def test_the_longest_name_is_used(layout: Layout) -> None:
    base = layout.root / ("a" * 255)
    assert layout.choose(ATTNIMG_CACHE=str(base), HOME=str(layout.root / "alice")).variables == own(
        base
    )


def test_a_temporary_folder_that_is_not_writable_is_replaced(layout: Layout) -> None:
    blocked = layout.root / "shm"
    layout.block("shm")
    assert layout.choose(TMPDIR=str(blocked)).variables["TMPDIR"] == str(layout.root / "tmp")
    assert "TMPDIR" not in layout.choose(TMPDIR=str(layout.root / "alice")).variables
    layout.block("tmp")
    own_folder = str(layout.root / "cache" / f"tmp-{UID}")
    assert layout.choose(TMPDIR=str(blocked)).variables["TMPDIR"] == own_folder


def test_a_home_of_the_user_s_own_is_used_as_without_a_container(layout: Layout) -> None:
    layout.block("cache")
    home = layout.root / "alice"
    assert layout.choose(HOME=str(home)).variables == {
        "ATTNIMG_CACHE": str(home / ".cache" / "attnimg"),
        "ATTNIMG_CACHE_INSTEAD_OF": str(layout.root / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / ".cache" / "attnimg" / f"inductor-{UID}"),
    }


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_outside_of_an_image_nothing_is_set(layout: Layout, variable: str) -> None:
    layout.environment = {"HOME": "/dev/null/home", variable: str(layout.root / "alice")}
    assert set(layout.choose().variables) <= {"HOME"}


def test_outside_of_an_image_without_a_home(layout: Layout) -> None:
    layout.environment = {"HOME": "/dev/null/home"}
    base = layout.root / "work" / ".cache"
    assert layout.choose().variables == {
        **own(base),
        "ATTNIMG_CACHE": str(base),
        "ATTNIMG_CACHE_INSTEAD_OF": "/dev/null/home/.cache",
        "HOME": str(base / f"home-{UID}"),
    }


def test_what_an_earlier_image_wrote_is_found(layout: Layout) -> None:
    old = layout.root / "cache" / "huggingface"
    old.mkdir()
    chosen = layout.choose().variables
    assert chosen["HF_HOME"] == str(old)
    assert chosen["TRITON_CACHE_DIR"] == str(layout.root / "cache" / f"triton-{UID}")


@ROOT_ONLY
@pytest.mark.parametrize("name", ["huggingface", "home"])
def test_another_user_s_folders_are_not_used(layout: Layout, name: str) -> None:
    (layout.root / "cache" / name).mkdir()
    os.chown(layout.root / "cache" / name, OTHER, -1)
    chosen = layout.choose().variables
    variable = {"huggingface": "HF_HOME", "home": "HOME"}[name]
    assert chosen[variable] == str(layout.root / "cache" / f"{name}-{UID}")


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(lambda path: os.chown(path, OTHER, -1), marks=ROOT_ONLY, id="another user's"),
        pytest.param(lambda path: path.chmod(0o777), id="one that all may write to"),
    ],
)
def test_a_planted_folder_makes_the_volume_unusable(layout: Layout, plant) -> None:  # type: ignore[no-untyped-def]  # chown or chmod
    planted = layout.root / "cache" / f"triton-{UID}"
    planted.mkdir()
    plant(planted)
    chosen = layout.choose().variables
    assert chosen["ATTNIMG_CACHE"] == str(layout.root / "work" / ".cache")
    sentence = container.replaced_cache(chosen)
    assert sentence is not None
    assert f"has triton-{UID}, a folder of another user or one that all may write to" in sentence


def test_a_group_writable_folder_is_made_private(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A library with umask 002 creates the folder in a program that bypassed the entrypoint.
    folder = layout.root / "cache" / f"huggingface-{UID}"
    folder.mkdir()
    folder.chmod(0o775)
    for name in (*container.CACHES, "TMPDIR", container.INSTEAD_OF):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in layout.environment.items():
        monkeypatch.setenv(name, value)
    container.apply(create=True)
    assert os.environ["HF_HOME"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (layout.root / "cache" / f"inductor-{UID}").is_dir()
    assert (layout.root / "cache" / "home").is_dir()


@pytest.mark.parametrize(
    ("given", "having", "wanted"),
    [
        pytest.param("", ["usr/local/nvidia/lib64"], "/usr/local/nvidia/lib64", id="GKE"),
        pytest.param(
            "/mine",
            ["usr/local/nvidia/lib64"],
            "/mine:/usr/local/nvidia/lib64",
            id="GKE, in a pod that sets the variable",
        ),
        pytest.param("", [".singularity.d/libs"], "/.singularity.d/libs", id="apptainer exec --nv"),
        pytest.param("/usr/local/nvidia/lib64", ["usr/local/nvidia/lib64"], None, id="it is there"),
        pytest.param(
            "", ["usr/lib/x86_64-linux-gnu", "usr/local/nvidia/lib64"], None, id="NVIDIA's runtime"
        ),
        pytest.param("", [], None, id="no driver"),
    ],
)
def test_the_driver_s_library(
    tmp_path: Path, given: str, having: list[str], wanted: str | None
) -> None:
    for folder in having:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libcuda.so.1").write_text("")
    environment = {"LD_LIBRARY_PATH": given} if given else {}
    assert library_path(environment, root=tmp_path) == wanted


@pytest.mark.skipif(UID == 0, reason="root can read every folder")
def test_a_driver_s_folder_that_can_t_be_read_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "usr" / "local" / "nvidia" / "lib64"
    folder.mkdir(parents=True)
    (folder / "libcuda.so.1").write_text("")
    folder.chmod(0)
    assert library_path({}, root=tmp_path) is None


def test_the_driver_s_programs_are_found_without_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert container.find_driver_program("nvidia-smi", path="/nothing") is None
    monkeypatch.setattr(container, "DRIVER_PROGRAMS", (str(tmp_path),))
    assert container.find_driver_program("nvidia-smi", path="/nothing") == str(program)


@pytest.mark.parametrize(
    ("environment", "files", "name"),
    [
        pytest.param({}, [".dockerenv"], "Docker", id="Docker"),
        pytest.param({}, ["run/.containerenv"], "Podman", id="Podman"),
        pytest.param({"APPTAINER_CONTAINER": "/x.sif"}, [], "Apptainer", id="Apptainer"),
        pytest.param({"SINGULARITY_CONTAINER": "/x.sif"}, [], "Apptainer", id="Singularity"),
        pytest.param(
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [".dockerenv"], "Kubernetes", id="Kubernetes"
        ),
        pytest.param({"SLURM_JOB_ID": "7"}, ["opt/attnimg/image.json"], "enroot", id="enroot"),
        pytest.param({"SLURM_JOB_ID": "7"}, [], None, id="a Slurm job without a container"),
        pytest.param({}, [], None, id="no container"),
    ],
)
def test_the_runtime(
    tmp_path: Path, environment: dict[str, str], files: list[str], name: str | None
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    found = find_runtime(environment, root=tmp_path)
    assert (found.name if found else None) == name


def test_a_command_says_which_folder_it_uses(layout: Layout) -> None:
    layout.block("cache")
    environment = {"PATH": os.environ["PATH"], **layout.environment, "HOME": "/dev/null/home"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "attnimg", "--version"], cwd=layout.root / "work",
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    where = layout.root / "work" / ".cache"
    wanted = f"attnimg: {layout.root}/cache is not writable for user {UID}; caches are in {where}\n"
    assert done.stderr == wanted
    assert {path.name for path in where.iterdir()} >= {f"inductor-{UID}", f"home-{UID}"}


# The root of a container that is read-only with --ipc=none: nothing that a user could write to.
READ_ONLY = """
set -e
mount -t tmpfs none /dev/shm
mount -o remount,ro,bind /dev/shm
mount --bind /tmp /tmp
mount -o remount,ro,bind /tmp
cd /dev/shm
exec "$@"
"""


def read_only(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run attnimg as an ordinary user where no folder for caches is writable."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    if UID == 0:
        namespace.pop()
        command = ("setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", *command)
    environment = {
        "PATH": os.environ["PATH"], "HOME": "/dev/null/home", "ATTNIMG_CACHE": "/dev/null/cache",
        "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    return subprocess.run(
        [*namespace, "bash", "-c", READ_ONLY, "bash", *command], env=environment | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def namespaces() -> None:
    if read_only("true").returncode:
        pytest.skip("mounts are not permitted here, which make the folders read-only")


ATTNIMG = (sys.executable, "-P", "-m", "attnimg")


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("arguments", [("train", "x.yaml"), ("verify",), ("evaluate", "x.yaml")])
def test_without_a_writable_folder_a_run_is_refused(arguments: tuple[str, ...]) -> None:
    done = read_only(*ATTNIMG, *arguments)
    uid = OTHER if UID == 0 else 0
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "attnimg: there is no folder for caches and temporary files"
    for folder in ("/dev/null/cache", "/dev/shm/.cache", "/tmp/attnimg-", "/dev/shm/attnimg-"):
        assert any(folder in line and f"is not writable for user {uid}" in line for line in lines)
    assert lines[-1].startswith("  do:  mount a")


@pytest.mark.usefixtures("namespaces")
def test_without_a_writable_folder_doctor_fails_and_others_work() -> None:
    done = read_only(*ATTNIMG, "doctor")
    assert done.returncode == 1
    assert "FAIL  no folder for caches and temporary files: /dev/null/cache is not" in done.stdout
    assert read_only(*ATTNIMG, "train", "--help").returncode == 0
    assert read_only(*ATTNIMG, "--version").stderr == ""


@pytest.mark.usefixtures("namespaces")
def test_one_writable_folder_is_enough() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o777)
        done = read_only(*ATTNIMG, "train", "x.yaml", TMPDIR=folder)
        assert f"caches are in {folder}/attnimg-" in done.stderr
        assert "there is no folder" not in done.stderr
