"""The examples hold what their README says, and their configs are whole."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from attnimg.config.schema import Config
from attnimg.train.data import find_sources

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DATA = sorted((EXAMPLES / "data").glob("*.jsonl"))
# The first 480 bytes of the package's text: compress(1)'s codes of 9 bits, then of 10.
PACKED = (
    "SN6wyQNCSBoxbMqwABGkDh00b+Sk0VOGDAgUS9K4OQNCSZg2ZeakAGGljJw5ad64cQECBJUyeOiYSZMQRI4ZMGLA"
    "qOFCwZEyMXTEAJHEDYiHZUCIKXNGoxuNHI+8sThGTpkwdCoeRZOUaxg7ZYyGcWMRKYirch72/BlUBkOyW5OifQji"
    "Tpg5ddM8fOMQhJmIbRaOtWjnTRoyO0AMBkEmjJw1bkLitYu3DhyVcf2GGZP0jZnMZMqUgcMyCFyzU+CkkUgHhGcQ"
    "Ui22eQPWomXMZs1s7vzZrN2sJ9cC1THjrcXYIOaEObyQSZnWSK0qTcomzRk0dHQoPs1VOmUQ1a/TER6UhnHYU5OH"
    "uZM5PPaFD7GC0Fv3Logzb6ZqX4ycTBo7h2lllnutmSHHG22A5hhkkpGnQw3nITdGGGwkVBZX4FmHHQhEhJGHYNwl"
    "1dhjkc2BF4YTVqiVExqOd55ZZYD11EbbXZjUbHLMyNEdJiWV22pztNZYHg7aEGF6yjEHgnPQdZfUUor5tVobH4XV"
    "mkaZtXFYkK71huFvJs0BokUJXSnkfwFmBuZJfh2YoG9YhengDUfKFkZomc0kB5UguUHHmIyhGZqN9QE3GRppjIFG"
    "XT2CUAdZJuU5ZZV+tomgmnGy"
)
VERSES = 7
# Those of examples/trainer are for other trainers.
CONFIGS = sorted({*EXAMPLES.rglob("*.yaml")} - {*EXAMPLES.glob("trainer/*")})


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes the data, imported as it is run: beside its sibling."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("make_data")


@pytest.fixture
def debian_texts(script: ModuleType) -> ModuleType:
    return importlib.import_module("debian_texts")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_example_names_data_that_fit(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    config = Config(**yaml.safe_load(path.read_text()))
    if path.name == "demo.yaml":  # `make demo` writes its data
        data = tmp_path / "outputs" / "demo" / "definitions.jsonl"
        data.parent.mkdir(parents=True)
        data.write_text(json.dumps({"messages": [{"role": "user", "content": "Define x."}]}))
    find_sources(config)
    assert config.learning_rate
    assert config.output_dir.startswith("outputs/")


@pytest.mark.parametrize("path", DATA, ids=[path.name for path in DATA])
def test_the_readme_gives_the_hash_of_each_file(path: Path) -> None:
    readme = (EXAMPLES / "data" / "README.md").read_text()
    assert f"| `{path.name}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in readme


def test_the_data_are_real_text_without_markup() -> None:
    assert 1_000_000 < sum(path.stat().st_size for path in DATA) < 6_000_000
    lines = (EXAMPLES / "data" / "devils_dictionary.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) > 200
    for record in records:
        assert re.fullmatch(r"Define \S.*\.", record["instruction"])
        assert not re.search(r"[_{}]|\S  ", record["output"]), record["instruction"]


def test_a_slice_of_the_dictionary_is_remade(script: ModuleType) -> None:
    text = (
        "ZEAL, n.  A certain nervous disorder afflicting the _young_ and\n"
        "inexperienced.  (See {HUSBAND}.)\n\n"
        "    When Zeal sought Gratitude\n      He went:  away\n"
        f"{'':60}Jum Coople\n\n"
        "T, the twentieth letter.\n"
    )
    start = text.index("T, the")
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    place = [digits[n // 64] + digits[n % 64] for n in (start, len(text) - start)]
    index = (
        f"00databaseinfo\tA\tA\nzeal\tA\t{place[0]}\nardor\tA\t{place[0]}\n"
        f"t\t{place[0]}\t{place[1]}\n"
    )
    assert list(script.definitions(index, text)) == [
        {
            "instruction": "Define zeal.",
            "input": "",
            "output": "A certain nervous disorder afflicting the young and inexperienced. "
            "(See HUSBAND.)\n\nWhen Zeal sought Gratitude\n  He went: away\n-- Jum Coople",
        },
        {
            "instruction": "Define the letter T.",
            "input": "",
            "output": "T, the twentieth letter.",
        },
    ]


def test_chapters_are_verses_without_their_numbers(script: ModuleType) -> None:
    bible = "Title.\nGe1:1 In the beginning.\nGe1:2 And the earth.\n1Sm2:1 And Hannah prayed.\n"
    assert list(script.chapters(bible)) == [
        {"title": "Genesis 1", "text": "In the beginning.\nAnd the earth."},
        {"title": "1 Samuel 2", "text": "And Hannah prayed."},
    ]


def test_what_compress_packed_is_unpacked(debian_texts: ModuleType) -> None:
    genesis = json.loads((EXAMPLES / "data" / "kjv.jsonl").read_text().splitlines()[0])
    unpacked = debian_texts.unpack_lzw(base64.b64decode(PACKED)).decode("ascii")
    title, *verses = unpacked.splitlines()
    assert title == "Holy Bible, Authorized (King James) Version.  Textfile 930105."
    assert len(verses) == VERSES
    text = "\n".join(verse.split(" ", 1)[1] for verse in verses)
    assert genesis["text"].startswith(text)


def test_the_demo_model_is_small_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo"))
    prepare = importlib.import_module("prepare")
    tokenizer = prepare.make_tokenizer()
    first, again = (prepare.make_model(tokenizer) for _ in range(2))
    assert 1_500_000 < first.num_parameters() < 6_000_000
    assert first.config.vocab_size == len(tokenizer) == prepare.VOCAB_SIZE
    assert all(
        (one == two).all() for one, two in zip(first.parameters(), again.parameters(), strict=True)
    )
    chat = [{"role": "user", "content": "Define zeal."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nDefine zeal.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_demo_learns_short_definitions_and_asks_for_some_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo"))
    prepare, ask = (importlib.import_module(name) for name in ("prepare", "ask"))
    records = prepare.chosen_definitions()
    assert len(records) == 90
    assert max(len(record["output"]) for record in records) < 120
    assert set(ask.QUESTIONS) <= {record["instruction"] for record in records}


def test_the_demo_compares_steps_and_seconds_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo"))
    compare = importlib.import_module("compare")
    cases = (("packed", 4, 0.5, 0.95), ("padded", 8, 0.75, 0.7))
    for name, steps_of_a_pass, second_of_a_step, filled in cases:
        lines = [
            {"step": step, "epoch": step / steps_of_a_pass, "tokens_per_second": 1.0,
             "filled": filled,
             "seconds": 9 + step * second_of_a_step}
            for step in (2, 4, 6)
        ]  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    receipt = {
        "attention": {"backend": "sdpa"},
        "plan": {"because": "it fits"},
        "proofs": [{"backend": "eager", "reasons": ["wrong"], "cases": 1},
                   {"backend": "sdpa", "reasons": [], "cases": 154}],
    }  # fmt: skip
    (tmp_path / "packed" / "receipt.json").write_text(json.dumps(receipt))
    compare.main(str(tmp_path / "packed"), str(tmp_path / "padded"))
    told = capsys.readouterr().out
    assert "sdpa passed 154 probes" in told
    assert "4 steps and 2.0 s: 95% of each batch is text" in told
    assert "8 steps and 6.0 s: 70% is text" in told
