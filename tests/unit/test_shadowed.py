"""FlashAttention-2's stub in front of FlashAttention-4: told by content, without an import."""

from __future__ import annotations

import base64
import hashlib

import pytest

from attnimg.machine.probe import shadowed

FILE = "flash_attn/cute/interface.py"


def install(site, package, content):
    """Put a distribution of one file into a folder, as pip does."""
    path = site / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=")
    info = site / f"{package.replace('-', '_')}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "RECORD").write_text(f"{FILE},sha256={digest.decode()},{len(content)}\n")


@pytest.mark.parametrize(
    ("order", "found"),
    [
        pytest.param(["flash-attn", "flash-attn-4"], (), id="FA4 last: it is in front"),
        pytest.param(["flash-attn-4", "flash-attn"], ("flash-attn-4",), id="FA2 last: its stub is"),
        pytest.param(["flash-attn-4"], (), id="FA4 alone"),
        pytest.param(["flash-attn"], (), id="FA2 alone"),
    ],
)
def test_whichever_was_installed_last_wins(tmp_path, monkeypatch, order, found):
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in order:
        install(tmp_path, package, f"# {package}")
    assert shadowed(order) == found


def test_a_file_that_an_uninstall_took_along_is_missed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("flash-attn", "flash-attn-4"):
        install(tmp_path, package, f"# {package}")
    (tmp_path / FILE).unlink()
    assert shadowed(["flash-attn", "flash-attn-4"]) == ("flash-attn-4",)
