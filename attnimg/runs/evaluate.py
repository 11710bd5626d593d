"""Compute the loss of a run's model on its evaluation data, as training computes eval_loss.

select a backend -> verify -> tokenizer, documents -> model -> rows -> the engine's evaluation
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from attnimg import application
from attnimg.config.schema import Config, has_reference, trains_preferences
from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.pipeline import Applied, Selected, select, select_verify_apply
from attnimg.runs.evaluate_preferences import (
    PreferenceEvaluation,
    evaluate_preferences,
    load_frozen_reference,
)
from attnimg.runs.evaluation_data import load_data
from attnimg.runs.folder import (
    WITHOUT_TRAINING,
    RunFolder,
    find_run,
    has_receipt,
    locate,
    require_base,
)
from attnimg.train.run import TrainReport, read_checked_task, with_model_config

if TYPE_CHECKING:
    import torch

    from attnimg.train.data import Documents
    from attnimg.train.fit import Session

# Keys that an evaluation takes from a config file; all others come from the trained run.
DATA_KEYS = (
    "datasets", "pretraining_dataset", "test_datasets", "val_set_size", "dataset_prepared_path",
    "dataset_num_proc", "dataset_processes", "dataset_exact_deduplication", "streaming",
    "shuffle_merged_datasets", "shuffle_before_merging_datasets", "sequence_len", "min_sample_len",
    "excess_length_strategy", "sample_packing", "eval_sample_packing", "pad_to_sequence_len",
    "batch_flattening", "train_on_inputs", "chat_template", "chat_template_jinja",
    "chat_template_kwargs", "default_system_message", "micro_batch_size", "eval_batch_size",
    "attn_implementation", "attn_backends", "attn_known_bad", "bf16", "fp16", "tf32", "seed",
    "max_steps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTarget:
    """What is evaluated.

    Attributes:
        config: names the data and the model.
        run: the trained weights; None for the base model alone.
        notes: what the user should know.
    """

    config: Config
    run: RunFolder | None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> str | None:
        """Return the folder of the trained weights, or the name of the base model."""
        return str(self.run.folder) if self.run else self.config.base_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The loss on one dataset, or on all.

    Attributes:
        dataset: the config key, "test_datasets[0]"; "all" for all of them.
        path: the path or name in the config; None for all.
        documents: number of evaluated documents.
        tokens: number of their tokens.
        trained_tokens: number of those with loss.
        loss: negative log-likelihood per trained token.
        standard_error: of the loss, from the differences between documents; None for one document.
        perplexity: exp(loss).
    """

    dataset: str
    path: str | None
    documents: int
    tokens: int
    trained_tokens: int
    loss: float
    standard_error: float | None
    perplexity: float


# Called with the name of a task, the amount that is done, and the total.
Advance = Callable[[str, int, int], None]


def find_target(argument: str, *, base: bool, base_model: str | None = None) -> EvaluationTarget:
    """Return the model and the data that an argument names.

    Args:
        argument: a run's folder, a checkpoint in it, or a config file.
        base: whether the base model is evaluated, without what the run trained.
        base_model: the base model, if it has been moved.

    Raises:
        AttnimgError: as `find_run` does, also for a base model that a whole model is compared with
            (base-model-differs), or the file has another rl than the run (bad-value).
    """
    written, folder = locate(argument)
    if written is not None and (base or not has_receipt(folder)):
        config = written
        if base_model is not None:
            config = config.model_copy(update={"base_model": base_model})
        note = f"{folder} has no trained run: the base model {config.base_model} is evaluated"
        return EvaluationTarget(config=config, run=None, notes=() if base else (note,))
    run = find_run(argument, command="evaluate", base_model=base_model)
    if run.kind == "model" and (base or has_reference(run.config)):
        require_base(run, command="evaluate")
    config = run.config if base else run.loading_config
    if written is not None:
        if written.rl != run.config.rl:
            raise _other_method(written, run)
        changes = {key: getattr(written, key) for key in DATA_KEYS}
        config = config.model_copy(update=changes)
    return EvaluationTarget(config=config, run=None if base else run, notes=run.notes)


def evaluate(
    target: EvaluationTarget, machine: Machine, *, report: TrainReport, advance: Advance
) -> tuple[Evaluation | PreferenceEvaluation, ...]:
    """Compute the loss on each evaluation dataset, and on all where there are several.

    Args:
        target: as `find_target` returns it.
        machine: this machine.
        report: receives the plan, proofs and warnings.
        advance: receives the progress.

    Raises:
        AttnimgError: there is no evaluation data (missing-key), or what training raises.
    """
    from attnimg.train.check import require_package_of_qat
    from attnimg.train.environment import silence_libraries

    config = _with_rounding(target).model_copy(update=WITHOUT_TRAINING)
    if not config.test_datasets and not config.val_set_size:
        raise _nothing_to_evaluate(target)
    require_package_of_qat(config, machine)
    silence_libraries()
    with ExitStack() as undo:
        undo.enter_context(application.restore_registries())
        task = read_checked_task(config, machine, report)
        task, plan = with_model_config(config, task, select(task, report), report)
        # Before the proofs, so that a mistake in the data is reported without waiting for them.
        tokenizer, parts = load_data(config, target.run, report)

        # The model that the losses of preferences compare with; None for texts.
        reference: list[Any] = []

        def load(selected: Selected) -> Any:
            model = _load_weights(config, target.run, selected, tokenizer, report.log)
            reference[:] = [load_frozen_reference(config, target.run, model, selected, tokenizer)]
            return model

        applied = select_verify_apply(task, load, report=report, plan=plan)
        folder = undo.enter_context(TemporaryDirectory())
        config = config.model_copy(update={"output_dir": folder})
        make_session = partial(_session, config, machine, applied, tokenizer, reference[-1], report)
        if trains_preferences(config):
            return evaluate_preferences(
                parts, target.run, make_session=make_session, report=report, advance=advance
            )
        return _evaluate_parts(make_session, parts, report=report, advance=advance)


def _with_rounding(target: EvaluationTarget) -> Config:
    """Return the config whose qat rounds weights as at the end of the run, or not at all."""
    config, run = target.config, target.run
    if config.qat is None or run is None:
        return config
    name, receipt = run.folder.name, run.receipt or {}
    steps = receipt.get("metrics", {}).get("steps") or 0
    if name.startswith("checkpoint-") and name[11:].isdigit():
        steps = int(name[11:])
    rounded = steps > (config.qat.fake_quant_after_n_steps or 0)
    qat = config.qat.model_copy(update={"fake_quant_after_n_steps": None}) if rounded else None
    return config.model_copy(update={"qat": qat})


def _other_method(written: Config, run: RunFolder) -> AttnimgError:
    """Return the error for data of another method than the run's."""
    return AttnimgError(
        "the data are for another method than the run",
        why=f"found rl: {written.rl or 'none'} in the file, rl: {run.config.rl or 'none'} in the "
        "receipt of the run",
        do=f"set rl: {run.config.rl} in the file, with test_datasets of preference data; for the "
        "loss on texts, pass a YAML file with the trained model as base_model (merge an adapter "
        "first, with attnimg merge), and an output_dir without a run"
        if run.config.rl
        else "remove rl from the file, with test_datasets of texts",
        code="bad-value",
        key="rl",
    )


def _nothing_to_evaluate(target: EvaluationTarget) -> AttnimgError:
    """Return the error for a run without evaluation data."""
    known = target.run is None or target.run.receipt is not None
    return AttnimgError(
        "there is no evaluation data",
        why="found neither test_datasets nor val_set_size in the config"
        if known
        else "the folder has no receipt.json, which would name test_datasets",
        do="add test_datasets, written like datasets, to the YAML file of the run, and pass that "
        "file: its output_dir names the run"
        if known
        else "pass a YAML file with test_datasets and the folder as base_model; merge an "
        "adapter first, with attnimg merge",
        code="missing-key",
        key="test_datasets",
    )


def _load_weights(
    config: Config,
    run: RunFolder | None,
    selected: Selected,
    tokenizer: Any,
    log: Callable[[str], None],
) -> Any:
    """Load the trained weights, or the base model; few weights have gradients.

    Comparing the loss needs some gradient; gradients of all weights would need their memory.
    """
    from attnimg.runs.weights import load_trained
    from attnimg.train.model import load_model

    if run is None:
        model = load_model(
            config, tokenizer=tokenizer, implementation=selected.implementation,
            context=selected.context, needs_dtype_cast=selected.backend.needs_dtype_cast, log=log,
        ).eval()  # fmt: skip
    else:
        model = load_trained(
            run, tokens=len(tokenizer), implementation=selected.implementation,
            context=selected.context, needs_dtype_cast=selected.backend.needs_dtype_cast,
            trainable=True, log=log,
        )  # fmt: skip
        if config.qat:
            from attnimg.train.qat import simulate_quantization

            log(f"qat: {simulate_quantization(model, config.qat, dtype=selected.context.dtype)}")
    if not hasattr(model, "peft_config"):
        vectors = [weight for weight in model.parameters() if weight.ndim == 1]
        for weight in model.parameters() if vectors else ():
            weight.requires_grad_(weight.ndim == 1 and weight.is_floating_point())
    return model


def _evaluate_parts(
    make_session: Callable[[Documents], Session],
    parts: dict[str, Documents],
    *,
    report: TrainReport,
    advance: Advance,
) -> tuple[Evaluation, ...]:
    """Evaluate each dataset with the engine of training."""
    from attnimg.train.fit import build_engine
    from attnimg.train.loss import loss_check_text
    from attnimg.train.own_loss import check_loss
    from attnimg.train.records import ProgressView

    found: list[tuple[str, Documents, DocumentLosses]] = []
    total = DocumentLosses()
    engine: Any = None
    for key, documents in parts.items():
        session = make_session(documents)
        if engine is None:
            view = ProgressView(report.console, total=1, visible=False)
            engine = build_engine(session, view, lambda _: None)
            check = check_loss(engine, session.train, context=session.run.context, sharded=False)
            report.log(loss_check_text(check))
        engine.session = session
        batches = math.ceil(len(session.train.dataset) / engine.args.per_device_eval_batch_size)
        losses = DocumentLosses(partial(_show, advance, key, batches))
        engine.observe = losses.add
        computed = engine.evaluate(eval_dataset=session.train.dataset)["eval_loss"]
        assert math.isclose(computed, losses.mean, rel_tol=1e-3, abs_tol=1e-4)
        found.append((key, documents, losses))
        total.sums += losses.sums
        total.counts += losses.counts
    results = [_result(key, documents, losses) for key, documents, losses in found]
    if len(results) > 1:
        tokens = sum(result.tokens for result in results)
        results.append(_evaluation("all", None, tokens, total))
    return tuple(results)


def _show(advance: Advance, key: str, batches: int, done: int) -> None:
    advance(f"evaluating {key}", done, batches)


def _session(
    config: Config,
    machine: Machine,
    applied: Applied,
    tokenizer: Any,
    reference: Any,
    report: TrainReport,
    documents: Documents,
) -> Session:
    """Return a session of training whose rows are those of one evaluation dataset."""
    from attnimg.train.arguments import plan_steps
    from attnimg.train.attention_check import build_attention_check
    from attnimg.train.distributed import StopFlag
    from attnimg.train.fit import Session
    from attnimg.train.preferences.batches import make_preference_rows
    from attnimg.train.records import RunFacts
    from attnimg.train.rows import make_rows

    selected, padding = applied.selected, tokenizer.pad_token_id
    if trains_preferences(config):
        rows = make_preference_rows(documents.validation, config, pad_token_id=padding)
    else:
        rows = make_rows(
            documents.validation,
            config,
            packed=bool(config.sample_packing) and config.eval_sample_packing is not False,
            context=selected.context,
            pad_token_id=padding,
        )
    return Session(
        config=config,
        folder=Path(config.output_dir),
        model=applied.model,
        tokenizer=tokenizer,
        run=RunFacts(
            machine=machine,
            plan=selected.plan,
            implementation=application.current_implementation(applied.model),
            context=selected.context,
        ),
        resume=None,
        stop=StopFlag(),
        console=report.console,
        train=rows,
        evaluation=rows,
        reference=reference,
        schedule=plan_steps(config, rows=len(rows.dataset), world=1, validation=True),
        restored={},
        identity={},
        attention_check=build_attention_check(
            0, selected.plan, selected.context, dropout=0.0, log=report.log
        ),
    )


class DocumentLosses:
    """Sum the negative log-likelihoods of each document.

    Args:
        on_batch: called with the number of batches so far.

    Attributes:
        sums: of each document.
        counts: trained tokens of each document.
    """

    def __init__(self, on_batch: Callable[[int], None] | None = None) -> None:
        self.on_batch, self.batches = on_batch, 0
        self.sums, self.counts = list[float](), list[int]()

    def add(self, inputs: Any, outputs: Any) -> None:
        """Add a batch: its inputs, and the output of the head."""
        import torch

        length = outputs.log_probs.shape[1]
        documents = _document_numbers(inputs)[:, :length].to(outputs.log_probs.device)
        mask = outputs.label_mask
        size = int(documents.max()) + 1
        sums = torch.zeros(size, dtype=torch.float64, device=mask.device)
        counts = torch.zeros(size, dtype=torch.int64, device=mask.device)
        sums.index_add_(0, documents[mask], -outputs.log_probs[mask].detach().double())
        counts.index_add_(0, documents[mask], torch.ones_like(documents[mask]))
        trained = counts > 0  # not of padding
        self.sums += sums[trained].tolist()
        self.counts += counts[trained].tolist()
        self.batches += 1
        if self.on_batch is not None:
            self.on_batch(self.batches)

    @property
    def mean(self) -> float:
        """Return the negative log-likelihood per trained token."""
        return math.fsum(self.sums) / max(sum(self.counts), 1)

    @property
    def standard_error(self) -> float | None:
        """Return the standard error of the mean, that of a ratio estimated from documents.

        Source: Cochran, Sampling Techniques, 1977, section 2.11, without the finite population
        correction (2026-11-27).
        """
        number, tokens, mean = len(self.sums), sum(self.counts), self.mean
        if number < 2:
            return None
        squares = ((s - mean * n) ** 2 for s, n in zip(self.sums, self.counts, strict=True))
        return math.sqrt(math.fsum(squares) * number / (number - 1)) / tokens


def _document_numbers(inputs: Any) -> torch.Tensor:
    """Return the number of each token's document in a batch, int64 (B, S)."""
    import torch

    ids = inputs["input_ids"]
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
    if "position_ids" not in inputs or "attention_mask" in inputs:
        return rows  # one document per row
    starts = (inputs["position_ids"] == 0).flatten().long()
    return (starts.cumsum(0) - 1).clamp(min=0).view(ids.shape)


def _result(key: str, documents: Documents, losses: DocumentLosses) -> Evaluation:
    """Return the result of one dataset."""
    from attnimg.train.rows import row_lengths

    sources = [figures for figures in documents.figures if figures.key == key]
    path = sources[0].path if sources else None
    return _evaluation(key, path, int(row_lengths(documents.validation).sum()), losses)


def _evaluation(key: str, path: str | None, tokens: int, losses: DocumentLosses) -> Evaluation:
    mean = losses.mean
    return Evaluation(
        dataset=key, path=path, documents=len(losses.sums), tokens=tokens,
        trained_tokens=sum(losses.counts), loss=mean, standard_error=losses.standard_error,
        perplexity=math.exp(min(mean, 700.0)),
    )  # fmt: skip
