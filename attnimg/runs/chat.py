"""Generate answers with a run's model: transformers' generation on a selected attention backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from attnimg import application
from attnimg.config.schema import dataset_entries, is_chat, type_name
from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.pipeline import Selected, select, select_verify_apply
from attnimg.runs.folder import WITHOUT_TRAINING, RunFolder
from attnimg.train.run import TrainReport, read_checked_task, with_model_config

Message = Mapping[str, str]

# The largest relative difference between one token's logits with a KV cache and without one.
# Rounding in bfloat16 explains less than 0.02, measured on tiny models (2026-11-27).
_CACHE_TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How answers are generated; None means the value of the model's generation config.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        temperature: temperature of the sampling; 0 always takes the most likely token.
        top_p: total probability of the most likely tokens that are sampled from.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatModel:
    """A loaded model that answers.

    Attributes:
        model: a transformers model, or a PEFT model around it.
        tokenizer: its tokenizer.
        stops: the tokens that end an answer.
        limit: the number of positions of the model; None where it is not known.
        template_kwargs: variables of the chat template in training.
        system: the system message that training added to conversations without one.
    """

    model: Any
    tokenizer: Any
    stops: tuple[int, ...]
    limit: int | None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: the answer, without special tokens.
        prompt_tokens: number of tokens in the prompt.
        tokens: number of generated tokens.
        finish: why it ended: at an end token, at the longest length, at the end of the model's
            context, or by the user.
        seconds: how long it took.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: Literal["stop", "length", "context", "interrupted"]
    seconds: float


@contextmanager
def load_chat(
    run: RunFolder, machine: Machine, *, report: TrainReport, raw: bool
) -> Iterator[ChatModel]:
    """Load a run's model for the duration of the block, with a selected attention backend.

    Args:
        run: as `find_run` returns it.
        machine: this machine.
        report: receives the plan and the proof.
        raw: whether texts are completed without a chat template.

    Raises:
        AttnimgError: the tokenizer has no chat template (no-chat-template), or the model can't be
            loaded.
    """
    from attnimg.runs.weights import load_trained
    from attnimg.train.environment import silence_libraries
    from attnimg.train.tokenizer import load_tokenizer

    silence_libraries()
    changes = {
        "sample_packing": False, "batch_flattening": None, "micro_batch_size": 1,
        "eval_batch_size": None, "attn_implementation": None, "attn_backends": None,
        "attn_forward_only_ok": True,
    }  # fmt: skip
    config = run.loading_config.model_copy(update=WITHOUT_TRAINING | changes)
    tokenizer = load_tokenizer(config, log=lambda _: None)
    if not raw and not tokenizer.chat_template:
        raise AttnimgError(
            "the tokenizer has no chat template",
            why=f"found none with the model in {run.folder}; messages need one",
            do="pass --raw to complete texts, or set chat_template in the config and train again",
            code="no-chat-template",
            key="chat_template",
        )

    if not raw and (text := _other_prompt(run)) is not None:
        report.log(f"warning: {text}")

    def load(selected: Selected) -> Any:
        return load_trained(
            run, tokens=len(tokenizer), implementation=selected.implementation,
            context=replace(selected.context, autocast=None),
            needs_dtype_cast=selected.backend.needs_dtype_cast, log=report.log,
        )  # fmt: skip

    with application.restore_registries():
        task = read_checked_task(config, machine, report)
        task, plan = with_model_config(config, task, select(task, report), report)
        model = select_verify_apply(task, load, report=report, plan=plan).model
        _require_cached_attention(model, report)
        ends = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)}
        ends |= {tokenizer.convert_tokens_to_ids(token) for token in config.eot_tokens or ()}
        yield ChatModel(
            model=model,
            tokenizer=tokenizer,
            stops=tuple(sorted(ends - {None})),
            limit=_positions(model.config),
            template_kwargs=config.chat_template_kwargs or {},
            system=config.default_system_message,
        )


def _other_prompt(run: RunFolder) -> str | None:
    """Return the warning for a run without conversations: it trained other prompts than chat's."""
    specs = [spec for _, spec, trains in dataset_entries(run.config) if trains]
    if run.receipt is None or not specs or any(is_chat(spec) for spec in specs):
        return None
    types = ", ".join(dict.fromkeys(type_name(spec) for spec in specs))
    return (
        f"the chat template writes another prompt than training, whose data have type {types}; "
        "--raw continues a prompt that is written as in training"
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _positions(config: Any) -> int | None:
    """Return the number of positions in a model's configuration."""
    from attnimg.train.base_model import rope_positions

    text = config.get_text_config(decoder=True).to_dict()
    positions = rope_positions(text) or text.get("n_positions") or text.get("max_seq_len")
    return positions if isinstance(positions, int) else None


def _require_cached_attention(model: Any, report: TrainReport) -> None:
    """Switch to sdpa if the selected backend computes wrong logits with a KV cache.

    Training and proofs call backends without a cache.

    Raises:
        AttnimgError: the logits of sdpa are wrong as well (code cache-differs, exit code 1).
    """
    from attnimg.application import inner_model

    error = _cache_error(model)
    if error is not None and application.current_implementation(model) != "sdpa":
        report.warn_replaced(f"sdpa replaces the backend, which can't use a KV cache: {error}")
        inner_model(model).set_attn_implementation("sdpa")
        error = _cache_error(model)
    if error is not None:
        raise AttnimgError(
            "the model computes other logits with a KV cache",
            why=error,
            do="generate without a cache: model.generate(..., use_cache=False) in transformers",
            code="cache-differs",
            exit_code=1,
        )


def _cache_error(model: Any) -> str | None:
    """Return how a token's logits differ with a KV cache; None if they do not."""
    import torch

    rows = len(model.get_input_embeddings().weight)
    ids = torch.randint(0, rows, (1, 12), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            begun = model(input_ids=ids[:, :-1], use_cache=True)
            cached = model(
                input_ids=ids[:, -1:], past_key_values=begun.past_key_values, use_cache=True
            ).logits[0, -1].float()  # fmt: skip
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:300]
    difference = float((cached - whole).norm() / (whole - whole.mean()).norm())
    if difference <= _CACHE_TOLERANCE:
        return None
    return f"found a relative difference of {difference:.2g}; allowed {_CACHE_TOLERANCE}"


def answer(
    chat: ChatModel,
    prompt: Sequence[Message] | str,
    settings: GenerationSettings,
    *,
    on_text: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Answer:
    """Generate the answer to a conversation, or the continuation of a text.

    Args:
        chat: as `load_chat` yields it.
        prompt: messages with role and content, or a text to continue.
        settings: how to generate.
        on_text: called with each piece of the answer as it is generated.
        stopped: returns whether the user stopped the answer.

    Raises:
        AttnimgError: the prompt is longer than the model's positions (context-full), or the chat
            template does not accept the messages (bad-chat).
    """
    import torch
    from transformers import StoppingCriteria, TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # transformers' types are not followed
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002  transformers passes it
            if text:
                on_text(text)

    class UserStop(StoppingCriteria):  # type: ignore[misc]  # transformers' types are not followed
        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stopped(), device=input_ids.device)

    began = time.monotonic()
    ids = _encode(chat, prompt).to(next(chat.model.parameters()).device)
    length = ids.shape[1]
    room = settings.max_new_tokens
    if chat.limit is not None:
        if length >= chat.limit:
            raise AttnimgError(
                "the conversation is longer than the model's context",
                why=f"found {length:,} tokens; the model has {chat.limit:,} positions",
                do="type /reset to begin a new conversation, or write less",
                code="context-full",
                exit_code=1,
            )
        room = min(room, chat.limit - length)
    with torch.no_grad():
        output = chat.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            eos_token_id=list(chat.stops) or None,
            pad_token_id=chat.tokenizer.pad_token_id,
            streamer=Streamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=[UserStop()],
            **_sampling(settings),
        )
    generated = output[0, length:].tolist()
    finish: Literal["stop", "length", "context", "interrupted"] = "length"
    if generated and generated[-1] in chat.stops:
        finish = "stop"
    elif stopped():
        finish = "interrupted"
    elif room < settings.max_new_tokens:
        finish = "context"
    return Answer(
        text=chat.tokenizer.decode(generated, skip_special_tokens=True),
        prompt_tokens=length,
        tokens=len(generated),
        finish=finish,
        seconds=round(time.monotonic() - began, 3),
    )


def _sampling(settings: GenerationSettings) -> dict[str, Any]:
    """Return the arguments of `generate` for sampling."""
    if settings.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {"temperature": settings.temperature, "top_p": settings.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


def _encode(chat: ChatModel, prompt: Sequence[Message] | str) -> Any:
    """Return the tokens of a prompt, int64 (1, S)."""
    from jinja2 import TemplateError

    if isinstance(prompt, str):
        return chat.tokenizer(prompt, return_tensors="pt")["input_ids"]
    try:
        return chat.tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True,
            **chat.template_kwargs,
        )["input_ids"]  # fmt: skip
    except TemplateError as error:
        raise AttnimgError(
            "the chat template does not accept this conversation",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do="leave out --system: some templates accept no system message"
            if prompt[0]["role"] == "system"
            else "pass --raw to complete texts without the template",
            code="bad-chat",
        ) from error
