"""Print statistics and samples of prepared data as text that shows which tokens are trained.

Trained tokens are in brackets as well as in color, for terminals and files without colors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TextIO

from rich.console import Console
from rich.text import Text

from attnimg.errors import counted, printable
from attnimg.train.data import summary_line
from attnimg.train.samples import Omitted, Sample, SampledRow, Token, visible

if TYPE_CHECKING:
    from attnimg.train.data import SourceFigures
    from attnimg.train.preprocess import Preprocessed, Split

# Two shades each, to distinguish adjacent tokens. Color-blind readers can tell blue and grey apart,
# which also differ in brightness (Okabe and Ito, 2008).
_TRAINED = ("#000000 on #56b4e9", "#000000 on #9ad4f5")
_MASKED = ("#c8c8c8 on #303030", "#c8c8c8 on #454545")
_SPECIAL, _FAINT, _WARNING = "bold", "dim", "bold yellow"

# Dropped records for which the labels are probably wrong.
WITHOUT_LOSS = "without_loss"

# Texts for the counts of SourceFigures that name some records.
_REASONS = {
    "empty": "dropped: no text",
    "too_long": "dropped: longer than sequence_len",
    "too_short": "dropped: shorter than min_sample_len",
    WITHOUT_LOSS: "dropped: no trained token",
    "split": "split: longer than sequence_len",
    "truncated": "truncated: longer than sequence_len",
}


class Signs(NamedTuple):
    """The signs around trained tokens, special tokens and bytes, and between documents."""

    trained: tuple[str, str]
    special: tuple[str, str]
    code: tuple[str, str]
    line: str


_UNICODE = Signs(("\u27e6", "\u27e7"), ("\u2039", "\u203a"), ("\u27e8", "\u27e9"), "\u2500")
_ASCII = Signs((">>>", "<<<"), ("{", "}"), ("{", "}"), "-")


class Printer(NamedTuple):
    """A stream to print to, and the signs that its encoding supports."""

    console: Console
    signs: Signs


def printer(file: TextIO) -> Printer:
    """Return a printer for a stream: in color for a terminal, unless NO_COLOR is set."""
    unicode = (file.encoding or "utf-8").lower().startswith("utf")
    console = Console(
        file=file, highlight=False, emoji=False, markup=False, soft_wrap=True,
        no_color=None if unicode else True,
    )  # fmt: skip
    return Printer(console, _UNICODE if unicode else _ASCII)


def print_figures(prepared: Preprocessed, out: Printer) -> None:
    """Print what happened to the records of each dataset entry, and the run's rows and steps."""
    for figures in prepared.documents.figures:
        _print(out, f"{figures.key}  {summary_line(figures)}")
        for name, text in dropped_texts(figures):
            _print(out, f"    {text}", style=_WARNING if name == WITHOUT_LOSS else "")
    for name, text in facts(prepared):
        _print(out, f"{name:<12}{text}")


def dropped_texts(figures: SourceFigures) -> Iterator[tuple[str, str]]:
    """Yield each reason why records were dropped or cut, and a line with the first places."""
    for name, places in figures.places.items():
        count = getattr(figures, name)
        more = ", ..." if count > len(places) else ""
        yield name, f"{count:,} {_REASONS[name]} ({'; '.join(places)}{more})"


def facts(prepared: Preprocessed) -> Iterator[tuple[str, str]]:
    """Yield a name and a text: the splits, the steps of the run, and where the data are kept."""
    unit = prepared.documents.figures[0].unit
    yield from _split_facts("training", prepared.train, unit)
    if prepared.evaluation is not None:
        yield from _split_facts("evaluation", prepared.evaluation, unit)
    config, schedule = prepared.config, prepared.schedule
    rows = config.micro_batch_size * config.gradient_accumulation_steps * prepared.world
    processes = f" in {prepared.world} processes" if prepared.world > 1 else ""
    until = f"num_epochs: {config.num_epochs:g}"
    if config.max_steps:
        until = f"max_steps: {config.max_steps}"
    yield (
        "steps",
        f"{counted(schedule.steps_per_epoch, 'optimizer step')} in an epoch, "
        f"{counted(rows, 'row')} in each{processes}; {schedule.total_steps:,} in the run "
        f"({until})",
    )
    yield "kept in", _kept_text(prepared)


def _kept_text(prepared: Preprocessed) -> str:
    """Return where the tokenized documents are kept for `train`."""
    folder = prepared.config.dataset_prepared_path
    if folder is None:
        return "memory only; set dataset_prepared_path to keep the tokenized data for train"
    others = ", ".join(found.key for found in prepared.documents.figures if not found.kept)
    return folder + (f"; not {others}: datasets of the hub may change" if others else "")


def _split_facts(name: str, split: Split, unit: str) -> Iterator[tuple[str, str]]:
    found = split.figures
    share = found["trained_tokens"] / max(1, found["tokens"])
    yield (
        name,
        f"{counted(found['documents'], unit)}, {counted(found['tokens'], 'token')}, "
        f"{found['trained_tokens']:,} trained ({share:.1%})",
    )
    if found["filled_share"] is None:
        return
    how = "packed" if found["packed"] else "not packed, one document in each"
    yield (
        "  rows",
        f"{found['rows']:,} with {found['row_capacity']:,} tokens each ({how}), "
        f"{found['filled_share']:.1%} filled",
    )


def print_samples(samples: Sequence[Sample], row: SampledRow | None, out: Printer) -> None:
    """Print samples and a packed row, with a legend."""
    signs = out.signs
    first, last = signs.trained
    legend = Text("\n")
    legend.append(f"{first}trained{last}", _TRAINED[0])
    legend.append(" masked ", _MASKED[0])
    legend.append(f" {signs.special[0]}special token{signs.special[1]}", _SPECIAL)
    legend.append(
        f"  {signs.code[0]}F0 9F{signs.code[1]} bytes or codes that cannot be shown"
        + ("" if signs is _ASCII else "  \u00b7 space  \u21b5 line end"),
        _FAINT,
    )
    _print(out, legend)
    for sample in samples:
        title = f"{sample.source.key}, {sample.split}: {sample.place}"
        _print_document(sample, title, out)
    if row is not None:
        filled = sum(sample.length for sample in row.documents)
        _print(
            out,
            f"\nrow {row.number} of {row.rows}: {counted(len(row.documents), 'document')}, "
            f"{filled:,} of {row.capacity:,} tokens; none of them attends to another",
            style="bold",
        )
        start = 0
        for number, sample in enumerate(row.documents, start=1):
            end = start + sample.length
            title = f"document {number}, tokens {start:,} to {end - 1:,} of the row"
            _print_document(sample, f"{title}: {sample.source.key}, {sample.place}", out)
            start = end


def _print_document(sample: Sample, title: str, out: Printer) -> None:
    rule = out.signs.line * 3
    _print(
        out,
        f"\n{rule} {title} {rule} {counted(sample.length, 'token')}, {sample.trained:,} trained",
        style=_FAINT,
    )
    if sample.note:
        _print(out, f"! {sample.note}", style=_WARNING)
    _print(out, tokens_text(sample.tokens, out.signs))


def tokens_text(tokens: Iterable[Token | Omitted], signs: Signs) -> Text:
    """Return tokens as text: trained ones between brackets, each token in a color."""
    text, inside = Text(), False
    for token in tokens:
        trained = isinstance(token, Token) and token.trained
        if trained != inside:
            text.append(signs.trained[not trained], _TRAINED[0])
            inside = trained
        if isinstance(token, Omitted):
            text.append(
                f"\n... {counted(token.tokens, 'token')}, {token.trained:,} of them trained ...\n",
                _FAINT,
            )
            continue
        shade = (_TRAINED if trained else _MASKED)[token.position % 2]
        text.append(_token_text(token, signs), f"{_SPECIAL} {shade}" if token.special else shade)
    if inside:
        text.append(signs.trained[1], _TRAINED[0])
    return text


def _token_text(token: Token, signs: Signs) -> str:
    shown = ""
    for mark, part in visible(token.text):
        if mark == "code":
            part = part.join(signs.code)
        elif mark != "text" and signs is _ASCII:
            part = " "
        shown += part + ("\n" if mark == "line" else "")
    if not token.text:
        shown = (token.raw.hex(" ").upper() or token.piece).join(signs.code)
    return shown.join(signs.special) if token.special else shown


def _print(out: Printer, text: str | Text, *, style: str = "") -> None:
    """Print text; escape control characters, and characters that the encoding lacks."""
    shown = Text(printable(text), style) if isinstance(text, str) else text
    if out.signs is _ASCII:
        shown.plain = shown.plain.encode("ascii", "backslashreplace").decode("ascii")
    out.console.print(shown)
