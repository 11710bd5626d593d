"""Images of all tools are read, other files are refused, and a report has every finding."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
import zstandard
from small_image import save, tar_of, wheelhouse
from test_gates import KEY, PLAN, RECIPES, ROOT, read, run_gate

from attnimg.errors import AttnimgError
from recipes import run_gates
from recipes.artifact.facts import Artifact
from recipes.artifact.read import read_wheelhouse
from recipes.facts import Allowance
from recipes.gates import ExpectedContents, GateFinding, all_gates, gate_named, gate_names
from recipes.solve.plan import solve_all


def oci(path: Path, layer: bytes, *, attested: bool = False) -> Path:
    """Write an OCI archive with one layer, as other tools than Docker do."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"digest": f"sha256:{digest}", "size": len(data)}

    config = put(json.dumps({"config": {}, "history": []}).encode())
    manifest = put(json.dumps({"config": config, "layers": [put(layer)]}).encode())
    others = [{**put(b"{}"), "platform": {"os": "unknown"}}] if attested else []
    index = put(json.dumps({"manifests": [manifest, *others]}).encode())
    blobs["index.json"] = json.dumps({"manifests": [index]}).encode()
    path.write_bytes(tar_of(blobs))
    return path


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"]
)
def test_an_oci_archive_is_read_whatever_its_layers_are_compressed_with(
    tmp_path: Path, compress
) -> None:
    made = oci(tmp_path / "oci.tar", compress(tar_of({"root/key": KEY})))
    assert [file for file, _ in run_gate("secrets", read(made))] == ["root/key"]


def test_an_unpacked_image_is_read_as_one_layer(tmp_path: Path) -> None:
    (tmp_path / "root/.ssh").mkdir(parents=True)
    (tmp_path / "root/.ssh/id_rsa").write_text(KEY)
    made = read(tmp_path)
    assert len(run_gate("secrets", made)) == 2
    assert "only an archive has layers" in gate_named("size").skip_reason(
        made, ExpectedContents(plan=PLAN, platform="linux/amd64", pins={})
    )


@pytest.mark.parametrize(
    "content", [b"", b"no archive", gzip.compress(b"x" * 600)], ids=["empty", "text", "compressed"]
)
def test_what_is_no_image_is_refused_with_a_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.tar").write_bytes(content)
    with pytest.raises(AttnimgError) as caught:
        read(tmp_path / "image.tar")
    assert (caught.value.code, "docker save" in caught.value.do) == ("bad-archive", True)


def test_an_archive_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "image.tar", {"a": bytes(100_000)}).read_bytes()
    (tmp_path / "image.tar").write_bytes(whole[:40_000])
    with pytest.raises(AttnimgError, match="can't be read as an image"):
        read(tmp_path / "image.tar")


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'[{"Config": "manifest.json"}]', b"[3]"])
def test_an_archive_with_a_damaged_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "image.tar").write_bytes(tar_of({"manifest.json": text}))
    with pytest.raises(AttnimgError, match="can't be read as an image"):
        read(tmp_path / "image.tar")


def test_an_archive_of_two_images_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image.tar"
    manifest = json.dumps([{"Config": "config.json", "Layers": []}] * 2)
    image.write_bytes(tar_of({"manifest.json": manifest, "config.json": "{}"}))
    with pytest.raises(AttnimgError, match="can't be read as an image") as caught:
        read(image)
    assert "found 2 images, needed one" in caught.value.why


def test_an_attestation_is_no_second_image(tmp_path: Path) -> None:
    """BuildKit adds one to the index of an OCI archive."""
    made = oci(tmp_path / "oci.tar", tar_of({"root/key": KEY}), attested=True)
    assert [file for file, _ in run_gate("secrets", read(made))] == ["root/key"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_an_archive_with_a_damaged_layer_is_refused(tmp_path: Path, compress) -> None:
    layer = bytearray(compress(bytes(range(256)) * 99))
    layer[20:60] = bytes(40)
    with pytest.raises(AttnimgError, match="can't be read as an image"):
        read(oci(tmp_path / "oci.tar", bytes(layer)))


def test_a_manifest_that_lists_no_kernels_fails_the_pins(tmp_path: Path) -> None:
    made = wheelhouse(tmp_path / "wheels", {"x-1.whl": {"x.py": b""}}, {"kernels": ["x", 3]})
    found = [found for _, found in run_gate("pins", read_wheelhouse(made, over=None, log=id))]
    assert "abi None" in found


def test_a_folder_without_wheels_is_no_wheelhouse(tmp_path: Path) -> None:
    with pytest.raises(AttnimgError, match="is not a wheelhouse"):
        read_wheelhouse(tmp_path, over=None, log=lambda _: None)


@pytest.mark.parametrize(
    ("sums", "equal"),
    [
        pytest.param("{} *x-1.whl\n", True, id="as sha256sum -b writes them"),
        pytest.param("{}  x-1.whl\n", True, id="as sha256sum writes them"),
        pytest.param("{}  y-1.whl\n", False, id="of another file"),
        pytest.param("\udcff\n", False, id="no UTF-8"),
    ],
)
def test_the_sums_of_a_wheelhouse_are_compared(tmp_path: Path, sums: str, equal: bool) -> None:
    made = wheelhouse(tmp_path / "wheels", {"x-1.whl": {"x.py": b""}}, {})
    digest = hashlib.sha256((made / "x-1.whl").read_bytes()).hexdigest()
    (made / "SHA256SUMS").write_bytes(sums.format(digest).encode(errors="surrogateescape"))
    assert read_wheelhouse(made, over=None, log=id).sums["x-1.whl"] is equal


@pytest.mark.parametrize("place", ["compressed data", "method", "encrypted"])
def test_a_damaged_wheel_is_refused(tmp_path: Path, place: str) -> None:
    path = tmp_path / "x-1.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("x.py", "x" * 999)
    content = bytearray(path.read_bytes())
    listed = content.index(b"PK\x01\x02")  # the entry of the central directory
    if place == "compressed data":
        content[34:38] = b"\xff" * 4
    elif place == "method":
        content[8], content[listed + 10] = 98, 98
    else:
        content[6], content[listed + 8] = 1, 1
    path.write_bytes(content)
    with pytest.raises(AttnimgError, match=r"x-1\.whl is not a wheel"):
        read_wheelhouse(tmp_path, over=None, log=id)


def test_an_image_without_settings_has_no_variables(tmp_path: Path) -> None:
    image = save(tmp_path / "image.tar", {"a": b"a"})
    content = image.read_bytes()
    old, new = b'"config": {"Env": []}', b'"config": null       '
    assert len(old) == len(new)
    image.write_bytes(content.replace(old, new))
    assert read(image).env == {}


def test_an_allowance_takes_its_finding_away_and_says_why(tmp_path: Path) -> None:
    made = read(
        save(tmp_path / "image.tar", {"usr/lib/libx.a": b"a library", "opt/liby.a": b"a library"})
    )
    allowed = Allowance(gate="layers", file="usr/*.a", found="static", reason="gcc links it")
    expected = ExpectedContents(plan=PLAN, platform="linux/amd64", pins={})
    (verdict,) = run_gates.run_all(made, expected, [gate_named("layers")], (allowed,))
    assert [f.file for f in verdict.findings] == ["opt/liby.a"]
    assert [(f.file, why) for f, why in verdict.allowed] == [("usr/lib/libx.a", "gcc links it")]


def test_every_allowance_is_of_a_gate_that_exists_and_has_a_reason() -> None:
    for allowance in RECIPES.allowed:
        assert allowance.gate in gate_names()
        assert re.search(r"\w{3}.*\w{3}", allowance.reason)


def test_every_gate_judges_every_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "toy-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy.py", "")
    for plan in solve_all(RECIPES):
        _, verdicts = run_gates.check_artifact(
            plan, RECIPES, image=None, wheels=tmp_path, root=ROOT
        )
        assert {verdict.gate for verdict in verdicts} == gate_names()


def test_a_report_says_found_needed_and_what_to_do() -> None:
    finding = GateFinding(file="numpy", found="3", needed="2", do="make lock")
    verdict = run_gates.GateResult(gate="pins", findings=(finding,))
    made = Artifact(
        source="x.tar", kind="image", layers=(), files=(), distributions=(), env={}, sums={}
    )
    text = run_gates.format_report("cpu", made, [verdict])
    assert "FAILED: 1 finding" in text
    assert "why: found 3; needed 2" in text
    assert "do:  make lock" in text
    assert json.loads(run_gates.format_json("cpu", made, [verdict]))["passed"] is False


def test_each_gate_describes_itself_in_the_page() -> None:
    page = (ROOT / "docs/gates.md").read_text()
    assert re.findall(r"^## `([\w-]+)`", page, re.MULTILINE) == [gate.name for gate in all_gates()]
