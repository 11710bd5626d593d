"""Read the records of GPU runs that tests/gpu/suite.py wrote, and write the pages of them."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnimg.backends import find_backend
from attnimg.errors import AttnimgError
from recipes.files import NOTICE
from recipes.pages import code_list, markdown_table

FOLDER = "docs/gpu-runs"
NONE = "No run on a GPU is recorded yet.\n"

# The reference for losses: the first of these backends that was trained in the same run.
REFERENCES = ("sdpa", "eager", "sdpa_math")

Record = Mapping[str, Any]
_FIELDS = frozenset({"kind", "step", "backend", "started", "seconds", "machine", "state"})
_GOOD, _BAD = ("passed", "measured"), ("failed", "crash", "timeout")
_HEAD = """# Runs on GPUs

Each section is one run of `tests/gpu/suite.py` on a machine with a GPU: it proves every attention
backend there, trains with those that passed, and times them. Its records are in `docs/gpu-runs/`,
one JSON object per line. A result is one of: **passed**; **failed**, with the reason; **crash** or
**timeout** of the process that ran the kernel; **not here**, if the machine or a missing package
rules it out; **not reached**, if the time was up before.

- A *proof* compares a backend's outputs and gradients with plain attention in float64 on more than
  100 calls, packed documents among them, as `attnimg verify` does.
- *Training* is some steps of a random Llama on packed rows, with the same weights and data for each
  backend. The losses are compared with those of sdpa, else of eager attention, else of sdpa_math,
  in the same run. *1b* has the shape of Llama 3.2 1B.
- *Times* are medians by CUDA events. Operations are those that a causal model needs: for each
  document of L tokens and each query head, L * L / 2 * 4 * head_dim forward, and 2.5 times as many
  backward, whatever the kernel computes. The peak is the GPU's for dense bfloat16 matrix products.

Times of other versions of torch, Python or kernels than an image's never change the order in which
`auto` tries backends.
"""


def read_runs(root: Path) -> dict[str, list[Record]]:
    """Read the records of a checkout: name -> records, by name."""
    return {path.stem: read_run(path) for path in sorted((root / FOLDER).glob("*.jsonl"))}


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Notes on a run, written by hand.

    Attributes:
        was: its name on its machine, which another run's `known` may have.
        notes: sentences for its section.
    """

    was: str
    notes: tuple[str, ...]


def read_notes(root: Path) -> dict[str, Notes]:
    """Read docs/gpu-runs/notes.toml: name of a run -> its notes."""
    path = root / FOLDER / "notes.toml"
    found = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: Notes(was=one["was"], notes=tuple(one["notes"])) for name, one in found.items()}


def read_run(path: Path) -> list[Record]:
    """Read the records of one file; a last line that was cut off is left out.

    Raises:
        AttnimgError: another line is not a JSON object with the fields of a record (code
            "bad-records").
    """
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in [*lines, *([last] if last.endswith("}") else [])]]
        for place, record in enumerate(records, 1):
            if missing := _FIELDS - (record.keys() if isinstance(record, dict) else set()):
                raise ValueError(f"record {place} lacks {', '.join(sorted(missing))}")
        return records
    except (OSError, ValueError) as error:
        raise AttnimgError(
            f"{path} cannot be read",
            why=f"{type(error).__name__}: {error}; needed JSON objects, one per line",
            do="copy the file that tests/gpu/suite.py wrote",
            code="bad-records",
            exit_code=1,
        ) from error


def find_faults(records: Sequence[Record], *, all_right: bool) -> list[str]:
    """List what a run's records lack.

    Args:
        records: of one run.
        all_right: whether units that failed are faults too, as in a rehearsal.
    """
    steps = [record["step"] for record in records if record["kind"] == "run"]
    found = [f"no record of the run's {step}" for step in ("start", "end") if step not in steps]
    recorded = [record["unit"] for record in records if "unit" in record]
    planned = [name for r in records if r["kind"] == "plan" for name in r["values"]["units"]]
    found += [f"planned, but without a record: {name}" for name in planned if name not in recorded]
    twice = {name for name in recorded if recorded.count(name) > 1}
    found += [f"recorded more than once: {name}" for name in sorted(twice)]
    proven = any(record["kind"] == "proof" for record in records)
    if not proven and not _start(records).get("known"):
        found.append("no proof was recorded")
    if all_right:
        wrong = [r for r in records if r["state"] in (*_BAD, "not reached")]
        found += [f"{r.get('unit', r['step'])}: {r['state']}: {r.get('text', '')}" for r in wrong]
    return found


def runs_page(
    runs: Mapping[str, Sequence[Record]], notes: Mapping[str, Notes] | None = None
) -> str:
    """Write the page of all runs, the newest first."""
    parts = [f"<!-- {NOTICE} -->\n\n{_HEAD}", runs_table(runs)]
    parts += [
        _section(name, records, notes or {}) for name, records in sorted(runs.items(), reverse=True)
    ]
    return "\n".join(parts)


def runs_table(runs: Mapping[str, Sequence[Record]]) -> str:
    """Return the table of all runs: what ran on which GPU."""
    rows = []
    for name, records in sorted(runs.items(), reverse=True):
        start = _start(records)
        rows.append(
            (
                f"{start.get('gpu', '?')}, {_day(records)}",
                f"torch {start['versions'].get('torch', '?')}",
                code_list(_backends(records, "proof", ("passed",))),
                code_list(_backends(records, "training", ("passed",))),
                code_list(_backends(records, "proof", _BAD) | _backends(records, "training", _BAD)),
                f"[{name}](#{name})",
            )
        )
    head = ("GPU", "with", "proof passed", "trained", "failed somewhere", "record")
    return markdown_table(head, rows) if rows else NONE


def _section(name: str, records: Sequence[Record], notes: Mapping[str, Notes]) -> str:
    """Write one run."""
    parts = [f'<a id="{name}"></a>\n\n## {_start(records).get("gpu", "?")}, {_day(records)}\n']
    parts.append(_summary(name, records, {one.was: run for run, one in notes.items()}))
    if name in notes:
        listed = "".join(f"- {note}\n" for note in notes[name].notes)
        parts.append(f"### Findings and fixes\n\n{listed}")
    parts.append(_machine(records))
    for title, made in (
        ("Kernels installed or compiled", _kernels(records)),
        ("Proofs", _proofs(records)),
        ("Repeated proofs: how often a kernel that passed is refused", _repeats(records)),
        ("Training", _training(records)),
        ("Times, forward and backward", _times(records)),
        ("`attnimg train` of the same job", _jobs(records)),
        ("Failures", _failures(records)),
        ("Not available on this machine", _absent(records)),
        ("Not reached in time", _unreached(records)),
    ):
        if made:
            parts.append(f"### {title}\n\n{made}")
    return "\n".join(parts)


def _start(records: Sequence[Record]) -> dict[str, Any]:
    """Return the values of the run's first record."""
    found = [r for r in records if r["kind"] == "run" and r["step"] == "start"]
    return dict(found[0]["values"]) if found else {"versions": {}}


def _day(records: Sequence[Record]) -> str:
    return str(records[0]["started"])[:10] if records else "?"


def _summary(name: str, records: Sequence[Record], names: Mapping[str, str]) -> str:
    """Return sentences on how the run went; `names` maps the GPU machine's run names to ours."""
    start, units = _start(records), [r for r in records if "unit" in r]
    counts = Counter(r["state"] for r in units)
    ends = [r for r in records if r["kind"] == "run" and r["step"] == "end"]
    last = units[-1]["unit"] if units else "none"
    how = (
        f"It ran to its end in {ends[-1]['seconds']:.0f} s"
        if ends
        else f"It was cut off; the last record is that of `{last}`"
    )
    kind = "This was a rehearsal with small sizes. " if start.get("rehearsal") else ""
    if start.get("known"):
        before = names.get(start["known"], start["known"])
        kind += f"It continued `{before}`, which has the proofs of some of its kernels. "
    order = (*_GOOD, *_BAD, "not here", "not reached")
    states = ", ".join(f"{counts[state]} {state}" for state in sorted(counts, key=order.index))
    return (
        f"{kind}{how}. Of {len(units)} units of work: {states}. Records: `{FOLDER}/{name}.jsonl`.\n"
    )


def _machine(records: Sequence[Record]) -> str:
    start = _start(records)
    facts: Mapping[str, Any] = next(
        (r["values"] for r in records if r["kind"] == "facts" and "values" in r), {}
    )
    smi = start.get("smi") or {}
    rows = [
        ("GPU", f"{start.get('gpu', '?')} ({start.get('arch', '?')})"),
        ("driver", start.get("driver") or "-"),
        ("memory", smi.get("memory.total", "-")),
        (
            "highest SM / memory clock",
            f"{smi.get('clocks.max.sm', '-')} / {smi.get('clocks.max.mem', '-')}",
        ),
        ("CUDA", facts.get("cuda") or "-"),
        ("CPU cores", facts.get("cores", "-")),
        *(start.get("versions") or {}).items(),
    ]
    doctor = next((r for r in records if r["kind"] == "doctor"), None)
    if doctor is not None:
        rows.append(("`attnimg doctor`", _result(doctor)))
    return markdown_table(("machine", ""), [(str(key), str(value)) for key, value in rows])


def _kernels(records: Sequence[Record]) -> str:
    rows = [
        (r["backend"] or "-", r["state"], f"{r['seconds']:.0f}", _cell(r.get("text", "")))
        for r in records
        if r["kind"] == "kernel"
    ]
    return _table(("package", "result", "seconds", "output"), rows)


def _proofs(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        if r["kind"] == "proof" and r["step"] != "repeats" and "values" in r:
            values = r["values"]
            rows.append(
                (
                    f"`{r['backend']}`",
                    _package(r),
                    values["dtype"],
                    ", ".join(map(str, values["head_dims"])),
                    "packed and single" if values["packing"] else "single",
                    _result(r),
                    str(values["probes"]),
                    f"{values['proof_seconds'][0]:.1f}",
                    _nearest(values["figures"]),
                )
            )
    head = ("backend", "kernel of", "precision", "head_dim", "rows", "result", "probes", "seconds",
            "nearest to its bound")  # fmt: skip
    proofs = [r["values"] for r in records if r["kind"] == "proof" and "values" in r]
    notes = dict.fromkeys(note for values in proofs for note in values["notes"])
    listed = "".join(f"- {_cell(note)}\n" for note in notes)
    return _table(head, rows) + (f"\n{listed}" if listed else "")


def _package(record: Record) -> str:
    """Return the packages of a backend's kernel, with versions."""
    backend = find_backend(record["backend"])
    packages = backend.needs.packages if backend else ()
    versions = record["values"]["versions"]
    return (
        ", ".join(f"{name} {versions.get(name, '?')}" for name, _, _ in packages) or "torch's own"
    )


def _nearest(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return the figure that is closest to its limit."""
    bounded = [f for f in figures if f["allowed"] and f["error"] is not None]
    if not bounded:
        return "-"
    one = max(bounded, key=lambda f: float(f["error"]) / float(f["allowed"]))
    return f"{one['quantity']} {one['error']:.1e} of {one['allowed']:.1e}"


def _repeats(records: Sequence[Record]) -> str:
    rows = [
        (
            f"`{r['backend']}`",
            r["values"]["dtype"],
            ", ".join(map(str, r["values"]["head_dims"])),
            str(r["values"]["proofs"]),
            str(r["values"]["refused"]),
        )
        for r in records
        if r["kind"] == "proof" and r["step"] == "repeats" and "values" in r
    ]
    return _table(("backend", "precision", "head_dim", "proofs", "refused"), rows)


def _training(records: Sequence[Record]) -> str:
    rows = []
    trained = [r for r in records if r["kind"] == "training" and "values" in r]
    for r in trained:
        values = r["values"]
        rows.append(
            (
                f"`{r['backend']}`",
                f"{values['shape']}, {values['dtype']}",
                _result(r),
                f"{values['losses'][0]:.3f} to {values['losses'][-1]:.3f}",
                _difference(r, trained),
                f"{values['tokens_per_second']:,.0f}",
                _gib(values["memory_bytes"]),
                _cell(values["isolation"]),
            )
        )
    head = ("backend", "model", "result", "loss", "largest difference in loss", "tokens/s",
            "peak memory", "packed documents")  # fmt: skip
    return _table(head, rows)


def _difference(record: Record, trained: Sequence[Record]) -> str:
    """Return the largest difference of a record's losses from those of the reference."""
    shape = record["values"]["shape"]
    losses = {
        r["backend"]: r["values"]["losses"]
        for r in trained
        if r["values"]["shape"] == shape and r["state"] == "passed"
    }
    name = next((name for name in REFERENCES if name in losses), None)
    if name is None:
        return "-"
    if name == record["backend"]:
        return "the reference"
    pairs = zip(record["values"]["losses"], losses[name], strict=True)
    return f"{max(abs(a - b) for a, b in pairs):.1e} from `{name}`'s"


def _times(records: Sequence[Record]) -> str:
    """Return a row for each call and a column for each backend, the fastest of a row in bold."""
    calls: dict[tuple[int, int, int, str], dict[str, Mapping[str, Any]]] = {}
    for r in records:
        if r["kind"] == "timing" and "values" in r:
            one = r["values"]
            packing = f"{one['documents']} documents" if one["packing"] else "one document a row"
            call = (one["head_dim"], one["tokens"] // one["length"], one["length"], packing)
            calls.setdefault(call, {})[r["backend"]] = one
    names = list(dict.fromkeys(name for found in calls.values() for name in found))
    rows = []
    for (size, n_rows, length, packing), found in sorted(calls.items()):
        fastest = min(found, key=lambda name: float(found[name]["both_ms"]))
        cells = [_time(found.get(name), bold=name == fastest) for name in names]
        rows.append((str(size), f"{n_rows} x {length}", packing, *cells))
    head = ("head_dim", "rows", "packing", *(f"`{name}`" for name in names))
    units = "Milliseconds forward and backward; TFLOP/s, and their share of the peak.\n\n"
    return units + _table(head, rows) if rows else ""


def _time(values: Mapping[str, Any] | None, *, bold: bool) -> str:
    if values is None:
        return "-"
    share = values["share_of_peak"]
    of_peak = "" if share is None else f", {100 * share:.0f} %"
    mark = "**" if bold else ""
    return f"{mark}{values['both_ms']:.2f}{mark}; {values['both_tflops']:.0f}{of_peak}"


def _jobs(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        if r["kind"] == "train-command" and "values" in r:
            values = r["values"]
            rows.append(
                (
                    f"`{r['backend']}`",
                    f"{values['shape']}, {values['rows']} x {values['sequence_len']} tokens, "
                    f"{values['steps']} steps",
                    f"{values['losses'][0]:.3f} to {values['losses'][-1]:.3f}",
                    f"{values['tokens_per_second']:,.0f}",
                    _gib(values["memory_bytes"]),
                    f"{values['command_seconds']:.0f}",
                )
            )
    head = ("backend", "job", "loss", "tokens/s", "peak memory", "seconds of the whole command")
    return _table(head, rows)


def _failures(records: Sequence[Record]) -> str:
    wrong = [r for r in records if r["state"] in _BAD]
    return "".join(
        f"- {r.get('unit') or r['kind'] + ' ' + r['backend']}: **{r['state']}**, "
        f"{_cell(r.get('text', '')) or r.get('code', '')}\n"
        for r in wrong
    )


def _absent(records: Sequence[Record]) -> str:
    reasons: dict[str, str] = {}
    for r in records:
        if r["state"] == "not here":
            reasons.setdefault(r["backend"] or r["step"], _cell(r.get("text", "")))
    return "".join(f"- {name}: {text}\n" for name, text in reasons.items())


def _unreached(records: Sequence[Record]) -> str:
    return "".join(f"- {r['unit']}\n" for r in records if r["state"] == "not reached")


def _backends(records: Sequence[Record], kind: str, states: Sequence[str]) -> set[str]:
    return {r["backend"] for r in records if r["kind"] == kind and r["state"] in states}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table; no text without rows."""
    return markdown_table(head, rows) if rows else ""


def _result(record: Record) -> str:
    code = record.get("code")
    return f"{record['state']}: {code}" if code else str(record["state"])


def _gib(memory: int | None) -> str:
    return "-" if memory is None else f"{memory / (1 << 30):.1f} GiB"


def _cell(text: object) -> str:
    """Return a text as one line that fits into a table's cell."""
    return " ".join(str(text).split()).replace("|", "/")
