"""What carries loss in conversations: real chat templates x tokenizers x kinds of conversation.

The trained text must be what the assistant says and the token that ends its turn, no more.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_labels import (
    CALL,
    PLACE,
    TOKENIZERS,
    TOOL,
    answer,
    learnt,
    parse,
    tokenizer,
    user,
)
from data_strategies import conversations, examples, texts
from hypothesis import given
from hypothesis import strategies as st

from attnimg.errors import AttnimgError
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.chat_labels import label_tokens

FIXTURES = Path(__file__).parents[2] / "fixtures" / "chat_templates"
TAGS = "<think>\n{reasoning}\n</think>\n\n{answer}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One template and what it makes of an answer.

    Attributes:
        end: what ends a turn; " </s>" where a blank stands before the token.
        last: what ends the last turn, where it is another token.
        system: whether it takes a system message.
        reasoning: how it writes the reasoning of the last answer; None: it must be refused.
        keeps: whether it writes the reasoning of earlier answers too.
        call: the trained text of a tool call; None: tools must be refused.
    """

    end: str
    last: str | None = None
    system: bool = True
    reasoning: str | None = None
    keeps: bool = False
    call: str | None = None


IM_END = "<|im_end|>"
DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    "</tool_call>"
)
LLAMA = '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
GEMMA4 = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>'
COMMAND_R = 'Action: ```json\n[{"tool_name": "weather", "parameters": {"city": "Paris"}}]```'

# The names of TRL's templates, and those of tests/fixtures/chat_templates.
TEMPLATES = {
    "always_open": Row(end=IM_END),
    "chatml": Row(end=IM_END),
    "cohere": Row(end="<|END_OF_TURN_TOKEN|>"),
    "cohere2": Row(end="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "command_r": Row(end="<|END_OF_TURN_TOKEN|>", call=COMMAND_R + "<|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": Row(end=DEEPSEEK, reasoning=TAGS),
    "deepseekv3": Row(end=DEEPSEEK, reasoning=TAGS),
    "gemma": Row(end="<end_of_turn>", system=False),
    "gemma3": Row(end="<end_of_turn>"),
    "gemma4_v5": Row(
        end="<turn|>", call=GEMMA4,
        reasoning="<|channel>thought\n{reasoning}\n<channel|>{answer}",
    ),
    "glm4moe": Row(
        end="<|user|>", reasoning="<think>{reasoning}</think>\n{answer}",
        call="<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "</tool_call><|observation|>",
    ),
    "gptoss": Row(
        end="<|end|>", last="<|return|>",
        reasoning="<|channel|>analysis<|message|>{reasoning}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>{answer}",
        call='to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
    ),
    "granite": Row(
        end="<|end_of_text|>",
        call='<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|end_of_text|>',
    ),
    "lfm2_v2": Row(
        end=IM_END, call="<|tool_call_start|>[weather(city='Paris')]<|tool_call_end|><|im_end|>"
    ),
    "llama2": Row(end=" </s>"),
    "llama3": Row(end="<|eot_id|>"),
    "llama3_1": Row(end="<|eot_id|>", call=LLAMA),
    "llama3_2": Row(end="<|eot_id|>", call=LLAMA),
    "mistral_tekken": Row(end="</s>"),
    "mistral_v1": Row(end="</s>", system=False),
    "mistral_v2": Row(
        end="</s>",
        call='[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, '
        '"id": "abcdefghi"}]</s>',
    ),
    "muse_glimmer": Row(
        end="<|eot|>", keeps=True,
        reasoning="to=self<|message|>{reasoning}<|eom|><|start|>assistant to=user<|message|>"
        "{answer}",
        call='to=weather<|message|><atem:function_calls>\n<atem:invoke name="weather">\n'
        '<atem:parameter name="city">Paris</atem:parameter>\n</atem:invoke>\n'
        "</atem:function_calls><|eot|>",
    ),
    "nemotron_3_nano": Row(
        end=IM_END, reasoning="<think>\n{reasoning}\n</think>\n{answer}", call=XML + "\n<|im_end|>"
    ),
    "phi3": Row(end="<|end|>"),
    "phi3_5": Row(end="<|end|>"),
    "phi4": Row(end=IM_END),
    "phi4_mini": Row(end="<|end|>"),
    "qwen2_5": Row(end=IM_END, call=HERMES),
    "qwen3": Row(end=IM_END, reasoning=TAGS, call=HERMES),
    "qwen3_5_think": Row(end=IM_END, reasoning=TAGS, call=XML + IM_END),
    "qwen3_8": Row(end=IM_END, reasoning=TAGS, keeps=True, call=XML + IM_END),
    "qwen3_instruct_2507": Row(end=IM_END, call=HERMES),
    "think_once": Row(end=IM_END, reasoning=TAGS),
    "vicuna": Row(end="</s>"),
    "zephyr": Row(end="</s>"),
}  # fmt: skip
# Templates that come with one of their own for conversations with tools.
TOOL_USE = {"command_r": "command_r_tool_use", "mistral_v2": "mistral_v3_tool_use"}


@cache
def template(name: str) -> str:
    """The text of a template, ours or of the installed TRL."""
    import trl

    own = FIXTURES / f"{name}.jinja"
    path = own if own.is_file() else Path(trl.__file__).parent / "chat_templates" / own.name
    return path.read_text(encoding="utf-8")


@cache
def all_templates() -> tuple[str, ...]:
    return tuple(map(template, [*TEMPLATES, *TOOL_USE.values()]))


FIRST = answer("Yes.", reasoning_content="The king spoke.")
SECOND = answer("Go.", reasoning_content="At night.")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "single": {"messages": [user("Is it?"), answer("Yes.")]},
    "multi-turn": {"messages": [user("Is it?"), answer("Yes."), user("Thanks."), answer("Go.")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("Is it?"),
                            answer("Yes."), user("Thanks."), answer("Go.")]},
    "reasoning": {"messages": [user("Is it?"), FIRST]},
    "reasoning in two turns": {"messages": [user("Is it?"), FIRST, user("Thanks."), SECOND]},
    "tools": {
        "messages": [
            user("Is it hot?"), {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "7"},
            answer("Yes."), user("Thanks."), answer("Go."),
        ],
        "tools": [TOOL],
    },
}  # fmt: skip


def expected(row: Row, kind: str) -> list[str] | None:
    """The trained text of each answer; None where the record must be refused."""
    yes, go = "Yes." + row.end, "Go." + (row.last or row.end)
    if kind == "single":
        return ["Yes." + (row.last or row.end)]
    if kind == "tools":
        return [row.call, yes, go] if row.call else None
    if kind == "system" and not row.system:
        return None
    if not kind.startswith("reasoning"):
        return [yes, go]
    if row.reasoning is None:
        return None
    thought = row.reasoning.format(reasoning="The king spoke.", answer="Yes.")
    if kind == "reasoning":
        return [thought + (row.last or row.end)]
    last = row.reasoning.format(reasoning="At night.", answer="Go.") + (row.last or row.end)
    return [thought + row.end if row.keeps else yes, last]


def encoder(name: str, kind: str, **keys: Any) -> ChatEncoder:
    templates: Any = template(name)
    if name in TOOL_USE:
        templates = {"default": template(name), "tool_use": template(TOOL_USE[name])}
    return ChatEncoder(tokenizer(kind, all_templates()), templates, **keys)


def shown(text: str, tokens: str) -> str:
    """Return a text as these tokenizers decode it: some turn U+2581 into a blank."""
    text = unicodedata.normalize("NFC", text) if tokens == "byte-level, NFC" else text
    text = text.replace("\u2581", " ")
    return text.replace(" ", "") if tokens == "sentencepiece" else text


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_and_its_end_are_trained_and_nothing_else(name: str, kind: str) -> None:
    want = expected(TEMPLATES[name], kind)
    for tokens in TOKENIZERS:
        encode = encoder(name, tokens)
        if want is None:
            with pytest.raises(AttnimgError, match=r"data\.jsonl, line 7"):
                learnt(encode, CONVERSATIONS[kind])
            continue
        found = learnt(encode, CONVERSATIONS[kind])
        # A token that begins at the blank before an answer is the answer's.
        assert [shown(run.removeprefix(" "), tokens) for run in found] == [
            shown(run, tokens) for run in want
        ], tokens
        removed = kind == "reasoning in two turns" and not TEMPLATES[name].keeps
        assert any("reasoning of earlier turns" in note for note in encode.warnings) == removed


@pytest.mark.parametrize("kind", ["single", "multi-turn", "system"])
@pytest.mark.parametrize(
    "name", ["cohere2", "diffusion_gemma", "gemma3", "glm4moe", "llama3", "phi3", "qwen2_5", "lfm2"]
)
def test_a_template_that_marks_what_is_generated_is_followed(name: str, kind: str) -> None:
    encode = encoder(f"{name}_training", "byte-level")
    conversation = parse(CONVERSATIONS[kind])
    ((ids, labels),) = encode([(PLACE, conversation)])
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    marked = encode.tokenizer.apply_chat_template(
        messages, chat_template=template(f"{name}_training"), return_assistant_tokens_mask=True,
        return_dict=True,
    )  # fmt: skip
    assert ids == marked["input_ids"]
    assert [label != -100 for label in labels] == [bool(bit) for bit in marked["assistant_masks"]]
    assert not encode.warnings


@pytest.mark.parametrize("blank", ["", " ", "\t"])
@pytest.mark.parametrize("name", ["llama3", "llama3_training"])
def test_an_answer_without_text_is_not_trained_with_another(name: str, blank: str) -> None:
    encode = encoder(name, "byte-level")
    turns = [user("Is it?"), answer(blank), user("Go."), answer("Yes."), user("Go."), answer(blank)]
    assert learnt(encode, {"messages": turns}) == ["Yes.<|eot_id|>"]
    assert learnt(encode, {"messages": turns[:4]}) == ["Yes.<|eot_id|>"]
    assert learnt(encode, {"messages": turns[2:]}) == ["Yes.<|eot_id|>"]
    assert any("answers without text are not trained" in note for note in encode.warnings)


@pytest.mark.parametrize(
    ("name", "kind", "note"),
    [
        pytest.param("mistral_v2", "system", "a prompt that differs from the one at generation",
                     id="a system message that moves to the last turn"),
        pytest.param("qwen3_5_think", "tools", "a prompt that differs from the one at generation",
                     id="think blocks that earlier turns lose"),
        pytest.param("glm4moe", "single", "this text is added after the last answer",
                     id="an end of turn that is the next one's opening"),
        pytest.param("qwen3", "single", r"starts answers with '<think>\n\n</think>'",
                     id="a think block that the template writes by itself"),
        pytest.param("gptoss", "single", "starts answers with '<|channel|>final<|message|>'",
                     id="a channel that the template writes by itself"),
        pytest.param("llama3", "multi-turn", None, id="nothing to say"),
    ],
)  # fmt: skip
def test_what_a_template_does_of_itself_is_said(name: str, kind: str, note: str | None) -> None:
    encode = encoder(name, "byte-level")
    learnt(encode, CONVERSATIONS[kind])
    assert any(note in said for said in encode.warnings) if note else not encode.warnings


def test_reasoning_that_a_template_always_drops_is_put_back_once() -> None:
    encode = encoder("deepseek_r1_distill", "byte-level")
    record = {"messages": [user("Is it?"), answer("The king spoke.\n</think>\n\nYes.")]}
    ((ids, _),) = encode([(PLACE, parse(record))])
    want = "The king spoke.\n</think>\n\nYes." + DEEPSEEK
    assert encode.tokenizer.decode(ids).endswith("\uff5c><think>\n" + want)
    assert learnt(encode, record) == [want]
    assert any("restored before the last answer" in note for note in encode.warnings)


def test_end_tokens_that_end_no_answer_are_said() -> None:
    for chosen, said in (("</s>", True), ("<|im_end|>", False)):
        encode = encoder("qwen2_5", "byte-level", eot_tokens=(chosen,))
        assert learnt(encode, CONVERSATIONS["single"]) == ["Yes.<|im_end|>"]
        assert any("do not end the answers" in note for note in encode.warnings) == said


@pytest.mark.parametrize(
    ("offsets", "labels"),
    [
        pytest.param([(0, 3), (3, 7), (7, 11)], [-100, 2, 3], id="a token with the blank before"),
        pytest.param([(0, 3), (4, 7), (7, 11)], [-100, 2, 3], id="a blank trimmed off the offsets"),
        pytest.param([(0, 3), (4, 4), (4, 7), (7, 11)], [-100, -100, 3, 4],
                     id="a token of the blank alone is the template's"),
        pytest.param([(0, 5), (5, 7), (7, 11)], [1, 2, 3],
                     id="a token of both that shows the answer"),
        pytest.param([(0, 4), (4, 7), (7, 11)], [-100, 2, 3],
                     id="a special token that swallows the blank behind it"),
        pytest.param([(0, 3), (3, 5), (5, 5), (5, 7), (7, 11)], [-100, 2, -100, 4, 5],
                     id="a token of no character"),
    ],
)  # fmt: skip
def test_tokens_that_show_the_answer_are_labelled(
    offsets: list[tuple[int, int]], labels: list[int]
) -> None:
    text = "[I] Yes</s>"  # the answer is characters 4 to 11
    ids = list(range(1, len(offsets) + 1))
    assert label_tokens(ids, text, offsets, trained=[(4, 11)]) == labels


def test_a_token_that_swallows_an_answers_first_blank_is_not_the_answers() -> None:
    """Phi-3's <|assistant|> takes the blanks behind it (rstrip), the answer's own too."""
    offsets = [(0, 4), (4, 7), (7, 11)]
    assert label_tokens([1, 2, 3], "[I] Yes</s>", offsets, trained=[(3, 11)]) == [-100, 2, 3]


def test_the_token_behind_a_character_that_a_normalizer_removed_is_not_the_answers() -> None:
    """NFC makes one character of a letter and its accent, with the offsets of the letter."""
    text, offsets = "[I] e\u0301</s>", [(0, 3), (4, 5), (6, 10)]
    assert label_tokens([1, 2, 3], text, offsets, trained=[(4, 6)]) == [-100, 2, -100]
    assert label_tokens([1, 2, 3], text, offsets, trained=[(4, 6), (6, 10)]) == [-100, 2, 3]


def test_a_letter_behind_a_blank_that_the_tokenizer_inserts_is_labelled() -> None:
    """ByteLevel with add_prefix_space: the blank's trimmed offsets are behind the letter's."""
    offsets = [(0, 1), (2, 2), (1, 2)]
    assert label_tokens([1, 2, 3], ":y", offsets, trained=[(1, 2)]) == [-100, 2, 3]


def test_a_blank_inside_the_answer_is_labelled_though_trimmed() -> None:
    ids, offsets = [1, 2, 3, 4], [(0, 1), (1, 2), (6, 6), (6, 7)]  # "x:" and blanks, then "y"
    assert label_tokens(ids, ":x    y", offsets, trained=[(1, 7)]) == [-100, 2, 3, 4]


def one_blank_trimmed(processor: str) -> Any:
    """Build a byte-level tokenizer with a token of a newline and a blank, whose blank it trims."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    trimming = processors.ByteLevel(trim_offsets=True)
    found = {
        "ByteLevel": trimming,
        "Sequence": processors.Sequence(
            [
                trimming,
                processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)]),
            ]
        ),
        "RobertaProcessing": processors.RobertaProcessing(("</s>", 0), ("</s>", 0)),
        "none": None,
    }
    letters = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u010a\u0120"]
    backend = Tokenizer(
        models.BPE({letter: n for n, letter in enumerate(letters)}, [("\u010a", "\u0120")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if found[processor] is not None:
        backend.post_processor = found[processor]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("processor", ["ByteLevel", "Sequence", "RobertaProcessing", "none"])
def test_a_token_that_ends_with_an_answers_blank_is_the_answers(processor: str) -> None:
    """Of a newline and a blank, trimmed offsets show the newline alone, the template's."""
    tokens = one_blank_trimmed(processor)
    before = tokens.backend_tokenizer.to_str()
    encode = ChatEncoder(
        tokens, "{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    )
    for said in ("  Yes", "  \n x  \n  ", "a\n  b"):
        found = learnt(encode, {"messages": [user("Is it?"), answer(said)]})
        assert [run.removeprefix("\n") if said[0] == " " else run for run in found] == [
            said + "</s>"
        ]
    assert tokens.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_text_is_trained_as_it_is(name: str) -> None:
    """Check that answers are trained whole: any characters, blanks at both ends, equal contents."""
    row = TEMPLATES[name]

    @examples(12)
    @given(st.sampled_from(TOKENIZERS), conversations(system=row.system))
    def check(tokens: str, messages: list[dict[str, Any]]) -> None:
        found = learnt(encoder(name, tokens), {"messages": messages})
        said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        ends = [row.end] * (len(said) - 1) + [row.last or row.end]
        assert len(found) == len(said)
        for run, text, end in zip(found, said, ends, strict=True):
            run, end = shown(run, tokens), shown(end, tokens)
            assert run.endswith(end), tokens
            # Templates strip contents or not. A token may hold a blank of both.
            learned = run.removesuffix(end)
            # A "\u2581" at an end is no blank for the template, and decodes to one.
            forms = [
                shown(cut, tokens)
                for whole in (text, shown(text, tokens))
                for k in range(len(whole) - len(whole.lstrip()) + 1)
                for cut in (whole[k:], whole[k:].rstrip(), whole[k:].rstrip("\n"))
            ]
            assert learned in [blank + form for form in forms for blank in ("", " ", "\n")], tokens

    check()


# Letters that also stand in templates' own words.
SHORT = ("a", "s", "r", "think", "user", "7", "Yes", "\u4f60\u597d", "e\u0301te", "{{a}}", "\n")


@pytest.mark.parametrize("name", [name for name, row in TEMPLATES.items() if row.reasoning])
def test_any_reasoning_is_trained_as_it_is(name: str) -> None:
    row = TEMPLATES[name]
    text = texts(SHORT, free=False).map(str.strip)

    @examples(10)
    @given(st.lists(st.tuples(text, text, st.booleans()), min_size=1, max_size=3))
    def check(answers: list[tuple[str, str, bool]]) -> None:
        messages = []
        for reasoning, content, inside in answers:
            tagged = answer(f"<think>\n{reasoning}\n</think>\n\n{content}")
            keyed = answer(content, reasoning_content=reasoning)
            # Other templates write tags as any text.
            messages += [user("a"), tagged if inside and row.reasoning == TAGS else keyed]
        found = learnt(encoder(name, "byte-level"), {"messages": messages})
        wanted = []
        for number, (reasoning, content, _) in enumerate(answers, start=1):
            last = number == len(answers)
            assert row.reasoning is not None
            whole = row.reasoning.format(reasoning=reasoning, answer=content)
            wanted.append(whole if last or row.keeps else content)
            wanted[-1] += row.last or row.end if last else row.end
        assert [run.lstrip("\n ") for run in found] == wanted

    check()
