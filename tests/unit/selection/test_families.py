"""Check the record of every causal type of transformers, and that explain agrees with it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from families import CHANGES, RECORD, ROWS, values_of, variants, write_config
from run_facts import a_problem
from tiny_models import causal_types

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Machine
from attnimg.selection import plan
from attnimg.selection.attention_shapes import read_model
from attnimg.selection.model_types import find_refusal, mask_refusal, refused_types
from attnimg.train.base_model import require_trainable

FOUND: dict[str, dict[str, dict[str, Any]]] = json.loads(RECORD.read_text())["types"]
CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", packages={"torch": "2"})
# Explains each config of a list of files, without what a laptop may lack.
EXPLAIN = """
import contextlib, io, json, sys
for name in ("torch", "transformers", "trl", "datasets"):
    sys.modules[name] = None
from attnimg.cli.explain import explain
for file in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        explain(file, settings=[], on=None, image=None, as_json_lines=True)
    print(json.dumps([error["code"] for error in json.loads(out.getvalue())["errors"]]))
"""


def test_the_record_has_every_type_of_the_installed_transformers() -> None:
    assert json.loads(RECORD.read_text())["transformers"] == metadata.version("transformers")
    assert set(FOUND) == set(variants(causal_types())), "make families"


@pytest.mark.parametrize("name", FOUND)
def test_a_type_trains_or_is_refused_before_its_weights_as_explain_says(name: str) -> None:
    assert FOUND[name].keys() == ROWS.keys()
    for kind, result in FOUND[name].items():
        assert "crashed" not in result, (kind, result)
        if "trains" in result:
            assert result["explained"] == [], (kind, result)
        else:
            assert result["before_weights"] is True, (kind, result)
            assert result["refused"] in result["explained"], (kind, result)


def test_explain_without_torch_says_what_the_record_says(tmp_path: Path) -> None:
    expected, files = [], []
    for number, (name, (model_type, settings)) in enumerate(variants(list(causal_types())).items()):
        home = tmp_path / str(number)
        write_config(home / "model", model_type, settings)
        # A type that packs without an error has none unpacked either.
        for kind in ("unpacked", "packed") if FOUND[name]["packed"]["explained"] else ("packed",):
            file = home / f"{kind}.json"
            file.write_text(json.dumps(values_of(home, rows=kind)))
            files.append(str(file))
            expected.append((name, kind, FOUND[name][kind]["explained"]))
    done = subprocess.run(
        [sys.executable, "-c", EXPLAIN, *files], capture_output=True, text=True, check=True
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(name, kind, codes) for (name, kind, _), codes in zip(expected, said, strict=True)]
    assert found == expected


def test_every_refused_type_is_one_of_transformers() -> None:
    named = {name for row in refused_types().values() for name in row.types}
    assert named <= set(causal_types())


def test_each_refusal_cites_a_file_of_its_type() -> None:
    import transformers

    models = Path(transformers.__file__).parent / "models"
    for row in refused_types().values():
        for name in row.types if "{file}" in row.source else ():
            assert list(models.glob(f"*/modeling_{name.replace('-', '_')}.py")), name
    mixes = mask_refusal("big_bird")
    assert mixes is not None
    assert "[modeling_big_bird.py, create_causal_mask" in (mixes.why or "")


def refusal(model_type: str, *, packing: bool = True, **fields: Any) -> str | None:
    found = find_refusal(
        {"model_type": model_type, **fields},
        name="there",
        packing=packing,
        sequence_len=64,
        packages=CPU.packages,
    )
    return found.code if found else None


@pytest.mark.parametrize(
    ("model_type", "keys", "code"),
    [
        ("llama", {}, None),
        ("xlnet", {"packing": False}, "not-causal-lm"),
        ("gemma4_assistant", {"packing": False}, "not-trainable"),
        ("bloom", {}, "packing-not-isolated"),
        ("bloom", {"packing": False}, None),
        pytest.param("deepseek_v32", {"index_topk": 63}, "packing-not-isolated", id="too few keys"),
        pytest.param("deepseek_v32", {"index_topk": 64}, None, id="a key for every token"),
        pytest.param("llama4", {"text_config": {"model_type": "llama4_text",
            "attention_chunk_size": 32}}, "packing-not-isolated", id="of its text part"),
        pytest.param("llama4", {"text_config": {"model_type": "llama4_text",
            "attention_chunk_size": 8192}}, None, id="a chunk holds the row"),
        pytest.param("own", {"llm_config": {"model_type": "bloom"}}, "packing-not-isolated",
            id="of its language model under another name"),
    ],
)  # fmt: skip
def test_a_type_is_refused_for_what_holds_of_it_alone(
    model_type: str, keys: dict[str, Any], code: str | None
) -> None:
    assert refusal(model_type, **keys) == code


def test_a_package_that_is_missing_refuses_and_its_presence_does_not() -> None:
    raw = {"model_type": "gemma3n"}
    config = Config(base_model="there", sequence_len=64)
    with pytest.raises(AttnimgError) as caught:
        require_trainable(config, raw, packages=CPU.packages)
    assert (caught.value.code, caught.value.do) == ("not-trainable", "pip install timm")
    require_trainable(config, raw, packages={"timm": "1"})


def test_code_that_a_model_brings_is_not_judged_by_its_type() -> None:
    raw = {"model_type": "bloom", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    config = Config(base_model="there", sample_packing=True, trust_remote_code=True)
    require_trainable(config, raw, packages=CPU.packages)


@pytest.mark.parametrize(
    ("asked", "model_type", "takes", "mixes"),
    [
        pytest.param(None, "opt", "sdpa_math", False, id="auto goes on to what gets boundaries"),
        pytest.param("sdpa", "opt", "sdpa", True, id="a name is not swapped"),
        pytest.param(None, "llama", "sdpa", False, id="a mask with boundaries is taken"),
        pytest.param(None, "gpt_oss", "eager", True, id="nothing else has sinks"),
    ],
)
def test_a_mask_without_boundaries_is_not_packed_on(
    asked: str | None, model_type: str, takes: str, mixes: bool
) -> None:
    model = read_model({"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 64,
                        "num_attention_heads": 4, "num_key_value_heads": 4})  # fmt: skip
    problem = a_problem(model=model, dtype="float32", packing=True)
    found = plan.choose(asked, CPU, problem)
    assert found.chosen is not None
    assert found.chosen.backend.name == takes
    error = plan.mixing_error(found, problem)
    assert (error.code if error else None) == ("packing-not-isolated" if mixes else None)
    assert plan.mixing_error(found, a_problem(model=model, dtype="float32")) is None


def test_the_changes_are_of_types_whose_rows_are_bounded() -> None:
    bounded = {name for row in refused_types().values() if row.rows_up_to for name in row.types}
    assert CHANGES.keys() == bounded
