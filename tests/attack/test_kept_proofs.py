"""Attack with kept proofs: damaged files and files that others could have written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damages import KINDS, put
from generated import DAMAGES, Damage, try_cases
from hypothesis import strategies as st

from attnimg.backends import find_backend
from attnimg.run_facts import Figure, Proof
from attnimg.verification import proofs as cache

FIGURE = Figure(quantity="dq", error=1e-7, allowed=1e-6, case="17 tokens")
PROOF = Proof(backend="sdpa", reasons=(), figures=(FIGURE,), cases=3, longest=64, seconds=0.5)
OTHERS = (*sorted({*KINDS} - {"gone"}), "link", "writable", "folder writable")


def test_kept_proofs(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    sdpa = find_backend("sdpa")
    assert sdpa is not None
    folder, path = tmp_path / "own", tmp_path / "own" / "k.json"
    cache.write(folder, "k", PROOF, log=lambda _: None)
    content = path.read_bytes()

    def judge(case: Damage | str) -> str:
        shutil.rmtree(folder)
        cache.write(folder, "k", PROOF, log=lambda _: None)
        if isinstance(case, Damage):
            path.write_bytes(case.of(path.read_bytes()))
        elif case == "writable":
            path.chmod(0o666)
        elif case == "folder writable":
            folder.chmod(0o777)
        elif case == "link":
            (tmp_path / "k.json").write_bytes(content)
            path.unlink()
            path.symlink_to(tmp_path / "k.json")
        else:
            put(path, case)
        said: list[str] = []
        try:
            found = cache.read(folder, "k", name="sdpa", has_bounds=True, log=said.append)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if found is None:
            return "" if len(said) == 1 else f"it says {said}, needed one sentence"
        if isinstance(case, str):
            return "it was taken"
        bad = [figure for figure in found.figures if not figure.error <= figure.allowed]
        return f"it was taken: {found}" if bad or found.backend != "sdpa" else ""

    try_cases("kept proofs", st.one_of(DAMAGES, st.sampled_from(OTHERS)), judge,
                 record=record_property, count=200)  # fmt: skip
