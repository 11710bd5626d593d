"""The table of what was really built: nothing is claimed that no record shows."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from small_image import save, tar_of, wheelhouse

from attnimg.errors import AttnimgError
from recipes.artifact.archive import layer_sizes
from recipes.artifact.read import read_image, read_wheelhouse
from recipes.pages.built import (
    build_record,
    image_record,
    images_table,
    kernel_state,
    read_manifest,
    read_records,
    replace_table,
)
from recipes.read import read_recipes
from recipes.solve.plan import solve_all

ROOT = Path(__file__).resolve().parents[3]
PLANS = solve_all(read_recipes(ROOT))
HOPPER = next(plan for plan in PLANS if plan.image.name == "hopper")
KEY = next(step.key for step in HOPPER.steps if step.kernel.name == "flash-attn")


STEP = next(step for step in HOPPER.steps if step.kernel.name == "flash-attn")


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        pytest.param({}, "built, 2026-11-25", id="a whole build"),
        pytest.param({"trimmed": True}, "small build, 2026-11-25", id="a small build"),
        pytest.param(
            {"key": "0" * 16}, "2026-11-25, from an earlier recipe", id="a recipe that has moved"
        ),
        pytest.param({"name": "xformers"}, "not yet built", id="another kernel's record"),
    ],
)
def test_the_state_of_a_kernel(kernel: dict[str, object], says: str) -> None:
    made = {"name": "flash-attn", "key": KEY, "trimmed": False, "day": "2026-11-25", **kernel}
    assert kernel_state(STEP, {"kernels": [made]}) == says


KERNELS = [
    {"name": step.kernel.name, "key": step.key, "trimmed": False, "day": f"2026-11-{25 - place}"}
    for place, step in enumerate(HOPPER.steps)
    if step.kernel.form != "wheel"
]


@pytest.mark.parametrize(
    ("image", "kernels", "state"),
    [
        pytest.param("hopper", KERNELS, "kernels built 2026-11-25", id="all kernels"),
        pytest.param("hopper", KERNELS[1:], "4 of 5 kernels built", id="all but one"),
        pytest.param("hopper", [{**KERNELS[0], "trimmed": True}, *KERNELS[1:]],
                     "4 of 5 kernels built", id="one of them in a small build"),
        pytest.param("hopper", [{**KERNELS[0], "key": "0"}], "not yet built",
                     id="one from an earlier recipe"),
        pytest.param("hopper", [], "not yet built", id="no record"),
        pytest.param("cpu", [], "built and tested on every change", id="nothing to compile"),
    ],
)  # fmt: skip
def test_the_state_of_an_image_is_that_of_its_kernels(
    image: str, kernels: list[dict[str, object]], state: str
) -> None:
    text = images_table(PLANS, {"hopper": {"kernels": kernels}})
    row = next(line for line in text.splitlines() if line.startswith(f"| `{image}`"))
    assert row.split(" | ")[-1] == f"{state} |"


def record(manifest: object, codes: object = None, **changes: Any) -> dict[str, Any]:
    """Return a record, as `make built/NAME` writes it."""
    given = {"platform": "linux/amd64", "day": "2026-11-25", "machine": "2 cores", "earlier": {}}
    given |= changes
    return dict(json.loads(build_record(manifest, codes or {}, **given)))  # type: ignore[arg-type]


WHEEL = "a-1-cp311-cp311-linux_x86_64.whl"


def test_a_record_has_what_was_found_in_each_library() -> None:
    manifest = {"image": "hopper", "abi": "x", "kernels": [{"name": "a", "wheel": WHEEL}]}
    made = record(manifest, {WHEEL: {"a/_C.so": ["sm_90"]}})
    assert made == {
        "image": "hopper",
        "platform": "linux/amd64",
        "abi": "x",
        "kernels": [
            {
                "name": "a",
                "wheel": WHEEL,
                "day": "2026-11-25",
                "machine": "2 cores",
                "code": {"a/_C.so": ["sm_90"]},
            }
        ],
    }


ARM = "b-1-cp39-abi3-manylinux_2_28_aarch64.whl"


@pytest.mark.parametrize(
    ("wheels", "platform", "found"),
    [
        pytest.param([WHEEL, "b-1-py3-none-any.whl"], "linux/amd64", "", id="x86-64, and any"),
        pytest.param([ARM], "linux/arm64", "", id="arm64"),
        pytest.param([], "linux/amd64", "", id="none yet"),
        pytest.param([WHEEL, ARM], "linux/amd64", f"found {ARM}, for linux/arm64", id="a mixture"),
        pytest.param([WHEEL], "linux/arm64", f"found {WHEEL}, for linux/amd64", id="another's"),
    ],
)
def test_wheels_are_recorded_for_their_own_platform_alone(
    wheels: list[str], platform: str, found: str
) -> None:
    kernels = [{"name": wheel, "wheel": wheel} for wheel in wheels]
    manifest = {"image": "hopper", "abi": "x", "kernels": kernels}
    if not found:
        assert record(manifest, platform=platform)["platform"] == platform
        return
    with pytest.raises(AttnimgError, match=f"the wheels are not for {platform}") as caught:
        record(manifest, platform=platform)
    assert caught.value.why == found


def test_each_wheel_has_the_day_and_the_machine_of_its_own_build() -> None:
    first = {"name": "a", "wheel": WHEEL, "sha256": "1" * 64}
    second = {"name": "b", "wheel": WHEEL, "sha256": "2" * 64}
    earlier = record({"image": "hopper", "abi": "x", "kernels": [first, second]})
    again = {"image": "hopper", "abi": "x", "kernels": [first, {**second, "sha256": "3" * 64}]}
    made = record(again, day="2026-11-28", machine="64 cores", earlier=earlier)
    assert [(kernel["day"], kernel["machine"]) for kernel in made["kernels"]] == [
        ("2026-11-25", "2 cores"),
        ("2026-11-28", "64 cores"),
    ]


FIRST = {
    "name": "a", "version": "1", "trimmed": False, "wheel": WHEEL, "seconds": 900,
    "cpu_seconds": 1700, "jobs": 2, "attempts": 1, "objects_compiled": 13, "objects_reused": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("again", "seconds"),
    [
        pytest.param(
            {"objects_compiled": 0, "objects_reused": 13}, 900, id="one from the cache keeps them"
        ),
        pytest.param({"objects_compiled": 13}, 30, id="one that compiled again has its own"),
        pytest.param(
            {"objects_compiled": 0, "objects_reused": 13, "trimmed": True},
            30,
            id="a small build does not take those of a whole one",
        ),
    ],
)
def test_times_are_those_of_the_build_that_compiled(again: dict[str, object], seconds: int) -> None:
    manifest = {"image": "hopper", "abi": "x", "kernels": [{**FIRST, "seconds": 30, **again}]}
    earlier = {"kernels": [FIRST]}
    made = record(manifest, earlier=earlier)
    assert made["kernels"][0]["seconds"] == seconds


def test_an_earlier_wheel_that_nobody_compiled_has_no_jobs_to_keep() -> None:
    before = {key: FIRST[key] for key in ("name", "version", "trimmed", "seconds")}
    again = {**FIRST, "seconds": 30, "objects_compiled": 0, "objects_reused": 13}
    manifest = {"image": "hopper", "abi": "x", "kernels": [again]}
    [made] = record(manifest, earlier={"kernels": [before]})["kernels"]
    assert (made["seconds"], made["jobs"]) == (900, 2)


WHOLE = {key: FIRST[key] for key in ("name", "version", "trimmed", "wheel")} | {"key": "aaaa"}


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        pytest.param({"image": "hopper", "abi": "x", "kernels": [WHOLE]}, "", id="a whole one"),
        pytest.param(
            {"image": "ampere", "abi": "x", "kernels": [WHOLE]},
            "'ampere', needed 'hopper'",
            id="another image's",
        ),
        pytest.param(
            {"image": "hopper", "abi": "x", "kernels": [{}]},
            "lists no kernels",
            id="nameless kernels",
        ),
        pytest.param({"image": "hopper", "abi": "x"}, "lists no kernels", id="no kernels at all"),
        pytest.param({"image": "hopper", "kernels": [WHOLE]}, "found the abi None", id="no abi"),
        pytest.param(["hopper"], "found the image None", id="no manifest"),
    ],
)
def test_only_a_wheelhouse_of_the_image_is_written_down(
    tmp_path: Path, manifest: object, says: str
) -> None:
    made = wheelhouse(tmp_path / "wheels", {"a-1.whl": {"a.py": b""}}, manifest)
    read = read_wheelhouse(made, over=None, log=lambda _: None)
    if not says:
        assert read_manifest(read, image="hopper") == manifest
        return
    with pytest.raises(AttnimgError) as caught:
        read_manifest(read, image="hopper")
    assert (caught.value.code, says in caught.value.why) == ("bad-wheelhouse", True)


def test_a_changed_wheel_is_not_written_down(tmp_path: Path) -> None:
    manifest = {"image": "hopper", "abi": "x", "kernels": [WHOLE]}
    made = wheelhouse(tmp_path / "wheels", {"a-1.whl": {"a.py": b""}}, manifest)
    with zipfile.ZipFile(made / "a-1.whl", "a") as wheel:
        wheel.writestr("b.py", "")
    with pytest.raises(AttnimgError, match="is not a wheelhouse of hopper"):
        read_manifest(read_wheelhouse(made, over=None, log=lambda _: None), image="hopper")


def test_records_are_read_by_image(tmp_path: Path) -> None:
    (tmp_path / "docs/built").mkdir(parents=True)
    (tmp_path / "docs/built/hopper.json").write_text('{"day": "2026-11-25"}')
    assert read_records(tmp_path) == {"hopper": {"day": "2026-11-25"}}


def test_the_readme_keeps_all_but_the_table() -> None:
    begin, end = "<!-- built: `make render` writes what follows -->", "<!-- built: end -->"
    text = replace_table(f"before\n{begin}\n\nold\n\n{end}\nafter\n", "built", "new\n")
    assert text == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert replace_table(text, "built", "new\n") == text


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(AttnimgError, match="no place for a generated table"):
        replace_table("nothing here", "built", "new")


CONFIG = {
    "os": "linux",
    "architecture": "amd64",
    "config": {"Labels": {"org.opencontainers.image.title": "attnimg:cpu"}},
}
GOOD = "x\n52 passed, 9 skipped in 283.10s (0:04:43)\n"


@pytest.mark.parametrize(
    ("config", "selftest", "says"),
    [
        pytest.param(CONFIG, GOOD, "", id="the image, whose tests passed"),
        pytest.param(CONFIG, "3 passed in 2s", "", id="a short line"),
        pytest.param(CONFIG, "1 failed, 3 passed in 2s", "tests that passed", id="a failed test"),
        pytest.param(CONFIG, "1 passed, 2 errors in 1s", "tests that passed", id="errors"),
        pytest.param(CONFIG, "", "tests that passed", id="no result"),
        pytest.param({**CONFIG, "config": {}}, GOOD, "needed 'attnimg:cpu'", id="no title"),
        pytest.param({**CONFIG, "config": {"Labels": {"org.opencontainers.image.title":
                     "attnimg:hopper"}}}, GOOD, "found the title 'attnimg:hopper'", id="another"),
    ],
)  # fmt: skip
def test_only_an_image_whose_selftest_passed_is_recorded(
    config: dict[str, Any], selftest: str, says: str
) -> None:
    sizes = [{"name": "base", "bytes": 3, "zstd_bytes": 1, "gzip_bytes": 2}]

    def make() -> tuple[str, str]:
        stored = json.dumps(config).encode()
        return image_record("cpu", sizes, stored, day="2026-11-28", selftest=selftest)

    if says:
        with pytest.raises(AttnimgError) as caught:
            make()
        assert says in caught.value.why
        return
    path, text = make()
    assert path == "docs/built/image-cpu.json"
    made = json.loads(text)
    assert (made["layers"], made["platform"]) == (sizes, "linux/amd64")
    assert made["selftest"] == selftest.strip().splitlines()[-1].partition(" in ")[0]


def test_the_record_of_an_image_for_arm64_has_a_name_of_its_own() -> None:
    stored = json.dumps({**CONFIG, "architecture": "arm64"}).encode()
    path, _ = image_record("cpu", [], stored, day="2026-11-28", selftest=GOOD)
    assert path == "docs/built/image-cpu-arm64.json"


def test_layers_are_measured_as_they_are_pushed(tmp_path: Path) -> None:
    content = b"".join(str(n).encode() for n in range(40_000))
    layers = [{"usr/lib/a": content}, {"opt/venv/b": b"b" * 5000}]
    history = ("RUN echo $APT_PACKAGES", "RUN install -r /torch.txt")
    archive = save(tmp_path / "image.tar", *layers, history=history)
    sizes, config = layer_sizes(archive, log=lambda _: None)
    tars = [tar_of(layer) for layer in layers]
    assert [one["name"] for one in sizes] == ["python", "torch"]
    assert [one["bytes"] for one in sizes] == [len(tar) for tar in tars]
    assert [one["gzip_bytes"] for one in sizes] == [len(gzip.compress(tar, 6)) for tar in tars]
    read = read_image(archive, log=lambda _: None)
    assert [one["zstd_bytes"] for one in sizes] == [layer.zstd_bytes for layer in read.layers]
    assert config == read.config


@pytest.mark.parametrize("content", [b"", b"no tar", tar_of({"manifest.json": b"[]"})])
def test_what_is_no_image_is_not_measured(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.tar").write_bytes(content)
    with pytest.raises(AttnimgError, match="can't be read as an image"):
        layer_sizes(tmp_path / "image.tar", log=lambda _: None)
