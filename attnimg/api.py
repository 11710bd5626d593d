"""The Python API for your own trainer: select a backend for a model, verify it, and apply it.

    choice = attnimg.select("org/model", packing=True, sequence_len=8192)
    with attnimg.use(choice):
        model = AutoModelForCausalLM.from_pretrained(
            "org/model", attn_implementation=choice.implementation
        )
        attnimg.check_packing(model)

or, for a model that is loaded already:

    choice = attnimg.apply(model, packing=True)

Each step is logged by the logger "attnimg" at level INFO; at level WARNING where a backend is
replaced by the next candidate. The command line calls the same functions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args

from attnimg import application, pipeline
from attnimg.backends import find_backend
from attnimg.config.attention import name_errors
from attnimg.context import build_context
from attnimg.errors import AttnimgError
from attnimg.facts import (
    DType,
    Finding,
    GroupChoice,
    LayerKind,
    Machine,
    Model,
    ModelClass,
    Plan,
    Problem,
    Proof,
    RunContext,
    Verdict,
)
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.selection import known_bad, model_config, model_types
from attnimg.selection import plan as planning
from attnimg.selection.attention_shapes import read_attention_dropout, read_model
from attnimg.task import Task, find_machine, gpu_text

_log = logging.getLogger("attnimg")

# A trainer's collator: it turns a list of examples, each with input_ids and labels, into a batch.
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


class Settings(TypedDict, total=False):
    """The arguments of `select` besides the model."""

    packing: bool
    sequence_len: int | None
    micro_batch_size: int
    dtype: Any
    autocast: bool | None
    backend: str
    backends: Mapping[LayerKind, str] | None
    strict: bool
    compiled: bool
    checkpointing: bool
    trust_remote_code: bool


class Choice:
    """A backend that `select` chose for a model and a run.

    After `verify`, the choice may be another backend: the next one that passed its proof.
    """

    def __init__(self, task: Task, plan: Plan, warnings: tuple[Finding, ...], *, here: bool):
        self._task, self._plan, self._warnings, self._here = task, plan, warnings, here
        self._proofs: tuple[Proof, ...] = ()
        self._verified = False
        self._implementation: str | None = None

    @property
    def backend(self) -> str:
        """The name of the backend, "flash_attention_3"."""
        return self._chosen.backend.name

    @property
    def kernel(self) -> str:
        """The kernel that computes it, "flash-attn 2.8.3"."""
        return self._chosen.kernel or ""

    @property
    def implementation(self) -> str:
        """The value of `attn_implementation` to pass to from_pretrained inside `use`."""
        backend = application.plan_backend(self._plan)
        return self._implementation or backend.applied_as or backend.name

    @property
    def because(self) -> str:
        """Why it was chosen, in one sentence."""
        return self._plan.reason

    @property
    def candidates(self) -> tuple[Verdict, ...]:
        """All backends by rank, each with the reasons against it."""
        return self._plan.verdicts

    @property
    def groups(self) -> tuple[GroupChoice, ...]:
        """The backend of each group of layers; empty where all layers run `backend`."""
        return self._plan.groups

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Warnings about the model and the machine."""
        return self._warnings

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """The proofs that `verify` made or read from its cache, including failed ones."""
        return self._proofs

    @property
    def verified(self) -> bool:
        """Whether the backend passed its proof on this machine."""
        return self._verified

    def verify(self) -> Choice:
        """Compare the backend with a float64 reference, forward and backward, on this machine.

        The proof runs in a subprocess and is cached on disk. If it fails, the next candidate is
        verified where the backend was chosen by "auto"; otherwise it is an error.

        Returns:
            This choice.

        Raises:
            KernelError: no allowed backend passed; the error has the values that failed.
            AttnimgError: the choice was made for another machine.

        Example:
            >>> import attnimg
            >>> config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
            ...           "num_attention_heads": 4, "num_key_value_heads": 2}
            >>> attnimg.select(config, sequence_len=64).verify().verified
            True
        """
        if self._verified:
            return self
        self._require_here()
        use_shipped_kernels(self._task.machine)
        self._plan, self._proofs = pipeline.verify_plan(self._plan, self._task, LoggedReport())
        self._verified = True
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the choice, its candidates and proofs as a dict that JSON can represent.

        Example:
            >>> import attnimg
            >>> config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
            ...           "num_attention_heads": 4, "num_key_value_heads": 2}
            >>> attnimg.select(config, on="cpu").to_dict()["chosen"]["backend"]
            'sdpa'
        """
        return planning.plan_dict(self._plan) | {
            "on": self._task.machine.arch.name,
            "implementation": self.implementation,
            "warnings": [
                {"code": w.code, "key": w.key, "what": w.what, "do": w.do} for w in self._warnings
            ],
            "verified": self._verified,
            "proofs": [asdict(proof) | {"passed": proof.passed} for proof in self._proofs],
        }

    def __str__(self) -> str:
        """Return the text that `attnimg explain` prints."""
        from attnimg.cli.as_text import explained_text

        return explained_text(
            self._plan,
            gpu=gpu_text(self._task.machine),
            model=self._task.problem.model,
            problem=self._task.problem,
            machine=self._task.machine,
        )

    def __repr__(self) -> str:
        state = "verified" if self._verified else "not verified"
        return f"<attnimg.Choice {self.backend} on {self._task.machine.arch.name}, {state}>"

    @property
    def _chosen(self) -> Verdict:
        assert self._plan.chosen is not None, "`select` raises if nothing was chosen"
        return self._plan.chosen

    @property
    def _context(self) -> RunContext:
        return build_context(self._task.problem, application.plan_backend(self._plan))

    def _require_here(self) -> None:
        """Raise if it was selected for another machine."""
        if not self._here:
            raise AttnimgError(
                "a choice for another machine can't be verified",
                why=f"it was selected for {gpu_text(self._task.machine)}",
                do="leave out `on` and `image` on the machine that trains",
                code="other-machine",
            )

    def _layers(self) -> tuple[Any, ...]:
        model = self._task.problem.model
        return model.layers if model else ()

    def _prepare(self) -> application.Hold:
        """Load the kernel, and register it with transformers unless transformers has it."""
        with application.registries:
            self._implementation = application.load_and_register(
                application.plan_backend(self._plan),
                layers=self._layers(),
                trusted=self._task.problem.trusted,
            )
            return application.Hold([self._implementation])


class LoggedReport:
    """Report the steps of the pipeline to the logger "attnimg"."""

    def log(self, text: str) -> None:
        """Log a line."""
        _log.info("%s", text)

    def warn_replaced(self, text: str) -> None:
        """Log why a backend is replaced by the next candidate."""
        _log.warning("%s", text)

    def show_plan(self, plan: Plan, task: Task, warnings: Sequence[Finding]) -> None:
        """Log a plan that chose a backend, and its warnings."""
        assert plan.chosen is not None
        _log.info(
            "requested %s, got %s on %s: %s",
            plan.requested,
            plan.chosen.backend.name,
            gpu_text(task.machine),
            plan.reason,
        )
        for warning in warnings:
            _log.warning("%s: %s; %s", warning.code, warning.what, warning.do)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelFacts:
    """The facts about a model: its attention, class, name and the dtype of its weights."""

    model: Model
    model_class: ModelClass | None
    dropout: float
    name: str
    weights: DType | None = None


def select(
    model: object,
    *,
    packing: bool = False,
    sequence_len: int | None = None,
    micro_batch_size: int = 1,
    dtype: Any = "auto",
    autocast: bool | None = None,
    backend: str = "auto",
    backends: Mapping[LayerKind, str] | None = None,
    strict: bool = False,
    compiled: bool = False,
    checkpointing: bool = False,
    trust_remote_code: bool = False,
    on: str | None = None,
    image: str | None = None,
) -> Choice:
    """Select the attention backend for a model and a training run.

    torch is imported only if `model` is a loaded model.

    Args:
        model: a hub name or a folder, both on this machine; the content of config.json as a dict; a
            transformers config; or a loaded model.
        packing: whether rows hold several documents that must not attend to one another.
        sequence_len: tokens in the longest row; None if not known.
        micro_batch_size: rows per batch on one device.
        dtype: precision of q, k and v: "bfloat16" or "bf16", "float16", "float32" or a torch.dtype;
            "auto" is that of a loaded model, or else what `attnimg train` would use.
        autocast: whether the forward pass runs under torch.autocast; None: it does if `dtype` is
            not the dtype of the weights.
        backend: "auto", a name that `attn_implementation` takes in a config, or a hub kernel
            "org/name". The environment variable ATTNIMG_BACKEND replaces "auto".
        backends: the backend for each kind of layers, {"sliding": NAME, "full": NAME}; only if
            `backend` is "auto". A kind that is left out gets the best backend that fits it.
        strict: whether no other member of the flash family may replace the named backend.
        compiled: whether the model runs under torch.compile.
        checkpointing: whether activations are recomputed in the backward pass.
        trust_remote_code: whether hub kernels of unknown publishers may run.
        on: a GPU to select for instead of this machine: "h100", "t4", "sm_90", "cpu".
        image: the image whose packages are assumed to be installed there, "hopper".

    Returns:
        The choice. It is not verified yet.

    Raises:
        KernelError: the named backend, or every backend, does not fit.
        PackingLeak: it is known that packed documents would affect one another in this model.
        AttnimgError: an argument is invalid, or the model's config can't be read.

    Example:
        >>> import attnimg
        >>> config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
        ...           "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> attnimg.select(config, on="h100", packing=True, sequence_len=4096).backend
        'flash_attention_3'
    """
    requested = backend_name(backend)
    _require_kinds(backends, backend)
    _require_counts(sequence_len=sequence_len, micro_batch_size=micro_batch_size)
    _require_flags(
        packing=packing,
        strict=strict,
        compiled=compiled,
        checkpointing=checkpointing,
        trust_remote_code=trust_remote_code,
    )
    machine, _ = find_machine(on, image)
    facts = _model_facts(model)
    precision = _dtype(dtype, facts, machine.arch)
    if autocast is None:
        autocast = precision != (facts.weights or "float32")
    problem = Problem(
        model=facts.model,
        model_class=facts.model_class,
        dtype=precision,
        packing=packing,
        dropout=facts.dropout,
        compiled=compiled,
        checkpointing=checkpointing,
        sequence_len=sequence_len,
        rows=micro_batch_size,
        autocast=autocast,
        trusted=trust_remote_code,
        known_bad=known_bad.load(None, today=date.today()),
    )
    task = Task(
        machine=machine, problem=problem, requested=requested, strict=strict, kinds=backends
    )
    plan = pipeline.select(task, LoggedReport())
    warnings = pipeline.find_warnings(plan, task)
    return Choice(task, plan, warnings, here=on is None and image is None)


# The choices of the `use` blocks that are active, the innermost last.
_in_use: ContextVar[tuple[Choice, ...]] = ContextVar("attnimg_in_use", default=())


@contextmanager
def use(choice: Choice) -> Iterator[Choice]:
    """Register a choice with transformers inside the block; verify it first if it is not verified.

    Models that are loaded inside with `attn_implementation=choice.implementation` run its backend.
    transformers' registries are restored at the end, so train inside the block. A backend that
    `apply` registers inside the block stays registered until `restore`. Blocks of several threads
    may overlap; kernels of the flash family should not, since transformers holds only one.

    Raises:
        KernelError: no allowed backend passed its proof, or the kernel does not load.

    Example:
        >>> import attnimg
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
        >>> with attnimg.use(attnimg.select(config, sequence_len=64)) as choice:
        ...     model = AutoModelForCausalLM.from_config(
        ...         config, attn_implementation=choice.implementation
        ...     )
        ...     model.config._attn_implementation
        'sdpa'
    """
    choice.verify()
    with application.restore_registries():
        hold = choice._prepare()
        token = _in_use.set((*_in_use.get(), choice))
        try:
            yield choice
        finally:
            _in_use.reset(token)
            hold.release()


# The attribute of a model for what `apply` changed. Copies of the model get it too.
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
        """Return the same for a copy of the model, which runs the same choice."""
        return replace(self, hold=deepcopy(self.hold, memo))

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to pickle it: as `before` alone, for processes without attnimg."""
        return str, (self.before,)


def _find_applied(model: Any) -> _Applied | str | None:
    """Return what `apply` changed in a model; in an unpickled one, its attention before."""
    found: _Applied | str | None = vars(_base(model)).get(_APPLIED)
    return found


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
    use_shipped_kernels(choice._task.machine)
    with application.registries:
        if _find_applied(model) is not None:
            restore(model)
        _apply(choice, model, collator)
    return choice


def _apply(choice: Choice, model: Any, collator: Collator | None) -> None:
    """Verify a choice, and apply it to a model."""
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
        if application.current_implementation(model) != before:
            model.set_attn_implementation(before)
        application.unregister(application.registered_names() - registered)
        raise
    choice._plan, choice._proofs = applied.selected.plan, applied.selected.proofs
    choice._verified, choice._implementation = True, application.current_implementation(model)
    names = (application.registered_names() - registered) | {choice._implementation}
    applied_to = _Applied(choice=choice, before=before, hold=application.Hold(names))
    setattr(_base(model), _APPLIED, applied_to)


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
        delattr(_base(model), _APPLIED)
        model.set_attn_implementation(found.before if isinstance(found, _Applied) else found)
        if isinstance(found, _Applied):
            found.hold.release()


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
        context = replace(choice._context, packing=True)
    else:
        facts = _model_facts(model)
        known = find_backend(implementation.removeprefix("kernels:"))
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
        context = build_context(problem, known or _backend("sdpa"))
    proof = check_isolation(
        model,
        implementation=implementation,
        context=context,
        collate=_adapt_collator(collator),
    )
    require_isolation(proof)
    _log.info("packing: isolated on %s (%s)", implementation, proof.why)


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


def _base(model: Any) -> Any:
    """Return the model inside PEFT's wrapper; an unwrapped model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    return _in_use.get()[-1] if _in_use.get() else None


def _adapt_collator(collator: Collator | None) -> Any:
    """Return a function that collates rows of documents; None without a collator."""
    if collator is None:
        return None

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
        return {
            name: value.to(device) if hasattr(value, "to") else value
            for name, value in batch.items()
            if name != "labels"
        }

    return collate


def _backend(name: str) -> Any:
    found = find_backend(name)
    assert found is not None
    return found


def backend_name(name: str) -> str | None:
    """Return the requested backend, None for "auto"; raise for a name that is not a backend."""
    for error in name_errors(name):
        raise AttnimgError(error.what, why=error.why, do=error.do, code=error.code, key="backend")
    return None if name == planning.AUTO else name


def _require_kinds(backends: Mapping[LayerKind, str] | None, backend: str) -> None:
    """Raise unless `backends` names backends for known kinds of layers, and `backend` is "auto"."""
    if not backends:
        return
    if not isinstance(backends, Mapping):
        raise _bad_value("backends", "is not a dict", backends, '{"sliding": NAME, "full": NAME}')
    if unknown := backends.keys() - {*get_args(LayerKind)}:
        raise AttnimgError(
            f"backends has an unknown kind of layers: {min(map(str, unknown))}",
            why=f"known are {', '.join(get_args(LayerKind))}",
            do='pass backends={"sliding": NAME, "full": NAME}',
            code="bad-value",
            key="backends",
        )
    for name in backends.values():
        backend_name(name)
    if backend != planning.AUTO:
        raise AttnimgError(
            "backends and backend exclude each other",
            why=f"found backend={backend!r} and backends={dict(backends)!r}",
            do="leave backend out",
            code="bad-value",
            key="backends",
        )


def _require_counts(**counts: int | None) -> None:
    """Raise unless each is a whole number of at least 1, or None for an unknown sequence_len."""
    for key, count in counts.items():
        unknown = count is None and key == "sequence_len"
        if not unknown and (type(count) is not int or count < 1):
            raise _bad_value(key, "is not a whole number of at least 1", count, "8192")


def _require_flags(**flags: object) -> None:
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise _bad_value(key, "is neither True nor False", flag, "True")


def _bad_value(key: str, what: str, found: object, example: str) -> AttnimgError:
    return AttnimgError(
        f"{key} {what}",
        why=f"found {found!r}",
        do=f"pass {key}={example}, or leave it out",
        code="bad-value",
        key=key,
    )


# The names that trainers' arguments have for them.
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _dtype(given: Any, facts: _ModelFacts, arch: Any) -> DType:
    """Return the precision of q, k and v."""
    name = str(given).removeprefix("torch.")
    name = _DTYPE_NAMES.get(name, name)
    if name == "auto":
        return (
            _autocast_dtype(arch)
            or facts.weights
            or planning.training_dtype(bf16="auto", fp16=False, arch=arch)
        )
    if name not in get_args(DType):
        raise AttnimgError(
            f"dtype is not one of {', '.join(get_args(DType))}",
            why=f"found {given!r}",
            do='pass dtype="bfloat16", or leave it out',
            code="bad-value",
            key="dtype",
        )
    found: DType = name  # type: ignore[assignment]  # checked in the line above
    return found


def _autocast_dtype(arch: Any) -> DType | None:
    """Return the dtype of the torch.autocast block around the call; None outside of one."""
    import sys

    if (torch := sys.modules.get("torch")) is None:
        return None
    device = "cpu" if arch.vendor == "cpu" else "cuda"
    if not torch.is_autocast_enabled(device):
        return None
    name: DType = str(torch.get_autocast_dtype(device)).removeprefix("torch.")  # type: ignore[assignment]  # torch's own name
    return name


def _model_facts(model: object) -> _ModelFacts:
    """Read what is known about a model.

    Raises:
        AttnimgError: its config can't be read, or is not on this machine.
    """
    if isinstance(model, str | os.PathLike):
        return _named_model(os.fspath(model))
    if isinstance(model, Mapping):
        return _from_config(model, name=str(model.get("_name_or_path") or "the model"))
    config = getattr(model, "config", model)
    if not hasattr(config, "to_dict"):
        raise AttnimgError(
            "this is not a model",
            why=f"found {type(model).__name__}",
            do="pass a model, a transformers config, a dict as in config.json, a folder or a name",
            code="bad-model",
            key="model",
        )
    raw = config.to_dict()
    facts = _from_config(raw, name=str(getattr(config, "_name_or_path", "") or "the model"))
    if config is model:
        return facts
    weights = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return replace(
        facts,
        model_class=application.read_class_limits(type(_base(model))),
        weights=weights if weights in get_args(DType) else None,  # type: ignore[arg-type]  # checked
    )


def _named_model(name: str) -> _ModelFacts:
    path = model_config.find_config(name)
    if path is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise AttnimgError(
            f"there is no folder {name}",
            why="a name with this form is a folder of this machine; needed one with a config.json",
            do="correct the path, or pass the loaded model",
            code="bad-model",
            key="model",
        )
    if path is None:
        raise AttnimgError(
            f"the config.json of {name} is not on this machine",
            why="found neither a folder of that name nor a snapshot in the Hugging Face cache",
            do=f"run hf download {name} config.json, or pass the loaded model",
            code="model-not-at-hand",
            key="model",
        )
    return _from_config(model_config.read_config(path), name=name, file=Path(path).name)


def _from_config(raw: Mapping[str, Any], *, name: str, file: str = "config.json") -> _ModelFacts:
    model = read_model(raw, file=file)
    return _ModelFacts(
        model=model,
        model_class=model_types.find_class(model.type),
        dropout=read_attention_dropout(raw, file=file),
        name=name,
    )
