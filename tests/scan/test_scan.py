"""The scan with the real pip-audit, against a server on this machine that speaks OSV's protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from loopback import serve_json

from attnimg.errors import AttnimgError
from recipes.read import read_recipes
from recipes.scan import _CONTROL, scan
from recipes.solve.lock import pinned_versions, read_locks
from recipes.solve.plan import solve

ROOT = Path(__file__).parents[2]
PIP_AUDIT = Path(os.environ.get("PIP_AUDIT", "build/audit/bin/pip-audit")).absolute()
RECIPES = read_recipes(ROOT)
CONTROL_NAME, CONTROL_VERSION, CONTROL_ID = _CONTROL

Answer = Callable[[str, dict[str, Any]], Any]


def vulnerability(name: str, *ids: str, fixed: str = "99") -> dict[str, Any]:
    """Return an entry in OSV's format."""
    events = [{"introduced": "0"}, {"fixed": fixed}]
    affected = {
        "package": {"name": name, "ecosystem": "PyPI"},
        "ranges": [{"type": "ECOSYSTEM", "events": events}],
    }
    return {"id": ids[0], "aliases": list(ids[1:]), "summary": "wrong", "affected": [affected]}


def database(*entries: dict[str, Any]) -> Answer:
    """A database with these entries and the one that each must have."""
    control = vulnerability(CONTROL_NAME, "PYSEC-2018-28", CONTROL_ID)

    def answer(_: str, query: dict[str, Any]) -> Any:
        name, version = query["package"]["name"], query["version"]
        found = [entry for entry in entries if entry["affected"][0]["package"]["name"] == name]
        if (name, version) == (CONTROL_NAME, CONTROL_VERSION):
            found.append(control)
        return {"vulns": found} if found else {}

    return answer


def run(answer: Answer, image: str = "cpu") -> subprocess.CompletedProcess[str]:
    with serve_json(answer) as url:
        env = {**os.environ, "PIP_AUDIT_OSV_URL": f"{url}/v1/query"}
        command = [sys.executable, "-m", "recipes", "scan", image, "--pip-audit", str(PIP_AUDIT)]
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )


def test_an_image_without_known_vulnerabilities_passes_and_each_pin_was_asked_for() -> None:
    asked = set()

    def answer(path: str, query: dict[str, Any]) -> Any:
        asked.add((query["package"]["name"], query["version"]))
        return database()(path, query)

    done = run(answer)
    assert done.returncode == 0, done.stderr
    assert "cpu has no known vulnerability without an answer" in done.stdout
    plan = solve(RECIPES.images["cpu"], RECIPES)
    pins = pinned_versions(plan, lock=read_locks((plan,), root=ROOT)["cpu"])
    assert set(pins.items()) <= asked
    assert ("torch", "2.13.0") in asked


def test_a_vulnerability_is_refused_with_the_version_that_fixes_it() -> None:
    done = run(database(vulnerability("transformers", "GHSA-aaaa-bbbb-cccc", "CVE-2030-1234")))
    assert done.returncode == 1
    assert "CVE-2030-1234 (GHSA-aaaa-bbbb-cccc), fixed in 99" in done.stderr
    assert "do:  make bump PIN=PACKAGE" in done.stderr


def test_a_vulnerability_with_an_answer_passes_and_is_printed() -> None:
    done = run(
        database(vulnerability("flash-attn", "GHSA-7g5w-pq96-8c5w", "CVE-2026-31253")), "hopper"
    )
    assert done.returncode == 0, done.stderr
    assert "CVE-2026-31253" in done.stdout
    assert "not_affected until" in done.stdout


def test_another_vulnerability_of_that_package_is_refused() -> None:
    done = run(database(vulnerability("flash-attn", "CVE-2026-31254")), "hopper")
    assert done.returncode == 1
    assert "CVE-2026-31254" in done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda _, query: {}, id="an empty database"),
        pytest.param(lambda _, query: None, id="not found"),
        pytest.param(lambda _, query: b"<html>log in</html>", id="the page of a proxy"),
        pytest.param(
            lambda path, query: (
                database()(path, query) if query["package"]["name"] == CONTROL_NAME else b"<html>"
            ),
            id="no answer after the first",
        ),
        pytest.param(
            database({**vulnerability("transformers", "CVE-2030-1"), "schema_version": "2.0.0"}),
            id="an entry that pip-audit can not read",
        ),
    ],
)
def test_a_scan_that_was_not_made_has_its_own_exit_code(answer: Answer) -> None:
    done = run(answer)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the packages were not scanned" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_can_not_be_reached_has_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", "http://127.0.0.1:9/v1/query")
    command = [sys.executable, "-m", "recipes", "scan", "cpu", "--pip-audit", str(PIP_AUDIT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "refused" in done.stderr


def test_an_answer_that_has_expired_is_refused_before_anything_is_asked() -> None:
    plan = solve(RECIPES.images["hopper"], RECIPES)
    with pytest.raises(AttnimgError, match="not in force"):
        scan(
            plan,
            RECIPES.cves,
            lock=read_locks((plan,), root=ROOT)["hopper"],
            pip_audit=Path("/nowhere"),
            today=date(2030, 1, 1),
        )


FAKE = """#!{python}
import json, sys
pins = open(sys.argv[sys.argv.index("--requirement") + 1]).read().split()
control = pins == ["requests==2.19.0"]
name, _, version = pins[0].partition("==")
found = {{"id": "PYSEC-2018-28", "aliases": ["CVE-2018-18074"], "fix_versions": ["2.20"]}}
answers = [
    {{"name": n, "version": v, "vulns": [found] if control else []}}
    for n, _, v in (pin.partition("==") for pin in pins)
]
code = 1 if control else 0
if not control:
    {change}
print(json.dumps({{"dependencies": answers, "fixes": []}}))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param("pass", "", id="an answer for each pin"),
        pytest.param("answers[0]['name'] = name.upper()", "", id="another spelling of a name"),
        pytest.param("answers[0]['version'] += '.0'", "", id="another spelling of a version"),
        pytest.param("answers[0]['version'] = '99'", "the answer is for 99", id="other version"),
        pytest.param("answers[0]['version'] = 'x y'", "the answer is for x y", id="no version"),
        pytest.param("del answers[0]['version']", "the answer is for", id="without a version"),
        pytest.param("del answers[0]", "no answer", id="a pin without an answer"),
        pytest.param(
            "answers.append({'name': 'x', 'version': '1', 'vulns': []})", "x: the answer is for 1",
            id="an answer that nobody asked for",
        ),
        pytest.param(
            "answers[0] = {'name': name, 'skip_reason': 'private'}", "private", id="a skipped pin"
        ),
        pytest.param("answers = None", "dependencies", id="no list"),
        pytest.param("answers = {'a': 1}", "dependencies", id="a table"),
        pytest.param("answers[0] = 1", "dependencies.0", id="a number for a package"),
        pytest.param("answers[0]['name'] = 1", "name", id="a number for a name"),
        pytest.param("answers[0]['vulns'] = [1]", "vulns.0", id="a number for a vulnerability"),
        pytest.param("answers[0]['vulns'] = [{'id': 'a'}]", "fix_versions", id="half of one"),
        pytest.param("code = 2", "exit code 2", id="an exit code of failure, with JSON"),
        pytest.param("sys.stdout.buffer.write(b'\\xff')", "JSON", id="no UTF-8"),
    ],
)  # fmt: skip
def test_what_pip_audit_prints_has_to_be_an_answer_for_each_pin(
    tmp_path: Path, change: str, why: str
) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(FAKE.format(python=sys.executable, change=change))
    program.chmod(0o755)
    command = [sys.executable, "-m", "recipes", "scan", "cpu", "--pip-audit", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (3 if why else 0), done.stdout + done.stderr
    assert why in done.stderr
    assert "Traceback" not in done.stderr
