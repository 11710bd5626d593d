"""What a record of a conversation says is used, or refused by name with its file and number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents, sample_text
from attnimg.train.data.named_templates import CHATML

Run = Callable[..., Config]
Write = Callable[..., str]

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLING = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def user(content: Any = "Q", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def answer(content: Any = "A", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def one(config: Config, tokenizer: Any) -> tuple[str, str]:
    """The only document: its text, and the text of its tokens with loss."""
    documents = load_documents(config, tokenizer)
    (row,) = documents.train
    learnt = [label for label in row["labels"] if label != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(learnt)


@pytest.mark.parametrize(
    ("messages", "learnt"),
    [
        pytest.param([user(), answer("A", weight=0), user(), answer("B", weight=1)],
                     "B<|im_end|>", id="weight 0"),
        pytest.param([user(), answer("A", train=False), user(), answer("B")],
                     "B<|im_end|>", id="train: false"),
        pytest.param([user("Q", training=True), answer("A", training=False)],
                     "Q<|im_end|>", id="training: true on the user's turn, as axolotl has it"),
        pytest.param([user("Q", weight=1), answer("A", weight=1)], "A<|im_end|>",
                     id="weight 1 on any message, as OpenAI has it"),
        pytest.param([user(), answer("A", weight=None)], "A<|im_end|>", id="a null flag"),
        pytest.param([user(), answer([{"type": "text", "text": "No."},
                                      {"type": "text", "text": " Yes."}])],
                     "No. Yes.<|im_end|>", id="text parts are joined"),
        pytest.param([user(), answer([{"type": "text", "text": "No.", "train": False},
                                      {"type": "text", "text": " Yes.", "train": True}])],
                     " Yes.<|im_end|>", id="a part without loss"),
        pytest.param([user(), answer([{"type": "text", "text": " No.", "weight": 1},
                                      {"type": "text", "text": " Yes.", "weight": 0}])],
                     " No.<|im_end|>", id="the last part without loss"),
        pytest.param([{"role": "developer", "content": "D"}, user(), answer()],
                     "A<|im_end|>", id="a developer's message"),
        pytest.param([user(), answer(), {"role": "tool", "content": "T"}, answer("B")],
                     "A<|im_end|>B<|im_end|>", id="a tool's message"),
        pytest.param([user(), answer(""), user(), answer("B")], "B<|im_end|>",
                     id="an empty answer among others"),
        pytest.param([user("<|im_end|>"), answer("a<|im_end|>b")], "a<|im_end|>b<|im_end|>",
                     id="special tokens inside a content"),
        pytest.param([user("(content 1 of a turn)"), answer("(content 0 of a turn)")],
                     "(content 0 of a turn)<|im_end|>", id="a content that looks like our marks"),
        pytest.param([user(), answer("  if x:\n        y\n")], "  if x:\n        y\n<|im_end|>",
                     id="blanks inside and around, which tokenizers trim off offsets"),
        pytest.param([user(), answer("<think>\nR\n</think>\n\nA")],
                     "<think>\nR\n</think>\n\nA<|im_end|>", id="think tags as any text"),
    ],
)  # fmt: skip
def test_what_a_message_says_is_used(
    run_on: Run, json_lines: Write, tokenizer: Any, messages: list[Any], learnt: str
) -> None:
    config = run_on(json_lines({"messages": messages}), "chat_template")
    assert one(config, tokenizer)[1] == learnt


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_the_template_whatever_its_name(
    run_on: Run, json_lines: Write, tokenizer: Any, key: str
) -> None:
    path = json_lines({"messages": [user(), answer("A", **{key: "R"})]})
    config = run_on(path, "chat_template", chat_template_jinja=THINKING)
    assert one(config, tokenizer)[1] == "<think>R</think>A<|im_end|>"


@pytest.mark.parametrize(
    ("message", "tools", "learnt"),
    [
        pytest.param({"role": "assistant", "tool_calls": [CALL]}, TOOLS,
                     '{"name": "f", "arguments": {"x": 1}}<|im_end|>', id="no content"),
        pytest.param({"role": "assistant", "content": None, "tool_calls": [CALL]}, None,
                     '{"name": "f", "arguments": {"x": 1}}<|im_end|>', id="null content"),
        pytest.param(answer("A", tool_calls=[CALL, CALL]), TOOLS,
                     'A{"name": "f", "arguments": {"x": 1}}{"name": "f", "arguments": {"x": 1}}'
                     "<|im_end|>", id="a content and two calls"),
        pytest.param({"role": "assistant", "tool_calls": [
                         {"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                     '[{"name": "f"}]', '{"name": "f", "arguments": {"x": 1}}<|im_end|>',
                     id="arguments and tools as JSON text"),
    ],
)  # fmt: skip
def test_tool_calls_are_trained(
    run_on: Run, json_lines: Write, tokenizer: Any, message: Any, tools: Any, learnt: str
) -> None:
    record = {"messages": [user(), message, {"role": "tool", "content": "7"}, answer("B")],
              "tools": tools}  # fmt: skip
    config = run_on(json_lines(record), "chat_template", chat_template_jinja=CALLING)
    text, trained = one(config, tokenizer)
    assert trained == learnt + "B<|im_end|>"
    assert tools is None or '"name": "f"' in text.partition("<|im_start|>")[0]


def each_argument(written: str) -> str:
    """A template that writes the arguments of each call in a loop."""
    loop = "{% for k, v in call.function.arguments.items() %}" + written + "{% endfor %}"
    return CALLING.replace("{{ call.function | tojson }}", "{{ call.function.name }}:" + loop)


@pytest.mark.parametrize(
    ("template", "arguments", "learnt"),
    [
        pytest.param(each_argument("{{ k }}={{ v }};"), {"x": "a", "y": [1, {"z": True}]},
                     "f:x=a;y=[1, {'z': True}];", id="all of them"),
        pytest.param(each_argument("{{ k }}={{ v }};"), {"x": "", "y": 0, "z": False},
                     "f:x=;y=0;z=False;", id="values that are false or empty"),
        pytest.param(each_argument("{{ k }}={{ v[:40] }};"), {"x": "a" * 40},
                     f"f:x={'a' * 40};", id="a value that is no longer than a cut"),
        pytest.param(each_argument("{{ k }}={{ v[:40] }};"), {"x": "a" * 41}, None,
                     id="a value that is cut off"),
        pytest.param(each_argument("{% if v is string %}{{ k }}={{ v }};{% endif %}"), {"x": 1},
                     None, id="a number that is dropped"),
        pytest.param(each_argument("{% if v is string %}{{ k }}={{ v }};{% endif %}"), {"x": "1"},
                     "f:x=1;", id="no number to be dropped"),
        pytest.param(each_argument("{% if v %}{{ k }}={{ v }};{% endif %}"), {"x": 0}, None,
                     id="a zero that is dropped"),
        pytest.param(each_argument("{{ k }}={{ '' if v is boolean else v }};"), {"x": [{"a": 1}],
                     "y": True}, None, id="a truth that is dropped"),
        pytest.param(each_argument("{{ v }};"), {"x": "a"}, None, id="keys that are dropped"),
        pytest.param(each_argument("{{ k }}={{ v | upper }};"), {"x": "a"}, None,
                     id="a value that is rewritten"),
    ],
)  # fmt: skip
def test_a_template_must_write_all_of_a_tool_call(
    run_on: Run, json_lines: Write, tokenizer: Any,
    template: str, arguments: dict[str, Any], learnt: str | None,
) -> None:  # fmt: skip
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    path = json_lines({"messages": [user(), {"role": "assistant", "tool_calls": [call]}]})
    config = run_on(path, "chat_template", chat_template_jinja=template)
    if learnt is not None:
        assert one(config, tokenizer)[1] == learnt + "<|im_end|>"
        return
    with pytest.raises(AttnimgError, match=r"data\.jsonl, line 1") as caught:
        load_documents(config, tokenizer)
    assert "drops a tool call of message 2, or part of it" in caught.value.why


@pytest.mark.parametrize(
    "written",
    [
        pytest.param("{{ m.reasoning_content | replace('\n', ' ') }}", id="on one line"),
        pytest.param("{{ m.reasoning_content.split('\n')[0] }}", id="its first line"),
        pytest.param("{{ m.reasoning_content[:5] }}", id="its beginning"),
        pytest.param("{{ m.reasoning_content }}{{ m.reasoning_content }}", id="twice"),
        pytest.param("", id="not at all"),
    ],
)
@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("reasoning", ["one\ntwo", "s\nt"])
def test_reasoning_that_a_template_rewrites_is_refused_in_every_turn(
    run_on: Run, json_lines: Write, tokenizer: Any, written: str, later: int, reasoning: str
) -> None:
    """A short one also stands in the template's own text, where it must not be found."""
    talk = [user(), answer("A", reasoning_content=reasoning), *[user(), answer("B")] * later]
    path = json_lines({"messages": talk})
    template = THINKING.replace("{{ m.reasoning_content }}", written)
    with pytest.raises(AttnimgError, match=r"data\.jsonl, line 1") as caught:
        load_documents(run_on(path, "chat_template", chat_template_jinja=template), tokenizer)
    assert "the reasoning of message 2" in caught.value.why
    config = run_on(path, "chat_template", chat_template_jinja=THINKING)
    assert one(config, tokenizer)[1].startswith(f"<think>{reasoning}</think>A<|im_end|>")


def generating(marked: str, other: str = "{{ m.content }}<|im_end|>") -> str:
    return (
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
            f"{marked}{{% else %}}{other}{{% endif %}}\n{{% endfor %}}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        .replace("[[", "{% generation %}")
        .replace("]]", "{% endgeneration %}")
    )


@pytest.mark.parametrize(
    ("template", "learnt", "note"),
    [
        pytest.param(generating("[[{{ m.content }}<|im_end|>]]"), "Abc<|im_end|>D<|im_end|>", None,
                     id="an answer and its end"),
        pytest.param(generating("[[{{ m.content }}]] [[<|im_end|>]]"), "Abc<|im_end|>D<|im_end|>",
                     None, id="the end apart from the text"),
        pytest.param(generating("[[{{ m.content }}<|im_end|>]]", "[[{{ m.content }}<|im_end|>]]"),
                     "Abc<|im_end|>D<|im_end|>", None, id="the user's turns too"),
        pytest.param(generating("{{ m.content[:1] }}[[{{ m.content[1:] }}<|im_end|>]]"),
                     "bc<|im_end|><|im_end|>", "has a part of an answer outside",
                     id="a part of an answer"),
    ],
)  # fmt: skip
def test_what_a_template_marks_as_generated_is_trained_of_each_answer(
    run_on: Run, json_lines: Write, tokenizer: Any, template: str, learnt: str, note: str | None
) -> None:
    talk = [user(), answer("Abc"), user(), answer("D"), user("R"), answer("")]
    for messages in (talk, talk[:4], [*talk[:4], answer("")]):
        config = run_on(
            json_lines({"messages": messages}), "chat_template", chat_template_jinja=template
        )
        assert one(config, tokenizer)[1] == learnt
        notes = load_documents(config, tokenizer).warnings
        assert any(note in said for said in notes) if note else not "".join(notes[1:])


def test_half_a_character_in_a_tool_call_is_refused(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    call = {"function": {"name": "f", "arguments": {"x": "\ud83d"}}}
    path = json_lines({"messages": [user(), {"role": "assistant", "tool_calls": [call]}]})
    with pytest.raises(AttnimgError, match="surrogate"):
        load_documents(run_on(path, "chat_template", chat_template_jinja=CALLING), tokenizer)


def test_a_system_column_opens_the_conversation(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    record = {"system": "S", "conversations": [{"from": "human", "value": "Q"},
                                               {"from": "gpt", "value": "A"}]}  # fmt: skip
    config = run_on(
        json_lines(record), "chat_template", spec_field_messages="conversations",
        spec_message_property_mappings={"role": "from", "content": "value"},
    )  # fmt: skip
    text, learnt = one(config, tokenizer)
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ")
    assert learnt == "A<|im_end|>"


def test_a_mapping_names_other_keys_too(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    record = {"messages": [user(), answer("A", thought="R")]}
    config = run_on(
        json_lines(record), "chat_template", chat_template_jinja=THINKING,
        spec_message_property_mappings={"reasoning_content": "thought"},
    )  # fmt: skip
    assert one(config, tokenizer)[1] == "<think>R</think>A<|im_end|>"


def test_conversations_without_an_answer_are_counted_and_dropped(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    path = json_lines({"messages": [user(), answer("")]}, {"messages": [user(), answer()]})
    documents = load_documents(run_on(path, "chat_template"), tokenizer)
    assert [(f.records, f.documents, f.empty) for f in documents.figures] == [(2, 1, 1)]


def test_what_has_no_effect_is_named(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    record = {"messages": [user("Q", lang="en"), answer("A"), user(), answer("")], "source": "x"}
    documents = load_documents(run_on(json_lines(record), "chat_template"), tokenizer)
    notes = "\n".join(documents.warnings)
    assert "columns have no effect: source" in notes
    assert "message keys have no effect: lang" in notes
    assert "answers without text are not trained" in notes


@pytest.mark.parametrize(
    ("record", "why", "do"),
    [
        pytest.param([user(), {"role": "assistant", "function_call": {"name": "f"}}],
                     "function_call", "tool_calls", id="OpenAI's function_call"),
        pytest.param([user(), {"role": "function_call", "content": "{}"}],
                     "a tool call of the assistant", '"role": "assistant", "tool_calls"',
                     id="ShareGPT's call"),
        pytest.param([user(), {"role": "observation", "content": "7"}],
                     "the result of a tool", '"role": "tool"', id="ShareGPT's result"),
        pytest.param([user(), answer("A", weight=0.5)], "weight of message 2 is 0.5", "0 or 1",
                     id="a weight between"),
        pytest.param([user(), answer("A", weight=1, train=False)], "contradict", "one of the flags",
                     id="flags that contradict one another"),
        pytest.param([user([{"type": "image", "image": "x.png"}]), answer()], "needed text",
                     "only text", id="an image"),
        pytest.param([user(), answer("A", images=["x.png"])], "images", "remove images from",
                     id="a list of images"),
        pytest.param([user(), answer("A", thinking="R", reasoning="S")], "which differ",
                     "keep one of them", id="two reasonings"),
        pytest.param([user(), answer("A", reasoning_content="R")], "drops the reasoning",
                     "<think>", id="reasoning that the template does not write"),
        pytest.param([user(), answer("A", reasoning_content="R", weight=0), user(), answer("B")],
                     "drops the reasoning", "<think>", id="reasoning of a turn without loss"),
        pytest.param([user(), answer("A", tool_calls=[CALL])], "drops a tool call", "chat_template",
                     id="tool calls that the template does not write"),
        pytest.param([user(), answer("A", tool_calls=[{"function": {}}])], "needed a list of calls",
                     "arguments", id="a call without a name"),
        pytest.param([user(), {"role": "assistant"}], "needed role and content",
                     "add the missing key", id="neither content nor calls"),
        pytest.param([], "needed a list of messages", "role and content", id="no message"),
        pytest.param({"messages": [{"role": "system", "content": "a"}, user(), answer()],
                      "system": "b"}, "a column system beside", "remove one", id="two systems"),
        pytest.param({"messages": [user(), answer()], "tools": "nonsense"}, "tools is",
                     "write each tool", id="tools that are none"),
        pytest.param({"id": 7, "talk": [user(), answer()]}, "needed messages",
                     "field_messages: talk", id="another column, which is not the first"),
        pytest.param({"id": 7, "instruction": "x", "output": "y"}, "needed messages",
                     "type: alpaca", id="the columns of another type"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(
    run_on: Run, json_lines: Write, tokenizer: Any, record: Any, why: str, do: str
) -> None:
    record = record if isinstance(record, dict) else {"messages": record}
    config = run_on(json_lines(record), "chat_template")
    with pytest.raises(AttnimgError, match=r"data\.jsonl, line 1") as caught:
        load_documents(config, tokenizer)
    assert why in caught.value.why
    assert do in caught.value.do


@pytest.mark.parametrize("name", ["system", "history"])
def test_alpaca_refuses_what_its_prompt_has_no_place_for(
    run_on: Run, json_lines: Write, tokenizer: Any, name: str
) -> None:
    record = {"instruction": "Q", "output": "A"}
    with pytest.raises(AttnimgError, match=f"found {name}"):
        load_documents(run_on(json_lines(record | {name: [["a", "b"]]}), "alpaca"), tokenizer)
    assert one(run_on(json_lines(record | {name: ""}), "alpaca"), tokenizer)[1] == "A<|im_end|>"


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_tokenizer_with_named_templates_is_used(
    run_on: Run, json_lines: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    named = {"default": THINKING, "tool_use": CALLING}
    monkeypatch.setattr(tokenizer, "chat_template", named)
    record = {"messages": [user(), answer()], "tools": tools}
    text, learnt = one(run_on(json_lines(record), "chat_template"), tokenizer)
    assert learnt == "A<|im_end|>"
    assert text.startswith("[{" if tools else "<|im_start|>user")
    monkeypatch.setattr(tokenizer, "chat_template", {"rag": THINKING})
    with pytest.raises(AttnimgError, match="found rag"):
        load_documents(run_on(json_lines(record), "chat_template"), tokenizer)
    config = run_on(json_lines({"messages": record["messages"]}), "chat_template",
                    chat_template="rag")  # fmt: skip
    assert one(config, tokenizer)[1] == "A<|im_end|>"


@pytest.mark.parametrize(
    ("mode", "learnt"),
    [("turn", "A<|im_end|>B<|im_end|>"), ("last", "AB<|im_end|>"), ("none", "AB"),
     ("all", "<|im_end|><|im_end|>A<|im_end|><|im_end|>B<|im_end|>")],
)  # fmt: skip
def test_train_on_eos_holds_where_the_layout_is_the_records_own(
    run_on: Run, json_lines: Write, tokenizer: Any, mode: str, learnt: str
) -> None:
    talk = [{"role": "system", "content": "S"}, user(), answer("A", lang="en"), user(), answer("B")]
    config = run_on(json_lines({"messages": talk}), "chat_template", spec_train_on_eos=mode)
    assert one(config, tokenizer)[1] == learnt


@pytest.mark.parametrize("roles", [["assistant"], ["user"]])
def test_the_end_tokens_of_all_turns_do_not_depend_on_flags(
    run_on: Run, json_lines: Write, tokenizer: Any, roles: list[str]
) -> None:
    """Where no answer carries loss, too; and a content that begins with one is not its own end."""
    ended = copy.deepcopy(tokenizer)
    ended.add_special_tokens({"extra_special_tokens": ["<|eot|>"]})
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% else %}<|im_start|>{{ m.content }}<|eot|>{% endif %}{% endfor %}"
    )
    talk = [
        {"role": "system", "content": "S"}, user("<|eot|>Q", train=False), answer("A", weight=0),
        {"role": "tool", "content": "R", "train": "user" in roles}, user("V"),
    ]  # fmt: skip
    config = run_on(
        json_lines({"messages": talk}), "chat_template", chat_template_jinja=template,
        spec_train_on_eos="all", spec_roles_to_train=roles,
    )  # fmt: skip
    said = {"assistant": "", "user": "R"}[roles[0]], {"assistant": "", "user": "V"}[roles[0]]
    assert one(config, ended)[1] == f"<|eot|><|eot|>{said[0]}<|eot|>{said[1]}<|eot|>"


@pytest.mark.parametrize("post", ["$A", "[S] $A", "$A [E]", "[S] $A [E]"])
@pytest.mark.parametrize(
    "said", ["Word", "[S]Word[E]", "[S][S]Word[E][E]", "Word[E]more", "[E]Word[S]"]
)
def test_a_text_that_spells_its_own_first_and_last_token_has_them_once(
    run_on: Run, json_lines: Write, tokenizer: Any, post: str, said: str
) -> None:
    """Post-processors add a start or an end token, both, or neither; the end is always there."""
    from tokenizers import processors

    names = {"[S]": "<|im_start|>", "[E]": "<|im_end|>"}

    def spelled(text: str) -> str:
        return text.replace("[S]", names["[S]"]).replace("[E]", names["[E]"])

    adding = copy.deepcopy(tokenizer)
    adding.bos_token = names["[S]"]
    ids = [(name, adding.convert_tokens_to_ids(name)) for name in names.values()]
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=spelled(post), special_tokens=ids
    )
    opening = "[S]" if post.startswith("[S]") else ""
    body = said.removeprefix(opening).removesuffix("[E]")
    text, learnt = one(run_on(json_lines({"text": spelled(said)})), adding)
    assert text == learnt == spelled(f"{opening}{body}[E]")
    record = {"instruction": "Q", "output": spelled(said)}
    text, learnt = one(run_on(json_lines(record), "alpaca"), adding)
    assert learnt == spelled(said.removesuffix("[E]") + "[E]")
    assert text.startswith(spelled(f"{opening}Below is"))


@pytest.mark.parametrize("flag", [{"train": False}, {"training": False}, {"weight": 0}])
@pytest.mark.parametrize(
    ("mode", "ends"),
    [("turn", "UT"), ("all", "UXT"), ("last", "T"), ("none", "")],
)
def test_a_turn_without_loss_has_none_beside_train_on_inputs(
    run_on: Run, json_lines: Write, tokenizer: Any, flag: dict[str, Any], mode: str, ends: str
) -> None:
    """Neither its reasoning, nor its calls, nor its end token; `ends` names the turns' ends."""
    left_out = answer("X", reasoning_content="R", **flag)
    config = run_on(
        json_lines({"messages": [user("U"), left_out, user("U"), answer("T")]}), "chat_template",
        chat_template_jinja=THINKING, train_on_inputs=True, spec_train_on_eos=mode,
    )  # fmt: skip
    end = {name: "<|im_end|>" if name in ends else "" for name in "UXT"}
    said = (
        f"<|im_start|>user\nU{end['U']}\n<|im_start|>assistant\n{end['X']}\n"
        f"<|im_start|>user\nU{end['U']}\n<|im_start|>assistant\nT{end['T']}\n"
    )
    assert one(config, tokenizer)[1] == said


@pytest.mark.parametrize(("mode", "end"), [("turn", ""), ("all", "<|im_end|>")])
def test_the_end_of_a_turn_without_loss_or_text_is_left_out_of_train_on_inputs(
    run_on: Run, json_lines: Write, tokenizer: Any, mode: str, end: str
) -> None:
    path = json_lines({"messages": [user("U"), answer(" \n", train=False), user("V"), answer("B")]})
    config = run_on(path, "chat_template", train_on_inputs=True, spec_train_on_eos=mode)
    assert one(config, tokenizer)[1] == (
        f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n \n{end}\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    )
    other = CHATML.replace(
        "message['role']", "(message['role'] if message['content'].strip() else '')"
    )
    config = run_on(
        path, "chat_template", train_on_inputs=True, spec_train_on_eos=mode,
        chat_template_jinja=other,
    )  # fmt: skip
    if end:
        assert one(config, tokenizer)[1].count(end) == 4
        return
    with pytest.raises(AttnimgError, match=r"data\.jsonl, line 1") as caught:
        load_documents(config, tokenizer)
    assert "message 2 has no text" in caught.value.why


def test_a_sample_shows_what_carries_loss(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    path = json_lines({"messages": [user("Q\x1b[31m"), answer(), user("word " * 999), answer("B")]})
    documents = load_documents(run_on(path, "chat_template", sequence_len=9999), tokenizer)
    shown = sample_text(documents, tokenizer)
    assert ">>>A<|im_end|><<<" in shown
    assert "\\x1b[31m" in shown
    assert "\x1b" not in shown
    assert len(shown) < 2500
