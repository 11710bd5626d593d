"""Run `attnimg convert`: convert another trainer's config into one for attnimg."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.cli import Styled, finding_json, findings_text, json_line
from attnimg.cli.check import print_styled
from attnimg.errors import AttnimgError, counted, printable, shortened
from attnimg.redact import redact

if TYPE_CHECKING:
    from attnimg.config.conversion import Conversion

_COLORS = {"done": "green", "done-otherwise": "yellow", "hint-not-used": "yellow", "refused": "red"}


def convert(
    file: str,
    output: str | None,
    trainer: str | None,
    dataset_format: str | None,
    as_json_lines: bool,
) -> None:
    """Convert one file: the new config to stdout or to a file, the report to stderr."""
    from attnimg.config import conversion
    from attnimg.config.read import read_yaml

    values = read_yaml(file)
    if output is not None and Path(output).exists():
        what = f"{output} exists already"
        why = "found a file or folder of that name, which is not overwritten"
        raise AttnimgError(what, why=why, do="pass --output with another name", code="file-exists")
    found = conversion.convert_values(
        values,
        trainer=trainer or conversion.find_trainer(values),  # type: ignore[arg-type]  # one of argparse's choices
        file=file,
        records=_records,
        format_of_data=dataset_format,  # type: ignore[arg-type]  # one of argparse's choices
    )
    if output is not None and not found.errors:
        _write(Path(output), found.text)
    if as_json_lines:
        print(json_line(_as_json(found, file=file, output=output)))
    else:
        for text in _report(found, file=file, output=output):
            print_styled(text, sys.stderr)
        if output is None and not found.errors:
            is_terminal = sys.stdout.isatty()
            print(printable(found.text) if is_terminal else found.text, end="")
    raise SystemExit(2 if found.errors else 0)


def _as_json(found: Conversion, *, file: str, output: str | None) -> dict[str, Any]:
    """Return the object that `convert --json` prints."""
    ok = not found.errors
    written = {
        "file": redact(file),
        "from": found.trainer,
        "ok": ok,
        "output": output if ok else None,
        "keys": [asdict(answer) for answer in found.answers],
        "added": dict(found.added),
        "config": dict(found.values) if ok else None,
        "yaml": found.text if ok else None,
        "errors": [finding_json(finding) for finding in found.errors],
        "warnings": [finding_json(finding) for finding in found.warnings],
    }
    # NaN and infinity, which JSON does not have, are refused, but are in the report.
    loaded: dict[str, Any] = json.loads(
        json.dumps(written, default=str), parse_constant=lambda name: name
    )
    return loaded


def _report(found: Conversion, *, file: str, output: str | None) -> Iterator[Styled]:
    """Yield a line for each key of the old config, each added key and each finding."""
    from attnimg.config.conversion import NAMES

    width = max((len(answer.key) for answer in found.answers), default=0)
    for answer in found.answers:
        text = shortened(", ".join(answer.to))
        if answer.reason:
            text += f"{': ' if text else ''}{shortened(answer.reason)}"
        line: Styled = [
            (f"  {answer.answer:<14} ", _COLORS[answer.answer]),
            (f"{shortened(answer.key):<{width}}  ", ""),
            (text, "dim"),
        ]
        if answer.do and answer.answer != "refused":
            line.append((f"\n    do:  {shortened(answer.do)}", "dim"))
        yield line
    if found.added and not found.errors:
        listed = ", ".join(f"{key}: {_short(value)}" for key, value in found.added.items())
        name = NAMES[found.trainer]
        yield [(f"  {'added':<14} {name}'s defaults: {listed}", "dim")]
    for findings, kind in ((found.errors, "error"), (found.warnings, "warning")):
        if kind == "error" or not found.errors:
            yield from findings_text(findings, kind)
    if found.errors:
        count = len(found.errors)
        mark, end = ("no", "red"), f"  {counted(count, 'error')}; nothing was written"
    else:
        mark, end = ("ok", "green"), f"  {output}" if output else ""
    yield [mark, (f"  {file}  ", ""), (f"from {NAMES[found.trainer]}", "cyan"), (end, "")]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _write(path: Path, text: str) -> None:
    """Write the new config to a temporary name, and rename it when it is complete."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
            os.link(name, path)  # fails if a file of that name was created meanwhile
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise AttnimgError(
            f"{path} can't be written",
            why=(error.strerror or str(error)).lower(),
            do="pass --output with a name in a folder that you can write to",
            code="file-missing",
        ) from error


def _records(entry: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a dataset on this machine; none without the packages that read it."""
    # ValueError: pydantic's, on a wrong entry; `check` names it in the new config.
    with suppress(AttnimgError, ImportError, ValueError):
        from attnimg.config.schema import DatasetSpec
        from attnimg.train.data.sources import find_source, read_source

        source = find_source(DatasetSpec.model_validate(entry), key="datasets[0]")
        if source.kind != "hub":
            for _, record in read_source(source):
                yield record
