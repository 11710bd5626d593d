"""Answers are those of plain transformers; the terminal, pipes, and what is refused."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnimg.cli.chat import ChatSession, _lines, _stop_on_interrupt
from attnimg.errors import AttnimgError
from attnimg.runs.chat import ChatModel, GenerationSettings, answer

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
from random_adapters import make_base, write_adapter

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without a receipt, whose tokenizer has a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat")
    base = make_base(folder / "model")
    write_adapter(base, folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "out")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> ChatModel:
    """The adapter by plain transformers and PEFT."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(folder / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    return ChatModel(model=model, tokenizer=tokenizer, stops=(2,), limit=256)


def generated(plain: ChatModel, messages: list[dict[str, str]] | str, tokens: int) -> str:
    """What transformers generates without sampling."""
    tokenizer = plain.tokenizer
    if isinstance(messages, str):
        ids = tokenizer(messages, return_tensors="pt")["input_ids"]
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    output = plain.model.generate(
        input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=2, eos_token_id=2
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def command(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    from attnimg.__main__ import run

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    return run(["chat", *arguments])


def test_a_pipe_is_answered_line_by_line(
    folder: Path, plain: ChatModel, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lines = "hi\nand then?\n\n/help\n/reset\nhi\n/exit\nnever answered\n"
    arguments = (str(folder / "out"), "--max-new-tokens", "6", "--system", "Be brief.")
    assert command(monkeypatch, lines, "--json", *arguments) == 0
    said = capsys.readouterr()
    first, second, third = (json.loads(line) for line in said.out.splitlines())
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert first["text"] == third["text"] == generated(plain, history, 6)
    history.append({"role": "assistant", "content": first["text"]})
    history.append({"role": "user", "content": "and then?"})
    assert second["text"] == generated(plain, history, 6)
    assert (first["prompt"], first["tokens"], first["finish"]) == ("hi", 6, "length")
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert "got      " in said.err, "the backend is named"
    assert said.err.count("/exit ends") == 1, "only /help lists the commands in a pipe"
    assert command(monkeypatch, "hi\n", *arguments) == 0
    said = capsys.readouterr()
    assert said.out == first["text"] + "\n"
    assert "cut off after 6 tokens" in said.err


def test_raw_text_is_continued_without_a_template(
    folder: Path, plain: ChatModel, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = str(folder / "model")
    assert command(monkeypatch, "hi\n", model) == 2
    assert "--raw" in capsys.readouterr().err
    assert command(monkeypatch, "hi\n", model, "--raw", "--max-new-tokens", "5", "--json") == 0
    with plain.model.disable_adapter():
        expected = generated(plain, "hi", 5)
    assert json.loads(capsys.readouterr().out)["text"] == expected


def write_receipt(folder: Path, **keys: Any) -> None:
    """Write the receipt of a finished run on the folder's adapter."""
    values = {"base_model": str(folder.parent / "model"), "adapter": "lora", "bf16": False,
              "learning_rate": 1e-3, "output_dir": str(folder), **keys}  # fmt: skip
    receipt = {"status": "done", "config": values, "dtype": "float32"}
    (folder / "receipt.json").write_text(json.dumps(receipt))


def test_the_prompt_is_that_of_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.chat_template = "{{ mood }}|" + TEMPLATE
    tokenizer.save_pretrained(tmp_path / "out")
    prompts: list[str] = []
    generate = answer

    def seen(chat: ChatModel, prompt: Any, *rest: Any, **options: Any) -> Any:
        from attnimg.runs.chat import _encode

        prompts.append(tokenizer.decode(_encode(chat, prompt)[0]))
        return generate(chat, prompt, *rest, **options)

    monkeypatch.setattr("attnimg.cli.chat.answer", seen)
    arguments = (str(tmp_path / "out"), "--max-new-tokens", "2")
    chats = [{"path": "talk.jsonl", "type": "chat_template"}]
    write_receipt(
        tmp_path / "out", datasets=chats, chat_template_kwargs={"mood": "calm"},
        default_system_message="Be kind.",
    )  # fmt: skip
    assert command(monkeypatch, "hi\n", *arguments) == 0
    assert "another prompt" not in capsys.readouterr().err
    assert command(monkeypatch, "hi\n", *arguments, "--system", "Be brief.") == 0
    assert prompts == [
        "calm|system: Be kind.\nuser: hi\nassistant: ",
        "calm|system: Be brief.\nuser: hi\nassistant: ",
    ]
    capsys.readouterr()
    write_receipt(tmp_path / "out", datasets=[{"path": "x.jsonl", "type": "alpaca"}])
    assert command(monkeypatch, "hi\n", *arguments) == 0
    said = capsys.readouterr().err
    assert "type alpaca" in said
    assert "--raw" in said
    assert command(monkeypatch, "hi\n", *arguments, "--raw") == 0
    assert "another prompt" not in capsys.readouterr().err


def test_a_seed_gives_the_same_samples(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(folder / "out"), "--raw", "--max-new-tokens", "8", "--temperature", "1.5")
    answers = []
    for seed in ("1", "1", "2"):
        assert command(monkeypatch, "hi\n", *arguments, "--seed", seed, "--top-p", "0.99") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def settings(tokens: int = 30) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=tokens, temperature=0)


def test_the_user_can_stop_an_answer(plain: ChatModel) -> None:
    pieces: list[str] = []
    found = answer(
        plain, [{"role": "user", "content": "hi"}], settings(),
        on_text=pieces.append, stopped=lambda: len(pieces) >= 2,
    )  # fmt: skip
    assert found.finish == "interrupted"
    assert 0 < found.tokens < 30
    assert "".join(pieces) == found.text


def test_an_answer_ends_at_an_end_token(plain: ChatModel) -> None:
    first = plain.tokenizer(generated(plain, "hi", 3))["input_ids"][0]
    chat = ChatModel(model=plain.model, tokenizer=plain.tokenizer, stops=(2, first), limit=None)
    found = answer(chat, "hi", settings(), on_text=lambda _: None, stopped=lambda: False)
    assert (found.finish, found.tokens) == ("stop", 1)


def test_the_context_is_not_exceeded(plain: ChatModel) -> None:
    chat = ChatModel(model=plain.model, tokenizer=plain.tokenizer, stops=(), limit=20)

    def ask(words: int) -> Any:
        text = "day " * words
        return answer(chat, text, settings(), on_text=lambda _: None, stopped=lambda: False)

    found = ask(5)
    assert (found.prompt_tokens + found.tokens, found.finish) == (20, "context")
    with pytest.raises(AttnimgError) as caught:
        ask(40)
    assert caught.value.code == "context-full"
    assert "/reset" in caught.value.do


def test_a_template_that_refuses_is_reported(plain: ChatModel) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(plain.tokenizer)
    tokenizer.chat_template = STRICT + TEMPLATE
    chat = ChatModel(model=plain.model, tokenizer=tokenizer, stops=(2,), limit=None)
    user = {"role": "user", "content": "hi"}
    with pytest.raises(AttnimgError) as caught:
        answer(chat, [{"role": "system", "content": "x"}, user], settings(3),
               on_text=lambda _: None, stopped=lambda: False)  # fmt: skip
    assert (caught.value.code, caught.value.why) == ("bad-chat", "no system")
    assert answer(chat, [user], settings(3), on_text=lambda _: None, stopped=lambda: False).tokens


def test_an_error_ends_a_pipe_and_not_a_conversation(
    plain: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = ChatModel(model=plain.model, tokenizer=plain.tokenizer, stops=(2,), limit=20)
    talk = ChatSession(chat, settings(2), system=None, raw=True, as_json_lines=False)
    lines = ["day " * 40, "hi"]
    monkeypatch.setattr("attnimg.cli.chat._lines", lambda: iter(lines))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(AttnimgError):
        talk.run()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    talk.run()
    said = capsys.readouterr()
    assert "longer than the model's context" in said.err
    assert said.out.strip()


def typed(*lines: str | BaseException) -> Iterator[str]:
    for line in lines:
        if isinstance(line, BaseException):
            raise line
        yield line


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()], ids=["Ctrl-D", "Ctrl-C"])
def test_the_prompt_ends_by_keys(monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    keys = typed("hi", "  ", "more", end)
    monkeypatch.setattr("builtins.input", lambda _: next(keys))
    stdin = io.StringIO()
    stdin.isatty = lambda: True  # type: ignore[method-assign]  # a terminal
    monkeypatch.setattr("sys.stdin", stdin)
    assert list(_lines()) == ["hi", "more"]


def test_the_second_interrupt_ends_the_program() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _stop_on_interrupt() as interrupts:
        assert not interrupts
        signal.raise_signal(signal.SIGINT)
        assert interrupts
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_control_characters_do_not_reach_a_terminal(
    plain: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = ChatSession(plain, settings(), system=None, raw=True, as_json_lines=False)
    talk._print_piece("a\x1b]0;x\x07\n")
    assert capsys.readouterr().out == "a\x1b]0;x\x07\n", "a script gets the text as it is"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    talk._print_piece("a\x1b]0;x\x07\n")
    assert capsys.readouterr().out == "a\\x1b]0;x\\x07\n"


def test_a_backend_that_can_not_use_a_cache_is_replaced(folder: Path) -> None:
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from attnimg.runs.chat import _require_cached_attention

    def without_cache(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any):  # type: ignore[no-untyped-def]  # as transformers
        keys = slice(-query.shape[2], None)
        return sdpa_attention_forward(
            module,
            query,
            key[:, :, keys],
            value[:, :, keys],
            None,
            **{**options, "is_causal": True},
        )

    said: list[str] = []

    class Report:
        def warn_replaced(self, text: str) -> None:
            said.append(text)

    AttentionInterface.register("without_cache", without_cache)
    try:
        for name, replaced in (("without_cache", True), ("sdpa", False), ("eager", False)):
            said.clear()
            model = AutoModelForCausalLM.from_pretrained(
                folder / "model", attn_implementation=name
            ).eval()
            _require_cached_attention(model, Report())  # type: ignore[arg-type]  # one method
            assert bool(said) == replaced
            assert model.config._attn_implementation == ("sdpa" if replaced else name)
    finally:
        del AttentionInterface._global_mapping["without_cache"]


@pytest.mark.parametrize(
    "options",
    [("--temperature", "-1"), ("--top-p", "0"), ("--max-new-tokens", "0"), ("--seed", "-1")],
    ids=" ".join,
)
def test_wrong_numbers_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert command(monkeypatch, "", str(folder / "out"), *options) == 2
    assert options[0] in capsys.readouterr().err
