"""Preference data: the texts of each type, TRL's tokens, long answers and wrong records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
from tiny_preferences import labeled, pairs
from tiny_run import make_tokenizer

from attnimg.config.schema import Config, DatasetSpec, is_chat
from attnimg.errors import AttnimgError
from attnimg.train.data import find_sources, load_documents
from attnimg.train.data.chat_render import Renderer
from attnimg.train.data.records import Place
from attnimg.train.preferences.batches import make_preference_rows
from attnimg.train.preferences.data import PreferenceEncoder, split_row
from attnimg.train.preferences.records import choose_preference_parser

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template that begins the last answer with an empty thought, as Qwen 3's does.
THINKING = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
TURN = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
LLAMA = (
    "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
ANSWERS = {"chosen": "Yes.", "rejected": "No."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def config_of(path: Path, records: list[Any], **keys: Any) -> Config:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"path": str(path), **keys.pop("entry", {})}
    return Config.model_validate(
        {"base_model": "m", "learning_rate": 1e-3, "rl": "dpo", "datasets": [entry],
         "shuffle_merged_datasets": False, **keys}
    )  # fmt: skip


# A type, a value of rl, a record, and the texts that axolotl 0.19 makes of it.
TEXTS: dict[str, tuple[Any, str, dict[str, Any], tuple[str, ...]]] = {
    "chatml": ("chatml", "dpo", {"question": "Is it?", **ANSWERS},
               (TURN, "Yes.<|im_end|>", "No.<|im_end|>")),
    "a system message": ("chatml.icr", "dpo", {"input": "Is it?", "system": "Be brief.", **ANSWERS},
                         (SYSTEM + TURN, "Yes.<|im_end|>", "No.<|im_end|>")),
    "llama3": ("llama3.intel", "ipo", {"question": "Is it?", "system": "", **ANSWERS},
               (LLAMA, "Yes.<|eot_id|>", "No.<|eot_id|>")),
    "the first turn": ("chatml.argilla_chat", "dpo",
                       {"chosen": [user("Is it?"), said("Yes."), user("a"), said("b")],
                        "rejected": [user("Is it?"), said("No.")]},
                       (TURN, "Yes.<|im_end|>", "No.<|im_end|>")),
    "answers as messages": ("llama3.ultra", "dpo",
                            {"prompt": "Is it?", "chosen": [user("x"), said("Yes.")],
                             "rejected": [user("x"), said("No.")]},
                            (LLAMA, "Yes.<|eot_id|>", "No.<|eot_id|>")),
    "ranked answers": ("zephyr.nectar", "dpo",
                       {"prompt": "Is it?", "answers": [{"rank": 2, "answer": "Yes."},
                                                        {"rank": 3, "answer": "No."},
                                                        {"rank": 1, "answer": "Hm."}]},
                       ("<|system|>\n</s>\n<|user|>\nIs it?</s>\n<|assistant|>\n", "No.", "Yes.")),
    "a mapping": ({"field_prompt": "q", "prompt_format": "{system}: {prompt}",
                   "chosen_format": "<{chosen}>"}, "dpo", {"q": "Is it?", "system": "A", **ANSWERS},
                  ("A: Is it?", "<Yes.>", "No.")),
    "kto": ("llama3.ultra", "kto", {"prompt": "Is it?", "completion": "Yes.", "label": 1},
            (LLAMA, "Yes.<|eot_id|>")),
    "kto with turns": ("chatml.argilla_chat", "kto",
                       {"completion": [user("Is it?"), said("Yes.")], "label": False},
                       (TURN, "Yes.<|im_end|>")),
    "messages": ("chat_template.default", "dpo", {"messages": [user("Is it?")], **ANSWERS},
                 (TURN, "Yes.<|im_end|>", "No.<|im_end|>")),
    "a question as text": ("chat_template", "dpo",
                           {"messages": "Is it?", "chosen": said("Yes."),
                            "rejected": [said("No.")]},
                           (TURN, "Yes.<|im_end|>", "No.<|im_end|>")),
    "an answer that is a role's name": (
        "chat_template", "dpo", {"messages": "Is it?", "chosen": "assistant", "rejected": "user"},
        (TURN, "assistant<|im_end|>", "user<|im_end|>")),
    "whole conversations": ("chat_template.argilla_chat", "dpo",
                            {"chosen": [user("Is it?"), said("Yes.")],
                             "rejected": [user("Is it?"), said("No.")]},
                            (TURN, "Yes.<|im_end|>", "No.<|im_end|>")),
    "orpo": ("chat_template.argilla", "orpo",
             {"chosen": [user("Is it?"), said("Yes.")], "rejected": [user("Is it?"), said("No.")],
              "system": "Be brief."},
             (SYSTEM + TURN, "Yes.<|im_end|>\n", "No.<|im_end|>\n")),
}  # fmt: skip


def texts_of(
    type_: Any, rl: str, record: dict[str, Any], tokenizer: Any, template: str = CHATML
) -> tuple[str, ...]:
    spec = DatasetSpec(path="x", type=type_)
    place = Place("x.jsonl", 1, "line", "datasets[0]")
    found = choose_preference_parser(spec, rl)(record, place)
    renderer = Renderer(tokenizer, template) if is_chat(spec) else None
    prompt, answers = PreferenceEncoder(tokenizer, renderer, adds_ids=rl == "orpo")._render(
        found, place
    )
    return (prompt, *answers)


@pytest.mark.parametrize("name", TEXTS)
def test_each_type_writes_axolotls_texts(name: str, tokenizer: Any) -> None:
    type_, rl, record, texts = TEXTS[name]
    assert texts_of(type_, rl, record, tokenizer) == texts


def test_a_thought_that_the_template_adds_is_left_out(tokenizer: Any) -> None:
    type_, rl, record, texts = TEXTS["messages"]
    assert texts_of(type_, rl, record, tokenizer, THINKING) == texts


@pytest.mark.parametrize("starts", [False, True], ids=["no start token", "a start token"])
def test_dpo_has_trls_tokens(tokenizer: Any, tmp_path: Path, starts: bool) -> None:
    from datasets import Dataset
    from trl import DPOTrainer

    if starts:
        tokenizer = _with_start(tokenizer)
    records = pairs(6)
    trainer, args = (
        SimpleNamespace(_tokenizer=tokenizer),
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
    )
    theirs = DPOTrainer._prepare_dataset(
        trainer, Dataset.from_list(records), tokenizer, args, "train"
    )
    rows = [split_row(row) for row in load_documents(config_of(tmp_path / "a.jsonl", records),
                                                     tokenizer).train]  # fmt: skip
    assert [row.prompt for row in rows] == theirs["prompt_ids"]
    assert [list(row.answers) for row in rows] == [
        [chosen, rejected]
        for chosen, rejected in zip(theirs["chosen_ids"], theirs["rejected_ids"], strict=True)
    ]


def test_kto_has_trls_tokens_and_batches(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    records = labeled(4)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
    )
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=4)
    theirs = KTOTrainer._prepare_dataset(
        trainer, Dataset.from_list(records), tokenizer, args, "train"
    )
    config = config_of(tmp_path / "a.jsonl", records, rl="kto", micro_batch_size=4)
    rows = make_preference_rows(load_documents(config, tokenizer).train, config, pad_token_id=0)
    collate = DataCollatorForUnpairedPreference(pad_token_id=0)
    for start in (0, 4):
        ours = rows.collate([rows.dataset[index] for index in range(start, start + 4)])
        expected = collate([theirs[index] for index in range(start, start + 4)])
        for name, values in expected.items():
            assert ours[name].tolist() == values.tolist(), name


@pytest.mark.parametrize("starts", [False, True], ids=["no start token", "a start token"])
def test_orpo_has_trls_tokens_and_batches(tokenizer: Any, tmp_path: Path, starts: bool) -> None:
    from functools import partial

    from trl.experimental.orpo import ORPOTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding

    if starts:
        tokenizer = _with_start(tokenizer)
    records = pairs(4)
    trainer = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=512)
    trainer.build_tokenized_answer = partial(ORPOTrainer.build_tokenized_answer, trainer)
    theirs = [ORPOTrainer.tokenize_row(trainer, record) for record in records]
    config = config_of(tmp_path / "a.jsonl", records, rl="orpo")
    rows = make_preference_rows(load_documents(config, tokenizer).train, config, pad_token_id=0)
    ours = rows.collate(list(rows.dataset))
    expected = DPODataCollatorWithPadding(pad_token_id=0)(theirs)
    for name in ("input_ids", "attention_mask", "labels"):
        for side in ("chosen", "rejected"):
            assert ours[f"{side}_{name}"].tolist() == expected[f"{side}_{name}"].tolist()


def _with_start(tokenizer: Any) -> Any:
    """Return a tokenizer that writes its start token before each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    start = tokenizer.bos_token
    backend.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=tokenizer.eos_token
    )


def test_a_start_token_of_the_template_is_not_doubled(tokenizer: Any, tmp_path: Path) -> None:
    records = [{**row, "prompt": "<s>" + row["prompt"]} for row in pairs(2)]
    config = config_of(tmp_path / "a.jsonl", records)
    for row in load_documents(config, _with_start(tokenizer)).train:
        assert split_row(row).prompt.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("strategy", "kept", "cut"), [("drop", 1, False), (None, 1, False), ("truncate", 2, True)]
)
def test_long_answers(
    tokenizer: Any, tmp_path: Path, strategy: str | None, kept: int, cut: bool
) -> None:
    records = [pairs(1)[0], {**pairs(1)[0], "chosen": " sea" * 99}, {**pairs(1)[0],
               "prompt": " sea" * 99}]  # fmt: skip
    keys = {"sequence_len": 40, "excess_length_strategy": strategy}
    found = load_documents(config_of(tmp_path / "a.jsonl", records, **keys), tokenizer)
    assert len(found.train) == kept
    assert (found.figures[0].truncated, found.figures[0].too_long) == (int(cut), 2 - int(cut))
    lengths = [split_row(row).longest for row in found.train]
    assert max(lengths) <= 40
    assert (40 in lengths) is cut


def test_a_long_answer_may_be_refused(tokenizer: Any, tmp_path: Path) -> None:
    records = [pairs(1)[0], {**pairs(1)[0], "chosen": " sea" * 99}]
    keys = {"sequence_len": 40, "excess_length_strategy": "raise"}
    with pytest.raises(AttnimgError, match=r"a\.jsonl, line 2"):
        load_documents(config_of(tmp_path / "a.jsonl", records, **keys), tokenizer)


def test_copies_are_removed_unless_their_label_differs(tokenizer: Any, tmp_path: Path) -> None:
    record = labeled(1)[0]
    records = [record, record, {**record, "label": not record["label"]}]
    config = config_of(
        tmp_path / "a.jsonl", records, rl="kto", micro_batch_size=2,
        dataset_exact_deduplication=True,
    )  # fmt: skip
    found = load_documents(config, tokenizer)
    assert [split_row(row).desirable for row in found.train] == [True, False]


def test_prepared_pairs_are_reused_for_the_same_method_only(tokenizer: Any, tmp_path: Path) -> None:
    keys = {"dataset_prepared_path": str(tmp_path / "kept")}
    found = [
        load_documents(config_of(tmp_path / "a.jsonl", pairs(4), rl=rl, **keys), tokenizer)
        for rl in ("dpo", "dpo", "orpo")
    ]
    assert [documents.figures[0].reused for documents in found] == [False, True, False]
    assert found[0].train[:] == found[1].train[:]


MESSAGES = {"type": "chat_template.default", "chat_template_jinja": CHATML}
WRONG: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "no answer": ("dpo", {}, {"prompt": "a", "chosen": "b"}, "rejected"),
    "a number for an answer": ("dpo", {}, {"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen"),
    "no prompt": ("dpo", {}, {"prompt": "", **ANSWERS}, "prompt"),
    "no label": ("kto", {}, {"prompt": "a", "completion": "b"}, "label"),
    "a label in words": ("kto", {}, {"prompt": "a", "completion": "b", "label": "yes"}, "label"),
    "a text for messages": ("dpo", {"type": "chatml.ultra"},
                            {"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen"),
    "one message": ("dpo", {"type": "chatml.ultra"},
                    {"prompt": "a", "chosen": [said("b")], "rejected": [said("b")]}, "1 message"),
    "no ranks": ("dpo", {"type": "zephyr.nectar"},
                 {"prompt": "a", "answers": ["b", "c"]}, "rank"),
    "one ranked answer": ("dpo", {"type": "zephyr.nectar"},
                          {"prompt": "a", "answers": [{"rank": 1, "answer": "b"}]}, "two"),
    "an unknown role": ("dpo", MESSAGES,
                        {"messages": [{"role": "bot", "content": "a"}], **ANSWERS}, "bot"),
    "an answer of the user": ("dpo", MESSAGES,
                              {"messages": "a", "chosen": user("b"), "rejected": said("c")},
                              "role user"),
    "a blank answer": ("dpo", MESSAGES, {"messages": "a", "chosen": " ", "rejected": "c"},
                       "does not write the answer"),
    "two questions in a row": ("orpo", {**MESSAGES, "type": "chat_template.argilla"},
                               {"chosen": [user("a"), user("a"), said("b")],
                                "rejected": [user("a"), said("b")]}, "in turn"),
    "two questions": ("dpo", {**MESSAGES, "type": "chat_template.argilla_chat"},
                      {"chosen": [user("a"), said("b")], "rejected": [user("z"), said("c")]},
                      "message 1"),
    "another turn": ("dpo", {**MESSAGES, "type": "chat_template.argilla_chat"},
                     {"chosen": [user("a"), said("b"), user("c"), said("d")],
                      "rejected": [user("a"), said("e")]}, "message 2"),
    "two first questions": ("dpo", {"type": "chatml.argilla_chat"},
                            {"chosen": [user("a"), said("b")],
                             "rejected": [user("z"), said("c")]}, "message 1"),
    "two questions of orpo": ("orpo", {**MESSAGES, "type": "chat_template.argilla"},
                              {"chosen": [user("a"), said("b")],
                               "rejected": [user("z"), said("c")]}, "message 1"),
    "a prompt for several questions": (
        "orpo", {**MESSAGES, "type": "chat_template.argilla"},
        {"chosen": [user("a"), said("b"), user("c"), said("d")],
         "rejected": [user("a"), said("b"), user("c"), said("e")], "prompt": "a"}, "prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_is_refused_by_its_line(name: str, tokenizer: Any, tmp_path: Path) -> None:
    rl, entry, record, named = WRONG[name]
    right = {
        "": labeled(1)[0] if rl == "kto" else pairs(1)[0],
        "chatml.ultra": {"prompt": "a", "chosen": [user("a"), said("b")],
                         "rejected": [user("a"), said("c")]},
        "zephyr.nectar": TEXTS["ranked answers"][2],
        "chat_template.default": TEXTS["messages"][2],
        "chat_template.argilla": TEXTS["orpo"][2],
        "chatml.argilla_chat": TEXTS["the first turn"][2],
        "chat_template.argilla_chat": {"chosen": [user("a"), said("b")],
                                       "rejected": [user("a "), said("c")]},
    }[entry.get("type", "")]  # fmt: skip
    keys = {"entry": entry, "rl": rl, "micro_batch_size": 2}
    load_documents(config_of(tmp_path / "a.jsonl", [right, right], **keys), tokenizer)
    with pytest.raises(AttnimgError) as caught:
        load_documents(config_of(tmp_path / "a.jsonl", [right, record], **keys), tokenizer)
    assert caught.value.code == "bad-data"
    assert "a.jsonl, line 2" in caught.value.what
    assert named in caught.value.why
    assert caught.value.do


def test_the_first_record_is_checked_without_a_tokenizer(tmp_path: Path) -> None:
    config = config_of(tmp_path / "a.jsonl", [{"question": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(AttnimgError, match="line 1") as caught:
        find_sources(config)
    assert caught.value.code == "wrong-columns"


def test_pairs_with_equal_answers(tokenizer: Any, tmp_path: Path) -> None:
    """Some are named in a warning, and stay; a source of nothing else is refused."""
    different = pairs(3)
    equal = {**different[0], "rejected": different[0]["chosen"]}
    found = load_documents(config_of(tmp_path / "a.jsonl", [*different, equal]), tokenizer)
    (warning,) = found.warnings
    assert "1 of 4 pairs of datasets[0]" in warning
    assert "a.jsonl, line 4" in warning
    assert len(found.train) == 4
    assert load_documents(config_of(tmp_path / "b.jsonl", different), tokenizer).warnings == ()
    with pytest.raises(AttnimgError) as caught:
        load_documents(config_of(tmp_path / "c.jsonl", [equal, equal]), tokenizer)
    assert (caught.value.code, caught.value.key) == ("bad-data", "datasets[0].path")
    assert "c.jsonl, line 1" in caught.value.why


def test_kto_with_answers_of_one_kind_prints_a_warning(tokenizer: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rl": "kto", "micro_batch_size": 2}
    for label, kind in (
        (True, "all answers are desirable"),
        (False, "all answers are undesirable"),
    ):
        records = [{**row, "label": label} for row in labeled(2)]
        (warning,) = load_documents(
            config_of(tmp_path / "a.jsonl", records, **keys), tokenizer
        ).warnings
        assert kind in warning
    assert (
        load_documents(config_of(tmp_path / "a.jsonl", labeled(2), **keys), tokenizer).warnings
        == ()
    )


@pytest.mark.parametrize(
    ("count", "size", "advice"), [(5, 2, 3), (5, 4, 3), (13, 2, 5), (5, 3, None), (4, 2, None)]
)
def test_kto_with_a_batch_of_one_row_prints_a_warning(
    tokenizer: Any, tmp_path: Path, count: int, size: int, advice: int | None
) -> None:
    def warnings(size: int) -> tuple[str, ...]:
        config = config_of(
            tmp_path / "a.jsonl", labeled(8)[:count], rl="kto", micro_batch_size=size
        )
        return load_documents(config, tokenizer).warnings

    assert len(warnings(size)) == (advice is not None)
    if advice is not None:
        assert f"set micro_batch_size: {advice}" in warnings(size)[0]
        assert warnings(advice) == ()


def test_kto_with_one_record_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rl": "kto", "micro_batch_size": 2}
    with pytest.raises(AttnimgError, match="only one record") as caught:
        load_documents(config_of(tmp_path / "a.jsonl", labeled(1)[:1], **keys), tokenizer)
    assert caught.value.code == "bad-data"
    keys["val_set_size"] = 0.3
    found = load_documents(config_of(tmp_path / "a.jsonl", labeled(2)[1:], **keys), tokenizer)
    assert any("evaluate on two records" in warning for warning in found.warnings)
