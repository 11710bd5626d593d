"""Attack with prepared folders: what is damaged, foreign or of other data is prepared again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacked import Outcome
from damages import KINDS, put
from generated import DAMAGES, Damage, try_cases
from hypothesis import strategies as st

from attnimg.train.data.prepare import DOCUMENTS, FIGURES


def test_prepared_folders(
    train: Callable[..., Outcome],
    home: Path,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    whole, used, data = tmp_path / "whole", tmp_path / "used", tmp_path / "data.jsonl"
    lines = (home / "data.jsonl").read_text()
    keys = {"dataset_prepared_path": str(used),
            "datasets": [{"path": str(data), "type": "completion"}]}  # fmt: skip

    def loss() -> float:
        metrics = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        return float(json.loads(metrics[0])["loss"])

    def trained(text: str) -> Outcome:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        # The same size and time, so that only the content can tell two of them apart.
        data.write_text(text)
        os.utime(data, (1e9, 1e9))
        return train(tmp_path, **keys)

    other = lines.replace("king", "ship")
    assert trained(other).code == 0
    other_loss = loss()
    shutil.rmtree(used)
    assert trained(lines).code == 0
    right_loss = loss()
    assert right_loss != other_loss
    shutil.copytree(used, whole)
    reused = trained(lines)
    assert (reused.code, loss()) == (0, right_loss)
    assert "reused" in reused.err

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[bool, str, Damage | str]:
        same = draw(st.booleans())
        name = draw(st.sampled_from([DOCUMENTS, FIGURES]))
        kinds = [*KINDS, "link", "writable", "folder writable", "untouched"]
        if draw(st.booleans()):
            return same, name, draw(st.sampled_from(kinds))
        return same, name, draw(DAMAGES)

    def judge(case: tuple[bool, str, Damage | str]) -> str:
        same, name, content = case
        text = lines if same else other
        shutil.rmtree(used)
        shutil.copytree(whole, used)
        path = next(used.glob(f"*/{name}"))
        if isinstance(content, Damage):
            path.write_bytes(content.of(path.read_bytes()))
        elif content == "writable":
            path.chmod(0o666)
        elif content == "folder writable":
            path.parent.chmod(0o777)
        elif content == "link":
            path.unlink()
            path.symlink_to(next(whole.glob(f"*/{name}")))
        elif content != "untouched":
            put(path, content)
        outcome = trained(text)
        if outcome.fault or outcome.code:
            return outcome.fault_with_text
        needed = right_loss if same else other_loss
        return "" if loss() == needed else f"it trained on other data: loss {loss()}, not {needed}"

    try_cases("prepared folders", cases(), judge, record=record_property, count=5)
