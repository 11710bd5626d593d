"""The kit of a GPU run: what is put in it, and how kernels are installed from it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from recipes.read import read_recipes

sys.path.append(str(Path(__file__).parents[1] / "gpu"))
import compile_kernels
import make_kit

TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
KERNELS = read_recipes(make_kit.ROOT).kernels


def wheel(folder, *, name="toy", tag="py3-none-any", files=None):
    """Write a wheel that has one module, and metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for file, text in (files or {f"{name}.py": "VALUE = 1\n"}).items():
            opened.writestr(file, text)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        opened.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
    return path


def describe(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.json").write_text(json.dumps({"env": {}, **facts}))


def states(to):
    lines = [json.loads(line) for line in (to / "status.jsonl").read_text().splitlines()]
    return {line["kernel"]: line for line in lines}


def install(kit, to, *names):
    return compile_kernels.main([f"--kit={kit}", f"--to={to}", *names])


def imported(to, code):
    env = {**os.environ, "PYTHONPATH": str(to)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_xformers_without_its_library_takes_torchs_kernels(tmp_path, monkeypatch):
    loads = "_build_metadata = None\n_built_with_cuda = (\n    _build_metadata is not None\n)\n"
    files = {"xformers/_cpp_lib.py": loads, "xformers/_C.so": "CUDA 12", "xformers/ops.py": ""}

    def download(_requirements, to):
        wheel(to, name="xformers", tag="py39-none-manylinux_2_28_x86_64", files=files)

    monkeypatch.setattr(make_kit, "download", download)
    folder = tmp_path / "xformers"
    for _ in range(2):
        make_kit.add_xformers(KERNELS["xformers"], folder)
        (made,) = folder.glob("xformers-*.whl")
        with zipfile.ZipFile(made) as opened:
            assert "xformers/_C.so" not in opened.namelist()
            scope = {}
            exec(opened.read("xformers/_cpp_lib.py").decode(), scope)
        assert scope["_built_with_cuda"] is True
        # One of an older kit is made again.
        (folder / "kernel.json").write_text("{}")
    files["xformers/_cpp_lib.py"] = "loaded = None\n"
    with pytest.raises(AssertionError, match="another xFormers"):
        make_kit.add_xformers(KERNELS["xformers"], folder)


def test_a_wheel_of_the_kit_is_installed_and_imported(tmp_path):
    folder = tmp_path / "kit/kernels/toy"
    wheel(folder)
    describe(folder, name="toy", imports=["toy"])
    assert install(tmp_path / "kit", tmp_path / "to", "toy") == 0
    line = states(tmp_path / "to")["toy"]
    assert (line["state"], line["error"], line["from"]) == ("installed", None, "wheel")
    code = "import toy; from importlib.metadata import version; print(toy.VALUE, version('toy'))"
    assert imported(tmp_path / "to", code) == "1 1.0"


def test_what_an_earlier_run_installed_is_not_installed_again(tmp_path):
    folder = tmp_path / "kit/kernels/toy"
    wheel(folder)
    describe(folder, name="toy", imports=["toy"])
    assert install(tmp_path / "kit", tmp_path / "to", "toy") == 0
    assert install(tmp_path / "kit", tmp_path / "to", "toy") == 0
    assert states(tmp_path / "to")["toy"]["from"] == "an earlier run"
    (tmp_path / "to/toy.py").write_text("raise ImportError('damaged')\n")
    assert install(tmp_path / "kit", tmp_path / "to", "toy") == 0
    assert states(tmp_path / "to")["toy"]["from"] == "wheel"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"toy.py": "raise ImportError('undefined symbol: _ZN3c10')\n"}, "undefined symbol"),
        ({"other.py": ""}, "No module named 'toy'"),
    ],
)
def test_a_wheel_that_cannot_be_imported_fails_with_what_it_said(tmp_path, files, expected):
    folder = tmp_path / "kit/kernels/toy"
    wheel(folder, files=files)
    describe(folder, name="toy", imports=["toy"])
    assert install(tmp_path / "kit", tmp_path / "to", "toy") == 1
    line = states(tmp_path / "to")["toy"]
    assert line["state"] == "failed"
    assert expected in line["error"]
    assert not list((tmp_path / "to").glob("toy*"))


def test_one_kernel_that_fails_ends_no_other(tmp_path):
    folder = tmp_path / "kit/kernels/toy"
    wheel(folder)
    describe(folder, name="toy", imports=["toy"])
    assert install(tmp_path / "kit", tmp_path / "to", "absent", "toy") == 1
    found = states(tmp_path / "to")
    assert found["toy"]["state"] == "installed"
    assert "the kit has no absent" in found["absent"]["error"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "kernel.json").write_text("{"), id="cut kernel.json"),
        pytest.param(lambda folder: (folder / "broken.whl").write_text(""), id="no wheel's name"),
    ],
)
def test_a_damaged_kernel_ends_no_other(tmp_path, damage):
    for name in ("toy", "other"):
        folder = tmp_path / f"kit/kernels/{name}"
        wheel(folder)
        describe(folder, name=name, imports=["toy"])
    damage(folder)
    install(tmp_path / "kit", tmp_path / "to", "other", "toy")
    found = states(tmp_path / "to")
    assert found["toy"]["state"] == "installed"
    assert found["other"]["state"] in ("installed", "failed")


@pytest.mark.parametrize(
    ("tag", "taken"),
    [
        (f"{TAG}-{TAG}-linux_x86_64", True),
        ("cp39-abi3-manylinux_2_28_x86_64", True),
        ("py39-none-manylinux_2_28_x86_64", True),
        ("cp38-cp38-linux_x86_64", False),
    ],
)
def test_a_wheel_is_taken_by_its_tags(tmp_path, tag, taken):
    wheel(tmp_path, tag=tag)
    assert bool(compile_kernels.usable_wheels([tmp_path])) is taken


def flash_attn_4(tmp_path):
    """Write a kit like FlashAttention-4's: a .pth, and a library in two pieces."""
    first, second = tmp_path / "kit-fa4a", tmp_path / "kit-fa4b"
    module = {"hidden/deep.py": "VALUE = 4\n", "deep.pth": f"import sys; {PTH}\n"}
    wheel(first, name="flash_attn_4", files={"flash_attn/cute/__init__.py": "import deep, large\n"})
    wheel(first, name="dsl", files=module)
    describe(
        first,
        name="flash-attn-4",
        imports=["flash_attn.cute"],
        inside="flash_attn",
        after=["flash-attn"],
        parts=[first.name, second.name],
    )
    tree = tmp_path / "tree"
    (tree / "large").mkdir(parents=True)
    (tree / "large/__init__.py").write_text(f"BYTES = {os.urandom(2000).hex()!r}\n")
    make_kit.pack(tree, ["**/*"], tmp_path / "packed", machine_code=True)
    whole = (tmp_path / "packed").read_bytes()
    second.mkdir()
    (first / "library.tar.xz.0").write_bytes(whole[:1000])
    (second / "library.tar.xz.1").write_bytes(whole[1000:])
    return second


PTH = "sys.path.insert(0, next(p for p in sys.path if p.endswith('to')) + '/hidden')"


def test_flash_attn_4_is_joined_from_its_parts_inside_flash_attn(tmp_path):
    flash_attn_4(tmp_path)
    folder = tmp_path / "kit/kernels/flash-attn"
    wheel(folder, name="flash_attn", files={"flash_attn/__init__.py": "VERSION = 2\n"})
    describe(folder, name="flash-attn", imports=["flash_attn"])
    to = tmp_path / "to"
    assert install(tmp_path / "kit", to, "flash-attn-4", "flash-attn") == 0, states(to)
    assert list(states(to)) == ["flash-attn", "flash-attn-4"]
    code = "import flash_attn, flash_attn.cute, deep; print(flash_attn.VERSION, deep.VALUE)"
    assert imported(to, code) == "2 4"


def test_a_missing_part_is_named(tmp_path):
    second = flash_attn_4(tmp_path)
    second.rename(tmp_path / "elsewhere")
    assert install(tmp_path / "kit", tmp_path / "to", "flash-attn-4") == 1
    assert "kit-fa4b" in states(tmp_path / "to")["flash-attn-4"]["error"]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "nvcc -c a.cu\nfatal error: Python.h: No such file or directory\n"
            "ninja: build stopped: subcommand failed.\nERROR: Failed building wheel for toy\n",
            "fatal error: Python.h: No such file or directory",
        ),
        ("/usr/bin/ld: cannot find -lcuda\nerror: command failed: exit status 1\n", None),
        ("nothing that names a cause\nthe end\n", "the end"),
        ("", "no output"),
    ],
)
def test_the_line_that_names_the_cause_is_recorded(log, expected):
    expected = expected or "/usr/bin/ld: cannot find -lcuda"
    assert compile_kernels.last_useful_line(log) == expected


def test_compilers_wait_for_a_slot_and_questions_do_not(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\necho "$@"\n[ "$1" != hold ] || { echo held; read line; }\n')
    compiler.chmod(0o755)
    slots = {"SLOTS": str(tmp_path), "SLOT_COUNT": "1", "SLOT_NVCC": str(compiler)}
    command = [sys.executable, str(compile_kernels.HERE / "compile_slot.py")]

    def start(*arguments):
        return subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **slots},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    with start("hold", "-c") as holder:
        assert [holder.stdout.readline(), holder.stdout.readline()] == ["hold -c\n", "held\n"]
        with start("-c", "-lineinfo", "a.cu") as waiting, start("--version") as question:
            assert question.communicate()[0] == "--version\n"
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(timeout=0.4)
            holder.communicate("done\n")
            assert waiting.communicate(timeout=30)[0] == "-c a.cu\n"


def test_versions_come_from_the_lock():
    assert make_kit.pinned("a==1 \\\n    --hash=sha256:0\nb-c==2.0\n", ["b-c", "a"]) == [
        "b-c==2.0",
        "a==1",
    ]
    with pytest.raises(SystemExit, match="absent is not in a lock file"):
        make_kit.pinned("a==1\n", ["absent"])
    lock = (make_kit.ROOT / "requirements/lock.txt").read_text()
    constraints = (make_kit.ROOT / "docker/constraints/hopper.txt").read_text()
    assert len(make_kit.pinned(lock, make_kit.LACKED)) == len(make_kit.LACKED)
    toolchain = (make_kit.ROOT / "requirements/images/toolchain-2.14.1-cu130.txt").read_text()
    assert make_kit.pinned(constraints, [*make_kit.FA4, make_kit.FA4_LARGE])
    assert make_kit.pinned(toolchain, make_kit.HEADERS)


@pytest.mark.parametrize("name", make_kit.BUILDS)
def test_a_kernel_is_built_for_hopper_by_its_recipe(name):
    kernel, build = KERNELS[name], make_kit.BUILDS[name]
    found = make_kit.environment(kernel, build)
    if variable := kernel.build["cuda"].arch_variable:
        assert found[variable] == kernel.archs["sm_90a"].token
    assert found.items() >= build.env.items()
    names = [patch.name for patch in make_kit.patches_of(kernel, make_kit.ROOT)]
    assert names[: len(kernel.patches)] == [Path(patch.name).name for patch in kernel.patches]
    key = make_kit.fingerprint(kernel, build, make_kit.patches_of(kernel, make_kit.ROOT))
    assert key != make_kit.fingerprint(kernel, build, [])


def test_a_source_is_packed_the_same_each_time(tmp_path):
    tree = tmp_path / "tree"
    (tree / "csrc").mkdir(parents=True)
    (tree / "csrc/kept.cu").write_text("kept\n")
    (tree / "left_out.md").write_text("left out\n")
    packed = []
    for name in "ab":
        make_kit.pack(tree, ["csrc/**/*"], tmp_path / name)
        packed.append((tmp_path / name).read_bytes())
        os.utime(tree / "csrc/kept.cu", (1, 1))
    assert packed[0] == packed[1]
    compile_kernels.unpack([], [tmp_path / "a"], into=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["kept.cu"]
