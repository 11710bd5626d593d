"""Parse and encode records by the type of their dataset.

A type has a parser, which turns a record into a pair of texts or a conversation, or raises with the
record's place, and an encoder, which turns the parsed records into tokens and labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from attnimg.config.schema import Config, DatasetSpec, is_chat, is_text, type_name
from attnimg.errors import AttnimgError
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.chat_mistral import MistralEncoder
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.conversations import parse_turns, trained_roles
from attnimg.train.data.prompts import choose_prompt, parse_prompt
from attnimg.train.data.records import (
    IGNORE_INDEX,
    Pair,
    Parsed,
    Place,
    Tokens,
    bad_record,
    require_column,
    require_text,
    unused_warning,
)
from attnimg.train.data.sources import Source
from attnimg.train.data.template_free import (
    SegmentEncoder,
    TokenEncoder,
    parse_segments,
    parse_tokens,
)


def choose_parser(spec: DatasetSpec) -> Callable[[Mapping[str, Any], Place], Parsed | None]:
    """Return the parser of a dataset type; it returns None for an empty record."""
    if is_chat(spec):
        return partial(parse_turns, spec)
    if is_text(spec):
        return partial(_parse_text, spec.field or spec.text_column or "text")
    if (prompt := choose_prompt(spec)) is not None:
        return partial(parse_prompt, prompt)
    return parse_segments if spec.type == "input_output" else parse_tokens


def make_encoder(source: Source, config: Config, tokenizer: Any) -> Encoder:
    """Return the encoder that turns a source's records into tokens.

    Raises:
        AttnimgError: the tokenizer has no end token, or no chat template where one is needed; or
            its end token is trained in two ways.
    """
    spec = source.spec
    if is_chat(spec) and config.tokenizer_use_mistral_common:
        return MistralEncoder(
            tokenizer,
            train_on_eos=spec.train_on_eos or "turn",
            train_on_inputs=config.train_on_inputs,
            system_message=config.default_system_message,
        )
    if is_chat(spec):
        eos, eot = spec.train_on_eos or "turn", spec.train_on_eot
        if eot not in (None, eos) and tokenizer.eos_token in (config.eot_tokens or ()):
            key = f"{source.key}.train_on_eot"
            what = f"{key}: {eot} contradicts train_on_eos: {eos}"
            why = f"eot_tokens has {tokenizer.eos_token}, which is the tokenizer's eos_token"
            raise AttnimgError(what, why=why, do=f"remove {key}", code="bad-value", key=key)
        return ChatEncoder(
            tokenizer,
            choose_chat_template(config, tokenizer, spec=spec, key=source.key),
            trained_roles=trained_roles(spec),
            train_on_eos=eos,
            train_on_eot=eot,
            train_on_inputs=config.train_on_inputs,
            eot_tokens=tuple(config.eot_tokens or ()),
            thinking_key=spec.template_thinking_key or "reasoning_content",
            template_kwargs=config.chat_template_kwargs,
            system_message=config.default_system_message,
        )
    if spec.type is None:
        return TokenEncoder(len(tokenizer))
    if spec.type == "input_output":
        return SegmentEncoder(tokenizer, config.train_on_inputs)
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end-of-text token"
        why = (
            f"found none; {type_name(spec)} ends each document with it, so that the model learns "
            "to stop"
        )
        do = 'set one: `special_tokens: {eos_token: "</s>"}`'
        raise AttnimgError(what, why=why, do=do, code="missing-key", key="special_tokens")
    prompt = choose_prompt(spec)
    return PairEncoder(
        tokenizer,
        config.train_on_inputs,
        ends=prompt.ends if prompt else 1,
        joined=bool(prompt and prompt.joined),
    )


def _parse_text(field: str, record: Mapping[str, Any], place: Place) -> Pair | None:
    """Return the text of a record; None for a blank one."""
    texts = {key: value for key, value in record.items() if isinstance(value, str)}
    longest = max(texts, key=lambda key: len(texts[key]), default=None)
    hint = "name the text column: `field: ...`"
    if longest is not None:
        hint = f"name the text column: `field: {json.dumps(longest, ensure_ascii=False)}`"
    text = require_text(
        require_column(record, field, place, needed=(field,), hint=hint), field, place
    )
    return Pair(None, text) if text.strip() else None


@dataclass(frozen=True, slots=True)
class PairEncoder:
    """Encode a prompt and its completion separately, so that generation has the same prompt tokens.

    Attributes:
        tokenizer: a transformers tokenizer; its start and end tokens are added to the pair.
        train_on_inputs: whether prompts are trained.
        ends: how many end tokens follow a completion.
        joined: whether prompt and completion are encoded as one text.
        warnings: on columns without effect in the records encoded so far.
    """

    tokenizer: Any
    train_on_inputs: bool
    ends: int = 1
    joined: bool = False
    warnings: dict[str, None] = field(default_factory=dict)

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[Tokens]:
        """Encode pairs: [start] prompt completion [end]; texts without prompt the same way.

        Raises:
            AttnimgError: a prompt has other tokens with its completion than without.
        """
        pairs = [parsed for _, parsed in batch if isinstance(parsed, Pair)]
        unused = dict.fromkeys(pair.unused for pair in pairs if pair.unused)
        self.warnings.update((unused_warning("columns", names), None) for names in unused)
        opening, ending = self._added_tokens()
        prompts = iter(self._tokenize([pair.prompt for pair in pairs if pair.prompt is not None]))
        encoded = []
        completions = self._completions([(p, x) for p, x in batch if isinstance(x, Pair)])
        for pair, answer in zip(pairs, completions, strict=True):
            # A text may already begin with the tokens that would be added.
            if pair.prompt is None and answer[: len(opening)] == opening:
                answer = answer[len(opening) :]
            if answer[-len(ending) :] == ending:
                answer = answer[: -len(ending)]
            completion = [*answer, *ending, *ending[-1:] * (self.ends - 1)]
            prompt = [*opening, *next(prompts)] if pair.prompt is not None else opening
            trained = self.train_on_inputs or pair.prompt is None
            mask = prompt if trained else [IGNORE_INDEX] * len(prompt)
            encoded.append((prompt + completion, mask + completion))
        return encoded

    def _completions(self, pairs: Sequence[tuple[Place, Pair]]) -> list[list[int]]:
        """Return the tokens of each completion, tokenized alone or together with its prompt."""
        if not self.joined:
            return self._tokenize([pair.completion for _, pair in pairs])
        completions = []
        prompts = self._tokenize([pair.prompt or "" for _, pair in pairs])
        whole = self._tokenize([f"{pair.prompt}{pair.completion}" for _, pair in pairs])
        for (place, _), prompt, tokens in zip(pairs, prompts, whole, strict=True):
            if tokens[: len(prompt)] != prompt:
                why = "the last token of the prompt also has a part of the completion"
                do = "use another type, whose completion is tokenized alone"
                raise bad_record(place, why=why, do=do)
            completions.append(tokens[len(prompt) :])
        return completions

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Return the tokens that are added before and after a text; the end token is the last."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        encoded = self.tokenizer("a", verbose=False)["input_ids"]
        (alone,) = self._tokenize(["a"])
        start = next(
            (n for n in range(len(encoded)) if alone and encoded[n : n + len(alone)] == alone),
            int(bos is not None and encoded[:1] == [bos]),  # a vocabulary without the letter
        )
        ending = encoded[start + len(alone) :]
        return encoded[:start], ending if ending[-1:] == [eos] else [*ending, eos]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose: the warning about the model's longest sequence; sequence_len is checked later.
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])


Encoder = ChatEncoder | MistralEncoder | PairEncoder | SegmentEncoder | TokenEncoder
