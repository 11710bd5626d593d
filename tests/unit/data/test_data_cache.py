"""What dataset_prepared_path keeps: used only when whole, the user's own, and of these data."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents, summary_line

Run = Callable[..., Config]
Write = Callable[..., str]

TEXTS = [{"text": f"Number {number}."} for number in range(100)]


def rows(documents: Any) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in documents["input_ids"]]


def test_prepared_documents_are_reused_until_something_changes(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = json_lines(*TEXTS)
    keys: dict[str, Any] = {"dataset_prepared_path": str(tmp_path / "prepared")}
    first = load_documents(run_on(path, **keys), tokenizer)
    again = load_documents(run_on(path, **keys, val_set_size=0.5), tokenizer)
    assert (first.figures[0].reused, again.figures[0].reused) == (False, True)
    assert "reused" in summary_line(again.figures[0])
    assert sorted(rows(first.train)) == sorted(rows(again.train) + rows(again.validation))
    assert rows(first.train) == rows(load_documents(run_on(path), tokenizer).train)
    assert not load_documents(run_on(path, **keys, sequence_len=64), tokenizer).figures[0].reused
    json_lines(*TEXTS[:50])
    assert not load_documents(run_on(path, **keys), tokenizer).figures[0].reused
    assert not list((tmp_path / "prepared").glob(".partial-*"))


def test_a_broken_record_leaves_nothing_prepared(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = json_lines(TEXTS[0], {"text": 3})
    config = run_on(path, dataset_prepared_path=str(tmp_path / "prepared"))
    with pytest.raises(AttnimgError, match="line 2"):
        load_documents(config, tokenizer)
    assert [path.name[:5] for path in (tmp_path / "prepared").iterdir()] == [".lock"]


def test_a_prepared_path_that_cannot_be_written_is_refused(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path = json_lines(*TEXTS)
    for prepared in (tmp_path / "file", tmp_path / "file" / "prepared"):
        with pytest.raises(AttnimgError) as caught:
            load_documents(run_on(path, dataset_prepared_path=str(prepared)), tokenizer)
        assert caught.value.key == "dataset_prepared_path"
    assert "remove dataset_prepared_path" in caught.value.do
    assert len(load_documents(run_on(path), tokenizer).train) == 100


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], *, sign: bool) -> None:
    """Change the figures of a kept folder, with or without the hash that vouches for them."""
    file = folder / "figures.json"
    kept = json.loads(file.read_text())
    change(kept["facts"])
    if sign:
        kept["sha256"] = sha256(json.dumps(kept["facts"], sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(kept))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the documents": (lambda f: flip(f / "documents.arrow"), "damaged"),
    "documents cut off": (lambda f: os.truncate(f / "documents.arrow", 200), "damaged"),
    "no documents": (lambda f: (f / "documents.arrow").unlink(), "documents.arrow cannot be read"),
    "no figures": (lambda f: (f / "figures.json").unlink(), "figures.json cannot be read"),
    "empty figures": (lambda f: (f / "figures.json").write_text(""), "damaged"),
    "endless figures": (lambda f: os.truncate(f / "figures.json", 1 << 36), "damaged"),
    "figures of another kind": (lambda f: (f / "figures.json").write_text("[1]"), "damaged"),
    "figures too deep": (lambda f: (f / "figures.json").write_text("[" * 50_000), "damaged"),
    "figures that are no text": (lambda f: (f / "figures.json").write_bytes(b"\xff\0"), "damaged"),
    "other figures": (
        lambda f: rewritten(f, lambda facts: facts["figures"].update(tokens=1), sign=False),
        "damaged",
    ),
    "another key": (
        lambda f: rewritten(f, lambda facts: facts.update(key="0" * 64), sign=True), "other data",
    ),
    "writable by others": (lambda f: (f / "documents.arrow").chmod(0o666), "other users may write"),
    "a folder writable by others": (lambda f: f.chmod(0o777), "other users may write"),
    "documents that are a pipe": (
        lambda f: replaced(f / "documents.arrow", os.mkfifo), "a regular",
    ),
    "figures that are a pipe": (lambda f: replaced(f / "figures.json", os.mkfifo), "a regular"),
    "a link": (
        lambda f: replaced(f / "documents.arrow", lambda p: p.symlink_to("/dev/zero")), "a regular",
    ),
    "a file for the folder": (lambda f: replaced(f, Path.touch), "a regular"),
    "a pipe for the folder": (lambda f: replaced(f, os.mkfifo), "a regular"),
    "a link for the folder": (lambda f: replaced(f, lambda p: p.symlink_to("/")), "a regular"),
    "an empty folder": (lambda f: replaced(f, Path.mkdir), "figures.json cannot be read"),
    "a folder in the file's place": (
        lambda f: replaced(f / "documents.arrow", Path.mkdir), "a regular",
    ),
}  # fmt: skip
if os.geteuid() == 0:
    DAMAGES |= {
        "another user's folder": (lambda f: os.chown(f, 12345, -1), "belongs to user 12345"),
        "another user's file": (
            lambda f: os.chown(f / "figures.json", 12345, -1), "belongs to user 12345",
        ),
    }  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_kept_folder_that_is_not_whole_and_own_is_prepared_again(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path, damage: str
) -> None:
    config = run_on(json_lines(*TEXTS[:5]), dataset_prepared_path=str(tmp_path / "prepared"))
    first = load_documents(config, tokenizer)
    expected = rows(first.train)
    assert first.warnings == ()
    (folder,) = (tmp_path / "prepared").glob("[!.]*")
    assert load_documents(config, tokenizer).figures[0].reused
    change, reason = DAMAGES[damage]
    change(folder)
    again = load_documents(config, tokenizer)
    assert not again.figures[0].reused
    assert len(again.warnings) == 1
    assert reason in again.warnings[0]
    assert "prepared again" in again.warnings[0]
    assert (rows(again.train), again.figures) == (expected, first.figures)
    kept = load_documents(config, tokenizer)
    assert (kept.figures[0].reused, kept.warnings) == (True, ())
    assert [path.name for path in (tmp_path / "prepared").glob("[!.]*")] == [folder.name]


def test_other_data_of_the_same_size_and_time_are_prepared_again(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = Path(json_lines(*TEXTS))
    config = run_on(path, dataset_prepared_path=str(tmp_path / "prepared"))
    first, before = load_documents(config, tokenizer), path.stat()
    path.write_bytes(path.read_bytes().replace(b"Number 7.", b"Number 9."))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    again = load_documents(config, tokenizer)
    assert not again.figures[0].reused
    assert again.figures[0].content != first.figures[0].content
    assert rows(again.train) == rows(load_documents(run_on(path), tokenizer).train)


@pytest.mark.parametrize("writes_date", [True, False])
def test_a_template_that_writes_the_date_is_prepared_again_the_next_day(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, writes_date: bool,
) -> None:  # fmt: skip
    class Tomorrow(date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2999, 1, 1)

    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template = tokenizer.chat_template
    if writes_date:
        template = "{{ strftime_now('%Y') }}" + template
    config = run_on(
        json_lines({"messages": talk}), "chat_template", chat_template_jinja=template,
        dataset_prepared_path=str(tmp_path / "prepared"),
    )  # fmt: skip
    load_documents(config, tokenizer)
    assert load_documents(config, tokenizer).figures[0].reused
    monkeypatch.setattr("attnimg.train.data.prepare.date", Tomorrow)
    assert load_documents(config, tokenizer).figures[0].reused != writes_date


def test_what_is_kept_is_its_users_alone(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    prepared.chmod(0o1777)  # as the image's /cache
    load_documents(run_on(json_lines(*TEXTS), dataset_prepared_path=str(prepared)), tokenizer)
    (folder,) = prepared.glob("[!.]*")
    assert sorted(path.name for path in folder.iterdir()) == ["documents.arrow", "figures.json"]
    assert {path.stat().st_mode & 0o077 for path in prepared.rglob("*")} == {0}


def test_a_folder_that_can_only_be_read_is_read(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the refusal of a read-only mount is put in by hand."""
    prepared = tmp_path / "prepared"
    config = run_on(json_lines(*TEXTS), dataset_prepared_path=str(prepared))
    load_documents(config, tokenizer)
    (folder,) = prepared.glob("[!.]*")
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(prepared)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **more)

    def cannot_remove(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("os.open", read_only)
    monkeypatch.setattr("attnimg.train.data.prepare._remove", cannot_remove)
    assert load_documents(config, tokenizer).figures[0].reused
    flip(folder / "documents.arrow")
    with pytest.raises(AttnimgError, match="damaged") as caught:
        load_documents(config, tokenizer)
    assert "Read-only" in caught.value.why


def test_of_several_processes_one_prepares(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    """Locks hold between threads as between processes; a killed run's leftovers are removed."""
    prepared = tmp_path / "prepared"
    config = run_on(json_lines(*TEXTS), dataset_prepared_path=str(prepared))
    load_documents(config, tokenizer)
    (folder,) = prepared.glob("[!.]*")
    shutil.copytree(folder, prepared / f".partial-{folder.name}-killed")
    flip(folder / "documents.arrow")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_documents(config, tokenizer), range(4)))
    assert sorted(documents.figures[0].reused for documents in found) == [False, True, True, True]
    assert len({tuple(rows(documents.train)) for documents in found}) == 1
    assert not list(prepared.glob(".partial-*"))
