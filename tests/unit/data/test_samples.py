"""Samples of prepared data: what they come from, what is trained, and how foreign text is shown."""

from __future__ import annotations

import io
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attnimg.cli.samples_html import require_page, write_page
from attnimg.cli.samples_text import (
    dropped_texts,
    facts,
    print_figures,
    print_samples,
    printer,
)
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.run_facts import RunContext
from attnimg.train.data import load_documents
from attnimg.train.preprocess import Preprocessed, prepare_data
from attnimg.train.rows import make_rows, pack_dataset
from attnimg.train.samples import Sample, choose_row, choose_samples, token_texts, visible

Run = Callable[..., Config]
Write = Callable[..., str]

CHAT = {"messages": [{"role": "user", "content": "Define day."},
                     {"role": "assistant", "content": "A period of\n24 hours."}]}  # fmt: skip
# Markup, escape sequences, characters that reorder or hide text, and several bytes a character.
HOSTILE = (
    "</div><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\u202e\u2066"
    "evil\x1b[31m\x07\x00\u200b\ufeff\u00a0\t\r\n"
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631 \U0001f600 <|im_end|>"
)


def samples_of(prepared: Preprocessed, count: int = 9, **keys: Any) -> list[Sample]:
    return choose_samples(prepared, count, **{"seed": 0, "limit": None, **keys})


def shown(prepared: Preprocessed, *, encoding: str = "utf-8", count: int = 9) -> str:
    """Return what is printed to a file with an encoding."""
    raw = io.BytesIO()
    out = printer(io.TextIOWrapper(raw, encoding=encoding, newline=""))
    row = choose_row(prepared, seed=0, limit=80)
    print_samples(samples_of(prepared, count), row, out)
    out.console.file.flush()
    return raw.getvalue().decode(encoding)


def test_what_is_trained_is_in_brackets_also_without_colors(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    prepared = prepare_data(run_on(json_lines(CHAT), "chat_template"), tokenizer)
    expected = (
        "\u2039<|im_start|>\u203auser↵\nDefine·day.\u2039<|im_end|>\u203a↵\n\u2039<|im_start|>\u203aassistant↵\n"
        "⟦A·period·of↵\n24·hours.\u2039<|im_end|>\u203a⟧↵\n"
    )
    assert expected in shown(prepared)
    assert "data.jsonl, line 1" in shown(prepared)
    plain = shown(prepared, encoding="ascii")
    assert "{<|im_start|>}assistant \n>>>A period of \n24 hours.{<|im_end|>}<<< \n" in plain


def test_a_terminal_gets_colors_unless_no_color_is_set(
    run_on: Run, json_lines: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_data(run_on(json_lines(CHAT), "chat_template"), tokenizer)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in shown(prepared)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search("\x1b\\[[0-9;]*[34]8;", shown(prepared))
    assert "⟦" in shown(prepared)


@pytest.mark.parametrize(
    "text",
    ["A day.", "naïve 漢字 😀👩‍👩‍👧", "a\ufffdb", "\u05e9\u05dc\u05d5\u05dd", HOSTILE],
)
def test_the_texts_of_tokens_are_the_decoded_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    found = token_texts(ids, tokenizer)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_first_bytes_of_a_character_are_shown_as_bytes(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    prepared = prepare_data(run_on(json_lines({"text": "a 😀"})), tokenizer)
    (sample,) = samples_of(prepared)
    assert [(t.text, t.raw) for t in sample.tokens[-5:-1]] == [  # type: ignore[union-attr]
        ("", b"\xf0"), ("", b"\x9f"), ("", b"\x98"), ("😀", b"")]  # fmt: skip
    assert "⟨F0⟩⟨9F⟩⟨98⟩😀" in shown(prepared)


def test_nothing_in_shown_text_is_invisible() -> None:
    marks = list(visible("a \n\x1b\u202eb\u00a0\u2028\u00ad"))
    assert marks == [
        ("text", "a"), ("space", "·"), ("line", "↵"), ("code", "U+001B"), ("code", "U+202E"),
        ("text", "b"), ("space", "⍽"), ("code", "U+2028"), ("code", "U+00AD"),
    ]  # fmt: skip
    assert list(visible("é 漢😀ש")) == [("text", "é"), ("space", "·"), ("text", "漢😀ש")]


def test_samples_are_drawn_by_the_seed_from_each_entry_and_split(
    json_lines: Write, tokenizer: Any
) -> None:
    first = json_lines(*[{"text": f"First {n}."} for n in range(30)], name="first.jsonl")
    second = json_lines(*[{"text": f"Second {n}."} for n in range(30)], name="second.jsonl")
    config = Config(
        datasets=[{"path": path, "type": "completion"} for path in (first, second)],
        val_set_size=0.2,
    )
    prepared = prepare_data(config, tokenizer)
    found = samples_of(prepared, 4)
    assert [(s.split, s.source.key) for s in found] == [
        (split, key) for split in ("training", "evaluation")
        for key in ("datasets[0]", "datasets[1]") for _ in range(4)
    ]  # fmt: skip
    assert found == samples_of(prepared, 4)
    assert found != samples_of(prepared, 4, seed=1)
    for sample in found:
        line = int(sample.place.rpartition(" ")[2])
        text = "".join(token.text for token in sample.tokens)  # type: ignore[union-attr]
        assert (
            text == f"{sample.place[: -len(f'.jsonl, line {line}')].title()} {line - 1}.<|im_end|>"
        )
    split = prepared.evaluation
    assert split is not None
    assert len(prepared.train.documents) + len(split.documents) == 60


def test_test_datasets_are_shown_separately(json_lines: Write, tokenizer: Any) -> None:
    train = json_lines(*[{"text": f"First {n}."} for n in range(5)], name="first.jsonl")
    test = json_lines({"text": "Second."}, name="second.jsonl")
    config = Config(
        datasets=[{"path": train, "type": "completion"}],
        test_datasets=[{"path": test, "type": "completion"}],
    )
    found = samples_of(prepare_data(config, tokenizer), 2)
    assert [(s.split, s.source.key) for s in found] == [
        ("training", "datasets[0]"), ("training", "datasets[0]"),
        ("evaluation", "test_datasets[0]"),
    ]  # fmt: skip
    assert found[-1].place == "second.jsonl, line 1"


def test_a_part_of_a_record_has_its_number(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    config = run_on(json_lines({"text": "day " * 60}), sequence_len=32, seed=3)
    found = samples_of(prepare_data(config, tokenizer), 99)
    count = len(found)
    assert count > 3
    assert {s.place for s in found} == {
        f"data.jsonl, line 1, part {n} of {count}" for n in range(1, count + 1)
    }


def test_rows_are_those_of_training(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    texts = [{"text": f"Number {n} " + "day " * (n % 17)} for n in range(80)]
    config = run_on(json_lines(*texts), sequence_len=64, sample_packing=True, micro_batch_size=2,
                    gradient_accumulation_steps=3)  # fmt: skip
    prepared = prepare_data(config, tokenizer)
    context = RunContext(
        dtype="float32", autocast=None, packing=True, padding_free=False, rows=2, sequence_len=64,
        compiled=False, checkpointing=False, seq_idx=False,
    )  # fmt: skip
    documents = load_documents(config, tokenizer)
    rows = make_rows(documents.train, config, packed=True, context=context, pad_token_id=0)
    assert prepared.train.rows is not None
    packed = pack_dataset(prepared.train.documents, prepared.train.rows)
    assert packed.to_dict() == rows.dataset.to_dict()
    figures = dict(prepared.train.figures)
    assert figures.pop("trained_tokens") == documents.figures[0].trained_tokens
    assert figures == rows.figures
    assert prepared.schedule.steps_per_epoch == -(-len(rows.dataset) // 6)
    row = choose_row(prepared, seed=0, limit=None)
    assert row is not None
    ids = [t.id for s in row.documents for t in s.tokens]  # type: ignore[union-attr]
    assert ids == packed[row.number - 1]["input_ids"]
    assert len(row.documents) > 1
    assert f"row {row.number} of {rows.figures['rows']}" in shown(prepared)


def test_without_packing_each_document_is_a_row(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    config = run_on(json_lines(*[{"text": "One."}] * 7), micro_batch_size=2)
    prepared = prepare_data(config, tokenizer)
    assert (prepared.train.rows, prepared.train.figures["rows"]) == (None, 7)
    assert prepared.schedule.steps_per_epoch == 4
    assert choose_row(prepared, seed=0, limit=None) is None
    assert "not packed" in dict(facts(prepared))["  rows"]


def test_where_documents_are_kept_is_printed(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = json_lines({"text": "Day."})
    kept = str(tmp_path / "kept")
    assert dict(facts(prepare_data(run_on(path), tokenizer)))["kept in"].startswith("memory only")
    local = prepare_data(run_on(path, dataset_prepared_path=kept), tokenizer)
    assert dict(facts(local))["kept in"] == kept
    figures = (replace(local.documents.figures[0], kept=False),)
    of_hub = replace(local, documents=replace(local.documents, figures=figures))
    assert dict(facts(of_hub))["kept in"].startswith(f"{kept}; not datasets[0]: ")


def test_what_was_dropped_is_listed_with_the_first_places(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    texts = [{"text": text} for text in ("Day.", "", "w " * 40, "  ", "", "", "", "b")]
    config = run_on(json_lines(*texts), sequence_len=16, excess_length_strategy="truncate",
                    min_sample_len=3)  # fmt: skip
    prepared = prepare_data(config, tokenizer)
    (figures,) = prepared.documents.figures
    assert [text for _, text in dropped_texts(figures)] == [
        "5 dropped: no text (data.jsonl, line 2; data.jsonl, line 4; data.jsonl, line 5, ...)",
        "1 truncated: longer than sequence_len (data.jsonl, line 3)",
        "1 dropped: shorter than min_sample_len (data.jsonl, line 8)",
    ]
    assert [name for name, _ in dropped_texts(figures)] == ["empty", "truncated", "too_short"]


@pytest.mark.parametrize("answers", [True, False], ids=["an answer", "no answer"])
def test_a_conversation_without_a_trained_turn_is_noted(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path, answers: bool
) -> None:
    silent = {"messages": [*CHAT["messages"][:1], {**CHAT["messages"][1], "train": answers}]}
    path = json_lines(CHAT, silent)
    config = run_on(path, "chat_template", spec_message_field_training="train")
    prepared = prepare_data(config, tokenizer)
    raw = io.BytesIO()
    out = printer(io.TextIOWrapper(raw, encoding="utf-8"))
    print_figures(prepared, out)
    out.console.file.flush()
    page = tmp_path / "page.html"
    write_page(page, prepared, name="a", samples=(), row=None, seed=0)
    for text in (raw.getvalue().decode(), page.read_text()):
        assert ("1 dropped: no trained token (data.jsonl, line 2)" in text) is not answers
    assert ("<span class=note>" in page.read_text()) is not answers


def test_a_page_that_does_not_fit_on_the_disk_is_an_error_of_the_disk(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    prepared = prepare_data(run_on(json_lines({"text": "a"}), "completion"), tokenizer)
    page = tmp_path / "page" / "a.html"
    page.parent.mkdir()

    def write() -> None:
        write_page(page, prepared, name="a", samples=(), row=None, seed=0)

    write()
    before = page.read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(AttnimgError, match="the disk is full") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.code, caught.value.key) == ("disk-full", None)
    assert "--html" in caught.value.do
    assert list(page.parent.iterdir()) == [page]
    assert page.read_text() == before
    shutil.rmtree(page.parent)
    with pytest.raises(AttnimgError, match="could not be written") as caught:
        write()
    assert caught.value.code == "not-written"


SEGMENTS = [{"label": False, "text": "Ask. "}, {"label": True, "text": "Answer."}]


@pytest.mark.parametrize(
    ("segments", "keys", "noted"),
    [
        pytest.param(SEGMENTS, {}, False, id="a masked part"),
        pytest.param(SEGMENTS[1:], {}, True, id="no masked part"),
        pytest.param(SEGMENTS[1:], {"train_on_inputs": True}, False, id="no mask was asked for"),
    ],
)
def test_a_document_without_the_mask_of_its_type_is_noted(
    run_on: Run, json_lines: Write, tokenizer: Any, segments: Any, keys: Any, noted: bool
) -> None:
    config = run_on(json_lines({"segments": segments}), "input_output", **keys)
    prepared = prepare_data(config, tokenizer)
    (sample,) = samples_of(prepared)
    assert ("every token has loss" in sample.note) is noted
    assert ("! every token has loss" in shown(prepared)) is noted


def test_the_middle_of_a_long_document_is_left_out(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    prepared = prepare_data(run_on(json_lines({"text": "day " * 100})), tokenizer)
    (whole,) = samples_of(prepared)
    (cut,) = samples_of(prepared, limit=30)
    head, omitted, tail = cut.tokens[:20], cut.tokens[20], cut.tokens[21:]
    assert (head, tail) == (whole.tokens[:20], whole.tokens[-10:])
    assert omitted.tokens == omitted.trained == whole.length - 30  # type: ignore[union-attr]
    assert cut.trained == whole.trained == whole.length - 1


def test_the_answers_of_a_pair_are_shown_separately(
    json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    template = (
        tokenizer.chat_template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pair = {
        "messages": CHAT["messages"][:1],
        "chosen": {"role": "assistant", "content": "Good."},
        "rejected": {"role": "assistant", "content": "Bad."},
    }
    config = Config(
        rl="dpo",
        chat_template_jinja=template,
        datasets=[{"path": json_lines(pair), "type": "chat_template.default"}],
    )
    prepared = prepare_data(config, tokenizer)
    prompt = "\u2039<|im_start|>\u203auser↵\nDefine·day.\u2039<|im_end|>\u203a↵\n"
    prompt += "\u2039<|im_start|>\u203aassistant↵\n"
    text = shown(prepared)
    for name, answer in (("chosen", "Good."), ("rejected", "Bad.")):
        assert f"data.jsonl, line 1, {name}" in text
        assert f"{prompt}⟦{answer}" in text
    assert "1 pair, " in dict(facts(prepared))["training"]
    (figures,) = prepared.documents.figures
    assert prepared.train.figures["tokens"] == figures.tokens
    assert prepared.train.figures["trained_tokens"] == figures.trained_tokens
    write_page(tmp_path / "a.html", prepared, name="a", samples=samples_of(prepared), row=None,
               seed=0)  # fmt: skip
    assert (tmp_path / "a.html").read_text().count("<article>") == 2


class HtmlPage(HTMLParser):
    """The elements, attributes and text of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.names, self.lines = set[str](), set[str](), list[str]()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names.update(name for name, _ in attrs)
        if tag == "div":
            self.open.append(dict(attrs).get("class") or "")
            if self.open[-1] == "d":
                self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "d" in self.open:
            self.lines[-1] += data


def test_a_page_has_the_text_and_nothing_of_it_is_markup(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = json_lines({"text": HOSTILE}, {"text": "<b>plain</b>"}, name="<i>\u202e\x1b.jsonl")
    prepared = prepare_data(run_on(path, sample_packing=True), tokenizer)
    file = tmp_path / "page.html"
    found = samples_of(prepared)
    write_page(file, prepared, name="<u>.yaml", samples=found, seed=0,
               row=choose_row(prepared, seed=0, limit=99))  # fmt: skip
    text = file.read_text(encoding="utf-8")
    page = HtmlPage(text)
    assert page.tags.isdisjoint({"script", "img", "svg", "link", "iframe", "form", "base"})
    assert not [name for name in page.names if name.startswith("on")]
    assert page.names.isdisjoint({"src", "href", "action"})
    assert "default-src 'none'" in text
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text
    )
    assert "<b>plain</b><|im_end|>" in page.lines
    assert any("</div><script>alert(1)</script>" in line for line in page.lines)
    assert len(page.lines) == 4  # two samples, and the two documents of the row
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([Path(path).name, file.name])


def test_a_page_replaces_a_page_and_no_other_file(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    prepared = prepare_data(run_on(json_lines({"text": "Day."})), tokenizer)
    page = tmp_path / "page.html"
    for _ in range(2):
        require_page(page)
        write_page(page, prepared, name="a", samples=(), row=None, seed=0)
    other = tmp_path / "run.yaml"
    other.write_text("a: 1\n")
    for wrong in (other, tmp_path, tmp_path / "no" / "page.html"):
        with pytest.raises(AttnimgError) as refused:
            require_page(wrong)
        assert (refused.value.code, refused.value.exit_code) == ("not-writable", 2)
    assert other.read_text() == "a: 1\n"
