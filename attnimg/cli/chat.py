"""Run `attnimg chat`: chat with a run's model on a terminal, or answer lines from a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import FrameType

from attnimg.cli import as_text, json_line
from attnimg.cli.evaluate import require_one_process
from attnimg.cli.progress import exit_on_sigterm
from attnimg.cli.train import PrintedReport
from attnimg.errors import AttnimgError, counted, printable
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.runs.chat import Answer, ChatModel, GenerationSettings, Message, answer, load_chat
from attnimg.runs.folder import find_run
from attnimg.task import installed_machine
from attnimg.train.packages import require_trainer


def chat(
    run: str,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    base_model: str | None,
    as_json_lines: bool,
) -> None:
    """Chat with a run's model, or answer each line of standard input."""
    _check_numbers(max_new_tokens, temperature, top_p, seed)
    require_trainer()
    require_one_process("chat")
    exit_on_sigterm()
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
    )
    found = find_run(run, command="chat", base_model=base_model)
    machine = installed_machine()
    use_shipped_kernels(machine)
    report = PrintedReport(as_text.console(sys.stderr))
    for note in found.notes:
        report.log(f"note: {note}")
    with load_chat(found, machine, report=report, raw=raw) as model:
        if seed is not None:
            from transformers import set_seed

            set_seed(seed)
        if sys.stdin.isatty():
            report.log(HELP)
        ChatSession(model, settings, system=system, raw=raw, as_json_lines=as_json_lines).run()


HELP = "/reset begins a new conversation, /exit ends, /help shows this; Ctrl-C stops an answer"


class ChatSession:
    """Answer lines until the input ends.

    Args:
        model: the loaded model.
        settings: how to generate.
        system: the system message; None for that of training, or of the chat template.
        raw: whether each line is a text to complete, without history.
        as_json_lines: whether to print one JSON object for each answer.
    """

    def __init__(
        self,
        model: ChatModel,
        settings: GenerationSettings,
        *,
        system: str | None,
        raw: bool,
        as_json_lines: bool,
    ) -> None:
        self.model, self.settings, self.raw = model, settings, raw
        self.as_json_lines = as_json_lines
        system = system or model.system
        self.begin: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.begin)

    def run(self) -> None:
        """Answer each line; on a terminal, an error does not end the conversation.

        Raises:
            AttnimgError: a line of a pipe can't be answered.
        """
        for line in _lines():
            if line == "/exit":
                return
            if line == "/help":
                sys.stderr.write(f"  {HELP}\n")
                continue
            if line == "/reset":
                self.messages = list(self.begin)
                continue
            try:
                self.answer(line)
            except AttnimgError as error:
                if not sys.stdin.isatty():
                    raise
                sys.stderr.write(f"{error}\n")

    def answer(self, line: str) -> None:
        """Print the answer to one line."""
        messages: list[Message] = [*self.messages, {"role": "user", "content": line}]
        with _stop_on_interrupt() as interrupts:
            found = answer(
                self.model,
                line if self.raw else messages,
                self.settings,
                on_text=self._print_piece,
                stopped=lambda: bool(interrupts),
            )
        if not self.raw:
            self.messages = [*messages, {"role": "assistant", "content": found.text}]
        if self.as_json_lines:
            print(json_line({"prompt": line, **asdict(found)}), flush=True)
            return
        print(flush=True)
        if found.finish != "stop":
            sys.stderr.write(f"  ({_ending(found)})\n")

    def _print_piece(self, text: str) -> None:
        if not self.as_json_lines:
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _ending(found: Answer) -> str:
    if found.finish == "interrupted":
        return "stopped"
    if found.finish == "context":
        return "cut off at the end of the model's context; /reset begins a new conversation"
    return f"cut off after {counted(found.tokens, 'token')}; --max-new-tokens allows more"


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty; Ctrl-C at the prompt ends them."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  for editing lines in input()

        with suppress(EOFError, KeyboardInterrupt):
            while True:
                if line := input("> ").strip():
                    yield line
        print()
        return
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # it is a TextIOWrapper
    for line in sys.stdin:
        if line := line.strip():
            yield line


@contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C inside the block; the second one raises KeyboardInterrupt."""
    interrupts: list[int] = []

    def collect(number: int, _frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, collect)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _check_numbers(
    max_new_tokens: int, temperature: float | None, top_p: float | None, seed: int | None
) -> None:
    """Raise for numbers out of range.

    Raises:
        AttnimgError: code bad-value.
    """
    for name, value, valid, needed in (
        ("--max-new-tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("--temperature", temperature, temperature is None or 0 <= temperature <= 100, "0 to 100"),
        ("--top-p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
        ("--seed", seed, seed is None or 0 <= seed < 2**32, "0 to 2**32 - 1"),
    ):
        if not valid:
            raise AttnimgError(
                f"{name} has an invalid value",
                why=f"found {value}; needed {needed}",
                do=f"pass {name} with a number in that range, or leave it out",
                code="bad-value",
            )
