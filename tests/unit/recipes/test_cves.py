"""recipes/cves.toml: an answer to a known vulnerability is for one version, and expires."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from attnimg.errors import AttnimgError
from recipes.cves import (
    LONGEST_DAYS,
    answer_to,
    grype_config,
    refuse_expired,
    refuse_wrong_cves,
)
from recipes.facts import Cve
from recipes.read import _read_bases, read_recipes
from recipes.solve.lock import pinned_versions, read_locks
from recipes.solve.plan import solve_all

ROOT = Path(__file__).parents[3]
TODAY = date(2026, 11, 27)
CVE = Cve(
    id="CVE-2026-31253",
    package="flash-attn",
    version="2.8.3.post2",
    status="not_affected",
    justification="vulnerable_code_not_present",
    reason="read",
    expires=TODAY + timedelta(days=30),
)
PINS = {("flash-attn", "2.8.3.post2"), ("urllib3", "2.8.0")}


def test_the_answers_of_the_repository_are_for_what_the_images_have() -> None:
    recipes = read_recipes(ROOT)
    plans = solve_all(recipes)
    locks = read_locks(plans, root=ROOT)
    pins = {
        pin for plan in plans for pin in pinned_versions(plan, lock=locks[plan.image.name]).items()
    }
    refuse_wrong_cves(recipes.cves, pins=pins)
    assert CVE.id in {cve.id for cve in recipes.cves}


@pytest.mark.parametrize(
    "right",
    [
        pytest.param(CVE, id="not affected, with a justification"),
        pytest.param(replace(CVE, package="Flash_Attn"), id="another spelling of the name"),
        pytest.param(replace(CVE, id="GHSA-7g5w-pq96-8c5w"), id="GitHub's id"),
        pytest.param(replace(CVE, id="PYSEC-2026-12"), id="PyPA's id"),
        pytest.param(replace(CVE, status="affected", justification=""), id="affected"),
        pytest.param(replace(CVE, package="deb:libc6", version="2.36-9"), id="Debian's package"),
        pytest.param(replace(CVE, expires=date(2020, 1, 1)), id="its form is right when expired"),
    ],
)
def test_a_valid_entry_passes(right: Cve) -> None:
    refuse_wrong_cves([right], pins=PINS)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        pytest.param(replace(CVE, package="flash-atn"), "no image has this", id="unknown package"),
        pytest.param(
            replace(CVE, version="2.9"), "the images have 2.8.3.post2", id="other version"
        ),
        pytest.param(replace(CVE, id="31253"), "needed CVE-", id="no id"),
        pytest.param(replace(CVE, justification=""), "needs one of", id="no justification"),
        pytest.param(replace(CVE, justification="safe"), "needs one of", id="unknown one"),
        pytest.param(replace(CVE, status="fixed"), "other statuses none", id="one too many"),
        pytest.param(replace(CVE, reason=" "), "reason is empty", id="no reason"),
    ],
)
def test_an_invalid_entry_is_refused(wrong: Cve, why: str) -> None:
    with pytest.raises(AttnimgError) as refused:
        refuse_wrong_cves([CVE, wrong], pins=PINS)
    assert why in refused.value.why
    assert len(refused.value.why.splitlines()) == 1


@pytest.mark.parametrize("days", [0, 1, LONGEST_DAYS])
def test_an_answer_counts_to_its_last_day(days: int) -> None:
    refuse_expired([replace(CVE, expires=TODAY + timedelta(days=days))], today=TODAY)


@pytest.mark.parametrize(("days", "why"), [(-1, "expired on 2026-11-26"), (367, "at most 366")])
def test_an_expired_or_endless_answer_is_refused(days: int, why: str) -> None:
    with pytest.raises(AttnimgError) as refused:
        refuse_expired([replace(CVE, expires=TODAY + timedelta(days=days))], today=TODAY)
    assert why in refused.value.why
    assert (refused.value.code, refused.value.exit_code) == ("expired-cve", 1)


@pytest.mark.parametrize(
    "text",
    [
        '[[cve]]\nid = "CVE-2026-1"\n',
        '[[cve]]\nid = "CVE-2026-1234"\npackage = "a"\nversion = "1"\nstatus = "ignored"\n'
        'reason = "r"\nexpires = 2027-01-01\n',
        '[[cve]]\nid = "CVE-2026-1234"\npackage = "a"\nversion = "1"\nstatus = "fixed"\n'
        'reason = "r"\nexpires = "soon"\n',
        '[[cve]]\nid = "CVE-2026-1234"\npackage = "a"\nversion = "1"\nstatus = "fixed"\n'
        'reason = "r"\nexpires = 2027-01-01\nexpire = 1\n',
        *(
            '[[cve]]\nid = "CVE-2026-1234"\npackage = "a"\nversion = "1"\nstatus = "fixed"\n'
            f'reason = "r"\nexpires = {day}\n'
            for day in ("1798761600", '"2027-01-01"', "2027-01-01T00:00:00Z", "1798761600.0")
        ),
    ],
    ids=[
        "missing keys",
        "a status that OpenVEX does not have",
        "no date",
        "an unknown key",
        "seconds for a date",
        "a text for a date",
        "a time for a date",
        "a fraction for a date",
    ],
)
def test_a_cves_toml_with_another_form_is_refused(tmp_path: Path, text: str) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    read_recipes(tmp_path)
    (tmp_path / "recipes/cves.toml").write_text(text)
    with pytest.raises(AttnimgError, match=r"recipes/cves\.toml"):
        read_recipes(tmp_path)


@pytest.mark.parametrize("key", ["python_fixes_until", "debian_fixes_until"])
@pytest.mark.parametrize("day", ["1798761600", '"2027-01-01"'])
def test_a_base_whose_date_is_none_is_refused(tmp_path: Path, key: str, day: str) -> None:
    text = (ROOT / "recipes/bases.toml").read_text()
    path = tmp_path / "bases.toml"
    path.write_text(text)
    assert _read_bases(path)
    path.write_text(re.sub(rf"^{key} = .*$", f"{key} = {day}", text, flags=re.MULTILINE))
    with pytest.raises(AttnimgError) as refused:
        _read_bases(path)
    assert key in refused.value.why


def test_an_answer_is_found_by_any_of_the_names() -> None:
    def found(package: str, version: str, *ids: str) -> bool:
        answer = answer_to([CVE], package=package, version=version, ids=ids)
        return answer is CVE

    assert found("flash_attn", "2.8.3.post2", "GHSA-7g5w-pq96-8c5w", "CVE-2026-31253")
    assert not found("flash-attn", "2.8.4", "CVE-2026-31253")
    assert not found("flash-attn-3", "2.8.3.post2", "CVE-2026-31253")
    assert not found("flash-attn", "2.8.3.post2", "CVE-2026-3125")


def test_grype_leaves_out_the_same() -> None:
    [python, debian] = grype_config([CVE, replace(CVE, package="deb:libc6", version="2.36-9")])[
        "ignore"
    ]  # type: ignore[misc]  # a list of two
    assert python["package"] == {"name": "flash-attn", "version": "2.8.3.post2", "type": "python"}
    assert debian["package"] == {"name": "libc6", "version": "2.36-9", "type": "deb"}
