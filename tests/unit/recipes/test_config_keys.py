"""docs/config-keys.md describes exactly the keys that the schema has."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnimg.config.keys import COMPUTED
from attnimg.config.schema import Config, DatasetSpec
from attnimg.errors import AttnimgError
from recipes.pages.config_keys_page import TEXTS, config_keys_page

TEXT = (Path(__file__).parents[3] / TEXTS).read_text(encoding="utf-8")
PAGE = config_keys_page(TEXT)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param("| `learning_rate` | number > 0 | - |", id="a bound"),
        pytest.param("| `warmup_ratio` | number >= 0, <= 1 | - |", id="two bounds"),
        pytest.param("| `seed` | whole number >= 0 | `42` |", id="a default"),
        pytest.param("| `attn_strict` | `true`, `false` | `false` |", id="a flag"),
        pytest.param("| `datasets` | list of entries | - |", id="a list of entries"),
        pytest.param("| `adapter` | `lora`, `qlora` | - |", id="names"),
        pytest.param("| `deepspeed` | text or mapping | - |", id="two types"),
    ],
)
def test_values_and_defaults_are_the_schema_s(row: str) -> None:
    assert row in PAGE


def test_every_key_has_a_row() -> None:
    for key in (Config.model_fields.keys() | DatasetSpec.model_fields.keys()) - set(COMPUTED):
        assert f"\n| `{key}` | " in PAGE, key


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        pytest.param("seed = ", "sead = ", "without a text: seed; without a key: sead", id="typo"),
        pytest.param('split = "', '# "', "without a text: split", id="a dataset's key left out"),
        pytest.param(
            'seed = "', 'attn_uses_flash_lib = ""\nseed = "', "without a key: attn_uses", id="more"
        ),
    ],
)
def test_other_keys_than_the_schema_s_are_refused(old: str, new: str, named: str) -> None:
    assert f"\n{old}" in TEXT
    with pytest.raises(AttnimgError) as refused:
        config_keys_page(TEXT.replace(f"\n{old}", f"\n{new}"))
    assert refused.value.code == "config-keys"
    assert named in refused.value.why
