"""Test that `make test` tries the same cases on every machine and in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from generated import DAMAGES, ODD, Damage, generate
from hypothesis import strategies as st

# Prints a digest of the cases of a seed, after it has loaded modules with constants of their own.
PROGRAM = """
import importlib, sys
sys.path[:0] = sys.argv[1:3]
for name in sys.argv[3:]:
    importlib.import_module(name)
from test_generated import digest
print(digest(12))
"""


def digest(at: int) -> str:
    found = hashlib.sha256()
    cases = st.tuples(DAMAGES, ODD, st.dictionaries(st.sampled_from("abc"), ODD))
    generate(cases, lambda case: found.update(repr(case).encode(errors="surrogatepass")), count=40,
          at=at)  # fmt: skip
    return found.hexdigest()


def test_a_seed_draws_the_same_cases_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "constants.py").write_text("A, B, C = 'attnimg', 918_273, b'\\x17\\x18'\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path), "constants"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == [digest(12)]
    assert digest(12) == digest(12)
    assert digest(12) != digest(13)


@pytest.mark.parametrize(
    ("damage", "needed"),
    [
        (Damage("flipped", (0, 999_999), (0, 1)), b"`bcdefghih"),
        (Damage("cut", (500_000,)), b"abcde"),
        (Damage("headless", (500_000,)), b"fghij"),
        (Damage("inserted", (100_000,), other=b"--"), b"a--bcdefghij"),
        (Damage("overlapping", (900_000, 100_000)), b"aj"),
        (Damage("twice"), b"abcdefghijabcdefghij"),
        (Damage("replaced", other=b"{}"), b"{}"),
    ],
    ids=lambda value: value.kind if isinstance(value, Damage) else "",
)
def test_a_damage_is_a_share_of_the_length(damage: Damage, needed: bytes) -> None:
    assert damage.of(b"abcdefghij") == needed
    assert damage.of(b"") in (b"", b"--", b"{}")
