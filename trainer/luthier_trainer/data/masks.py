"""Converts conversations into tokens, and finds out which of them the model writes itself: the labels.

What the assistant writes is found in one of two ways. A template with generation marks says it, and the offsets of the
tokens lead from characters to tokens. For other templates, a conversation is also tokenized up to each turn of the
assistant and up to its end. Both must be the beginning of the whole, token by token; otherwise the row has no mask.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier_api.forms import LossOn
from luthier_trainer.data import templates
from luthier_trainer.data.chats import Chat, Message, unlearnt
from luthier_trainer.data.reading import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


class Unreadable(ValueError):
    """The template does not write this conversation. The text says why."""


class Unmasked(ValueError):
    """It cannot be said which tokens of a conversation are the assistant's. The text says why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    turns: list[Span] | None = None
    """Characters that the assistant writes; None if the template does not mark them."""
    sanitised: bool = False
    """Whether spellings of control tokens in messages are marked, as transformers does, to be read as ordinary text."""


@dataclass(frozen=True)
class Labelled:
    """The tokens of a row."""

    ids: list[int]
    mask: list[int]
    """1: the token is a label."""
    remarks: tuple[str, ...] = ()
    """What is to be reported of the row: keys of `tokens.REMARKS`."""


@dataclass
class ChatReader:
    """Tokenizes conversations with the chat template of the tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    loss_on: LossOn
    parse_special: bool = False
    """Whether spellings of control tokens in messages are read as the tokens themselves."""
    _blank: dict[int, bool] = field(default_factory=dict)

    def __call__(self, chat: Chat) -> Labelled:
        """Return tokens and mask of a conversation. Raises Unreadable, or Unmasked."""
        messages, tools, prompt = chat["messages"], chat.get("tools"), chat.get("prompt")
        remarks = Counter[str]()
        whole = self.render(messages, tools)
        ids, offsets = self.tokenize(whole)
        if whole.sanitised:
            remarks["spelled"] += 1
        if self._is_lost(chat, whole.text):
            remarks["lost"] += 1
        if self.loss_on == "assistant":
            mask = self._assistant(messages, tools, prompt or 0, whole, ids, offsets, remarks)
        else:
            mask = [1] * len(ids)
        if prompt is not None and self.loss_on != "all":
            begin = self._length_before(messages[:prompt], tools, ids, remarks)
            mask = [0] * begin + mask[begin:]
        turns = self._marked_turns(messages, whole)
        for number in unlearnt(chat):
            if number in turns:
                begin, end = self._token_span(whole, ids, turns[number])
            else:
                begin, end = self._message(number, messages, tools, ids, remarks)
            mask[begin:end] = [0] * (end - begin)
        ids, mask = self._begin_once(ids, mask)
        if any(mask):
            self._end(ids, mask, messages[-1]["role"] == "assistant", remarks)
        return Labelled(ids, mask, tuple(remarks))

    def turn_ends(self) -> set[int]:
        """Return the control tokens with which the assistant ends a turn. Raises Unreadable, or Unmasked."""
        row = self({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        return {token for token, one in zip(row.ids, row.mask, strict=True) if one and token in self._ends}

    # ---- text

    def render(self, messages: list[Message], tools: Any = None, open_turn: bool = False) -> Rendered:
        """Return messages as text. `open_turn`: with the beginning of a turn of the assistant. Raises Unreadable."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import mark_control_tokens, render_jinja_template

        sanitised = not self.parse_special and self._spells(messages, tools)
        if sanitised:
            messages, tools = mark_control_tokens(messages, self._control), mark_control_tokens(tools, self._control)
        marked = self.is_marked and not open_turn
        try:
            texts, turns = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=open_turn,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise Unreadable(" ".join(str(error).split())) from None
        return Rendered(texts[0], [(a, b) for a, b in turns[0]] if marked else None, sanitised)

    @cached_property
    def is_marked(self) -> bool:
        """Return whether the template marks what the assistant writes."""
        return templates.is_marked(self.tokenizer)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Return a pattern of the tokens that messages cannot spell: special ones, and those of the template."""
        template = str(self.tokenizer.chat_template)
        added = self.tokenizer.added_tokens_decoder.values()
        found = {
            str(token) for token in added if token.special or (token.content in template and token.content.strip())
        }
        found |= set(Reader(self.tokenizer).spellings)
        return re.compile(
            "|".join(re.escape(token) for token in sorted(found, key=len, reverse=True) if token) or "(?!)"
        )

    def _spells(self, messages: list[Message], tools: Any) -> bool:
        return any(self._control.search(text) for text in _texts([messages, tools]))

    def _is_lost(self, chat: Chat, text: str) -> bool:
        """Return whether the template leaves out a message, a call of a tool, or the tools."""
        for message in chat["messages"]:
            content = message["content"].strip()
            moved = message.get("reasoning_content") or "</think>" in content or self._control.search(content)
            if content and not moved and content not in text and not _escaped(content, text):
                return True
            if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
                return True
        return any(str(tool["function"].get("name", "")) not in text for tool in chat.get("tools", ()))

    # ---- tokens

    def tokenize(self, rendered: Rendered, end: int | None = None) -> tuple[list[int], list[Span] | None]:
        """Return (token ids of the text up to character `end`, the characters of each token, or None if unknown).

        Raises Unmasked if the tokenizer reads a spelling as the control token in any case.
        """
        from transformers.utils.chat_template_utils import encode_marked_chat

        text = rendered.text[:end]
        if rendered.sanitised:
            try:
                return encode_marked_chat(self.tokenizer, text), None
            except ValueError as error:
                raise Unmasked(str(error)) from None
        options = {"return_offsets_mapping": True} if self.tokenizer.is_fast else {}
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, **options)
        return encoded["input_ids"], encoded.get("offset_mapping")

    def _assistant(
        self,
        messages: list[Message],
        tools: Any,
        first: int,
        whole: Rendered,
        ids: list[int],
        offsets: list[Span] | None,
        remarks: Counter[str],
    ) -> list[int]:
        """Return 1 for each token of the assistant's turns, from message `first` on.

        Raises Unmasked if they cannot be found by comparing.
        """
        mask = [0] * len(ids)
        if whole.turns is not None:
            if offsets is not None:
                return _within(whole.turns, offsets)
            for begin, end in (self._token_span(whole, ids, turn) for turn in whole.turns):
                mask[begin:end] = [1] * (end - begin)
            return mask
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and number >= first:
                begin, end = self._message(number, messages, tools, ids, remarks)
                mask[begin:end] = [1] * (end - begin)
        return mask

    def _marked_turns(self, messages: list[Message], whole: Rendered) -> dict[int, Span]:
        """Return number of a message → the characters that the template marks in it. Empty where this is not known.

        Only if as many turns are marked as messages are the assistant's, each is one of them.
        """
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.loss_on != "assistant" or whole.turns is None or len(whole.turns) != len(numbers):
            return {}
        return dict(zip(numbers, whole.turns, strict=True))

    def _message(self, number: int, messages: list[Message], tools: Any, ids: list[int], remarks: Counter[str]) -> Span:
        """Return the tokens of message `number`, found by comparing. Raises Unmasked if they cannot be found.

        They are what follows the messages before it, and, where the assistant writes it, the beginning of its turn.
        """
        begin, end = 0, len(ids)
        if number and messages[number]["role"] == "assistant":
            begin = self._length_before(messages[:number], tools, ids, remarks)
        elif number:
            begin = self._length_of(messages[:number], tools, ids)
        if number < len(messages) - 1:
            end = self._length_of(messages[: number + 1], tools, ids)
        return begin, end

    def _length_of(self, messages: list[Message], tools: Any, ids: list[int]) -> int:
        """Return how many tokens of `ids` are those of `messages`. Raises Unmasked if they alone have other tokens."""
        alone = self.tokenize(self.render(messages, tools))[0]
        if ids[: len(alone)] != alone:
            raise Unmasked(f"message {len(messages) - 1} is written differently where other messages follow it")
        return len(alone)

    def _length_before(self, messages: list[Message], tools: Any, ids: list[int], remarks: Counter[str]) -> int:
        """Return how many tokens of `ids` are those of `messages` and the beginning of the turn after them.

        Raises Unmasked if the messages alone have other tokens.
        """
        asked = self.tokenize(self.render(messages, tools, open_turn=True))[0]
        begin = common(asked, ids)
        if begin < len(asked):
            closed = self.tokenize(self.render(messages, tools))[0]
            if common(closed, ids) < len(closed):
                raise Unmasked("the messages before an answer are written differently where the answer follows them")
            remarks["diverging"] += 1
        return begin

    def _token_span(self, whole: Rendered, ids: list[int], turn: Span) -> Span:
        """Return the tokens of some characters: those that follow the tokens of the text before."""
        begin = common(self.tokenize(whole, turn[0])[0], ids)
        through = self.tokenize(whole, turn[1])[0]
        return begin, max(common(through, ids), begin)

    # ---- both ends

    def _begin_once(self, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Return the row without a second begin-of-text or end-of-text token at its ends."""
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids, mask = ids[1:], mask[1:]
        if len(ids) > 1 and ids[-1] == ids[-2] == self.tokenizer.eos_token_id:
            ids, mask = ids[:-1], mask[:-1]
        return ids, mask

    def _end(self, ids: list[int], mask: list[int], answered: bool, remarks: Counter[str]) -> None:
        """Add to the labels the token that ends each turn, so that the model learns to end it.

        Some templates leave it out of their marks, and some do not write it after the last turn; there it is the
        end-of-text token. `answered`: the last message is the assistant's. Changes `ids` and `mask`.
        """
        for begin, end in list(runs(mask)):
            last = next((ids[i] for i in range(end - 1, begin - 1, -1) if not self._is_blank(ids[i])), None)
            if last in self._ends:
                continue
            if end < len(ids):
                if ids[end] in self._ends:
                    mask[end] = 1
                    remarks["unmarked"] += 1
            elif answered:
                ids.append(self.tokenizer.eos_token_id)
                mask.append(1)
                remarks["unended"] += 1

    @cached_property
    def _ends(self) -> set[int]:
        """Return the control tokens, with one of which a turn ends."""
        return {*Reader(self.tokenizer).spellings.values(), *self.tokenizer.get_added_vocab().values()}

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            text = self.tokenizer.decode([token]).replace("▁", " ")  # SentencePiece's blank, where no decoder knows it
            self._blank[token] = token not in self._ends and not text.strip()
        return self._blank[token]


def common(some: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many tokens, characters or messages two sequences have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(some, other, strict=False)) if a != b), min(len(some), len(other)))


def runs(mask: list[int]) -> Iterator[Span]:
    """Yield (first, one after the last) of each run of ones."""
    begin = None
    for i, one in enumerate([*mask, 0]):
        if one and begin is None:
            begin = i
        elif not one and begin is not None:
            yield begin, i
            begin = None


def _within(turns: list[Span], offsets: list[Span]) -> list[int]:
    """Return 1 for each token that has characters of a turn. Both are in the order of the text."""
    mask, open_turns = [], iter(turns)
    begin, end = next(open_turns, (0, 0))
    for first, after in offsets:
        while end <= first and (turn := next(open_turns, None)) is not None:
            begin, end = turn
        mask.append(int(first < end and after > begin))
    return mask


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in messages or tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _escaped(content: str, text: str) -> bool:
    """Return whether a template has written a content as JSON, or with other blanks."""
    return json.dumps(content)[1:-1] in text or "".join(content.split()) in "".join(text.split())
