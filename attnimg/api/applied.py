"""Apply a backend to a loaded model, restore the model, and check its packing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Unpack

from attnimg import application, pipeline
from attnimg.api.advice import public
from attnimg.api.arguments import read_facts
from attnimg.api.choice import Choice, LoggedReport, Settings, in_use, log, select
from attnimg.backends import find_backend
from attnimg.context import build_context
from attnimg.errors import AttnimgError, PackingLeak, counted
from attnimg.facts import Machine
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.run_facts import Problem, Proof
from attnimg.task import gpu_text

# A trainer's collator: it turns a list of examples, each with input_ids and labels, into a batch.
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


# The attribute of a model that holds what `apply` changed. Copies of the model have it too.
_APPLIED = "_attnimg_applied"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Applied:
    """What `restore` needs to undo `apply`.

    Attributes:
        choice: the choice that was applied.
        before: the model's attention implementation before `apply`.
        hold: keeps the names registered that the model runs.
    """

    choice: Choice
    before: str
    hold: application.Hold

    def __deepcopy__(self, memo: dict[int, Any]) -> _Applied:
        """Return the record for a copy of the model, which runs the same choice."""
        return replace(self, hold=deepcopy(self.hold, memo))

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to pickle it: as `before` alone, for processes without attnimg."""
        return str, (self.before,)


def _find_applied(model: Any) -> _Applied | str | None:
    """Return what `apply` changed in a model; for an unpickled one, its previous attention."""
    found: _Applied | str | None = vars(application.inner_model(model)).get(_APPLIED)
    return found


@public(select)
def apply(model: Any, *, collator: Collator | None = None, **settings: Unpack[Settings]) -> Choice:
    """Select, verify and apply a backend to a loaded model, and check its packing.

    A backend that fails its proof, or that lets packed documents see each other, is replaced by the
    next candidate if it was chosen by "auto".

    Args:
        model: a transformers model, also one that PEFT has wrapped.
        collator: the trainer's collator, for the packing check; see `check_packing`.
        settings: the arguments of `select`, such as packing and sequence_len.

    Returns:
        The choice, verified.

    Raises:
        KernelError: no allowed backend fits and passes its proof.
        PackingLeak: packed documents affect one another with every allowed backend. The model runs
            its previous attention again.

    Example:
        >>> import attnimg
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        >>> choice = attnimg.apply(model, packing=True, sequence_len=64)
        >>> choice.verified, model.config._attn_implementation == choice.implementation
        (True, True)
        >>> attnimg.restore(model)
        >>> model.config._attn_implementation
        'eager'
    """
    model = _unwrapped(model)
    choice = select(model, **settings)
    choice._require_here()
    if choice._task.problem.packing:
        _require_device(model, choice._task.machine)
    elif collator is not None:
        log.warning("packing is not checked with the collator: it needs packing=True")
    use_shipped_kernels(choice._task.machine)
    with application.registries:
        if _find_applied(model) is not None:
            restore(model)
        _apply(choice, model, collator)
    return choice


def _apply(choice: Choice, model: Any, collator: Collator | None) -> None:
    """Verify a choice, and apply it to a model."""
    from attnimg.application.by_document import call_whole_rows

    before, registered = application.current_implementation(model), application.registered_names()

    def switch(selected: pipeline.Selected) -> Any:
        application.switch_backend(
            model,
            selected.backend,
            layers=choice._layers(),
            trusted=choice._task.problem.trusted,
        )
        return model

    try:
        applied = pipeline.select_verify_apply(
            choice._task,
            switch,
            report=LoggedReport(),
            plan=choice._plan,
            collate=_adapt_collator(collator),
        )
    except BaseException:
        call_whole_rows(model)
        if application.current_implementation(model) != before:
            model.set_attn_implementation(before)
        application.unregister(application.registered_names() - registered)
        raise
    choice._plan, choice._proofs = applied.selected.plan, applied.selected.proofs
    choice._verified, choice._implementation = True, application.current_implementation(model)
    names = (application.registered_names() - registered) | {choice._implementation}
    applied_to = _Applied(choice=choice, before=before, hold=application.Hold(names))
    setattr(application.inner_model(model), _APPLIED, applied_to)


@public()
def restore(model: Any) -> None:
    """Undo `apply`: the model runs its previous attention again.

    A copy made by copy.deepcopy is restored separately. A model that was pickled with a backend
    applied has to be restored, or applied again, in the process that loads it.

    Raises:
        AttnimgError: `apply` was not called for this model.

    Example:
        >>> import attnimg
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
        >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        >>> choice = attnimg.apply(model, sequence_len=64)
        >>> attnimg.restore(model)
        >>> model.config._attn_implementation
        'eager'
    """
    from attnimg.application.by_document import call_whole_rows

    model = _unwrapped(model)
    with application.registries:
        found = _find_applied(model)
        if found is None:
            raise AttnimgError(
                "there is nothing to restore",
                why="attnimg.apply was not called for this model, or it was restored already",
                do="call attnimg.restore once, with the model that attnimg.apply got",
                code="not-applied",
            )
        delattr(application.inner_model(model), _APPLIED)
        call_whole_rows(model)
        model.set_attn_implementation(found.before if isinstance(found, _Applied) else found)
        if isinstance(found, _Applied):
            found.hold.release()


@public(select)
def verify(model: object, **settings: Unpack[Settings]) -> tuple[Proof, ...]:
    """Verify every backend that fits a model on this machine, as `attnimg verify` does.

    Args:
        model: see `select`.
        settings: the arguments of `select`, such as packing and sequence_len.

    Returns:
        The proofs, best-ranked backend first. A failed proof has the reasons in `reasons`.

    Raises:
        AttnimgError: an argument is invalid, or no backend fits.

    Example:
        >>> import attnimg
        >>> config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
        ...           "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> all(proof.passed for proof in attnimg.verify(config, sequence_len=64))
        True
    """
    choice = select(model, **settings)
    choice._require_here()
    use_shipped_kernels(choice._task.machine)
    return tuple(proof for _, proof in pipeline.prove_fitting(choice._task, log=LoggedReport().log))


@public()
def check_packing(model: Any, *, collator: Collator | None = None) -> None:
    """Check that packed documents do not affect one another in a model.

    The model is called with two short documents packed, and with each alone. Both must have the
    same logits, and the loss of one must have no gradient with respect to the other.

    Args:
        model: a transformers causal language model, also one that PEFT has wrapped.
        collator: the trainer's collator, so that the batch is like those of training. It is called
            with one example per document; if it has TRL's attribute `padding_free`, with one
            example per row, with the lengths of the row's documents in `seq_lengths`. None for the
            batches of `attnimg train`: position_ids that start at 0 in each document, and
            cu_seq_lens for kernels that take them.

    Raises:
        PackingLeak: packed documents affect one another, or the model raised an error on them.
        AttnimgError: the model does not run the backend of the `use` block; or the collator can't
            be used.

    Example:
        >>> import attnimg
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
        >>> attnimg.check_packing(AutoModelForCausalLM.from_config(config))
    """
    from attnimg.verification.isolation import check_isolation, require_isolation

    model = _unwrapped(model)
    implementation = application.current_implementation(model)
    choice = _find_choice(model)
    if choice is not None:
        _require_device(model, choice._task.machine)
        _require_choice(model, choice)
        problem, backend = choice._task.problem, application.plan_backend(choice._plan)
    else:
        facts = read_facts(model)
        known = find_backend(implementation.removeprefix("kernels:")) or find_backend("sdpa")
        assert known is not None, "sdpa is always known"
        backend = known
        problem = Problem(
            model=facts.model,
            dtype=facts.weights or "float32",
            packing=True,
            dropout=facts.dropout,
            compiled=False,
            checkpointing=False,
            sequence_len=None,
            rows=1,
            autocast=False,
        )
    proof = check_isolation(
        model,
        implementation=implementation,
        context=replace(build_context(problem, backend), packing=True),
        collate=_adapt_collator(collator),
    )
    require_isolation(proof)
    log.info("packing: isolated on %s (%s)", implementation, proof.why)


def _unwrapped(model: Any) -> Any:
    """Return a model without the wrappers of torch.compile and data parallelism.

    Raises:
        AttnimgError: it is not a transformers model.
    """
    from torch import nn

    parallel = nn.parallel.DistributedDataParallel | nn.DataParallel
    while hasattr(model, "_orig_mod") or isinstance(model, parallel):
        model = model.module if isinstance(model, parallel) else model._orig_mod
    if not hasattr(model, "set_attn_implementation"):
        raise AttnimgError(
            "this is not a transformers model",
            why=f"found {type(model).__name__}, which has no set_attn_implementation",
            do="pass a model of transformers or PEFT; in other models, call attnimg.attention",
            code="bad-model",
            key="model",
        )
    return model


def _require_choice(model: Any, choice: Choice) -> None:
    """Raise unless a model runs the backend of a choice.

    Raises:
        AttnimgError: it runs another one.
    """
    found = application.current_implementation(model)
    if found in ("eager", "sdpa") and found != choice.implementation:
        raise AttnimgError(
            f"the model does not run {choice.backend}",
            why=f"found attn_implementation={found!r}, needed {choice.implementation!r}",
            do="load the model in the `use` block with attn_implementation=choice.implementation",
            code="not-applied",
        )
    application.require_applied(model, application.plan_backend(choice._plan))


def _require_device(model: Any, machine: Machine) -> None:
    """Raise if a model that is about to be called has no weights, or not on the choice's GPU."""
    device = next(model.parameters()).device
    if device.type == "meta":
        raise AttnimgError(
            "packing can't be checked while the model has no weights",
            why="found them on the device meta; the check calls the model",
            do="load the weights before",
            code="wrong-device",
        )
    if device.type != "cpu" or machine.arch.vendor == "cpu":
        return
    raise AttnimgError(
        "packing can't be checked while the model is on the CPU",
        why=f"found its weights on {device}; the backend was chosen for {gpu_text(machine)}",
        do='call model.to("cuda") first; to train on the CPU, set CUDA_VISIBLE_DEVICES=""',
        code="wrong-device",
    )


def _find_choice(model: Any) -> Choice | None:
    """Return the choice that `apply` made for a model, or else that of the innermost `use`."""
    applied = _find_applied(model)
    if isinstance(applied, _Applied):
        return applied.choice
    return in_use.get()[-1] if in_use.get() else None


def _adapt_collator(collator: Collator | None) -> Any:
    """Return a function that collates rows of documents; None without a collator."""
    if collator is None:
        return None
    name = getattr(collator, "__name__", type(collator).__name__)

    def collate(rows: list[list[Any]]) -> dict[str, Any]:
        device = rows[0][0].device
        documents = [[document.tolist() for document in row] for row in rows]
        if hasattr(collator, "padding_free"):
            examples = [
                {
                    "input_ids": [*chain(*row)],
                    "labels": [*chain(*row)],
                    "seq_lengths": [len(document) for document in row],
                }
                for row in documents
            ]
        else:
            examples = [{"input_ids": ids, "labels": ids} for row in documents for ids in row]
        batch = collator(examples)
        _require_boundaries(batch, name, documents=sum(map(len, rows)))
        return {
            key: value.to(device) if hasattr(value, "to") else value
            for key, value in batch.items()
            if key != "labels"
        }

    return collate


def _require_boundaries(batch: Mapping[str, Any], collator: str, *, documents: int) -> None:
    """Raise if a row of a batch has several documents without their boundaries."""
    if not batch.keys() <= {"input_ids", "labels", "attention_mask"}:
        return
    mask = batch.get("attention_mask")
    separates = mask is not None and (mask.dim() > 2 or int(mask.max()) > 1)
    if separates or len(batch["input_ids"]) >= documents:
        return
    raise PackingLeak(
        f"the collator {collator} packs documents without their boundaries",
        why=f"found {', '.join(sorted(batch))} for {counted(documents, 'document')} in "
        f"{counted(len(batch['input_ids']), 'row')}; needed position_ids that start at 0 in each "
        "document",
        do="pass a collator that returns position_ids, as transformers' DataCollatorWithFlattening",
        code="packing-not-isolated",
        key="collator",
    )
