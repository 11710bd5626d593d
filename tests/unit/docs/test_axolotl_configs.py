"""Compare docs/axolotl-configs.md with the record of `make axolotl-examples`."""

from __future__ import annotations

import json
from pathlib import Path

from attnimg.config.keys import key_answers
from attnimg.config.schema import Config

DOCS = Path(__file__).parents[3] / "docs"
PAGE = " ".join((DOCS / "axolotl-configs.md").read_text(encoding="utf-8").split())
RECORD = json.loads((DOCS / "measured/axolotl_examples.json").read_text(encoding="utf-8"))


def test_the_page_quotes_the_record() -> None:
    text, maintained = (RECORD["shares"][name] for name in ("text", "text, maintained"))
    assert f"axolotl {RECORD['axolotl']}" in PAGE
    assert (
        f"accepts {text['accepted']} of {text['examples']} examples that train on text, "
        f"{maintained['accepted']} of {maintained['examples']} of them maintained"
    ) in PAGE
    of_rl = RECORD["shares"]["rl"]
    assert f"accepts {of_rl['accepted']} of the {of_rl['examples']} examples with `rl`" in PAGE
    trained = {name for name, found in RECORD["trained"].items() if "trained" in found}
    assert f"{len(trained)} of the {len(RECORD['trained'])} trained" in PAGE
    assert all(f"`{name}`" in PAGE for name in RECORD["trained"].keys() - trained)


def test_the_share_is_at_least_what_is_promised() -> None:
    text, maintained = (RECORD["shares"][name] for name in ("text", "text, maintained"))
    assert text["accepted"] / text["examples"] >= 0.6
    assert maintained["accepted"] / maintained["examples"] >= 0.5


def test_what_trained_has_five_losses() -> None:
    for name, found in RECORD["trained"].items():
        if "trained" in found:
            assert len(found["losses"]) == 5, name


def test_the_keys_that_block_examples_are_still_refused() -> None:
    refused = {key for key, found in key_answers().items() if found.answer == "refused"}
    blocking = {key.partition(".")[0] for key in RECORD["blocking"]}
    # The rest are keys that attnimg implements, with a value that it does not.
    assert blocking - refused - Config.model_fields.keys() <= {"plugins", "context_parapllel_size"}
