"""What a kernel raised is told in a line that keeps the cause, wherever it stands."""

from __future__ import annotations

from attnimg.errors import BEGINNING, ENDING, exception_text


def test_a_short_message_is_whole_and_on_one_line() -> None:
    assert (
        exception_text(RuntimeError("No available\n  kernel."))
        == "RuntimeError: No available kernel."
    )
    longest = "x" * (BEGINNING + ENDING)
    assert exception_text(ValueError(longest)) == f"ValueError: {longest}"


def test_of_a_long_message_the_beginning_and_the_end_are_kept() -> None:
    text = f"No operator found for {'shapes ' * 200}: xFormers wasn't build with CUDA support"
    found = exception_text(NotImplementedError(text))
    assert found.startswith("NotImplementedError: No operator found for shapes")
    assert found.endswith("xFormers wasn't build with CUDA support")
    assert len(found) < 700
