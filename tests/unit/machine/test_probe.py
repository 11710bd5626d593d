"""What this machine is: recorded answers of drivers, and folders of local kernels."""

import base64
import hashlib
import json
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from attnimg.errors import AttnimgError
from attnimg.machine.fingerprint import triton_fingerprint, triton_in_short
from attnimg.machine.kernel_cache import shipped_kernels, shipped_triton
from attnimg.machine.local_kernels import (
    TorchBuild,
    choose_variant,
    read_local_kernels,
    torch_build,
)
from attnimg.machine.probe import CommandResult, Recording, describe, find_shadowed, this_machine

MACHINES = Path(__file__).parent / "machines"
TWO = "GPU A, 8.0, 1000, 1.0\nGPU B, 9.0, 2000, 1.0\n"
CPU_TORCH = TorchBuild(version=(2, 13), vendor="cpu")
CUDA_TORCH = TorchBuild(version=(2, 13), vendor="nvidia", toolkit=(13, 0))
HERE = f"{platform.machine()}-{platform.system().lower()}"


def read_machine(name):
    kept = json.loads((MACHINES / f"{name}.json").read_text())
    raw = dict(kept["recording"])
    if "nvidia_smi" in raw:
        raw["nvidia_smi"] = CommandResult(**raw["nvidia_smi"])
    raw["kfd_nodes"] = tuple(raw.get("kfd_nodes", ()))
    return Recording(**raw), kept["machine"]


@pytest.mark.parametrize("name", sorted(path.stem for path in MACHINES.glob("*.json")))
def test_a_recorded_machine_is_told_by_its_answers(name):
    recording, wanted = read_machine(name)
    machine = describe(recording)
    found = {
        "arch": machine.arch.name,
        "gpu": machine.gpu,
        "memory_bytes": machine.memory_bytes,
        "driver": machine.driver,
        "other_archs": list(machine.other_archs),
        "driver_problem": machine.driver_problem,
    }
    nothing = {"memory_bytes": None, "driver": None, "other_archs": [], "driver_problem": None}
    assert found == nothing | wanted


@pytest.mark.parametrize(
    ("mask", "arch", "others"),
    [
        pytest.param(None, "sm_80", ("sm_90",), id="all are visible"),
        pytest.param("", "cpu", (), id="an empty list hides all"),
        pytest.param("-1", "cpu", (), id="-1 hides all"),
        pytest.param("NoDevFiles", "cpu", (), id="a word hides all"),
        pytest.param("1", "sm_90", (), id="the second alone"),
        pytest.param("1,0", "sm_90", ("sm_80",), id="the second first"),
        pytest.param("0,7,1", "sm_80", (), id="the list ends at an invalid one"),
        pytest.param("GPU-6f1c0e1a", "sm_80", ("sm_90",), id="UUIDs are not told apart"),
    ],
)
def test_cuda_visible_devices_hides_devices(mask, arch, others):
    recording = Recording(
        nvidia_smi=CommandResult(returncode=0, stdout=TWO), cuda_visible_devices=mask
    )
    machine = describe(recording)
    assert (machine.arch.name, machine.other_archs) == (arch, others)


@pytest.mark.parametrize(
    ("script", "arch", "problem"),
    [
        pytest.param("echo 'GPU A, 8.0, 1000, 1.0'", "sm_80", None, id="one that answers"),
        pytest.param("echo 'no driver'; exit 9", "cpu", "no driver", id="one that complains"),
        pytest.param("exec /no/such", "cpu", "/no/such", id="one that does not run"),
    ],
)
def test_the_nvidia_smi_on_path_is_asked(script, arch, problem, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = this_machine([], sys_root=tmp_path)
    assert machine.arch.name == arch
    assert (problem is None) == (machine.driver_problem is None)
    assert (problem or "") in (machine.driver_problem or "")


def test_amd_gpus_are_read_below_sys(tmp_path, monkeypatch):
    for node, version in enumerate((0, 90402, 110000)):
        folder = tmp_path / "class/kfd/kfd/topology/nodes" / str(node)
        (folder / "mem_banks/0").mkdir(parents=True)
        (folder / "properties").write_text(f"gfx_target_version {version}\n")
        (folder / "mem_banks/0/properties").write_text("heap_type 1\nsize_in_bytes 1024\n")
    for variable in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    machine = this_machine([], sys_root=tmp_path)
    assert (machine.arch.name, machine.memory_bytes) == ("gfx942", 1024)
    assert machine.other_archs == ("gfx1100",)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert this_machine([], sys_root=tmp_path).arch.name == "gfx1100"


def test_packages_are_asked_for_in_any_spelling():
    machine = this_machine(["PyTest_XDist", "no-such-package-here"])
    assert set(machine.packages) - {"torch"} == {"pytest-xdist"}
    assert machine.torch == machine.packages.get("torch")


def test_torch_is_never_imported():
    code = "import sys; from attnimg.machine.probe import this_machine as m"
    code += "; m(['torch', 'transformers'])"
    code += (
        "; assert not {'torch', 'transformers', 'kernels', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def kernel(folder, variant, *, backend="cpu", source="def flash_attn_func(): ...\n"):
    path = folder / variant
    path.mkdir(parents=True)
    described = {"name": "toy-attn", "version": 1, "backend": {"type": backend}}
    (path / "metadata.json").write_text(json.dumps(described))
    (path / "__init__.py").write_text(source)
    return path


@pytest.mark.parametrize(
    "given",
    [
        pytest.param("", id="a repository"),
        pytest.param("build", id="its build folder"),
        pytest.param("build/torch-universal", id="one variant"),
    ],
)
def test_a_kernel_folder_is_read(given, tmp_path):
    kernel(tmp_path / "build", "torch-universal")
    path = str(tmp_path / given)
    (served,) = read_local_kernels(f"org/name={path}", torch="2.13.0+cpu")
    assert (served.repo, served.path, served.vendor) == ("org/name", path, "cpu")
    assert (served.version, served.exports) == ("1", {"flash_attn_func"})


def test_several_kernels_are_served(tmp_path):
    kernel(tmp_path, "a/torch-universal")
    kernel(tmp_path, "b/torch-universal")
    spec = f"org/a={tmp_path}/a:org/b={tmp_path}/b"
    assert [k.repo for k in read_local_kernels(spec, torch="2.13.0")] == ["org/a", "org/b"]


@pytest.mark.parametrize(
    ("source", "exports"),
    [
        pytest.param("def f(): ...\nasync def g(): ...\n", {"f", "g"}, id="functions"),
        pytest.param("from .ops import f, g as h\n", {"f", "h"}, id="imported names"),
        pytest.param("f = g = make()\n", {"f", "g"}, id="assigned names"),
        pytest.param("import os\ndef _f(): ...\n", set(), id="neither modules nor private names"),
        pytest.param(
            "try:\n    from x import f\nexcept ImportError:\n    def g(): ...\n", {"f", "g"},
            id="both ways of a try",
        ),
        pytest.param("if x:\n    def f(): ...\n", {"f"}, id="inside an if"),
        pytest.param("from .ops import *\n", None, id="a star hides what there is"),
        pytest.param("def __getattr__(name): ...\n", None, id="so does __getattr__"),
        pytest.param("def f(:\n", None, id="no Python"),
    ],
)  # fmt: skip
def test_exports_are_read_from_the_source(source, exports, tmp_path):
    kernel(tmp_path, "torch-universal", source=source)
    assert read_local_kernels(f"o/n={tmp_path}", torch="2.13.0")[0].exports == exports


def test_the_source_may_stand_in_a_package_of_the_kernels_name(tmp_path):
    path = kernel(tmp_path, "torch-universal")
    (path / "toy_attn").mkdir()
    (path / "__init__.py").rename(path / "toy_attn" / "__init__.py")
    assert read_local_kernels(f"o/n={tmp_path}", torch="2.13.0")[0].exports == {"flash_attn_func"}


@pytest.mark.parametrize(
    ("build", "variants", "chosen"),
    [
        pytest.param(CPU_TORCH, ["torch-cuda", "torch-cpu"], "torch-cpu", id="this vendor"),
        pytest.param(
            CPU_TORCH, ["torch-universal", "torch-cpu"], "torch-cpu", id="universal is the last"
        ),
        pytest.param(
            CPU_TORCH, ["torch-cpu", f"torch213-cxx11-cpu-{HERE}"], f"torch213-cxx11-cpu-{HERE}",
            id="compiled before pure Python",
        ),
        pytest.param(
            CPU_TORCH,
            [f"torch213-cpu-{HERE}", *(f"torch-stable-abi2{n}-cpu-{HERE}" for n in (9, 11, 14))],
            f"torch-stable-abi211-cpu-{HERE}", id="the newest stable ABI that is not too new",
        ),
        pytest.param(
            CUDA_TORCH, [f"torch213-cxx11-cu1{n}-{HERE}" for n in (26, 30, 32)],
            f"torch213-cxx11-cu130-{HERE}", id="CUDA's same major, no newer minor",
        ),
        pytest.param(
            CPU_TORCH, [f"torch212-cxx11-cpu-{HERE}", "torch213-cxx11-cpu-mips-plan9"], None,
            id="another torch or system is nothing",
        ),
        pytest.param(CUDA_TORCH, ["torch-cpu"], "torch-cpu", id="a foreign one is named"),
        pytest.param(CPU_TORCH, ["src", ".git"], None, id="no variants at all"),
    ],
)  # fmt: skip
def test_the_variant_is_the_one_that_kernels_would_load(build, variants, chosen, tmp_path):
    for name in variants:
        (tmp_path / "build" / name).mkdir(parents=True)
    path, rejected = choose_variant(tmp_path, build=build)
    assert (path.name if path else None) == chosen
    assert len(rejected) == (0 if chosen or "src" in variants else len(variants))


def test_kernels_itself_chooses_the_same(tmp_path):
    from kernels import resolver

    names = ["torch-cpu", "torch-cuda", "torch-universal", f"torch-stable-abi211-cpu-{HERE}"]
    names += [f"torch213-cxx11-cpu-{HERE}", f"torch-stable-abi29-cpu-{HERE}", "tvm-ffi01-x"]
    for name in names:
        (kernel(tmp_path / "build", name) / "metadata.json").write_text(
            '{"id": "_toy_cpu_1", "name": "toy-attn", "version": 1, "license": "MIT", '
            '"python-depends": [], "backend": {"type": "cpu"}}'
        )
    torch = this_machine([]).torch
    while names:
        chosen, _ = choose_variant(tmp_path, build=torch_build(torch))
        try:
            theirs = resolver.resolve_local_kernel(tmp_path, backend=None).variant_path
        except FileNotFoundError:
            theirs = None
        if theirs is None:
            break
        assert chosen == theirs
        for child in chosen.iterdir():
            child.unlink()
        chosen.rmdir()
        names.remove(chosen.name)
    assert len(names) < 4, "several rounds were compared"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        pytest.param("", "found no '='", id="empty"),
        pytest.param("org/name", "found no '='", id="no path"),
        pytest.param("o/n={path}/torch-cpu:", "found no '='", id="a colon at the end"),
        pytest.param("o/n={path}/none", "found no folder", id="no such folder"),
        pytest.param("o/n={path}/empty", "found no build variant", id="an empty folder"),
        pytest.param("o/n={path}/bare", "metadata.json", id="a variant without metadata"),
        pytest.param("o/n={path}/garbled", "the devices", id="metadata that is no JSON"),
        pytest.param("o/n={path}/listed", "the devices", id="metadata that is a list"),
        pytest.param("o/n={path}/xpu", "'xpu'", id="a vendor we know nothing of"),
        pytest.param("o/n={path}/old", "needs exactly torch 1.2", id="another torch"),
    ],
)
def test_an_entry_that_serves_nothing_is_named(spec, why, tmp_path):
    kernel(tmp_path, "torch-cpu")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare/torch-universal").mkdir(parents=True)
    for name, text in (("garbled", "{"), ("listed", "[]")):
        (kernel(tmp_path, f"{name}/torch-universal") / "metadata.json").write_text(text)
    kernel(tmp_path, "xpu/torch-universal", backend="xpu")
    version = torch_build("2.13.0")
    backend = {"cpu": "cpu", "nvidia": "cu{}{}", "amd": "rocm{}{}"}[version.vendor]
    kernel(tmp_path, f"old/torch12-cxx11-{backend.format(*(version.toolkit or ()))}-{HERE}")
    with pytest.raises(AttnimgError) as caught:
        read_local_kernels(spec.format(path=tmp_path), torch="2.13.0")
    assert caught.value.code == "local-kernel"
    assert "LOCAL_KERNELS entry" in caught.value.what
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        pytest.param("def flash_attn_varlen_func(q, k, *, softcap=0.0): ...\n",
                     {"q", "k", "softcap"}, id="its arguments are read"),
        pytest.param("def flash_attn_varlen_func(q, **options): ...\n", None, id="any: unknown"),
        pytest.param("@jit\ndef flash_attn_varlen_func(q): ...\n", None, id="decorated: unknown"),
        pytest.param("from ._ops import flash_attn_varlen_func\n", None, id="imported: unknown"),
        pytest.param("def flash_attn_func(q): ...\n", None, id="it has no such function"),
    ],
)  # fmt: skip
def test_what_the_varlen_entry_takes_is_read_from_the_source(source, takes, tmp_path):
    kernel(tmp_path, "torch-cpu", source=source)
    (served,) = read_local_kernels(f"o/n={tmp_path}", torch="2.13.0")
    assert served.varlen_takes == takes


SHIPPED = {"key": "a", "fingerprint": {"python": "3.11"}, "targets": {"sm_90": {"kernels": 218}}}


def test_what_is_shipped_is_read(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(SHIPPED))
    assert shipped_kernels(tmp_path).kernels == {"sm_90": 218}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"key": 5}, id="key"),
        pytest.param({"key": None}, id="no key"),
        pytest.param({"fingerprint": ["3.11"]}, id="fingerprint"),
        pytest.param({"fingerprint": {"python": 3.11}}, id="a version"),
        pytest.param({"targets": ["sm_90"]}, id="targets"),
        pytest.param({"targets": {"sm_90": 218}}, id="a target"),
        pytest.param({"targets": {"sm_90": {"kernels": "218"}}}, id="a count"),
    ],
)
@pytest.mark.parametrize("read", [shipped_kernels, shipped_triton])
def test_a_manifest_of_wrong_types_is_refused_in_words(tmp_path, read, changes):
    (tmp_path / "manifest.json").write_text(json.dumps(SHIPPED | changes))
    with pytest.raises(AttnimgError, match=r"manifest\.json cannot be read") as caught:
        read(tmp_path)
    assert caught.value.code == "bad-image"


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", "\x00"])
@pytest.mark.parametrize("read", [shipped_kernels, shipped_triton])
def test_a_manifest_that_is_none_is_refused_in_words(tmp_path, read, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(AttnimgError, match=r"manifest\.json cannot be read"):
        read(tmp_path)


def triton_here(folder, monkeypatch):
    """Install small packages of these names in place of any that are installed."""
    for name in ("triton/_C/libtriton.so", "triton/backends/nvidia/bin/ptxas"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"machine code")
    for package in ("triton", "sageattention"):
        (folder / package).mkdir(exist_ok=True)
        (folder / package / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(folder)
    for package in ("triton", "sageattention"):
        monkeypatch.delitem(sys.modules, package, raising=False)


def test_of_what_triton_kernels_depend_on_libraries_are_measured_by_size(tmp_path, monkeypatch):
    triton_here(tmp_path / "site", monkeypatch)
    whole, short = triton_fingerprint(), triton_in_short()
    assert short.items() <= whole.items()
    hashed = {name: len(value) for name, value in whole.items() if name not in short}
    assert hashed == {
        "triton/_C/libtriton.so": 64,
        "triton/backends/nvidia/bin/ptxas": 64,
        "triton/backends/nvidia/bin/ptxas-blackwell": len("absent"),
    }
    assert short["bytes of triton/_C/libtriton.so"] == str(len(b"machine code"))
    assert short["bytes of triton/backends/nvidia/bin/ptxas-blackwell"] == "absent"


def test_of_shipped_triton_kernels_only_what_is_cheap_is_compared(tmp_path, monkeypatch):
    triton_here(tmp_path / "site", monkeypatch)
    monkeypatch.setenv("TRITON_DEBUG", "0")
    manifest = SHIPPED | {"fingerprint": triton_fingerprint()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    read = shipped_triton(tmp_path)
    assert read.built == read.found == triton_in_short()
    assert read.kernels == {"sm_90": 218}
    assert read.settings == ("TRITON_DEBUG",)


def test_a_manifest_from_before_sizes_were_in_it_is_read(tmp_path, monkeypatch):
    triton_here(tmp_path / "site", monkeypatch)
    found = triton_fingerprint()
    old = {name: found[name] for name in found if not name.startswith("bytes of")}
    (tmp_path / "manifest.json").write_text(json.dumps(SHIPPED | {"fingerprint": old}))
    read = shipped_triton(tmp_path)
    assert read.built.items() < read.found.items()


CLAIMED_TWICE = "flash_attn/cute/interface.py"


def install(site, package, content):
    """Write a distribution of one file into a folder, as pip does."""
    path = site / CLAIMED_TWICE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=")
    info = site / f"{package.replace('-', '_')}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "RECORD").write_text(f"{CLAIMED_TWICE},sha256={digest.decode()},{len(content)}\n")


@pytest.mark.parametrize(
    ("order", "found"),
    [
        pytest.param(["flash-attn", "flash-attn-4"], (), id="FA4 last: it is in front"),
        pytest.param(["flash-attn-4", "flash-attn"], ("flash-attn-4",), id="FA2 last: its stub is"),
        pytest.param(["flash-attn-4"], (), id="FA4 alone"),
        pytest.param(["flash-attn"], (), id="FA2 alone"),
    ],
)
def test_whichever_was_installed_last_wins(tmp_path, monkeypatch, order, found):
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in order:
        install(tmp_path, package, f"# {package}")
    assert find_shadowed(order) == found


def test_a_file_that_an_uninstall_took_along_is_missed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("flash-attn", "flash-attn-4"):
        install(tmp_path, package, f"# {package}")
    (tmp_path / CLAIMED_TWICE).unlink()
    assert find_shadowed(["flash-attn", "flash-attn-4"]) == ("flash-attn-4",)
