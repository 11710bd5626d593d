"""Attack with model folders: damaged files, odd values in their JSON, and what is no file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacked import Outcome
from damages import KINDS, put
from generated import DAMAGES, ODD, Damage, try_cases
from hypothesis import strategies as st

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "model.safetensors", "model.safetensors.index.json", "special_tokens_map.json",
         "adapter_config.json", "chat_template.jinja")  # fmt: skip
# Numbers that are right in a config.json and make a model that fills the memory.
LARGE = 10**4


def test_models(
    train: Callable[..., Outcome],
    home: Path,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    model = home / "model"
    config = json.loads((model / "config.json").read_text())

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[str, bytes | str | Damage]:
        if draw(st.booleans()):
            changed = {**config, draw(st.sampled_from(sorted(config))): draw(ODD)}
            small = {k: v for k, v in changed.items() if not isinstance(v, int) or abs(v) < LARGE}
            return "config.json", json.dumps(small).encode(errors="surrogatepass")
        name = draw(st.sampled_from(FILES))
        if draw(st.integers(0, 7)) == 0:
            return name, draw(st.sampled_from(KINDS))
        return name, draw(DAMAGES)

    def judge(case: tuple[str, bytes | str | Damage]) -> str:
        name, content = case
        shutil.rmtree(tmp_path)
        shutil.copytree(model, tmp_path / "model")
        path = tmp_path / "model" / name
        whole = path.read_bytes() if path.exists() else b'{"a": {"b": 1}}'
        if isinstance(content, Damage):
            path.write_bytes(content.of(whole))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            put(path, content)
        return train(tmp_path, base_model=str(tmp_path / "model")).fault_with_text

    try_cases("models", cases(), judge, record=record_property, count=12)
