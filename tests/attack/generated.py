"""Try the cases that hypothesis generates within a time, and count how many attnimg held.

A class of attacks is a file test_CLASS.py that calls `held_against`. ATTACK_SECONDS is the time of
a class, 6 by default and 120 in `make attack`; ATTACK_SEED chooses other cases.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("ATTACK_SECONDS", "6"))
SEED = int(os.environ.get("ATTACK_SEED", "12"))
T = TypeVar("T")
_CASES = settings(
    max_examples=20, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def held_against(
    kind: str,
    cases: st.SearchStrategy[T],
    judge: Callable[[T], str],
    *,
    record: Callable[[str, Any], None],
    least: int = 3,
) -> None:
    """Try cases until the time is over, and raise with all that fell.

    Args:
        kind: the name of the class.
        cases: generates wrong inputs, and right ones among them.
        judge: tries one; returns what fell, "" where attnimg held.
        record: pytest's record_property; the summary prints what it gets.
        least: cases that must be tried, however slow the machine is.
    """
    fallen: list[tuple[T, str]] = []
    tried = 0
    end = time.monotonic() + SECONDS

    def attempt(case: T) -> None:
        nonlocal tried
        if time.monotonic() > end and tried >= least:
            return
        tried += 1
        if why := judge(case):
            fallen.append((case, why))

    # In rounds: hypothesis can't be stopped by a clock.
    round_ = 0
    while tried < least or time.monotonic() < end:
        seed(SEED + round_)(_CASES(given(cases)(attempt)))()
        round_ += 1
    record("attack", [kind, tried, tried - len(fallen)])
    assert not fallen, f"{len(fallen)} of {tried} fell:\n" + "\n\n".join(
        f"{case!r}\n  {why}" for case, why in fallen[:20]
    )


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Generate a file with flipped bits, a part missing, repeated, or other bytes inserted."""
    places = st.integers(0, max(0, len(content) - 1))
    flips = st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=4)
    inserted = st.sampled_from(
        [b"\0", b"\xff\xfe", b"\n", b'"', b"[", b"]", b"{", b"}", b"1" * 5000, b"[" * 50_000,
         b"\x1b[31m", b"NaN", b"null", b"-", b" " * 9]
    )  # fmt: skip

    def flipped(pairs: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, bit in pairs:
            if changed:
                changed[place] ^= 1 << bit
        return bytes(changed)

    return st.one_of(
        flips.map(flipped),
        places.map(lambda at: content[:at]),
        places.map(lambda at: content[at:]),
        st.tuples(places, inserted).map(lambda x: content[: x[0]] + x[1] + content[x[0] :]),
        st.tuples(places, places).map(lambda x: content[: min(x)] + content[max(x) :]),
        st.sampled_from([b"", b"\0" * 100, content * 2, b"[]", b"{}", b"null", b"3", b'"text"']),
        st.binary(max_size=200),
    )


# Values that no key, field or cell of a table should be given.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**31), 10**40]),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e300, 1e-300, -1.5]),
    st.sampled_from([
        "", " ", "\0", "\x1b[31mred", "[red]x[/blue]", "x" * 300, "a/" * 3000, "\u202eabc",
        "~nobody", "../../etc/passwd", "/dev/zero", "/dev/null", "http://x/y", "no", "1e-4", "{{ x",
    ]),
    st.text(max_size=12),
    st.sampled_from([[], {}, [[]], [None], {"a": {"b": []}}, [1, "x"], {"path": 3}, ["x"] * 50]),
)  # fmt: skip
