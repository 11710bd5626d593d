"""Check the attention kernel while it trains, and stop all processes where it is wrong.

At the session's first step, and at every multiple of attn_check_steps, one attention call of the
first micro-batch is captured with its gradients and judged (prove/running.py). Checks go through
the kinds of layers in turn, and through the layers of each kind. The processes then exchange what
they found, so that all of them stop, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from attnimg.errors import AttnimgError
from attnimg.facts import CallCheck
from attnimg.train.checkpoint import checkpoints, newest_checkpoint, step_of
from attnimg.train.distributed import gathered, rank, world_size

if TYPE_CHECKING:
    from attnimg.calls.capture import CapturedCall, Kind

# Judges a call; the text decides which row and heads of it.
Judge = Callable[["CapturedCall", str], CallCheck]


@dataclass(kw_only=True, slots=True)
class CheckRecord:
    """What the checks of a session came to, for its receipt.

    Attributes:
        every_steps: attn_check_steps.
        why_not: why no call is checked; "" where calls are.
        checks: calls that were judged, on all processes.
        last_passed: the step whose calls were judged last and found right.
        worst_margin: the largest error of a right call, as a share of what is allowed.
        worst: of which quantity, layer and step.
        doubtful: calls that broke a rule by little, or not when they were made again.
        skipped: why a call was not judged -> how often.
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
    """Capture and judge attention calls of a run.

    Args:
        every: optimizer steps from one check to the next; 0 for none.
        judge: compares a call with the reference.
        why_not: why the run's calls can't be compared; "" where they can.
        others: backends that fit this run besides the one it has, the best first.
        say: prints a line for the user.
    """

    def __init__(
        self,
        every: int,
        judge: Judge,
        *,
        why_not: str,
        others: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self.judge, self.others, self.say = judge, others, say
        self.record = CheckRecord(every_steps=every, why_not=why_not)
        self._kinds: list[Kind] = []
        self._checked: int | None = None
        self._turn = self._began = 0
        self._window: list[float] = []

    def announce(self) -> None:
        """Print whether calls will be checked."""
        every, why_not = self.record.every_steps, self.record.why_not
        if every and why_not:
            self.say(f"attention is not checked while training: {why_not}")
        elif every:
            steps = f"{every} steps" if every > 1 else "step"
            self.say(f"attention: one layer is checked every {steps} (attn_check_steps)")

    @contextmanager
    def watching(self, step: int, folder: Path) -> Iterator[None]:
        """Capture and judge a call of a micro-batch, if the step is to be checked and was not yet.

        Args:
            step: the optimizer step that the micro-batch belongs to, from 1.
            folder: output_dir, where the checkpoints are.

        Raises:
            AttnimgError: a call is wrong on one of the processes (kernel-wrong-at-run).
        """
        every = self.record.every_steps
        due = self._checked is None or (step != self._checked and step % every == 0)
        if not every or self.record.why_not or not due:
            yield
            return
        from attnimg.calls.capture import Capture

        # A session that resumes goes on with the layer after that of the session before.
        if self._checked is None:
            self._turn, self._began = (step - 1) // every, step
        else:
            self._turn += 1
        self._checked = step
        found: list[CallCheck] = []

        def judge(call: CapturedCall) -> None:
            found.append(self._judged(call, step))

        capture = Capture(self._layer(), judge)
        with capture.installed():
            yield
        self._kinds = capture.kinds
        if not found:
            why = "no call with gradients passed transformers' attention interface"
            found.append(CallCheck(backend="", layer=0, skipped=why))
        self._settle(gathered(found[0]), step, folder)

    def _layer(self) -> int:
        """Return the layer to check, of the kinds in turn; the first one before any was seen."""
        if not self._kinds:
            return 0
        kinds = list(dict.fromkeys(self._kinds))
        kind = kinds[self._turn % len(kinds)]
        layers = [layer for layer, found in enumerate(self._kinds) if found == kind]
        return layers[self._turn // len(kinds) % len(layers)]

    def _judged(self, call: CapturedCall, step: int) -> CallCheck:
        try:
            return self.judge(call, f"{step} {rank()}")
        # A call of an unusual model may be more than the check can read; right runs go on.
        except Exception as error:
            why = f"the check raised {type(error).__name__}: {error}"
            return CallCheck(backend="", layer=call.layer, skipped=why)

    def _settle(self, found: list[CallCheck], step: int, folder: Path) -> None:
        """Count what all processes found, and raise where one of them found a wrong call."""
        record = self.record
        for check in found:
            if check.skipped:
                if check.skipped not in record.skipped:
                    self.say(f"attention of step {step} was not checked: {check.skipped}")
                record.skipped[check.skipped] = record.skipped.get(check.skipped, 0) + 1
                continue
            record.checks += 1
            if not check.faults:
                self._count(check, step)
            elif not check.sure:
                self._tell_doubt(check, step)
        # Rounding goes beyond its bounds now and then, not twice in a session.
        doubted = record.doubtful > 1
        wrong = [n for n, check in enumerate(found) if check.sure or (doubted and check.faults)]
        if wrong:
            raise self._wrong(found[wrong[0]], wrong, step, folder)
        if any(check.figures for check in found) and not any(check.faults for check in found):
            record.last_passed = step

    def _tell_doubt(self, check: CallCheck, step: int) -> None:
        self.record.doubtful += 1
        again = (
            "which rounding may do once" if check.repeated else "and right when it was called again"
        )
        self.say(
            f"warning: attention by {check.backend} in layer {check.layer} was wrong at step "
            f"{step}, {again}: {check.faults[0].text}"
        )

    def _count(self, check: CallCheck, step: int) -> None:
        margin = round(check.margin, 4)
        self._window.append(margin)
        if margin >= (self.record.worst_margin or 0.0):
            worst = max(check.figures, key=lambda figure: figure.error / figure.allowed)
            self.record.worst_margin = margin
            self.record.worst = f"{worst.quantity} of layer {check.layer} at step {step}"

    def close_window(self) -> dict[str, float]:
        """Return the number of right calls since the last log, and the worst margin of them."""
        margins, self._window = self._window, []
        return {"attn_checks": len(margins), "attn_margin": max(margins)} if margins else {}

    def _wrong(self, check: CallCheck, ranks: list[int], step: int, folder: Path) -> AttnimgError:
        """Build the error that names the fault and where the run can go on."""
        reasons = [f"{reason.code}: {reason.text}" for reason in check.faults]
        again = "the same call made again is wrong too"
        if not check.sure:
            again = "that is the second call of this session that was wrong"
        where = f" on rank {', '.join(map(str, ranks))}" if world_size() > 1 else ""
        good = self._last_good(folder)
        passed = self.record.last_passed
        since = f"the check at step {passed} passed" if passed else "no check passed before"
        newest = newest_checkpoint(folder)
        edits = [f"set attn_implementation: {name}" for name in self.others[:1]]
        if not edits:
            edits = ["train on another machine: this one computes plain attention wrong"]
        if good is None:
            kept = "no checkpoint was written before the last check that passed"
        else:
            kept = f"the last good checkpoint is {good}"
            edits.append(f"set resume_from_checkpoint: {good}")
        # What stands there would be taken for the new run's.
        if good is None or newest != good:
            edits.append("set another output_dir")
        return AttnimgError(
            f"attention by {check.backend} is wrong in layer {check.layer} at step {step}{where}",
            why="\n".join((*reasons, f"{again}; {since}; {kept}")),
            do="\n".join(edits),
            code="kernel-wrong-at-run",
            key="attn_implementation",
            exit_code=1,
        )

    def _last_good(self, folder: Path) -> Path | None:
        """Return the newest checkpoint that is not newer than the last check that passed.

        Before the first such check, that is what the session began with.
        """
        passed = self.record.last_passed
        last = self._began - 1 if passed is None else passed
        good = [path for path in checkpoints(folder) if step_of(path) <= last]
        return good[-1] if good else None
