"""Test that chat templates are limited in time, memory and output, and that right ones pass."""

from __future__ import annotations

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from attnimg.train.data import chat_templates
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.chat_render import Renderer
from attnimg.train.data.chat_templates import TemplateLimitError, render_bounded
from attnimg.train.data.records import Conversation, Place, Turn

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "chat_templates"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TALK = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
PLACE = Place("talk.jsonl", 3, "line", "datasets[0]")

HEAVY = {
    "a string of 10 GB": ("{{ 'a' * 10000000000 }}", "memory"),
    "a string padded to 10 GB": ("{{ 'a'.ljust(10000000000) }}", "memory"),
    "a string that doubles": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "memory"),
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
                     "{% endfor %}", "0 s"),
    "a number of any size": ("{{ 10 ** 10 ** 8 }}", "power"),
    "digits of any number": ("{{ 1|round(100000000, 'ceil') }}", "digits"),
    "digits from a variable": ("{% set n = messages|length * 50000000 %}{{ 1|round(n, 'floor') }}",
                               "digits"),
    "digits by a name": ("{{ [1]|map('ro' 'und', 100000000, 'ceil')|list }}", "digits"),
    "more text than tokens are made of": ("{{ 'a' * 5000000 }}", "writes 5,"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "says"), HEAVY.values(), ids=HEAVY)
def test_a_template_that_takes_too_much_is_refused(
    template: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.3)
    monkeypatch.setattr(chat_templates, "MEMORY_BYTES", 256 << 20)
    with pytest.raises(TemplateLimitError, match=says):
        render_bounded(TALK, template=template + PLAIN)
    assert render_bounded(TALK, template=PLAIN)[0] == "<user>Is it?</s><assistant>Yes.</s>"


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja*")), ids=lambda path: path.stem)
def test_published_templates_keep_the_limits_with_a_long_record(path: Path, tokenizer: Any) -> None:
    long = [{**message, "content": message["content"] * 300_000} for message in TALK]
    chat_templates._refuse_powers(path.read_text())
    Renderer(tokenizer, path.read_text()).try_text(long)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ dict(**{'a': 1}) }}**bold** {# 2 ** 3 #}", id="keywords, text, a comment"),
        pytest.param("{{ '  ' * 3 ~ 7 % 2 * 3 }}", id="indents and remainders"),
        pytest.param("{{ 1.25|round(1, 'ceil') }}", id="rounding"),
    ],
)
def test_what_is_no_power_is_rendered(template: str) -> None:
    assert render_bounded(TALK, template=template)[0]


def test_limits_end_with_the_rendering() -> None:
    before = (
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        resource.getrlimit(resource.RLIMIT_AS),
    )
    render_bounded(TALK, template=PLAIN)
    with pytest.raises(TemplateLimitError):
        render_bounded(TALK, template="{{ 2 ** 3 }}")
    after = (
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        resource.getrlimit(resource.RLIMIT_AS),
    )
    assert after == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_thread_renders_without_the_limit_of_time() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(render_bounded(TALK, template=PLAIN)))
    thread.start()
    thread.join()
    assert found[0][0].startswith("<user>")


def test_the_encoder_names_the_record_and_does_not_try_again(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(chat_templates, "MEMORY_BYTES", 256 << 20)
    encode = ChatEncoder(tokenizer, "{{ 'a' * 10000000000 }}" + PLAIN)
    turns = tuple(Turn(message["role"], message["content"]) for message in TALK)
    with pytest.raises(AttnimgError, match=r"talk\.jsonl, line 3") as caught:
        encode([(PLACE, Conversation(turns))])
    assert (caught.value.key, caught.value.code) == ("chat_template", "bad-value")
    assert "MiB of memory" in caught.value.why
