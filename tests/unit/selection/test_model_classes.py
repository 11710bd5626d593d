"""What model classes of transformers do not take: one rule for explain and train, and its data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_facts import a_backend, a_problem

from attnimg.__main__ import run as attnimg
from attnimg.config.schema import Config
from attnimg.run_facts import LayerGroup, Model, ModelClass
from attnimg.selection.attention_shapes import read_model
from attnimg.selection.gpus_and_images import image_for, machine_with, parse_gpu
from attnimg.selection.judge import reason_against_class
from attnimg.selection.model_types import find_class
from attnimg.selection.plan import choose
from attnimg.task import build_problem
from recipes.render.transformers_models import causal_types, model_classes, model_lists

FLASH = "kernels-community/flash-attn2"


# A model's file scripts a function while it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_the_table_is_what_the_installed_transformers_says() -> None:
    found = model_classes()
    assert len(found) > 150
    for model_type, facts in found.items():
        assert find_class(model_type) == facts, model_type
    assert causal_types().causal.keys() == found.keys()
    root = Path(__file__).parents[3]
    for path, text in model_lists().items():
        assert root.joinpath(path).read_text() == text, "make classes"


@pytest.mark.parametrize(
    ("model_type", "backend", "says"),
    [
        ("llama", "sage", None),
        ("llama", "flash_attention_2", None),
        pytest.param(
            "bloom", "sage", "its own attention code", id="bloom would run eager without a word"
        ),
        pytest.param("falcon", "s2", "its own attention code", id="falcon would raise KeyError"),
        pytest.param("falcon", "flash_attention_2", None, id="falcon has flash attention"),
        pytest.param("llama4_text", "sage", "its mask has more", id="llama4 has chunks"),
        pytest.param("llama4_text", "sdpa_math", "its mask has more", id="nor sdpa's kernels"),
        pytest.param(
            "llama4_text", "flash_attention_2", "does not support FlashAttention-2", id="nor flash"
        ),
        pytest.param(
            "llama4", "flash_attention_4", "does not support FlashAttention-4", id="nor the whole"
        ),
        pytest.param("llama4_text", "sdpa", None, id="llama4 takes sdpa"),
        pytest.param("bloom", "eager", None, id="eager is what bloom runs anyway"),
        pytest.param(
            "gpt2", "flex_attention", "does not support PyTorch FlexAttention", id="no flex"
        ),
        pytest.param("gpt_oss", "flash_attention_2", "would replace", id="gpt_oss swaps names"),
        pytest.param("gpt_oss", FLASH, "would replace", id="hub paths too"),
        pytest.param("gpt_oss", "flash_attention_4", None, id="but not this one"),
        pytest.param("gpt_oss", "org/unread", None, id="nor those without flash in them"),
        pytest.param(
            "gemma2", "sdpa", "does not support PyTorch scaled_dot", id="gemma2 has no sdpa"
        ),
    ],
)
def test_a_class_takes_a_backend_or_a_sentence_says_why_not(
    model_type: str, backend: str, says: str | None
) -> None:
    named = a_backend(backend)
    facts = find_class(model_type)
    reason = reason_against_class(facts, named) if facts else None
    assert (reason is None) == (says is None)
    if reason is not None and says is not None:
        assert reason.code == "model-class"
        assert says in reason.text


def explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, **keys: Any
) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "c.json").write_text(
        json.dumps(
            {"base_model": str(tmp_path), "learning_rate": 1e-4, "datasets": [{"path": "d.jsonl"}]}
            | keys
        )
    )
    attnimg(["explain", str(tmp_path / "c.json"), "--on", "h100", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_explain_asks_the_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(tmp_path, capsys, "llama4_text", attn_implementation="flash_attention_2")
    assert found["chosen"] is None
    codes = {
        candidate["backend"]: [reason["code"] for reason in candidate["reasons"]]
        for candidate in found["candidates"]
    }
    for name in ("flash_attention_2", "flash_attention_4", "sdpa_math", "sage"):
        assert "model-class" in codes[name]
    assert codes["sdpa"] == []
    assert explained(tmp_path, capsys, "llama4_text")["chosen"]["backend"] == "sdpa"


def test_explain_asks_it_without_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text"}))
    code = (
        "import sys; from attnimg.__main__ import run; "
        f"run(['explain', {str(tmp_path)!r}, '--on', 'h100', '--json']); "
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "model-class" in done.stdout
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    ("raw", "trusted", "lacks"),
    [
        pytest.param({}, False, True, id="transformers' class"),
        pytest.param({"auto_map": {"AutoModelForCausalLM": "m.M"}}, False, True, id="not trusted"),
        pytest.param({"auto_map": {"AutoModelForCausalLM": "m.M"}}, True, False, id="own code"),
        pytest.param({"auto_map": {"AutoConfig": "m.C"}}, True, True, id="a config of its own"),
    ],
)  # fmt: skip
def test_code_that_comes_with_a_model_is_no_class_of_the_table(
    raw: dict[str, Any], trusted: bool, lacks: bool
) -> None:
    values = Config.model_validate({"base_model": "m", "trust_remote_code": trusted})
    model = read_model({"model_type": "bloom", **raw})
    problem = build_problem(values, model=model, dropout=0.0, arch=parse_gpu("h100").arch)
    assert (problem.model_class is not None) == lacks


def test_layers_that_differ_share_one_backend_where_no_router_can_be_put() -> None:
    layers = (
        LayerGroup(count=5, heads=8, kv_heads=4, head_dim_qk=256, head_dim_v=256),
        LayerGroup(count=1, heads=8, kv_heads=4, head_dim_qk=512, head_dim_v=512),
    )
    target = parse_gpu("a100")
    arch, label = target.arch, target.label
    machine = machine_with(image_for(arch), arch, label)
    problem = a_problem(model=Model(type="m", layers=layers), dtype="bfloat16")
    assert choose(None, machine, problem).groups
    own = a_problem(
        model=problem.model,
        dtype="bfloat16",
        model_class=ModelClass(name="M", lacks=frozenset({"others"})),
    )
    found = choose(None, machine, own)
    assert found.groups == ()
    assert found.chosen is not None
    assert found.chosen.backend.name == "sdpa"
