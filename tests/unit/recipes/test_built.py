"""The table of what was really built: nothing is claimed that no record shows."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from small_image import wheelhouse

from attnimg.errors import AttnimgError
from recipes.artifact.read import read_wheelhouse
from recipes.pages.built import (
    build_record,
    built_table,
    images_table,
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


def cell(**kernel: object) -> str:
    """Return what the table says of flash-attn in hopper."""
    made = {"name": "flash-attn", "key": KEY, "trimmed": False, **kernel}
    text = built_table(PLANS, {"hopper": {"day": "2026-11-25", "kernels": [made]}})
    head, *rows = (line.split(" | ") for line in text.splitlines())
    row = next(row for row in rows if row[0] == "| `hopper`")
    return row[head.index("FlashAttention-2")]


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
def test_a_cell(kernel: dict[str, object], says: str) -> None:
    assert cell(**kernel) == says


KERNELS = [
    {"name": step.kernel.name, "key": step.key, "trimmed": False}
    for step in HOPPER.steps
    if step.kernel.form != "wheel"
]


@pytest.mark.parametrize(
    ("image", "kernels", "state"),
    [
        pytest.param("hopper", KERNELS, "kernels built 2026-11-25", id="all kernels"),
        pytest.param("hopper", KERNELS[1:], "not yet built", id="all but one"),
        pytest.param("hopper", [{**KERNELS[0], "trimmed": True}, *KERNELS[1:]], "not yet built",
                     id="one of them in a small build"),
        pytest.param("hopper", [], "not yet built", id="no record"),
        pytest.param("cpu", [], "built and tested on every change", id="nothing to compile"),
    ],
)  # fmt: skip
def test_an_image_is_built_when_all_its_kernels_are(
    image: str, kernels: list[dict[str, object]], state: str
) -> None:
    text = images_table(PLANS, {"hopper": {"day": "2026-11-25", "kernels": kernels}})
    row = next(line for line in text.splitlines() if line.startswith(f"| `{image}`"))
    assert row.split(" | ")[-1] == f"{state} |"


def test_a_record_has_what_was_found_in_each_library() -> None:
    manifest = {"image": "hopper", "abi": "x", "kernels": [{"name": "a", "wheel": "a-1.whl"}]}
    codes = {"a-1.whl": {"a/_C.so": ["sm_90"]}}
    made = json.loads(
        build_record(manifest, codes, day="2026-11-25", machine="2 cores", earlier={})
    )
    assert made["kernels"] == [{"name": "a", "wheel": "a-1.whl", "code": codes["a-1.whl"]}]
    assert (made["day"], made["machine"], made["abi"]) == ("2026-11-25", "2 cores", "x")


FIRST = {
    "name": "a", "version": "1", "trimmed": False, "wheel": "a-1.whl", "seconds": 900,
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
    made = json.loads(
        build_record(manifest, {}, day="2026-11-25", machine="2 cores", earlier=earlier)
    )
    assert made["kernels"][0]["seconds"] == seconds


def test_an_earlier_wheel_that_nobody_compiled_has_no_jobs_to_keep() -> None:
    before = {key: FIRST[key] for key in ("name", "version", "trimmed", "seconds")}
    again = {**FIRST, "seconds": 30, "objects_compiled": 0, "objects_reused": 13}
    manifest = {"image": "hopper", "abi": "x", "kernels": [again]}
    text = build_record(manifest, {}, day="d", machine="m", earlier={"kernels": [before]})
    [made] = json.loads(text)["kernels"]
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
