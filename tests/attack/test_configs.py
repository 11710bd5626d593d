"""Attack with configs: odd values of every key, unknown keys, damaged YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from attacked import Attnimg, put_inputs
from generated import DAMAGES, ODD, try_cases
from hypothesis import strategies as st

from attnimg.config.attention import LEGACY
from attnimg.config.keys import key_answers
from attnimg.config.schema import Config, DatasetSpec

# Values that are right, and make a run longer than an attack has time for.
LONG = {"max_steps", "num_epochs", "sequence_len", "dataset_num_proc", "dataset_processes",
        "dataloader_num_workers", "lora_r"}  # fmt: skip
KEYS = sorted(set(Config.model_fields) | set(LEGACY) | set(key_answers()) | {"zzz", "a.b", ""})
ENTRY = sorted(DatasetSpec.model_fields)
COMMANDS = (["check"], ["check", "--json"], ["check", "--on", "h100"], ["explain"],
            ["explain", "--on", "l4", "--json"], ["train"])  # fmt: skip

changes = st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=3)
entries = st.dictionaries(st.sampled_from(ENTRY), ODD, max_size=2)


def test_configs(
    attnimg: Attnimg, right: dict[str, Any], home: Path, tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:  # fmt: skip
    file = tmp_path / "run.yaml"
    put_inputs(tmp_path, home)
    text = yaml.safe_dump(right).encode()

    @st.composite
    def contents(draw: st.DrawFn) -> bytes:
        if draw(st.integers(0, 3)) == 0:
            return draw(DAMAGES).of(text)
        changed = {**right, **draw(changes)}
        for key in LONG & changed.keys():
            if isinstance(changed[key], int) and changed[key] > 3:
                changed[key] = 2**31
        if draw(st.booleans()) and isinstance(changed.get("datasets"), list):
            changed["datasets"] = [{**right["datasets"][0], **draw(entries)}]
        return yaml.safe_dump(changed).encode(errors="surrogatepass")

    def judge(case: tuple[list[str], bytes]) -> str:
        command, content = case
        file.write_bytes(content)
        return attnimg.run([*command, file.name], folder=tmp_path).fault_with_text

    try_cases("configs", st.tuples(st.sampled_from(COMMANDS), contents()), judge,
                 record=record_property, count=24)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_right_config_is_taken(
    attnimg: Attnimg, right: dict[str, Any], home: Path, tmp_path: Path, command: list[str]
) -> None:
    put_inputs(tmp_path, home)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(right))
    outcome = attnimg.run([*command, "run.yaml"], folder=tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.fault == ""
