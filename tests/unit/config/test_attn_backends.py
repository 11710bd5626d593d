"""attn_backends refines auto in a config: each of its entries obeys the rules of a backend."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny_models import tiny_model
from tiny_run import make_tokenizer

from attnimg.config import check_values

RUN = {"base_model": "org/model", "learning_rate": 1e-3, "sample_packing": True,
       "datasets": [{"path": "a.jsonl", "type": "completion"}]}  # fmt: skip


def errors(**values):
    return {(e.code, e.key) for e in check_values(RUN | values, file="run.yaml").errors}


@pytest.mark.parametrize("requested", [{}, {"attn_implementation": "auto"}])
def test_known_backends_are_accepted(requested):
    assert (
        errors(attn_backends={"sliding": "flash_attention_2", "full": "sdpa"}, **requested) == set()
    )


REFUSED = [
    ({"attn_backends": {"sliding": "sdpaa"}}, ("unknown-backend", "attn_backends.sliding")),
    ({"attn_backends": {"full": "fa2"}}, ("alias-rejected", "attn_backends.full")),
    ({"attn_backends": {"full": "auto"}}, ("bad-value", "attn_backends.full")),
    ({"attn_backends": {"slidng": "sdpa"}}, ("bad-value", "attn_backends")),
    ({"attn_backends": {"full": "s2"}}, ("s2-with-packing", "sample_packing")),
    ({"attn_backends": {"full": "sdpa"}, "attn_implementation": "eager"},
     ("bad-value", "attn_backends")),
]  # fmt: skip


@pytest.mark.parametrize(("values", "expected"), REFUSED)
def test_each_entry_obeys_the_rules_of_a_backend(values, expected):
    assert expected in errors(**values)


def test_explain_shows_the_backend_of_each_kind_of_layers(tmp_path):
    model = tiny_model("gemma3_text", "eager")
    model.config.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    config = tmp_path / "run.yaml"
    values = RUN | {"base_model": str(tmp_path / "model"), "sequence_len": 128}
    values["attn_backends"] = {"sliding": "sdpa", "full": "eager"}
    config.write_text(json.dumps(values))
    command = [sys.executable, "-m", "attnimg", "explain", str(config), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert {g["layers"]["window"] is None: g["backend"] for g in found["groups"]} == {
        False: "sdpa",
        True: "eager",
    }
    assert found["chosen"]["because"].startswith("the backends that attn_backends names fit")
