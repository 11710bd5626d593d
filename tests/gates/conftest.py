"""Tests of the gates on small images with real machine code: `make test/gates` installs nvcc."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from recipes import run_gates
from recipes.artifact.facts import Artifact
from recipes.artifact.read import read_image
from recipes.facts import ImagePlan
from recipes.gates import GateFinding, gate_named
from recipes.read import read_recipes
from recipes.solve.lock import read_locks
from recipes.solve.plan import solve

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "build/nvcc/nvidia/cu13"
KERNEL = """__global__ void k(float* x) { x[threadIdx.x] += 1; }
void run(float* x) { k<<<1, 32>>>(x); }
"""

RunGate = Callable[[str, str, Path | Artifact], tuple[GateFinding, ...]]
Compile = Callable[..., bytes]


@cache
def plan_of(image: str) -> ImagePlan:
    recipes = read_recipes(ROOT)
    return solve(recipes.images[image], recipes)


@pytest.fixture(scope="session")
def run_gate() -> RunGate:
    """Check an image by one gate, against a recipe: run_gate(gate, recipe, archive)."""
    recipes = read_recipes(ROOT)

    def ask(gate: str, image: str, given: Path | Artifact) -> tuple[GateFinding, ...]:
        plan = plan_of(image)
        artifact = read_image(given, log=lambda _: None) if isinstance(given, Path) else given
        lock = read_locks((plan,), root=ROOT)[image]
        expected = run_gates.expected_contents(plan, recipes, lock=lock)
        (verdict,) = run_gates.run_all(artifact, expected, [gate_named(gate)], ())
        assert not verdict.skip_reason, verdict.skip_reason
        return verdict.findings

    return ask


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile a kernel into a shared library: cuda("sm_90a compute_90", *further options)."""
    if not (CUDA / "bin/nvcc").exists():
        pytest.skip("build/nvcc has no compiler; make test/gates installs it")
    folder = tmp_path_factory.mktemp("cuda")

    @cache
    def build(codes: str, *options: str) -> bytes:
        source, out = folder / "k.cu", folder / "k.so"
        source.write_text(KERNEL)
        targets = []
        for code in codes.split():
            arch = code.replace("sm_", "compute_")
            targets += ["-gencode", f"arch={arch},code={code}"]
        made = options or ("-shared", "-Xcompiler", "-fPIC", "-cudart", "none")
        command = [str(CUDA / "bin/nvcc"), *made, *targets, "-o", str(out), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        return out.read_bytes()

    return build


@pytest.fixture
def gcc(tmp_path: Path) -> Compile:
    """Compile C into a shared library without libc: gcc(source, *options, soname=, versions=)."""
    folder = tmp_path / "gcc"
    folder.mkdir()

    def build(
        source: str, *options: str, soname: str, versions: str = "", compiler: str = "gcc"
    ) -> bytes:
        (folder / "source.c").write_text(source)
        out = folder / (soname or "program")
        command = [compiler, "-fPIC", "-nostdlib", f"-L{folder}", "-o", str(out)]
        command += [f"-Wl,-soname,{soname}"] if soname else []
        if versions:
            (folder / "versions").write_text(versions)
            command.append(f"-Wl,--version-script={folder / 'versions'}")
        kind = [] if "-pie" in options else ["-shared"]
        command += [*kind, str(folder / "source.c"), *options]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        return out.read_bytes()

    return build
