"""The gates that look at files, layers and packages, each on a small image that breaks it.

Those that look into machine code and libraries need compilers: tests/gates.
"""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from small_image import SITE, Special, package, save

from recipes.archs import can_run
from recipes.artifact.archive import stage_names
from recipes.artifact.elf import read_elf
from recipes.artifact.facts import Artifact
from recipes.artifact.read import read_image
from recipes.artifact.secret_patterns import secrets_in
from recipes.facts import ImagePlan
from recipes.gates import ExpectedContents, gate_named
from recipes.read import read_recipes
from recipes.solve.plan import solve

ROOT = Path(__file__).resolve().parents[3]
RECIPES = read_recipes(ROOT)
PLAN = solve(RECIPES.images["cpu"], RECIPES)
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1r" * 8
# Made here, so that no scanner takes this file for a leak.
AWS, HUB = "AKIA" + "ABCDEFGHIJKLMNOP", "hf_" + "a" * 34


def read(path: Path) -> Artifact:
    return read_image(path, log=lambda _: None)


def run_gate(
    gate: str, artifact: Artifact, *, plan: ImagePlan = PLAN, **pins: str
) -> list[tuple[str, str]]:
    expected = ExpectedContents(plan=plan, platform="linux/amd64", pins=pins)
    return [(f.file, f.found) for f in gate_named(gate).check(artifact, expected)]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("usr/lib/libx.a", "a static library"),
        ("var/cache/apt/archives/gcc.deb", "a cache of a package manager"),
        ("var/lib/apt/lists/deb.debian.org_InRelease", "a cache of a package manager"),
        ("root/.cache/pip/http/0", "a cache of a package manager"),
        ("cache/home/.cache/uv/wheels/x", "a cache of a package manager"),
        ("var/log/dpkg.log", "a log"),
        (f"{SITE}/numpy/_core/tests/test_dtype.py", "a test of a dependency"),
        (f"{SITE}/numpy/tests/conftest.py", "a test of a dependency"),
        ("tmp/flash_attn.whl", "a package archive"),
        ("usr/lib/x86_64-linux-gnu/libx.a", "a static library"),
        (f"{SITE}/numpy/testing/overrides.py", None),
        (f"{SITE}/pytest/__init__.py", None),
        ("opt/attnimg/inside/test_packages.py", None),
        ("usr/lib/libx.so", None),
        ("var/lib/apt/lists/lock", "a cache of a package manager"),
    ],
)  # fmt: skip
def test_what_no_run_reads_is_refused(tmp_path: Path, path: str, says: str | None) -> None:
    faults = run_gate("layers", read(save(tmp_path / "image.tar", {path: b"some content"})))
    assert [(file, found.partition(" of ")[0]) for file, found in faults] == (
        [(path, says.partition(" of ")[0])] if says else []
    )


@pytest.mark.parametrize(
    "deletion", ["root/.cache/.wh.pip", "root/.wh..cache", "root/.cache/.wh..wh..opq"]
)
def test_a_cache_that_a_later_layer_deletes_still_ships(tmp_path: Path, deletion: str) -> None:
    image = save(tmp_path / "image.tar", {"root/.cache/pip/x": b"a wheel of many"}, {deletion: b""})
    ((file, found),) = run_gate("layers", read(image))
    assert (file, found) == (
        "root/.cache/pip/x",
        "a cache of a package manager of 15 bytes in layer 1 (runtime)",
    )


@pytest.mark.parametrize(
    ("later", "fate"),
    [
        pytest.param({"opt/.wh.big": b""}, "deletes", id="deleted"),
        pytest.param({".wh.opt": b""}, "deletes", id="its folder is deleted"),
        pytest.param({".wh..wh..opq": b""}, "deletes", id="everything is deleted"),
        pytest.param({"opt/big": b"small"}, "replaces", id="replaced"),
        pytest.param({"opt/": b""}, None, id="only its folder is touched"),
    ],
)
def test_what_a_later_layer_hides_is_shipped_for_nothing(
    tmp_path: Path, later: dict[str, bytes], fate: str | None
) -> None:
    faults = run_gate(
        "layers", read(save(tmp_path / "image.tar", {"opt/big": bytes(2_000_000)}, later))
    )
    assert [found for _, found in faults] == (
        [f"2.0 MB in layer 1 (runtime), which a later layer {fate}"] if fate else []
    )


@pytest.mark.parametrize(
    ("mode", "says"), [(0o4755, ["mode 4755"]), (0o2755, ["mode 2755"]), (0o755, []), (0o1777, [])]
)
def test_no_program_changes_who_runs_it(tmp_path: Path, mode: int, says: list[str]) -> None:
    image = save(tmp_path / "image.tar", {"usr/bin/su": Special(b"x", mode=mode)})
    assert [found for _, found in run_gate("layers", read(image))] == says


def test_a_bit_that_a_later_layer_clears_is_accepted(tmp_path: Path) -> None:
    first, then = (Special(b"x", mode=mode) for mode in (0o4755, 0o755))
    assert (
        run_gate("layers", read(save(tmp_path / "image.tar", {"bin/su": first}, {"bin/su": then})))
        == []
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"root/key": KEY}, "private key in layer 1 (runtime)"),
        ({"etc/app.yaml": f"token: {HUB}"}, "Hugging Face token in layer 1 (runtime)"),
        ({"etc/app.ini": f"id={AWS}"}, "AWS access key in layer 1 (runtime)"),
        ({"etc/pip.conf": "index-url = https://me:hunter2hunter2@pypi.example.org/simple"},
         "address with a password in layer 1 (runtime)"),
        ({"root/.netrc": "machine x"}, "a file of credentials in layer 1 (runtime)"),
        ({"root/.pypirc": "[pypi]"}, "a file of credentials in layer 1 (runtime)"),
        ({"root/.aws/credentials": "[default]"}, "a file of credentials in layer 1 (runtime)"),
        ({"home/a/.cache/huggingface/token": "x"}, "a file of credentials in layer 1 (runtime)"),
        ({"etc/ssl/cert.pem": "-----BEGIN CERTIFICATE-----\nMII"}, None),
        ({"usr/doc/ssh.txt": "begins with -----BEGIN PRIVATE KEY-----"}, None),
        ({"usr/doc/pip.txt": "https://username:password@example.org, https://${U}:${P}@x"}, None),
    ],
)  # fmt: skip
def test_secrets_are_refused(tmp_path: Path, files: dict[str, str], says: str | None) -> None:
    found = run_gate("secrets", read(save(tmp_path / "image.tar", files)))
    assert [text for _, text in found] == ([says] if says else [])


def test_a_secret_that_a_later_layer_deletes_is_still_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "image.tar", {"root/key": KEY}, {"root/.wh.key": b""})
    assert run_gate("secrets", read(image)) == [("root/key", "private key in layer 1 (runtime)")]


def test_secrets_in_history_and_variables_are_refused(tmp_path: Path) -> None:
    history = (f"RUN |1 HF_TOKEN={HUB} pip install x",)
    env = ("API_PASSWORD=hunter2hunter2", "PATH=/usr/bin", "TOKENIZERS_PARALLELISM=false")
    image = save(tmp_path / "image.tar", {"a": b"a"}, history=history, env=env)
    assert {found for _, found in run_gate("secrets", read(image))} == {
        "a value for HF_TOKEN",
        "Hugging Face token",
        "a value for API_PASSWORD",
    }


def test_binary_files_are_not_read_for_secrets() -> None:
    assert secrets_in(b"\0" + KEY.encode()) == ()
    assert secrets_in(KEY.encode()) == ("private key",)


LAYERS = {"a": bytes(range(256)) * 4000}


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        pytest.param({"size_max_mb": 1}, [], id="within the budget"),
        pytest.param({"size_max_mb": 0}, ["image"], id="the whole image is too large"),
        pytest.param({"layers_max_mb": {"torch": 0}}, ["layer torch"], id="a layer is too large"),
        pytest.param({"layers_max_mb": {"tourch": 9}}, ["tourch"], id="a layer that is not there"),
    ],
)
def test_sizes_are_held_to_the_recipe(
    tmp_path: Path, budget: dict[str, object], says: list[str]
) -> None:
    image = save(tmp_path / "image.tar", LAYERS, history=("RUN install.sh -r /torch.txt",))
    plan = replace(PLAN, image=replace(PLAN.image, **{"layers_max_mb": {}, **budget}))  # type: ignore[arg-type]
    assert [file for file, _ in run_gate("size", read(image), plan=plan)] == says


def step(command: str, comment: str = "buildkit.dockerfile.v0") -> dict[str, str]:
    return {"created_by": command, "comment": comment}


@pytest.mark.parametrize(
    ("base", "names"),
    [
        pytest.param([step("", "Imported from -")], ["base"], id="an imported base"),
        pytest.param(
            [step("# debian.sh"), step("RUN apt-get install tk"), step("COPY /usr/local")],
            ["base"] * 3,
            id="a base that BuildKit made",
        ),
    ],
)
def test_the_layers_below_our_own_are_those_of_the_base(
    base: list[dict[str, str]], names: list[str]
) -> None:
    ours = ["install $APT_PACKAGES", "-r /torch.txt", "-r /stack.txt", "COPY /files /"]
    found = stage_names([*base, *(step(command) for command in ours)])
    assert found == [*names, "python", "torch", "stack", "runtime"]


def test_sizes_are_those_of_zstd_3(tmp_path: Path) -> None:
    made = read(save(tmp_path / "image.tar", LAYERS))
    assert made.layers[0].bytes > 1_000_000
    assert 0 < (made.layers[0].zstd_bytes or 0) < 20_000


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        pytest.param([("numpy", "2.4.6"), ("attnimg", "0.1.0")], [], id="what is locked"),
        pytest.param([("numpy", "2.4.5")], [("numpy", "version 2.4.5")], id="another version"),
        pytest.param([], [("numpy", "nothing installed")], id="a locked package is missing"),
        pytest.param(
            [("numpy", "2.4.6"), ("left-pad", "1")],
            [("left-pad", "version 1")],
            id="nothing locks it",
        ),
        pytest.param([("numpy", "2.4.6+cpu")], [], id="a local label is not part of a pin"),
        pytest.param(
            [("numpy", "2.4.6+trim")], [("numpy", "version 2.4.6+trim")], id="a trimmed build"
        ),
        pytest.param([("numpy", "main")], [("numpy", "version main")], id="no version at all"),
        pytest.param(
            [("numpy", "2.4.6"), ("NumPy", "2.4.6")],
            [("numpy", f"{SITE}/NumPy-2.4.6.dist-info and {SITE}/numpy-2.4.6.dist-info")],
            id="installed twice",
        ),
    ],
)
def test_packages_are_those_of_the_lock(
    tmp_path: Path, installed: list[tuple[str, str]], says: list[tuple[str, str]]
) -> None:
    files = {
        path: data for name, version in installed for path, data in package(name, version).items()
    }
    assert run_gate("pins", read(save(tmp_path / "image.tar", files)), numpy="2.4.6") == says


def test_what_setuptools_bundles_is_not_installed(tmp_path: Path) -> None:
    bundled = package("zipp", "3", site=f"{SITE}/setuptools/_vendor")
    assert run_gate("pins", read(save(tmp_path / "image.tar", bundled))) == []


def test_a_package_that_a_later_layer_removed_is_not_installed(tmp_path: Path) -> None:
    removal = {f"{SITE}/.wh.zipp-3.dist-info": b""}
    assert run_gate("pins", read(save(tmp_path / "image.tar", package("zipp", "3"), removal))) == []


@pytest.mark.parametrize(
    ("sbom", "says"),
    [
        ({"numpy": "2", "attnimg": "0.1.0"}, []),
        ({"numpy": "2+cpu", "attnimg": "0.1.0"}, []),
        ({"numpy": "3", "attnimg": "0.1.0"}, [("numpy", "3")]),
        ({"attnimg": "0.1.0"}, [("numpy", "nothing")]),
        ({"numpy": "2", "attnimg": "0.1.0", "x": "1"}, [("x", "1")]),
    ],
)
def test_the_sbom_is_compared_with_the_lock(
    tmp_path: Path, sbom: dict[str, str], says: list[tuple[str, str]]
) -> None:
    made = replace(read(save(tmp_path / "image.tar", {"a": b"a"})), sbom=sbom)
    assert run_gate("sbom", made, numpy="2") == says


def test_a_package_without_a_licence_is_refused(tmp_path: Path) -> None:
    files = package("silent", "1", licence="") | package("told", "1")
    assert [
        file for file, _ in run_gate("licences", read(save(tmp_path / "image.tar", files)))
    ] == ["silent"]


@pytest.mark.parametrize(
    ("headers", "licence"),
    [
        ("License-Expression: Apache-2.0\nLicense: something", "Apache-2.0"),
        ("License: MIT License\n        Copyright 2020", "MIT License"),
        ("Classifier: License :: OSI Approved :: BSD License", "BSD License"),
        ("Classifier: License :: Other/Proprietary License", "Other/Proprietary License"),
        ("License: UNKNOWN", ""),
    ],
)
def test_a_licence_is_read_wherever_it_is_stated(
    tmp_path: Path, headers: str, licence: str
) -> None:
    text = f"Metadata-Version: 2.1\nName: x\nVersion: 1\n{headers}\n"
    made = read(save(tmp_path / "image.tar", {f"{SITE}/x-1.dist-info/METADATA": text}))
    assert [one.licence for one in made.distributions] == [licence]


@pytest.mark.parametrize(
    ("arch", "code", "yes"),
    [
        ("sm_90a", "sm_90a", True), ("sm_90a", "sm_90", True), ("sm_90a", "sm_80", False),
        ("sm_86", "sm_80", True), ("sm_80", "sm_86", False), ("sm_103", "sm_100f", True),
        ("sm_103", "sm_100a", False), ("sm_121", "sm_120", True), ("sm_120", "sm_100", False),
        ("sm_120", "compute_90", True), ("sm_120", "compute_90a", False),
        ("sm_120", "compute_100f", False), ("sm_80", "compute_90", False),
        ("gfx942", "gfx942", True), ("gfx942", "gfx90a", False), ("sm_90a", "lto_90", False),
    ],
)  # fmt: skip
def test_which_device_runs_which_code(arch: str, code: str, yes: bool) -> None:
    assert can_run(arch, code) is yes


# As in what the two ptxas of triton 3.8.0 wrote (2026-11-25): ABI version, e_flags, their note.
CUBINS = {
    "sm_80": (7, 0x500550, b""),
    "sm_90": (7, 0x5A055A, b""),
    "sm_90a": (7, 0x5A0D5A, b""),
    "sm_120": (8, 0x6007802, b"-v  -arch sm_120 "),
    "sm_120a": (8, 0x6007802, b"-v  -arch sm_120a "),
}


def cubin(code: str) -> bytes:
    abi, flags, note = CUBINS[code]
    head = b"\x7fELF\x02\x01\x01\x41" + bytes([abi]) + bytes(7)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 0, flags, 64, 56, 0, 64, 0, 0)
    return head + note


@pytest.mark.parametrize("code", CUBINS)
def test_the_letter_of_machine_code_is_read_from_its_flags_or_its_note(code: str) -> None:
    assert read_elf(io.BytesIO(cubin(code))).codes == {code}


@pytest.mark.parametrize(
    ("image", "place", "code", "needs"),
    [
        pytest.param("hopper", "triton/sm_90", "sm_90a", None, id="what the recipe declares"),
        pytest.param("hopper", "fa4/sm_90", "sm_90a", None, id="FlashAttention-4's"),
        pytest.param("blackwell", "triton/sm_120", "sm_120a", None, id="another image's"),
        pytest.param(
            "hopper", "triton/sm_90", "sm_90", "sageattention.toml declares for sm_90: sm_90a",
            id="without the letter",
        ),
        pytest.param(
            "hopper", "triton/sm_90", "sm_80", "sageattention.toml declares for sm_90: sm_90a",
            id="another GPU's in its folder",
        ),
        pytest.param(
            "hopper", "triton/sm_80", "sm_80", "sageattention.toml declares for sm_80: no GPU code",
            id="another GPU's folder",
        ),
    ],
)  # fmt: skip
def test_what_was_compiled_ahead_of_time_has_its_recipe_s_machine_code(
    tmp_path: Path, image: str, place: str, code: str, needs: str | None
) -> None:
    files = {f"opt/attnimg/{place}/KEY/kernel.cubin": cubin(code)}
    expected = ExpectedContents(
        plan=solve(RECIPES.images[image], RECIPES), platform="linux/amd64", pins={}
    )
    artifact = read(save(tmp_path / "image.tar", files))
    faults = gate_named("machine-code").check(artifact, expected)
    assert [(f.found, f.needed.rpartition("/")[2]) for f in faults] == (
        [(code, needs)] if needs else []
    )
