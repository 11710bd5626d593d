"""Select a backend for a model and a run, verify it, and register it with transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from datetime import date
from typing import Any, TypedDict

from attnimg import application, pipeline
from attnimg.api.advice import api_words, finding_in_api_words, public
from attnimg.api.arguments import (
    backend_name,
    read_dtype,
    read_facts,
    require_counts,
    require_flags,
    require_kinds,
    require_names,
)
from attnimg.errors import AttnimgError
from attnimg.facts import Finding, LayerKind
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.run_facts import GroupChoice, Plan, Problem, Proof, Verdict
from attnimg.selection import known_bad
from attnimg.selection import plan as planning
from attnimg.task import Task, find_machine, gpu_text

log = logging.getLogger("attnimg")


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

    @api_words()
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

    @api_words()
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
        log.info("%s", text)

    def warn_replaced(self, text: str) -> None:
        """Log why a backend is replaced by the next candidate."""
        log.warning("%s", text)

    def show_plan(self, plan: Plan, task: Task, warnings: Sequence[Finding]) -> None:
        """Log a plan that chose a backend, and its warnings."""
        assert plan.chosen is not None
        log.info(
            "requested %s, got %s on %s: %s",
            plan.requested,
            plan.chosen.backend.name,
            gpu_text(task.machine),
            plan.reason,
        )
        for warning in map(finding_in_api_words, warnings):
            log.warning("%s: %s; %s", warning.code, warning.what, warning.do)


@public()
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
    require_kinds(backends, backend)
    require_counts(sequence_len=sequence_len, micro_batch_size=micro_batch_size)
    require_flags(
        packing=packing,
        strict=strict,
        autocast=autocast,
        compiled=compiled,
        checkpointing=checkpointing,
        trust_remote_code=trust_remote_code,
    )
    require_names(on=on, image=image)
    machine, _ = find_machine(on, image)
    facts = read_facts(model)
    precision = read_dtype(dtype, facts, machine.arch)
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
    warnings = tuple(map(finding_in_api_words, pipeline.find_warnings(plan, task)))
    return Choice(task, plan, warnings, here=on is None and image is None)


# The choices of the `use` blocks that are active, the innermost last.
in_use: ContextVar[tuple[Choice, ...]] = ContextVar("attnimg_in_use", default=())


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
    if not isinstance(choice, Choice):
        raise TypeError(
            f"use() needs the result of attnimg.select, found {choice!r}; write "
            'attnimg.use(attnimg.select(model, backend="..."))'
        )
    choice.verify()
    with application.restore_registries():
        hold = choice._prepare()
        token = in_use.set((*in_use.get(), choice))
        try:
            yield choice
        finally:
            in_use.reset(token)
            hold.release()
