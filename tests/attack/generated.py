"""Try the cases that hypothesis generates, and count those that pass.

A class of attacks is a file test_CLASS.py that calls `try_cases`. `make test` tries a fixed list
of cases: their number and seed are constants. With ATTACK_SECONDS, as in `make attack`, a class
goes on for that time; ATTACK_SEED chooses other cases.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.cache import LRUCache
from hypothesis.internal.conjecture import providers

SECONDS = float(os.environ.get("ATTACK_SECONDS", "0"))
SEED = int(os.environ.get("ATTACK_SEED", "12"))
T = TypeVar("T")
# Cases of a round, where the time ends a class: hypothesis can't be stopped by a clock.
_ROUND = 20
# The unit of Damage.places.
_MILLION = 1_000_000


def generate(
    cases: st.SearchStrategy[T], attempt: Callable[[T], None], *, count: int, at: int
) -> None:
    """Generate cases for a function: the same for the same count and seed, in any process.

    Args:
        cases: generates them.
        attempt: gets each.
        count: how many; fewer where there are not as many.
        at: the seed.
    """
    fixed = settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    none = providers.Constants()
    # hypothesis also draws constants of the modules that happen to be loaded.
    # Source: hypothesis 6.170.17, conjecture/providers.py, _get_local_constants (2026-11-27).
    with (
        patch.object(providers, "_get_local_constants", lambda: none),
        patch.object(providers, "CONSTANTS_CACHE", LRUCache(1024)),
    ):
        seed(at)(fixed(given(cases)(attempt)))()


def try_cases(
    kind: str,
    cases: st.SearchStrategy[T],
    judge: Callable[[T], str],
    *,
    record: Callable[[str, Any], None],
    count: int,
) -> None:
    """Try `count` cases, or as many as ATTACK_SECONDS allows; raise if one fails, with all that do.

    Args:
        kind: the name of the class.
        cases: generates wrong inputs, and right ones among them; none may depend on a clock, a
            temporary path or the machine.
        judge: tries one; returns what is wrong, "" where it passes.
        record: pytest's record_property; the summary prints what it gets.
        count: the cases of `make test`.
    """
    failed: list[tuple[str, str]] = []
    tried = 0
    digest = hashlib.sha256()
    end = time.monotonic() + SECONDS

    def attempt(case: T) -> None:
        nonlocal tried
        if SECONDS and time.monotonic() > end:
            return
        shown = repr(case)  # before the judge can change it
        digest.update(shown.encode(errors="surrogatepass"))
        tried += 1
        if why := judge(case):
            failed.append((shown, why))

    if SECONDS:
        round_ = 0
        while time.monotonic() < end:
            generate(cases, attempt, count=_ROUND, at=SEED + round_)
            round_ += 1
    else:
        generate(cases, attempt, count=count, at=SEED)
    record("attack", [kind, tried, tried - len(failed), digest.hexdigest()[:12]])
    assert not failed, f"{len(failed)} of {tried} failed:\n" + "\n\n".join(
        f"{case}\n  {why}" for case, why in failed[:20]
    )


@dataclass(frozen=True, slots=True)
class Damage:
    """A change to a file's content, which `of` makes.

    Attributes:
        kind: of change.
        places: in the file, in millionths of its length.
        bits: that are flipped, one at each place.
        other: bytes to insert, or to replace all by.
    """

    kind: str
    places: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    other: bytes = b""

    def of(self, content: bytes) -> bytes:
        """Return the damaged content."""
        at = [place * len(content) // _MILLION for place in self.places]
        if self.kind == "flipped":
            changed = bytearray(content)
            for place, bit in zip(at, self.bits, strict=True) if content else ():
                changed[place] ^= 1 << bit
            return bytes(changed)
        return {
            "cut": lambda: content[: at[0]],
            "headless": lambda: content[at[0] :],
            "inserted": lambda: content[: at[0]] + self.other + content[at[0] :],
            "overlapping": lambda: content[: min(at)] + content[max(at) :],
            "twice": lambda: content * 2,
            "replaced": lambda: self.other,
        }[self.kind]()


_PLACES = st.integers(0, _MILLION - 1)
_INSERTED = [b"\0", b"\xff\xfe", b"\n", b'"', b"[", b"]", b"{", b"}", b"1" * 5000, b"[" * 50_000,
             b"\x1b[31m", b"NaN", b"null", b"-", b" " * 9]  # fmt: skip
_REPLACED = [b"", b"\0" * 100, b"[]", b"{}", b"null", b"3", b'"text"']


@st.composite
def _flips(draw: st.DrawFn) -> Damage:
    flips = draw(st.lists(st.tuples(_PLACES, st.integers(0, 7)), min_size=1, max_size=4))
    places, bits = zip(*flips, strict=True)
    return Damage("flipped", places, bits)


# Flipped bits, a part missing, repeated, or other bytes inserted.
DAMAGES = st.one_of(
    _flips(),
    st.builds(Damage, st.sampled_from(["cut", "headless"]), st.tuples(_PLACES)),
    st.builds(lambda at, x: Damage("inserted", (at,), other=x),
              _PLACES, st.sampled_from(_INSERTED)),
    st.builds(Damage, st.just("overlapping"), st.tuples(_PLACES, _PLACES)),
    st.just(Damage("twice")),
    st.builds(lambda x: Damage("replaced", other=x),
              st.one_of(st.sampled_from(_REPLACED), st.binary(max_size=200))),
)  # fmt: skip


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
