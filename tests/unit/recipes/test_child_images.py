"""What the gates say of an image that somebody built FROM one of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_image import SITE, package, save
from test_gates import KEY, PLAN, read

from attnimg.errors import AttnimgError
from recipes.child_images import is_childs_own, mark_child
from recipes.gates import ExpectedContents, GateFinding, gate_named
from recipes.run_gates import GateResult, format_report, run_all

OURS = package("torch", "2.13.0+cpu", version__py=b"ours") | package("rich", "15.0.0")
HISTORY = ("RUN base", "RUN python -B /image_files.py cpu /wheels", "RUN pip install")


def judge(tmp_path: Path, child: dict[str, bytes | str]) -> dict[str, GateResult]:
    image = save(tmp_path / "child.tar", {"etc/os": b""}, OURS, child, history=HISTORY)
    artifact = mark_child(read(image))
    pins = {"torch": "2.13.0", "rich": "15.0.0"}
    expected = ExpectedContents(
        plan=PLAN, platform="linux/amd64", pins=pins, fixed=frozenset({"torch"})
    )
    gates = [gate_named(name) for name in ("layers", "licences", "pins", "secrets")]
    results = run_all(artifact, expected, gates, ())
    assert "child.tar" in format_report("cpu", artifact, results)
    return {result.gate: result for result in results}


@pytest.mark.parametrize(
    ("child", "gate", "named"),
    [
        pytest.param(dict(package("einops", "0.8.2")), "pins", "einops", id="a package"),
        pytest.param(dict(package("rich", "15.1.0", site="opt/added/site-packages")), "pins",
                     "rich", id="another version, in a folder before the image's"),
        pytest.param(dict(package("secretive", "1.0", licence="")), "licences", "secretive",
                     id="a package without a licence"),
        pytest.param({"root/.cache/pip/http/0": b"x" * 99}, "layers", "root/.cache/pip/http/0",
                     id="a cache"),
        pytest.param(dict(package("tornado", "6.5", test__key=KEY.encode())), "secrets",
                     f"{SITE}/tornado/test.key", id="a package's key for its tests"),
        pytest.param({f"{SITE}/torch/__init__.cpython-311.pyc": b"x"}, "pins", "",
                     id="a .pyc that Python wrote"),
    ],
)  # fmt: skip
def test_what_a_child_image_adds_is_listed(
    tmp_path: Path, child: dict[str, bytes | str], gate: str, named: str
) -> None:
    results = judge(tmp_path, child)
    assert [finding for result in results.values() for finding in result.findings] == []
    assert {finding.file for finding in results[gate].own} == ({named} if named else set())


@pytest.mark.parametrize(
    ("child", "gate", "found"),
    [
        pytest.param(
            {f"{SITE}/torch-2.13.0+cpu.dist-info/.wh..wh..opq": b"",
             **package("torch", "2.15.0", version__py=b"theirs")},
            "pins", "version 2.15.0", id="another torch",
        ),
        pytest.param(
            {f"{SITE}/torch/version.py": b"theirs"}, "pins", "1 of its files in a layer",
            id="torch of the same version, from elsewhere",
        ),
        pytest.param(
            dict(package("torch", "2.13.0", site="opt/other/lib/python3.11/site-packages")),
            "pins", "opt/other", id="a second torch",
        ),
        pytest.param({"workspace/id": KEY.encode()}, "secrets", "private key", id="a secret"),
    ],
)  # fmt: skip
def test_another_torch_and_a_secret_are_refused(
    tmp_path: Path, child: dict[str, bytes | str], gate: str, found: str
) -> None:
    assert any(found in finding.found for finding in judge(tmp_path, child)[gate].findings)


@pytest.mark.parametrize(
    ("files", "own"), [("a", True), ("a, b", True), ("etc/os", False), ("a, etc/os", False)]
)
def test_a_finding_is_the_childs_if_all_its_files_are(
    tmp_path: Path, files: str, own: bool
) -> None:
    layers = {"etc/os": b""}, OURS, {"a": b"a", "b": b"b"}
    artifact = mark_child(read(save(tmp_path / "child.tar", *layers, history=HISTORY)))
    finding = GateFinding(files, found="no GPU code", needed="sm_90", do="build it")
    found = is_childs_own(finding, gate="machine-code", artifact=artifact, fixed=frozenset())
    assert found is own


MINE = "opt/axolotl/lib/python3.11/site-packages"


def declaration(name: str, version: str, *, record: bool) -> dict[str, bytes | str]:
    """Return the files that docker/added/image_venv.py writes."""
    info = f"{name}-{version}.dist-info"
    found: dict[str, bytes | str] = {
        f"{MINE}/{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{MINE}/{info}/INSTALLER": "attnimg\n",
    }
    lines = "".join(f"{info}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD"))
    return found | ({f"{MINE}/{info}/RECORD": lines} if record else {})


def test_a_declaration_in_a_virtual_environment_is_no_second_torch(tmp_path: Path) -> None:
    declared = declaration("torch", "2.13.0+cpu", record=False)
    declared |= declaration("rich", "15.0.0", record=True)
    results = judge(tmp_path, declared)
    assert (results["pins"].findings, results["pins"].own) == ((), ())


@pytest.mark.parametrize("installer", ["pip", "attnimg"])
def test_a_torch_beside_its_declaration_is_refused(tmp_path: Path, installer: str) -> None:
    """Also if its dist-info folder is marked as a declaration: it lists files of its own."""
    theirs = dict(package("torch", "2.13.0", site=MINE, version__py=b"theirs"))
    theirs[f"{MINE}/torch-2.13.0.dist-info/INSTALLER"] = installer.encode()
    declared = declaration("torch", "2.13.0+cpu", record=False)
    assert "opt/axolotl" in judge(tmp_path, declared | theirs)["pins"].findings[0].found


def test_an_image_that_is_not_built_from_an_attnimg_image_is_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "other.tar", OURS, history=("RUN pip install torch",))
    with pytest.raises(AttnimgError) as caught:
        mark_child(read(image))
    assert caught.value.code == "no-child"
