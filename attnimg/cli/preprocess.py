"""Run `attnimg preprocess`: prepare and cache the data of a run, and show samples of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg import config
from attnimg.cli import as_text, json_line
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, printable
from attnimg.train.distributed import rank, require_group
from attnimg.train.environment import require_parsable
from attnimg.train.packages import require_trainer

if TYPE_CHECKING:
    from rich.console import Console

    from attnimg.train.preprocess import Preprocessed
    from attnimg.train.samples import Omitted, Sample, SampledRow, Token

# The most tokens of a document, and of each document in a row, on a terminal and in HTML.
_SHOWN, _SHOWN_IN_ROW, _SHOWN_ON_PAGE = 400, 80, 4000

# Samples of each dataset entry in the HTML file, without --show.
_ON_PAGE = 10


def preprocess(
    file: str,
    settings: list[str],
    show: int | None,
    seed: int,
    html: str | None,
    as_json_lines: bool,
) -> None:
    """Tokenize, pack and cache the data of a run; show which tokens of samples are trained."""
    require_trainer()
    require_parsable(os.environ)
    require_group()
    page = None if html is None else Path(html)
    if html == "":
        raise AttnimgError(
            "--html has no file name",
            why='found "", needed the name of the page',
            do="pass a file name with --html, such as samples.html, or leave --html out",
            code="bad-value",
        )
    if page is not None:
        from attnimg.cli.samples_html import require_page

        require_page(page)
    err = as_text.console(sys.stderr)
    err.quiet = rank() != 0
    values = _read(file, settings, err)

    from attnimg.train.preprocess import preprocess as prepare

    def log(text: str) -> None:
        err.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    with _exit_on_sigterm():
        prepared = prepare(values, log=log)
        for warning in prepared.documents.warnings:
            log(f"warning: {warning}")
        if rank() == 0:
            _report(prepared, file, show, seed=seed, page=page, as_json=as_json_lines)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit in the block on SIGTERM, so that unfinished files are removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(file: str, settings: list[str], err: Console) -> Config:
    """Return the config after printing its warnings; print its errors and exit if it has any."""
    checked = config.check_file(file, overrides=tuple(settings))
    as_text.print_findings(checked, err=err)
    if checked.config is None or not checked.ok:
        raise SystemExit(2)
    return checked.config


def _report(
    prepared: Preprocessed, file: str, show: int | None, *, seed: int, page: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Print the statistics and the samples, and write the page."""
    from attnimg.cli import samples_text
    from attnimg.train.samples import choose_row, choose_samples

    if page is not None:
        from attnimg.cli.samples_html import write_page

        count = _ON_PAGE if show is None else show
        write_page(
            page,
            prepared,
            name=Path(file).name,
            samples=choose_samples(prepared, count, seed=seed, limit=_SHOWN_ON_PAGE),
            row=choose_row(prepared, seed=seed, limit=_SHOWN_ON_PAGE) if count else None,
            seed=seed,
        )
    if as_json:
        samples = choose_samples(prepared, show or 0, seed=seed, limit=None)
        row = choose_row(prepared, seed=seed, limit=None) if show else None
        print(json_line(_json(prepared, file, samples, row, page=page)))
        return
    out = samples_text.printer(sys.stdout)
    samples_text.print_figures(prepared, out)
    if show:
        samples = choose_samples(prepared, show, seed=seed, limit=_SHOWN)
        row = choose_row(prepared, seed=seed, limit=_SHOWN_IN_ROW)
        samples_text.print_samples(samples, row, out)
    if page is not None:
        # Control characters in the path are escaped for a terminal, but not for scripts.
        print(printable(str(page)) if sys.stdout.isatty() else page)


def _json(
    prepared: Preprocessed,
    file: str,
    samples: list[Sample],
    row: SampledRow | None,
    *,
    page: Path | None,
) -> dict[str, Any]:
    """Return the object that `preprocess --json` prints."""
    evaluation, folder = prepared.evaluation, prepared.config.dataset_prepared_path
    return {
        "file": file,
        "prepared": folder,
        "datasets": [asdict(figures) for figures in prepared.documents.figures],
        "training": prepared.train.figures,
        "evaluation": evaluation.figures if evaluation else None,
        "steps_per_epoch": prepared.schedule.steps_per_epoch,
        "total_steps": prepared.schedule.total_steps,
        "processes": prepared.world,
        "warnings": list(prepared.documents.warnings),
        "samples": [_sample_json(sample) for sample in samples],
        "row": row
        and {
            "number": row.number,
            "capacity": row.capacity,
            "documents": [_sample_json(sample) for sample in row.documents],
        },
        "html": str(page) if page else None,
    }


def _sample_json(sample: Sample) -> dict[str, Any]:
    return {
        "dataset": sample.source.key,
        "split": sample.split,
        "place": sample.place,
        "tokens": sample.length,
        "trained_tokens": sample.trained,
        "note": sample.note or None,
        "shown": [_token_json(token) for token in sample.tokens],
    }


def _token_json(token: Token | Omitted) -> dict[str, Any]:
    values = asdict(token)
    if raw := values.pop("raw", None):
        values["bytes"] = raw.hex(" ")
    return values
