"""Turn parsed records into tokens and labels, before any limit on their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from attnimg.errors import AttnimgError
from attnimg.schema import Config
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.conversations import trained_roles
from attnimg.train.data.documents import IGNORED
from attnimg.train.data.parsed import Pair, Parsed
from attnimg.train.data.records import Place
from attnimg.train.data.sources import Source
from attnimg.train.data.types import is_chat

Tokens = tuple[list[int], list[int]]  # input_ids and labels, equally long


class Encoder(Protocol):
    """Makes tokens of parsed records, in their order."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what people should know."""

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[Tokens]:
        """Encode a batch."""


@dataclass(frozen=True, slots=True)
class PairEncoder:
    """Encode prompt and completion apart, so that generation meets the same prompt tokens.

    Attributes:
        tokenizer: a transformers tokenizer; it adds what it adds at the start of a text.
        train_on_inputs: whether prompts carry loss.
    """

    tokenizer: Any
    train_on_inputs: bool
    warnings: tuple[str, ...] = ()

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[Tokens]:
        """Encode pairs: [start] prompt completion [end]; texts without prompt the same way."""
        pairs = [parsed for _, parsed in batch if isinstance(parsed, Pair)]
        starts = iter(self._tokenize([pair.prompt for pair in pairs if pair.prompt is not None]))
        answers = iter(
            self._tokenize([p.completion for p in pairs if p.prompt is not None], start=False)
        )
        texts = iter(self._tokenize([pair.completion for pair in pairs if pair.prompt is None]))
        encoded = []
        for pair in pairs:
            prompt = [] if pair.prompt is None else next(starts)
            answer = next(texts if pair.prompt is None else answers)
            learnt = [*answer, self.tokenizer.eos_token_id]
            mask = prompt if self.train_on_inputs else [IGNORED] * len(prompt)
            encoded.append((prompt + learnt, mask + learnt))
        return encoded

    def _tokenize(self, texts: list[str], *, start: bool = True) -> list[list[int]]:
        if not texts:
            return []
        # verbose: the warning about the model's longest sequence; sequence_len is checked later.
        ids = self.tokenizer(texts, add_special_tokens=start, verbose=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # A text may spell the tokens that the tokenizer, or this class, adds to it.
        ids = [row[1:] if bos is not None and row[:2] == [bos, bos] else row for row in ids]
        return [row[:-1] if row and row[-1] == eos else row for row in ids]


def encoder_for(source: Source, config: Config, tokenizer: Any) -> Encoder:
    """Choose how a source's records become tokens.

    Raises:
        AttnimgError: the tokenizer has no end token, or no chat template where one is needed.
    """
    spec = source.spec
    if is_chat(spec):
        return ChatEncoder(
            tokenizer,
            choose_chat_template(config, tokenizer, spec=spec, key=source.key),
            trained_roles=trained_roles(spec),
            train_on_eos=spec.train_on_eos or "turn",
            train_on_inputs=config.train_on_inputs,
            eot_tokens=tuple(config.eot_tokens or ()),
            system_message=config.default_system_message,
        )
    if tokenizer.eos_token_id is None:
        raise AttnimgError(
            "the tokenizer has no end-of-text token",
            why=f"found none; {spec.type} ends each document with it, so that the model "
            "learns to stop",
            do='name one: `special_tokens: {eos_token: "</s>"}`',
            code="missing-key",
            key="special_tokens",
        )
    return PairEncoder(tokenizer, config.train_on_inputs)
