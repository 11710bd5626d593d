"""Check the attention kernel and the process during training; stop all processes on an error.

At the session's first step, and at every multiple of attn_check_steps, one attention call of the
first micro-batch is captured with its gradients and compared with the reference
(verification/running_check.py). The checks alternate between the kinds of layers, and between the
layers of each kind. The settings of the process are compared with those before the first step
(verification/process_state.py), also in runs whose calls can't be compared. The processes then
exchange their results, so that all of them stop or none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attnimg.application.router import call_shape
from attnimg.errors import AttnimgError, KernelError, set_backend
from attnimg.facts import Backend
from attnimg.run_facts import CallCheck, LayerGroup, Plan, RunContext
from attnimg.train.checkpoint import checkpoint_step, list_checkpoints, newest_checkpoint
from attnimg.train.distributed import gather_objects, rank, world_size

if TYPE_CHECKING:
    from attnimg.verification.process_state import RunState
    from attnimg.verification.running_check import CallKind, CapturedCall

# Backends that the error on a wrong kernel suggests: torch's own, then plain attention.
_FALLBACKS = ("sdpa", "eager")

# The least seconds between two comparisons of the process, each of about 10 ms, if a run has at
# least DEFAULT_STEPS, the default of attn_check_steps, between checks: small models make 200 steps
# in a second.
COMPARE_EVERY_S, DEFAULT_STEPS = 30.0, 200

# Compares a call with the reference; the text seeds the choice of the row and the heads.
CompareFunction = Callable[["CapturedCall", str], CallCheck]


def build_attention_check(
    every: int,
    plan: Plan,
    context: RunContext,
    *,
    dropout: float,
    log: Callable[[str], None],
) -> AttentionCheck:
    """Return the check of a run's attention calls.

    Args:
        every: attn_check_steps.
        plan: the plan of the run.
        context: how the run calls its model.
        dropout: the dropout rate of the attention weights.
        log: prints a line for the user.
    """
    from attnimg.verification.running_check import reason_not_checked

    assert plan.chosen is not None
    verdicts = [choice.verdict for choice in plan.groups] or [plan.chosen]
    used = {verdict.backend.name: verdict.backend for verdict in verdicts}
    # Plain attention supports every model.
    fitting = {"eager", *(verdict.backend.name for verdict in plan.verdicts if verdict.fits)}
    return AttentionCheck(
        every,
        partial(_compare_call, plan, context),
        why_not=reason_not_checked([*used.values()], context, dropout=dropout),
        alternatives=[name for name in _FALLBACKS if name in fitting - used.keys()],
        log=log,
    )


@dataclass(kw_only=True, slots=True)
class CheckRecord:
    """The results of a session's checks, for its receipt.

    Attributes:
        every_steps: attn_check_steps.
        why_not: why no call is checked; "" if calls are checked.
        checks: calls that were checked, on all processes.
        last_passed: the last step whose calls were checked and correct.
        worst_margin: the largest error of a correct call, as a share of the allowed error.
        worst: the quantity, layer and step of that error.
        doubtful: wrong calls whose error was close to the bound, or that were correct when
            repeated.
        skipped: reason why a call was not checked -> number of calls.
    """

    every_steps: int
    why_not: str
    checks: int = 0
    last_passed: int | None = None
    worst_margin: float | None = None
    worst: str = ""
    doubtful: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


class AttentionCheck:
    """Capture attention calls of a run, and compare them with the reference.

    Args:
        every: optimizer steps between two checks; 0 for no checks.
        compare: compares a call with the reference.
        why_not: why the run's calls can't be compared; "" if they can.
        alternatives: other backends that fit this run, the best first.
        log: prints a line for the user.
    """

    def __init__(
        self,
        every: int,
        compare: CompareFunction,
        *,
        why_not: str,
        alternatives: Sequence[str],
        log: Callable[[str], None],
    ) -> None:
        self.compare, self.alternatives, self.log = compare, alternatives, log
        self.record = CheckRecord(every_steps=every, why_not=why_not)
        self._kinds: list[CallKind] = []
        self._last_checked: int | None = None
        self._turn = self._first_step = 0
        self._margins: list[float] = []
        self._process: RunState | None = None
        self._last_unchanged: int | None = None
        self._compared_at = -math.inf

    def report_schedule(self) -> None:
        """Print whether calls will be checked."""
        every, why_not = self.record.every_steps, self.record.why_not
        if every and why_not:
            self.log(f"attention is not checked during training: {why_not}")
        elif every:
            steps = f"{every} steps" if every > 1 else "step"
            self.log(f"attention: one layer is checked every {steps} (attn_check_steps)")

    def is_due(self, step: int) -> bool:
        """Return whether the next micro-batch, which belongs to this step, is checked."""
        every = self.record.every_steps
        if not every:
            return False
        return self._last_checked is None or (step != self._last_checked and step % every == 0)

    @contextmanager
    def checking(self, step: int, folder: Path) -> Iterator[None]:
        """Check one attention call of the micro-batch in the block, if this step is checked.

        Args:
            step: the optimizer step that the micro-batch belongs to, from 1.
            folder: output_dir, where the checkpoints are.

        Raises:
            AttnimgError: a call is wrong on one of the processes (kernel-wrong-at-run), or the
                settings of one have changed (process-state).
        """
        if not self.is_due(step):
            yield
            return
        from attnimg.verification.process_state import RunState

        self._process = self._process or RunState()
        # A resumed session continues with the layer after the last one of the session before.
        if self._last_checked is None:
            every = self.record.every_steps
            self._turn, self._first_step = (step - 1) // every, step
        else:
            self._turn += 1
        self._last_checked = step
        if self.record.why_not:
            yield
            check = None
        else:
            found: list[CallCheck] = []
            with self._capturing(found, step):
                yield
            check = found[0]
        results = gather_objects((check, self._find_changes()))
        self._record_results([check for check, _ in results if check], step, folder)
        self._raise_changes([changes for _, changes in results], step, folder)

    def require_unchanged(self, step: int, folder: Path) -> None:
        """Raise if the settings of a process have changed by the last step; all processes call it.

        Args:
            step: the last step.
            folder: output_dir.

        Raises:
            AttnimgError: code process-state.
        """
        if self.record.every_steps:
            self._compared_at = -math.inf
            self._raise_changes(gather_objects(self._find_changes()), step, folder)

    def _find_changes(self) -> list[str] | None:
        """Return the changed settings of this process; None if it is too early to compare again."""
        now = time.monotonic()
        rare = self.record.every_steps >= DEFAULT_STEPS
        if self._process is None or (rare and now - self._compared_at < COMPARE_EVERY_S):
            return None
        self._compared_at = now
        return self._process.changes()

    @contextmanager
    def _capturing(self, found: list[CallCheck], step: int) -> Iterator[None]:
        """Check one attention call of the micro-batch in the block; add the result to a list."""
        from attnimg.verification.running_check import Capture

        def check(call: CapturedCall) -> None:
            found.append(self._check_call(call, step))

        capture = Capture(self._layer(), check)
        with capture.installed():
            yield
        self._kinds = capture.kinds
        if not found:
            why = "the model made no call with gradients through transformers' attention interface"
            found.append(CallCheck(backend="", layer=0, skipped=why))

    def _raise_changes(self, changes: Sequence[list[str] | None], step: int, folder: Path) -> None:
        """Raise where the settings of a process have changed.

        Args:
            changes: of each rank; None where it was not compared.
            step: the step that was trained.
            folder: output_dir.

        Raises:
            AttnimgError: code process-state.
        """
        wrong = {number: found for number, found in enumerate(changes) if found}
        if not wrong:
            # Each rank has a clock of its own, by which it compares or not.
            if None not in changes:
                self._last_unchanged = step
            return
        where = f" on rank {', '.join(map(str, wrong))}" if world_size() > 1 else ""
        since = (
            f"at step {self._last_unchanged}" if self._last_unchanged else "before the first step"
        )
        otherwise = "find the code that changes it; attn_check_steps: 0 turns this check off"
        kept, edits = self._advise(self._last_unchanged, folder, otherwise=otherwise)
        raise KernelError(
            f"the process was changed during training, found at step {step}{where}",
            why="\n".join(
                (
                    *next(iter(wrong.values()))[:5],
                    f"needed the same state as {since}: attnimg and its packages do not change "
                    "this, but a kernel or other code in the process may",
                    kept,
                )
            ),
            do="\n".join(edits),
            code="process-state",
            exit_code=1,
        )

    def _layer(self) -> int:
        """Return the layer to check, of each kind in turn; 0 while the kinds are unknown."""
        if not self._kinds:
            return 0
        kinds = list(dict.fromkeys(self._kinds))
        kind = kinds[self._turn % len(kinds)]
        layers = [layer for layer, found in enumerate(self._kinds) if found == kind]
        return layers[self._turn // len(kinds) % len(layers)]

    def _check_call(self, call: CapturedCall, step: int) -> CallCheck:
        try:
            return self.compare(call, f"{step} {rank()}")
        # An unusual model may make a call that the check does not support: the run continues.
        except Exception as error:
            why = f"the check raised {type(error).__name__}: {error}"
            return CallCheck(backend="", layer=call.layer, skipped=why)

    def _record_results(self, checks: list[CallCheck], step: int, folder: Path) -> None:
        """Record the results of all processes, and raise where one of them has a wrong call."""
        record = self.record
        for check in checks:
            if check.skipped:
                if check.skipped not in record.skipped:
                    self.log(f"attention of step {step} was not checked: {check.skipped}")
                record.skipped[check.skipped] = record.skipped.get(check.skipped, 0) + 1
                continue
            record.checks += 1
            if not check.faults:
                self._record_margin(check, step)
            elif not check.confirmed:
                self._warn_of_doubtful(check, step)
        # Rounding may exceed its bounds once, but not twice in a session.
        doubted = record.doubtful > 1
        wrong = [
            n for n, check in enumerate(checks) if check.confirmed or (doubted and check.faults)
        ]
        if wrong:
            raise self._wrong_kernel_error(checks[wrong[0]], wrong, step, folder)
        if any(check.figures for check in checks) and not any(check.faults for check in checks):
            record.last_passed = step

    def _warn_of_doubtful(self, check: CallCheck, step: int) -> None:
        self.record.doubtful += 1
        detail = "and correct when it was called again"
        if check.repeated:
            detail = "by little, as rounding may cause once"
        self.log(
            f"warning: attention by {check.backend} in layer {check.layer} was wrong at step "
            f"{step}, {detail}: {check.faults[0].text}"
        )

    def _record_margin(self, check: CallCheck, step: int) -> None:
        margin = round(check.margin, 4)
        self._margins.append(margin)
        if margin >= (self.record.worst_margin or 0.0):
            worst = max(check.figures, key=lambda figure: figure.error / figure.allowed)
            self.record.worst_margin = margin
            self.record.worst = f"{worst.quantity} of layer {check.layer} at step {step}"

    def close_window(self) -> dict[str, float]:
        """Return the number of correct calls since the last log, and their largest margin."""
        margins, self._margins = self._margins, []
        return {"attn_checks": len(margins), "attn_margin": max(margins)} if margins else {}

    def _wrong_kernel_error(
        self, check: CallCheck, ranks: list[int], step: int, folder: Path
    ) -> AttnimgError:
        """Return the error that names the fault and the checkpoint to resume from."""
        reasons = [f"{reason.code}: {reason.text}" for reason in check.faults]
        repeated = "the repeated call is wrong too"
        if not check.confirmed:
            repeated = "it is the second call of this session that was wrong"
        where = f" on rank {', '.join(map(str, ranks))}" if world_size() > 1 else ""
        passed = self.record.last_passed
        since = f"the check at step {passed} passed" if passed else "no earlier check passed"
        otherwise = "train on another machine: on this one, plain attention is wrong"
        kept, edits = self._advise(passed, folder, otherwise=otherwise)
        return KernelError(
            f"attention by {check.backend} is wrong in layer {check.layer} at step {step}{where}",
            why="\n".join((*reasons, f"{repeated}; {since}; {kept}")),
            do="\n".join(edits),
            code="kernel-wrong-at-run",
            exit_code=1,
        )

    def _advise(self, passed: int | None, folder: Path, *, otherwise: str) -> tuple[str, list[str]]:
        """Return which checkpoint is good, and the edits of the config to continue from it."""
        good, newest = self._last_good_checkpoint(passed, folder), newest_checkpoint(folder)
        edits = [set_backend(name) for name in self.alternatives[:1]]
        if not edits:
            edits = [otherwise]
        if good is None:
            kept = "no checkpoint was written before the last check that passed"
        else:
            kept = f"the last good checkpoint is {good}"
            edits.append(f"set resume_from_checkpoint: {good}")
        # In the same folder the new run would find the checkpoints of this one.
        if good is None or newest != good:
            edits.append("set another output_dir")
        return kept, edits

    def _last_good_checkpoint(self, passed: int | None, folder: Path) -> Path | None:
        """Return the newest checkpoint that is not newer than the last check that passed.

        Where no check has passed yet, return the one that the session resumed from.
        """
        last = self._first_step - 1 if passed is None else passed
        good = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= last]
        return good[-1] if good else None


def _compare_call(plan: Plan, context: RunContext, call: CapturedCall, seed: str) -> CallCheck:
    from attnimg.verification.running_check import check_call

    return check_call(
        call,
        backend=_find_backend(plan, call),
        dtype=context.dtype,
        longest=context.sequence_len,
        seed=seed,
    )


def _find_backend(plan: Plan, call: CapturedCall) -> Backend:
    """Return the backend of the layer group most similar to a call.

    The call may lack the window or the soft cap of its layer.
    """
    assert plan.chosen is not None
    kind = call.kind
    shape = (kind.head_dim_qk, kind.head_dim_v, kind.window, kind.softcap, kind.sinks)

    def similarity(layers: LayerGroup) -> int:
        return sum(a == b for a, b in zip(call_shape(layers), shape, strict=True))

    closest = max(plan.groups, key=lambda choice: similarity(choice.layers), default=None)
    return (closest.verdict if closest else plan.chosen).backend
