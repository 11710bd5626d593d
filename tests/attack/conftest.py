"""Fixtures of the attacks: the process that runs commands, a model with data, the summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from attacked import Attnimg, Outcome, put_inputs
from generated import SECONDS

# Each class of attacks stops by itself after its time or its cases. Before that, libraries are
# loaded and a correct run trains, which takes minutes on a busy machine. A timeout has no result.
SETUP_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(SECONDS + SETUP_S))


@pytest.fixture(scope="session")
def attnimg() -> Iterator[Attnimg]:
    with Attnimg() as running:
        yield running


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and data.jsonl."""
    from tiny_run import make_model, sentences

    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "model")
    lines = [json.dumps({"text": text}) + "\n" for text in sentences(60, seed=3)]
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def right(attnimg: Attnimg, home: Path) -> dict[str, Any]:
    """The config of a short, correct run; it has run once, so that its proofs are stored."""
    keys = {
        "base_model": "model",
        "datasets": [{"path": "data.jsonl", "type": "completion"}],
        "learning_rate": 1e-2,
        "sequence_len": 64,
        "sample_packing": True,
        "max_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "output_dir": "out",
    }
    (home / "run.yaml").write_text(yaml.safe_dump(keys))
    done = attnimg.run(["train", "run.yaml"], folder=home, seconds=SETUP_S / 2)
    assert done.code == 0, done.err
    return keys


@pytest.fixture
def train(
    attnimg: Attnimg, right: dict[str, Any], home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Outcome]:
    """Train in a new folder, with keys that override those of `right`."""

    def run(
        folder: Path | None = None, *, options: dict[str, Any] | None = None, **keys: Any
    ) -> Outcome:
        folder = folder or tmp_path_factory.mktemp("run")
        put_inputs(folder, home)
        (folder / "run.yaml").write_text(yaml.safe_dump({**right, **keys}))
        return attnimg.run(["train", "run.yaml"], folder=folder, **(options or {}))

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the cases tried and passed per class, from the reports of all xdist processes."""
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)
    ]
    found = [
        value for report in reports for name, value in report.user_properties if name == "attack"
    ]
    if found:
        terminalreporter.section("attacks: cases tried and passed")
        for kind, tried, passed, cases in sorted(found):
            line = f"{kind:<18} {tried:>5} tried  {passed:>5} passed  cases {cases}"
            terminalreporter.write_line(line)
