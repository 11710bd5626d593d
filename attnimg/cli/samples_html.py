"""Write the statistics and samples of prepared data as one static HTML page.

The page has no script and loads nothing. Everything in it that comes from data is escaped, and its
Content-Security-Policy forbids scripts and requests even if that were wrong.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from attnimg.cli.samples_text import WITHOUT_LOSS, dropped_texts, facts
from attnimg.errors import AttnimgError, counted
from attnimg.files import data_file
from attnimg.train.checkpoint import write_errors
from attnimg.train.samples import SPACES, Omitted, Sample, SampledRow, Token, visible

if TYPE_CHECKING:
    from attnimg.train.data import SourceFigures
    from attnimg.train.preprocess import Preprocessed

# The sign of a white-space character -> that character.
_SPACES = {sign: letter for letter, sign in SPACES.items()}

# The beginning of each page; a file that begins otherwise is not overwritten.
_MARK = '<!doctype html>\n<html lang="en" data-made-by="attnimg preprocess">'


def require_page(path: Path) -> None:
    """Raise unless a page can be written to a path, before anything is tokenized.

    Raises:
        AttnimgError: it is a folder or another file, or its folder can't be written to (exit 2).
    """
    try:
        if path.exists() or path.is_symlink():
            with path.open("rb") as file:
                if file.read(len(_MARK)) == _MARK.encode():
                    return
            why = "found a file that this command did not write"
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                return
    except OSError as error:
        why = f"{error.filename or path}: {(error.strerror or str(error)).lower()}"
    raise AttnimgError(
        f"{path} cannot be written by --html",
        why=f"{why}; needed a new file, or a page that this command wrote",
        do="pass another file name with --html, in a folder that exists",
        code="not-writable",
    )


def write_page(
    path: Path,
    prepared: Preprocessed,
    *,
    name: str,
    samples: Sequence[Sample],
    row: SampledRow | None,
    seed: int,
) -> None:
    """Write a page to a temporary file, and rename it when it is complete.

    Args:
        path: where it is written.
        prepared: the prepared data.
        name: of the config, for the title.
        samples: documents to show.
        row: a packed row to show; None for none.
        seed: of the choice of samples.

    Raises:
        AttnimgError: it could not be written (disk-full, not-written).
    """
    text = "".join(_page(prepared, name, samples, row, seed))
    do = "free space, or pass a file on another disk with --html"
    with write_errors(path, kept="the cached documents are kept", do=do, key=None):
        _write(path, text)


def _write(path: Path, text: str) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _page(
    prepared: Preprocessed,
    name: str,
    samples: Sequence[Sample],
    row: SampledRow | None,
    seed: int,
) -> Iterator[str]:
    style = data_file("samples.css").read_text("utf-8")
    yield f'{_MARK}\n<head>\n<meta charset="utf-8">\n'
    yield (
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    )
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<title>{_text(name)}: training data</title>\n<style>\n{style}</style>\n</head>\n"
    yield "<body>\n"
    yield f"<header><h1>What <code>{_text(name)}</code> trains on</h1>\n"
    yield f"<div class=cards>{''.join(_cards(prepared))}</div></header>\n<main>\n"
    yield f"<section><h2>Datasets</h2>\n{_datasets(prepared.documents.figures)}"
    lines = "".join(f"<dt>{_text(n)}</dt><dd>{_text(text)}</dd>" for n, text in facts(prepared))
    yield f"<dl>{lines}</dl>"
    yield "".join(f"<p class=note>{_text(warning)}</p>" for warning in prepared.documents.warnings)
    yield f"</section>\n{_LEGEND}"
    for (key, split), group in groupby(samples, key=lambda one: (one.source.key, one.split)):
        chosen = list(group)
        count = counted(len(chosen), "document")
        yield (
            f"<section><h2>{_text(key)} <small>{split}: {count}, chosen at random "
            f"(seed {seed})</small></h2>\n<p class=path>{_text(chosen[0].source.path)}, "
            f"type {_text(chosen[0].source.type)}</p>\n"
        )
        yield from (_document(sample, _text(sample.place)) for sample in chosen)
        yield "</section>\n"
    if row is not None:
        yield from _row(row)
    yield "</main>\n</body>\n</html>\n"


def _cards(prepared: Preprocessed) -> Iterator[str]:
    """Yield the most important figures."""
    found, schedule = prepared.train.figures, prepared.schedule
    share = found["trained_tokens"] / max(1, found["tokens"])
    unit = prepared.documents.figures[0].unit
    number, _, name = counted(found["documents"], unit).partition(" ")
    yield _card(number, f"{name} to train on")
    yield _card(f"{found['tokens']:,}", "tokens")
    yield _card(f"{share:.1%}", f"trained: {counted(found['trained_tokens'], 'token')}", share)
    if found["filled_share"] is not None:
        yield _card(
            f"{found['filled_share']:.1%}",
            f"of {counted(found['rows'], 'row')} filled, "
            f"{'packed' if found['packed'] else 'not packed'}",
            found["filled_share"],
        )
    yield _card(f"{schedule.steps_per_epoch:,}", "optimizer steps in an epoch")
    if prepared.evaluation is not None:
        number, _, name = counted(prepared.evaluation.figures["documents"], unit).partition(" ")
        yield _card(number, f"{name} to evaluate on")


def _card(value: str, label: str, share: float | None = None) -> str:
    bar = "" if share is None else f'<meter value="{share:.4f}">{share:.1%}</meter>'
    return f"<div class=card><b>{_text(value)}</b><span>{_text(label)}</span>{bar}</div>"


def _datasets(sources: Iterable[SourceFigures]) -> str:
    head = "<tr><th>entry<th>path<th>type<th>records<th>documents<th>tokens<th>trained</tr>"
    rows = []
    for found in sources:
        numbers = (found.records, found.documents, found.tokens)
        share = found.trained_tokens / max(1, found.tokens)
        names = "".join(f"<td>{_text(text)}" for text in (found.key, found.path, found.type))
        cells = "".join(f"<td class=n>{number:,}" for number in numbers)
        rows.append(f"<tr>{names}{cells}<td class=n>{share:.1%}</tr>")
        for reason, text in dropped_texts(found):
            note = " class=note" if reason == WITHOUT_LOSS else ""
            rows.append(
                f"<tr class=dropped><td><td colspan=6><span{note}>{_text(text)}</span></tr>"
            )
    return f"<div class=wide><table>{head}{''.join(rows)}</table></div>"


_LEGEND = """<nav>
<label><input type=checkbox id=borders> show where tokens begin</label>
<span><span class=d><u><i>trained</i></u></span> has loss</span>
<span><span class=d><i>masked</i></span> is context only</span>
<span><span class=d><i class=s>&lt;|special|&gt;</i></span> special token</span>
<span><span class=d><i><b data-w="\u00b7"> </b></i></span> space</span>
<span><span class=d><i><b data-w="\u21b5"></b></i></span> line end</span>
<span><span class=d><i><b class=c>F0 9F</b></i></span> part of a character</span>
<span class=hint>Hover over a token for its id and vocabulary entry.</span>
</nav>
"""


def _row(row: SampledRow) -> Iterator[str]:
    filled = sum(sample.length for sample in row.documents)
    yield (
        f"<section><h2>A packed row <small>row {row.number:,} of {row.rows:,}: "
        f"{counted(len(row.documents), 'document')}, {filled:,} of {row.capacity:,} tokens"
        "</small></h2>\n"
        "<p>Documents in a row do not attend to each other; positions start at 0 in each.</p>\n"
    )
    widths = [100 * sample.length / row.capacity for sample in row.documents]
    parts = "".join(
        f'<span style="width:{width:.2f}%" title="document {number}">{number}</span>'
        for number, width in enumerate(widths, start=1)
    )
    yield f"<div class=row>{parts}</div>\n"
    for number, sample in enumerate(row.documents, start=1):
        where = f"document {number} of the row: {sample.source.key}, {sample.place}"
        yield _document(sample, _text(where))
    yield "</section>\n"


def _document(sample: Sample, title: str) -> str:
    share = sample.trained / max(1, sample.length)
    note = f"<p class=note>{_text(sample.note)}</p>" if sample.note else ""
    return (
        f"<article><h3>{title}<small>{counted(sample.length, 'token')}, {sample.trained:,} trained "
        f'<meter value="{share:.4f}">{share:.0%}</meter></small></h3>{note}\n'
        f"<div class=d dir=auto>{''.join(_runs(sample.tokens))}</div></article>\n"
    )


def _runs(tokens: Iterable[Token | Omitted]) -> Iterator[str]:
    """Yield the tokens, with those that are trained underlined together."""
    for kind, group in groupby(tokens, key=lambda one: isinstance(one, Token) and one.trained):
        run = "".join(map(_token, group))
        yield f"<u>{run}</u>" if kind else run


def _token(token: Token | Omitted) -> str:
    if isinstance(token, Omitted):
        return (
            f"<span class=more>not shown: {counted(token.tokens, 'token')}, {token.trained:,} of "
            "them trained</span>"
        )
    state = "trained" if token.trained else "masked"
    if not token.position:
        state = "masked: nothing comes before the first token"
    raw = f", bytes {token.raw.hex(' ').upper()}" if token.raw else ""
    piece = _text("".join(part for _, part in visible(token.piece)))
    about = f"id {token.id} \u2502 {piece}{raw} \u2502 token {token.position:,} \u2502 {state}"
    mark = " class=s" if token.special else ""
    return f'<i{mark} data-t="{about}">{_token_text(token)}</i>'


def _token_text(token: Token) -> str:
    if not token.text:
        return f"<b class=c>{_text(token.raw.hex(' ').upper() or token.piece)}</b>"
    shown = ""
    for mark, part in visible(token.text):
        match mark:
            case "text":
                shown += escape(part)
            case "space" | "line":
                # CSS draws the sign, so that text wraps at spaces and can be copied.
                shown += f'<b data-w="{part}">{_SPACES[part]}</b>'
            case "code":
                shown += f"<b class=c>{part}</b>"
    return shown


def _text(text: str) -> str:
    """Return text for HTML: escaped, without characters that are invisible or reorder text."""
    return escape("".join(part if mark != "space" else " " for mark, part in visible(text)))
