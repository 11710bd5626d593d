"""Test that signal handlers, the signal mask, umask and working directory are restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnimg.application.registry import keep_process_settings


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o022)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    os.umask(umask)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def change() -> None:
    """Change all settings, as the import of a kernel may."""
    os.chdir("/")
    os.umask(0o777)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


@pytest.mark.parametrize("raises", [False, True], ids=["", "and it raises"])
def test_settings_are_restored(tmp_path: Path, raises: bool) -> None:
    def handler(*_: object) -> None:
        pass

    signal.signal(signal.SIGTERM, handler)
    usual = signal.getsignal(signal.SIGUSR1)
    try:
        with keep_process_settings():
            change()
            if raises:
                raise ValueError
    except ValueError:
        assert raises
    assert Path.cwd() == tmp_path
    assert umask() == 0o022
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.getsignal(signal.SIGUSR1) is usual
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_thread_other_than_the_main_one_restores_all_but_handlers(tmp_path: Path) -> None:
    found: list[object] = []

    def work() -> None:
        with keep_process_settings():
            change()
        found.extend([Path.cwd(), umask()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [tmp_path, 0o022]


def test_the_working_directory_need_not_be_readable(tmp_path: Path) -> None:
    code = f"""if True:
        import os
        from attnimg.application.registry import keep_process_settings
        os.chmod(".", 0o311)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with keep_process_settings():
            os.chdir("/")
        assert os.getcwd() == {str(tmp_path)!r}
    """
    try:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    finally:
        tmp_path.chmod(0o700)
