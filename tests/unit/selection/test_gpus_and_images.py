"""The names that --on takes, and what identifies the image of a process."""

import json

import pytest

from attnimg.errors import AttnimgError
from attnimg.files import data_file
from attnimg.selection.gpus_and_images import (
    DIGEST_VARIABLE,
    arch_from_name,
    cpus_of_machines,
    gpu_catalogue,
    image_record,
    parse_gpu,
)


@pytest.mark.parametrize(
    ("name", "arch", "capability"),
    [
        ("cpu", "cpu", None),
        ("t4", "sm_75", (7, 5)),
        ("v100", "sm_70", (7, 0)),
        ("a100", "sm_80", (8, 0)),
        ("a10g", "sm_86", (8, 6)),
        ("l4", "sm_89", (8, 9)),
        ("l40s", "sm_89", (8, 9)),
        ("rtx3090", "sm_86", (8, 6)),
        ("rtx4090", "sm_89", (8, 9)),
        ("h100", "sm_90", (9, 0)),
        ("h200", "sm_90", (9, 0)),
        ("b200", "sm_100", (10, 0)),
        ("b300", "sm_103", (10, 3)),
        ("rtx5090", "sm_120", (12, 0)),
        ("dgx-spark", "sm_121", (12, 1)),
        ("mi210", "gfx90a", None),
        ("mi300x", "gfx942", None),
        ("mi355x", "gfx950", None),
        ("rx7900xtx", "gfx1100", None),
    ],
)
def test_every_name_of_the_contract_has_its_architecture(name, arch, capability):
    target = parse_gpu(name)
    found, label = target.arch, target.label
    assert (found.name, found.capability) == (arch, capability)
    assert label == gpu_catalogue()[name].label


def test_the_cpu_of_arm64_machines_is_known():
    arm64 = {gpu.name for gpu in gpu_catalogue().values() if gpu.cpu == "arm64"}
    assert arm64 == {"dgx-spark", "gh200", "gb200", "gb300", "jetson-thor"}
    assert cpus_of_machines(arch_from_name("sm_90")) == {"amd64", "arm64"}
    assert cpus_of_machines(arch_from_name("sm_110")) == {"arm64"}
    assert cpus_of_machines(arch_from_name("sm_61")) == set()


def test_the_catalogue_has_a_memory_size_for_every_gpu():
    assert [gpu.name for gpu in gpu_catalogue().values() if not gpu.memory_gb] == ["cpu"]


@pytest.mark.parametrize(
    ("name", "vendor", "capability"),
    [
        pytest.param("sm_61", "nvidia", (6, 1), id="an old one that has no name here"),
        pytest.param("sm_110", "nvidia", (11, 0), id="a new one that has no name here"),
        pytest.param("gfx908", "amd", None, id="three digits"),
        pytest.param("gfx1201", "amd", None, id="four digits"),
        pytest.param("gfx90c", "amd", None, id="a letter"),
    ],
)
def test_an_architecture_needs_no_catalogue(name, vendor, capability):
    target = parse_gpu(name)
    arch, label = target.arch, target.label
    assert (arch.name, arch.vendor, arch.capability, label) == (name, vendor, capability, name)


@pytest.mark.parametrize(
    ("name", "do"),
    [
        pytest.param("H100", "write h100", id="another case is told"),
        pytest.param("SM_90", "write sm_90", id="another case of an architecture is told"),
        pytest.param(" h100", "write h100", id="blanks are told"),
        pytest.param("h10", "h100", id="the nearest name is told"),
        pytest.param("rtx-4090", "rtx4090", id="a hyphen too many"),
        pytest.param("sm_9", "sm_90", id="one digit"),
        pytest.param("sm_90a", "sm_90", id="a suffix is no architecture of a machine"),
        pytest.param("sm_1000", "sm_90", id="four digits"),
        pytest.param("sm_09", "sm_90", id="a zero in front"),
        pytest.param("gfx", "gfx942", id="no digits"),
        pytest.param("", "write the name of a GPU", id="nothing"),
        pytest.param("quadro", "write the name of a GPU", id="nothing near"),
        pytest.param("sm_9\u0660", "sm_90", id="a digit that is not ASCII"),
    ],
)
def test_another_name_is_refused_with_help(name, do):
    with pytest.raises(AttnimgError) as caught:
        parse_gpu(name)
    assert (caught.value.code, caught.value.key, caught.value.exit_code) == ("unknown-gpu", None, 2)
    assert do in caught.value.do


def test_arch_names_are_not_gpu_names():
    with pytest.raises(AttnimgError, match="h100"):
        arch_from_name("h100")


DIGEST = "sha256:" + "ab" * 32


def image_manifest(folder, **changes):
    """Write the manifest of an image, as docker/image_files.py does."""
    recipe = json.loads(data_file("images.json").read_text())["images"]["cpu"]
    path = folder / "image.json"
    values = {"image": "cpu", **recipe, "installed": {}, "version": "0.2.0", "revision": "ab12"}
    path.write_text(json.dumps(values | changes))
    return path


@pytest.mark.parametrize(
    ("variable", "digest"),
    [
        (DIGEST, DIGEST),
        (f"registry.example:5000/attnimg@{DIGEST}", DIGEST),
        (f"{DIGEST}\n", DIGEST),
        ("", None),
        ("sha256:ab", None),
        ("latest", None),
        (DIGEST.upper(), None),
    ],
)
def test_an_image_is_identified_by_version_revision_and_digest(tmp_path, variable, digest):
    found = image_record({DIGEST_VARIABLE: variable}, image_manifest(tmp_path))
    assert found == {"name": "cpu", "version": "0.2.0", "revision": "ab12", "digest": digest}


def test_without_a_launcher_the_digest_is_not_known(tmp_path):
    found = image_record({}, image_manifest(tmp_path, version="dev", revision=None))
    assert found == {"name": "cpu", "version": "dev", "revision": None, "digest": None}


def test_outside_an_image_there_is_none(tmp_path):
    assert image_record({DIGEST_VARIABLE: DIGEST}, tmp_path / "image.json") is None
