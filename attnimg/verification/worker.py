"""The process that runs foreign kernels: `python -m attnimg.verification.worker`.

It reads the candidates from stdin, as one JSON object, and writes JSON objects to stdout, one per
line: what it is about to run, so that its parent knows what crashed it, and the proofs. The output
of kernels goes to stderr. After a kernel that changed the state of the process, or forked it, the
parent starts a new child for the rest.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from attnimg.backends import find_backend
from attnimg.errors import AttnimgError
from attnimg.run_facts import Geometry, HubLayer, LayersTask, OptimizerTask, Proof, QatTask, Reason
from attnimg.verification.cases import full_row_length, longest_document

# Cases between two comparisons of the process, each of which takes 3 ms: as long as a small case.
COMPARE_EVERY = 8


def main() -> None:
    """Prove all candidates on stdin."""
    task = json.loads(sys.stdin.read())
    _die_with_parent()
    _die_before_parent()
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Imported here, so that no candidate's time limit includes it.
    import transformers.integrations.flash_attention
    import transformers.modeling_utils  # noqa: F401 - loaded for the time it takes

    _cap_memory(task["memory_bytes"], device=device)
    os.chdir(task["folder"])
    references: dict[Any, Any] = {}
    for candidate in task["candidates"]:
        _send(report, begin=candidate["backend"])
        if candidate["task"] is not None:
            proof = prove_task(candidate, device=device, report=report)
        else:
            proof = prove_candidate(candidate, device=device, references=references, report=report)
        _send(report, proof=asdict(proof))
        if any(reason.code == "process-state" for reason in proof.reasons):
            _send(report, stop=True)
            return


def prove_candidate(
    candidate: dict[str, Any], *, device: str, references: dict[Any, Any], report: TextIO
) -> Proof:
    """Prove one candidate; an exception of its kernel becomes a reason."""
    import torch

    from attnimg.backends._transformers import applied_form, attention_function
    from attnimg.backends.fp8 import restore_flash_kernel
    from attnimg.verification.candidate import device_budget, merge, prove_geometry, repeat_calls
    from attnimg.verification.checks import with_device_bounds
    from attnimg.verification.process_state import process_state_reason
    from attnimg.verification.runner import count_forks

    started = time.perf_counter()
    name = candidate["backend"]
    geometries = tuple(Geometry(**values) for values in candidate["geometries"])
    backend = find_backend(name)
    assert backend is not None, name
    backend = applied_form(with_device_bounds(backend), geometries, routed=candidate["routed"])
    budget = device_budget(backend, device=device)
    longest = min(longest_document(geometry, budget) for geometry in geometries)
    all_heads = min(full_row_length(geometry, budget) for geometry in geometries)
    watch = _Watch(device, report)

    def on_probe(case: str) -> None:
        watch.require_unchanged_at_intervals()
        watch.begin(case)

    try:
        function = attention_function(backend, trusted=candidate["trusted"])
        watch.require_unchanged(all_code=True)
        found = merge(
            prove_geometry(
                function,
                backend,
                geometry,
                device=device,
                references=references,
                on_probe=on_probe,
                on_repeat=lambda: _send(report, again=name),
            )
            for geometry in geometries
        )
        on_probe("repeated calls")
        leaking, later = repeat_calls(
            function, backend, geometries[0], device=device, references=references
        )
        watch.require_unchanged(all_code=True)
        if running := count_forks():
            leaking = [*leaking, f"children: {running} forks of this process still run"]
    # Foreign kernels may raise anything, on import and in a call. The reason is kept and shown.
    except (Exception, SystemExit) as error:
        reasons = watch.reasons(error)
        seconds = time.perf_counter() - started
        return Proof(backend=name, reasons=reasons, longest=longest, seconds=seconds)
    finally:
        # fp8 replaces torch's own flash kernel, which the next candidate may use.
        restore_flash_kernel()
    if device == "cuda":
        torch.cuda.empty_cache()
    sequence_len = max(geometry.sequence_len for geometry in geometries)
    notes = []
    if longest < sequence_len:
        notes.append(f"proven up to {longest} of {sequence_len} tokens: limited by memory")
    if all_heads < longest:
        limit = "CPU time" if device == "cpu" else "memory"
        notes.append(
            f"proven with all heads up to {all_heads} of {sequence_len} tokens: limited by {limit}"
        )
    notes += [f"found once, and not when run again: {reason.text}" for reason in found.unrepeated]
    notes += [f"raises where training never calls it: {call}" for call in found.raised]
    reasons = tuple(found.reasons) or tuple(later)
    if leaking:
        reasons = (process_state_reason(leaking, when=watch.stage), *reasons)
    return Proof(
        backend=name,
        reasons=reasons,
        figures=tuple(found.figures),
        cases=found.cases,
        longest=longest,
        seconds=time.perf_counter() - started,
        note="; ".join(notes),
    )


def prove_task(candidate: dict[str, Any], *, device: str, report: TextIO) -> Proof:
    """Prove layers, an optimizer or fake quantizers; an exception of their code becomes a reason.

    A kernel of the hub, whose code may be anybody's, must not change the process either.
    """
    from attnimg.hub_layers import load_layer
    from attnimg.verification.fake_quantizers import prove_fake_quantizers
    from attnimg.verification.layers import TaskResult, prove_layers
    from attnimg.verification.optimizers import prove_optimizer

    started = time.perf_counter()
    name, values = candidate["backend"], candidate["task"]
    hub = HubLayer(**values["hub"]) if values.get("hub") else None
    watch = _Watch(device, report, may_change=hub is None)
    try:
        if hub:
            load_layer(hub)
            watch.require_unchanged(all_code=True)
        if "op" in values:
            task = LayersTask(**{**values, "hub": hub})
            found = prove_layers(task, device=device, on_case=watch.begin)
            watch.require_unchanged(all_code=True)
        elif "group_size" in values:
            found = prove_fake_quantizers(QatTask(**values), device=device, on_case=watch.begin)
        else:
            found = prove_optimizer(OptimizerTask(**values), device=device, on_case=watch.begin)
    # SystemExit as well, as in prove_candidate: the child must report it and go on.
    except (Exception, SystemExit) as error:
        found = TaskResult([], list(watch.reasons(error)), 0)
    return Proof(
        backend=name,
        reasons=tuple(found.reasons),
        figures=tuple(found.figures),
        cases=found.cases,
        seconds=time.perf_counter() - started,
        note=found.note,
    )


class _ProcessChanged(Exception):
    """Raised when a kernel changed the process, which would make later probes fail."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text)
        self.reason = reason


class _Watch:
    """Watch whether the code that is proven changes the process.

    Args:
        device: "cpu" or "cuda".
        report: where the parent is told what runs.
        may_change: whether changes are allowed.

    Attributes:
        stage: what runs, "loading" at first.
    """

    def __init__(self, device: str, report: TextIO, *, may_change: bool = False) -> None:
        import torch

        from attnimg.verification.process_state import ProcessState
        from attnimg.verification.random_state import draw_and_read_states

        self.stage, self._since = "loading", ["loading"]
        self._begun = 0
        self._device, self._report, self._may_change = torch.device(device), report, may_change
        self._before, self._random = ProcessState(), draw_and_read_states(self._device)

    def begin(self, case: str) -> None:
        """Report a case that is about to run."""
        self.stage = case
        self._since.append(case)
        self._begun += 1
        _send(self._report, case=case)

    def require_unchanged_at_intervals(self) -> None:
        """Raise as require_unchanged does, after the first case and every COMPARE_EVERY."""
        if self._begun == 1 or len(self._since) >= COMPARE_EVERY:
            self.require_unchanged()

    def require_unchanged(self, *, all_code: bool = False) -> None:
        """Raise _ProcessChanged if the process changed; `all_code`: also in any loaded module."""
        from attnimg.verification.process_state import process_state_reason
        from attnimg.verification.random_state import is_rewound

        if self._may_change:
            return
        changes = self._before.changes()
        if all_code:
            changes += self._before.replaced_code()
        if self.stage != "loading":
            changes += self._before.count_changes()
        elif not changes and is_rewound(self._random, self._device):
            changes.append("torch's random numbers were seeded or rewound")
        if changes:
            raise _ProcessChanged(process_state_reason(changes, when=self._when()))
        self._since.clear()

    def _when(self) -> str:
        """Return what ran since the process was last compared."""
        first = self._since[0] if self._since else self.stage
        return self.stage if first == self.stage else f"{first} to {self.stage}"

    def reasons(self, error: BaseException) -> tuple[Reason, ...]:
        """Return the reasons for an exception; a changed process comes first, as the cause."""
        from attnimg.verification.process_state import process_state_reason

        if isinstance(error, _ProcessChanged):
            return (error.reason,)
        changes = [] if self._may_change else self._before.changes()
        changed = (process_state_reason(changes, when=self._when()),) if changes else ()
        return (*changed, _reason(error, stage=self.stage))


def _reason(error: BaseException, *, stage: str) -> Reason:
    """Return the reason for an exception that a kernel raised."""
    import torch

    from attnimg.errors import exception_text

    text = str(error)
    where = f"{stage}: {exception_text(error)}"
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    # torch's CPU allocator raises a RuntimeError.
    if out_of_memory or "can't allocate memory" in text or "not enough memory" in text:
        return Reason(code="oom", text=where)
    if isinstance(error, AttnimgError):
        return Reason(code=error.code, text=exception_text(error))
    return Reason(code="import-error" if stage == "loading" else "crash", text=where)


def _die_with_parent() -> None:
    """Make Linux kill this process when its parent ends, so that a hanging kernel does not stay."""
    # Source: prctl(2), PR_SET_PDEATHSIG is 1 (2026-11-25).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _die_before_parent() -> None:
    """Make Linux kill this process before its parent if memory runs out: the parent reports it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _cap_memory(memory_bytes: int, *, device: str) -> None:
    """Limit what this process may allocate, so that no kernel takes all memory."""
    import torch

    if device == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(0.9, memory_bytes / total))
        return
    status = Path("/proc/self/status").read_text(encoding="ascii")
    used_kb = next(int(line.split()[1]) for line in status.splitlines() if line[:7] == "VmSize:")
    limit = used_kb * 1024 + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _send(report: TextIO, **message: Any) -> None:
    # The first newline ends a line that a kernel began; reports of a forked process have another
    # pid.
    report.write("\n" + json.dumps(message | {"pid": os.getpid()}) + "\n")


if __name__ == "__main__":
    main()
