"""Turn parsed records into tokens and labels, before any limit on their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from attnimg.config.schema import Config, is_chat
from attnimg.errors import AttnimgError
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.conversations import trained_roles
from attnimg.train.data.documents import IGNORED
from attnimg.train.data.parsed import Pair, Parsed, unused_note
from attnimg.train.data.records import Place
from attnimg.train.data.sources import Source

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
        tokenizer: a transformers tokenizer; what it adds to a text stands at the ends of the pair.
        train_on_inputs: whether prompts carry loss.
        notes: the warnings, each once.
    """

    tokenizer: Any
    train_on_inputs: bool
    notes: dict[str, None] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what had no effect in what was encoded so far."""
        return tuple(self.notes)

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[Tokens]:
        """Encode pairs: [start] prompt completion [end]; texts without prompt the same way."""
        pairs = [parsed for _, parsed in batch if isinstance(parsed, Pair)]
        unused = dict.fromkeys(pair.unused for pair in pairs if pair.unused)
        self.notes.update((unused_note("columns", names), None) for names in unused)
        opening, ending = self._added()
        prompts = iter(self._tokenize([pair.prompt for pair in pairs if pair.prompt is not None]))
        encoded = []
        for pair, answer in zip(pairs, self._tokenize([p.completion for p in pairs]), strict=True):
            # A text may spell the tokens that are added to it.
            if pair.prompt is None and answer[: len(opening)] == opening:
                answer = answer[len(opening) :]
            if answer[-len(ending) :] == ending:
                answer = answer[: -len(ending)]
            learnt = [*answer, *ending]
            prompt = [*opening, *next(prompts)] if pair.prompt is not None else opening
            counts = self.train_on_inputs or pair.prompt is None
            mask = prompt if counts else [IGNORED] * len(prompt)
            encoded.append((prompt + learnt, mask + learnt))
        return encoded

    def _added(self) -> tuple[list[int], list[int]]:
        """Return the tokens that are added before and after a text; the end token is the last."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        whole = self.tokenizer("a", verbose=False)["input_ids"]
        (alone,) = self._tokenize(["a"])
        start = next(
            (n for n in range(len(whole)) if alone and whole[n : n + len(alone)] == alone),
            int(bos is not None and whole[:1] == [bos]),  # a vocabulary without the letter
        )
        ending = whole[start + len(alone) :]
        return whole[:start], ending if ending[-1:] == [eos] else [*ending, eos]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose: the warning about the model's longest sequence; sequence_len is checked later.
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])


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
