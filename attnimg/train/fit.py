"""Run the training: rows, engine, final model, plot, receipt."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, memory_errors
from attnimg.train import metrics
from attnimg.train.arguments import plan_steps
from attnimg.train.attention_check import AttentionCheck
from attnimg.train.checkpoint import ResumePoint, read_state
from attnimg.train.distributed import (
    StopFlag,
    Stopped,
    join,
    lost_rank_errors,
    rank,
    world_size,
)
from attnimg.train.identity import identity_of
from attnimg.train.metrics import draw_loss
from attnimg.train.output_dir import locked, prepare_output_dir
from attnimg.train.receipt import FitResult, RunFacts, Status, applied, open_receipt, write_receipt
from attnimg.train.resume import (
    accepted_changes,
    identity_in,
    require_same,
    require_steps,
    resume_notes,
)
from attnimg.train.rows import Rows, even_out, make_rows
from attnimg.train.saved_model import save_final
from attnimg.train.session import ProgressView, Session, build_engine, check_own_loss, run_engine
from attnimg.train.tokenizer import stop_notes, use_trained_template

if TYPE_CHECKING:
    from attnimg.train.data.documents import Documents


def fit(
    config: Config,
    *,
    model: Any,
    tokenizer: Any,
    documents: Documents,
    run: RunFacts,
    resume: ResumePoint | None,
    stop: StopFlag,
    console: Console,
    attention_check: AttentionCheck,
) -> FitResult:
    """Train, and leave in output_dir: checkpoints, the model, metrics, a plot, a receipt.

    Args:
        config: the validated run.
        model: what `load_model` gave.
        tokenizer: what `load_tokenizer` gave.
        documents: training and validation documents, tokenized.
        run: what the steps before found out.
        resume: what `check_inputs` found; None for a new run in an empty folder.
        stop: whether someone asked to stop, from `stop_signals`.
        console: where progress goes, stderr's.
        attention_check: judges attention calls of training steps.

    Raises:
        AttnimgError: the run failed (exit code 1): disk full, out of memory, loss not finite,
            attention kernel wrong; or another run trains in output_dir (output-dir-busy).
        Stopped: someone asked to stop; a checkpoint is written.
    """
    silence_libraries()
    join(cpu=run.machine.arch.vendor == "cpu", timeout_s=config.ddp_timeout)
    folder = Path(config.output_dir).expanduser()
    train, evaluation = _rows(config, documents, run=run, tokenizer=tokenizer)
    identity = identity_of(
        config,
        run=run,
        tokenizer=tokenizer,
        figures=documents.figures,
        rows=train.figures["rows"],
        tokens=train.figures["tokens"],
    )
    require_same(identity, config, resume)
    notes = use_trained_template(config, tokenizer)
    for note in (*notes, *stop_notes(documents.train, tokenizer, model)):
        console.print(f"  warning: {note}", highlight=False, markup=False, soft_wrap=True)
    session = Session(
        config=config,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        run=run,
        resume=resume,
        stop=stop,
        console=console,
        train=train,
        evaluation=evaluation,
        schedule=plan_steps(
            config, rows=len(train.dataset), world=world_size(), validation=evaluation is not None
        ),
        restored=read_state(resume.path) if resume and resume.path else {},
        identity=identity,
        attention_check=attention_check,
    )
    require_steps(session.schedule.total_steps, config, resume)
    with locked(folder) if rank() == 0 else nullcontext():
        if rank() == 0:
            prepare_output_dir(folder, resume, console=console)
        return _with_receipt(session, documents.figures)


def _with_receipt(session: Session, data_figures: object) -> FitResult:
    """Train with a receipt on the disk from before the first step to after the last word."""
    train, evaluation = session.train, session.evaluation
    point = session.resume.path if session.resume else None
    before = identity_in(point) if point else {}
    if point and rank() == 0:
        for note in resume_notes(before, session.identity, name=point.name):
            session.console.print(note, highlight=False, markup=False, soft_wrap=True)
    receipt = open_receipt(
        session.config,
        run=session.run,
        figures={
            "world_size": world_size(),
            "identity": session.identity,
            "data": data_figures,
            "packing": {"train": train.figures, "eval": evaluation.figures if evaluation else None},
            "schedule": session.schedule,
            "attention_check": session.attention_check.record,
            "changed_on_resume": {
                change.key: {"before": change.before, "now": change.now}
                for change in accepted_changes(before, session.identity)
            },
        },
        resumed_from=point,
    )
    first = rank() == 0
    if first:
        write_receipt(session.folder, receipt, status="running")
    try:
        with memory_errors(), lost_rank_errors(session.config.ddp_timeout):
            result = _train(session, receipt)
    except BaseException as error:
        if first:
            _write_end(session.folder, receipt, error=error)
        raise
    if first:
        figures = asdict(result)
        names = ("steps", "loss", "eval_loss", "aux_loss", "tokens", "seconds")
        receipt |= {"metrics": {name: figures[name] for name in names}, "files": result.files}
        write_receipt(session.folder, receipt, status="done")
    return result


def _rows(
    config: Config, documents: Documents, *, run: RunFacts, tokenizer: Any
) -> tuple[Rows, Rows | None]:
    """Pack both splits; evaluation is packed as training is, unless eval_sample_packing is false.

    Without sample_packing nothing is packed: no proof shows that the model keeps documents apart.
    """
    packed = bool(config.sample_packing)
    eval_packed = packed and config.eval_sample_packing is not False

    def rows(dataset: Any, *, packed: bool) -> Rows:
        return make_rows(
            dataset, config, packed=packed, context=run.context, pad_token_id=tokenizer.pad_token_id
        )

    def shared_out(made: Rows, *, batch_size: int) -> Rows:
        at_once = batch_size * world_size() if world_size() > 1 else 1
        return even_out(made, multiple=at_once, pad_token_id=tokenizer.pad_token_id)

    train = shared_out(rows(documents.train, packed=packed), batch_size=config.micro_batch_size)
    if documents.validation is None or not len(documents.validation):
        return train, None
    evaluation = shared_out(
        rows(documents.validation, packed=eval_packed),
        batch_size=config.eval_batch_size or config.micro_batch_size,
    )
    return train, evaluation


def _train(session: Session, receipt: dict[str, object]) -> FitResult:
    """Build the engine, compare its loss with the model's own, train, and write the model."""
    began = time.monotonic()
    first = rank() == 0
    view = ProgressView(session.console, total=session.schedule.total_steps, visible=first)

    def ready(engine: Any) -> None:
        receipt["applied"] = applied(engine, session.run.plan)
        if first:
            write_receipt(session.folder, receipt, status="running")

    engine = build_engine(session, view, ready)
    counts = count_weights(engine.model)
    receipt["weights"] = counts
    session.console.print(f"  {sentence(counts)}", highlight=False, markup=False, soft_wrap=True)
    session.attention_check.announce()
    receipt["loss"] = check_own_loss(engine, session)
    try:
        notes = run_engine(engine, session)
    finally:
        view.end()
    files = save_final(engine, session.config, session.folder)
    if first:
        files += _draw(session, steps=engine.state.global_step)
    # All is written: a signal from here on has nothing left to save.
    session.stop.training = False
    lines = metrics.read(session.folder)
    return FitResult(
        steps=engine.state.global_step,
        loss=next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        eval_loss=next((x["eval_loss"] for x in reversed(lines) if "eval_loss" in x), None),
        aux_loss=next((line["aux_loss"] for line in reversed(lines) if "aux_loss" in line), None),
        tokens=engine.meter.total_tokens,
        seconds=time.monotonic() - began,
        files=tuple(files),
        resumed_from=session.resume.path if session.resume else None,
        notes=tuple(notes),
    )


def _draw(session: Session, *, steps: int) -> list[Path]:
    """Draw the losses; name the files about them."""
    picture = draw_loss(
        session.folder,
        title=Path(str(session.config.base_model)).name,
        subtitle=f"attention {session.run.backend}, {session.run.context.dtype}, {steps:,} steps",
    )
    return [path for path in (picture, session.folder / metrics.FILE) if path]


def _write_end(folder: Path, receipt: Mapping[str, object], *, error: BaseException) -> None:
    """Write how the run ended, unless the disk is too full even for that."""
    status: Status = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    told: dict[str, object] = {"code": type(error).__name__, "what": str(error)}
    if isinstance(error, AttnimgError):
        told = {"code": error.code, "what": error.what, "why": error.why, "do": error.do}
    # The error on its way to the user matters more than its copy on a full disk.
    with suppress(AttnimgError):
        write_receipt(folder, {**receipt, "error": told}, status=status)


def silence_libraries() -> None:
    """Turn off progress bars, notes and telemetry of the libraries below; errors still come.

    Call it before transformers is imported: the hub client reads its switches at import.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers would report to a Kubeflow server whatever report_to says.
    # Source: transformers 5.22.2, training_args.py, is_kubeflow_available (2026-11-27).
    os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"
    # loss.png is drawn without a window; matplotlib raises on a backend that it does not know.
    os.environ["MPLBACKEND"] = "agg"
    # It would warn that the kernel it was kept from is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _import_bitsandbytes_alone()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # What they warn of is either refused by name before the run or said by the plan.
    for name in ("accelerate", "torch.distributed", "kernels", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _import_bitsandbytes_alone() -> None:
    """Import bitsandbytes without the hub kernel it would fetch, and run, at import.

    On a CPU with avx512_bf16 it asks the hub for kernels-community/quantization-bitsandbytes, which
    also computes in bfloat16 whatever the run's precision; without it, it uses its own code.
    Source: bitsandbytes 0.50.2, backends/cpu/ops.py, has_avx512bf16 (2026-11-21).
    """
    if find_spec("bitsandbytes") is None or "bitsandbytes" in sys.modules:
        return
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # None makes its import fail
    try:
        import bitsandbytes  # noqa: F401  imported for its registrations alone
    finally:
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCounts:
    """Numbers of weights; tied ones count once, packed 4-bit ones by their unpacked number."""

    trained: int
    all: int


def count_weights(model: Any) -> WeightCounts:
    """Count a model's weights, without the frozen copies of PEFT's modules_to_save."""
    counts = [
        (_count(weight), weight.requires_grad)
        for name, weight in model.named_parameters()
        if ".original_module." not in name
    ]
    return WeightCounts(
        trained=sum(count for count, trained in counts if trained),
        all=sum(count for count, _ in counts),
    )


def _count(weight: Any) -> int:
    # DeepSpeed's ZeRO 3 leaves an empty tensor in place of a weight.
    count = int(weight.numel() or getattr(weight, "ds_numel", 0))
    if type(weight).__name__ == "Params4bit":
        return count * 2 * int(weight.element_size())
    return count


def sentence(counts: WeightCounts) -> str:
    """Return the line that a run prints before its first step."""
    share = counts.trained / max(counts.all, 1)
    return f"weights: trains {counts.trained:,} of {counts.all:,} ({share:.2%})"
