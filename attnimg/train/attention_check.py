"""Check the attention kernel during training, and stop all processes where it is wrong.

At the session's first step, and at every multiple of attn_check_steps, one attention call of the
first micro-batch is captured with its gradients and compared with the reference
(verify/running_check.py). The checks alternate between the kinds of layers, and between the layers
of each kind. The processes then exchange their results, so that either all of them stop or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attnimg.apply.router import shape_of
from attnimg.errors import AttnimgError
from attnimg.facts import Backend, CallCheck, LayerGroup, Plan, RunContext
from attnimg.train.checkpoint import checkpoints, newest_checkpoint, step_of
from attnimg.train.distributed import gathered, rank, world_size

if TYPE_CHECKING:
    from attnimg.verify.running_check import CallKind, CapturedCall

# Backends that the error on a wrong kernel suggests: torch's own, then plain attention.
_OTHERS = ("sdpa", "eager")

# Compares a call with the reference; the text is a seed that chooses the row and the heads.
Judge = Callable[["CapturedCall", str], CallCheck]


def attention_check_of(
    every: int,
    found: Plan,
    context: RunContext,
    *,
    dropout: float,
    say: Callable[[str], None],
) -> AttentionCheck:
    """Return the check of a run's attention calls.

    Args:
        every: attn_check_steps.
        found: the plan of the run.
        context: how the run calls its model.
        dropout: the dropout rate of the attention weights.
        say: prints a line for the user.
    """
    from attnimg.verify.running_check import reason_not_checked

    assert found.chosen is not None
    verdicts = [choice.verdict for choice in found.groups] or [found.chosen]
    used = {verdict.backend.name: verdict.backend for verdict in verdicts}
    # Plain attention supports every model.
    fitting = {"eager", *(verdict.backend.name for verdict in found.verdicts if verdict.fits)}
    return AttentionCheck(
        every,
        partial(_judged, found, context),
        why_not=reason_not_checked([*used.values()], context, dropout=dropout),
        others=[name for name in _OTHERS if name in fitting - used.keys()],
        say=say,
    )


@dataclass(kw_only=True, slots=True)
class CheckRecord:
    """The results of a session's checks, for its receipt.

    Attributes:
        every_steps: attn_check_steps.
        why_not: why no call is checked; "" if calls are checked.
        checks: calls that were judged, on all processes.
        last_passed: the last step whose calls were judged and right.
        worst_margin: the largest error of a right call, as a share of the allowed error.
        worst: the quantity, layer and step of that error.
        doubtful: wrong calls whose error was close to the bound, or that were right when repeated.
        skipped: reason why a call was not judged -> number of calls.
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
        every: optimizer steps between two checks; 0 for no checks.
        judge: compares a call with the reference.
        why_not: why the run's calls can't be compared; "" if they can.
        others: other backends that fit this run, the best first.
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
        self._kinds: list[CallKind] = []
        self._checked: int | None = None
        self._turn = self._began = 0
        self._margins: list[float] = []

    def announce(self) -> None:
        """Print whether calls will be checked."""
        every, why_not = self.record.every_steps, self.record.why_not
        if every and why_not:
            self.say(f"attention is not checked during training: {why_not}")
        elif every:
            steps = f"{every} steps" if every > 1 else "step"
            self.say(f"attention: one layer is checked every {steps} (attn_check_steps)")

    def due(self, step: int) -> bool:
        """Return whether a call of the next micro-batch, which belongs to this step, is checked."""
        every = self.record.every_steps
        if not every or self.record.why_not:
            return False
        return self._checked is None or (step != self._checked and step % every == 0)

    @contextmanager
    def checking(self, step: int, folder: Path) -> Iterator[None]:
        """Capture and judge a call of the block's micro-batch, the first of each step to check.

        Args:
            step: the optimizer step that the micro-batch belongs to, from 1.
            folder: output_dir, where the checkpoints are.

        Raises:
            AttnimgError: a call is wrong on one of the processes (kernel-wrong-at-run).
        """
        if not self.due(step):
            yield
            return
        from attnimg.verify.running_check import Capture

        # A resumed session continues with the layer after the last one of the session before.
        if self._checked is None:
            every = self.record.every_steps
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
            why = "the model made no call with gradients through transformers' attention interface"
            found.append(CallCheck(backend="", layer=0, skipped=why))
        self._settle(gathered(found[0]), step, folder)

    def _layer(self) -> int:
        """Return the layer to check, of each kind in turn; 0 while the kinds are unknown."""
        if not self._kinds:
            return 0
        kinds = list(dict.fromkeys(self._kinds))
        kind = kinds[self._turn % len(kinds)]
        layers = [layer for layer, found in enumerate(self._kinds) if found == kind]
        return layers[self._turn // len(kinds) % len(layers)]

    def _judged(self, call: CapturedCall, step: int) -> CallCheck:
        try:
            return self.judge(call, f"{step} {rank()}")
        # The check may not support the call of an unusual model, which must not stop the run.
        except Exception as error:
            why = f"the check raised {type(error).__name__}: {error}"
            return CallCheck(backend="", layer=call.layer, skipped=why)

    def _settle(self, found: list[CallCheck], step: int, folder: Path) -> None:
        """Record the results of all processes, and raise where one of them has a wrong call."""
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
            elif not check.confirmed:
                self._warn_of_doubtful(check, step)
        # Rounding may exceed its bounds once, but not twice in a session.
        doubted = record.doubtful > 1
        wrong = [
            n for n, check in enumerate(found) if check.confirmed or (doubted and check.faults)
        ]
        if wrong:
            raise self._wrong(found[wrong[0]], wrong, step, folder)
        if any(check.figures for check in found) and not any(check.faults for check in found):
            record.last_passed = step

    def _warn_of_doubtful(self, check: CallCheck, step: int) -> None:
        self.record.doubtful += 1
        again = "by little, as rounding may cause once" if check.repeated else (
            "and right when it was called again"
        )  # fmt: skip
        self.say(
            f"warning: attention by {check.backend} in layer {check.layer} was wrong at step "
            f"{step}, {again}: {check.faults[0].text}"
        )

    def _count(self, check: CallCheck, step: int) -> None:
        margin = round(check.margin, 4)
        self._margins.append(margin)
        if margin >= (self.record.worst_margin or 0.0):
            worst = max(check.figures, key=lambda figure: figure.error / figure.allowed)
            self.record.worst_margin = margin
            self.record.worst = f"{worst.quantity} of layer {check.layer} at step {step}"

    def close_window(self) -> dict[str, float]:
        """Return the number of right calls since the last log, and their largest margin."""
        margins, self._margins = self._margins, []
        return {"attn_checks": len(margins), "attn_margin": max(margins)} if margins else {}

    def _wrong(self, check: CallCheck, ranks: list[int], step: int, folder: Path) -> AttnimgError:
        """Build the error that names the fault and the checkpoint to resume from."""
        reasons = [f"{reason.code}: {reason.text}" for reason in check.faults]
        again = "the repeated call is wrong too"
        if not check.confirmed:
            again = "it is the second call of this session that was wrong"
        where = f" on rank {', '.join(map(str, ranks))}" if world_size() > 1 else ""
        good = self._last_good(folder)
        passed = self.record.last_passed
        since = f"the check at step {passed} passed" if passed else "no earlier check passed"
        newest = newest_checkpoint(folder)
        edits = [f"set attn_implementation: {name}" for name in self.others[:1]]
        if not edits:
            edits = ["train on another machine: on this one, plain attention is wrong"]
        if good is None:
            kept = "no checkpoint was written before the last check that passed"
        else:
            kept = f"the last good checkpoint is {good}"
            edits.append(f"set resume_from_checkpoint: {good}")
        # In the same folder the new run would find the checkpoints of this one.
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

        Where no check has passed yet, return the one that the session resumed from.
        """
        passed = self.record.last_passed
        last = self._began - 1 if passed is None else passed
        good = [path for path in checkpoints(folder) if step_of(path) <= last]
        return good[-1] if good else None


def _judged(found: Plan, context: RunContext, call: CapturedCall, seed: str) -> CallCheck:
    from attnimg.verify.running_check import check_call

    return check_call(
        call,
        backend=_backend_of(found, call),
        dtype=context.dtype,
        longest=context.sequence_len,
        seed=seed,
    )


def _backend_of(found: Plan, call: CapturedCall) -> Backend:
    """Return the backend of the layer group most similar to a call.

    The call may lack the window or the soft cap of its layer.
    """
    assert found.chosen is not None
    kind = call.kind
    shape = (kind.head_dim_qk, kind.head_dim_v, kind.window, kind.softcap, kind.sinks)

    def similarity(layers: LayerGroup) -> int:
        return sum(a == b for a, b in zip(shape_of(layers), shape, strict=True))

    closest = max(found.groups, key=lambda choice: similarity(choice.layers), default=None)
    return (closest.verdict if closest else found.chosen).backend
