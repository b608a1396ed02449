"""Which tokens of a conversation are trained, proven against the tokenizer's own chat template.

For each trained turn two cuts of the rendered text are needed: where the model would begin to write, and where it has
written its stop token. Each is rendered on its own from the turns before it. Only if both renderings begin the whole
text, in characters and in token ids, are the tokens between them known to be what the model writes; else the turn is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UserError
from launcher.shipped import folder

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Cut:
    """Characters begin:end of the whole text are what the model writes as turn `turn`, numbered from 1."""

    turn: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, with the spans to train; `cuts` None: every token."""

    text: str
    cuts: list[Cut] | None

    def texts(self) -> list[str]:
        """The whole text, then the two beginnings that prove each cut: what has to be tokenised."""
        return [self.text, *(self.text[:at] for cut in self.cuts or [] for at in (cut.begin, cut.end))]

    def mask(self, ids: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
        """Which tokens of the whole text are trained.

        Args:
            ids: token ids of each of `texts`.
        Returns:
            [tokens] uint8, 1 where trained.
        Raises:
            UserError: a token reaches over a cut, so the model never sees these ids when it writes.
        """
        whole, *beginnings = ids
        if self.cuts is None:
            return np.ones(len(whole), dtype=np.uint8)
        mask = np.zeros(len(whole), dtype=np.uint8)
        for i, cut in enumerate(self.cuts):
            begin, end = beginnings[2 * i], beginnings[2 * i + 1]
            for part, place in ((begin, "begins"), (end, "ends")):
                if list(whole[: len(part)]) != list(part):
                    raise UserError(
                        f"turn {cut.turn}: a token reaches over the place where the turn {place}, so which tokens are "
                        f"trained cannot be proven. Strip white space at the ends of its content."
                    )
            mask[len(begin) : len(end)] = 1
        return mask


def render(messages: Messages, template: Callable[[Messages, bool], str], *, train_on: str) -> Rendered:
    """Render a conversation and find what is trained.

    Args:
        template: (messages, add_generation_prompt) -> text.
        train_on: assistant, last_assistant or all.
    Raises:
        UserError: the template refuses the conversation, or a trained turn cannot be proven; names the turn.
    """
    if not messages:
        raise UserError("the conversation has no turn.")
    text = _call(template, messages, False, turn=len(messages))
    if train_on == "all":
        return Rendered(text, None)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last_assistant":
        turns = turns[-1:]
    return Rendered(text, [_cut(messages, turn, text, template) for turn in turns])


def _cut(messages: Messages, index: int, text: str, template: Callable[[Messages, bool], str]) -> Cut:
    turn = index + 1
    if index == 0:
        raise UserError(f"turn {turn}: the conversation begins with an assistant turn, so nothing asks for it.")
    before = _call(template, messages[:index], True, turn=turn)
    through = text if turn == len(messages) else _call(template, messages[:turn], False, turn=turn)
    for prefix, what in ((before, "the turns before it"), (through, "the turns up to it")):
        if not text.startswith(prefix):
            raise UserError(
                f"turn {turn}: the chat template writes {what} differently once later turns follow, so which tokens "
                f"are trained cannot be proven. Use data.train_on=last_assistant or another data.chat_template."
            )
    if not through.startswith(before):
        raise UserError(f"turn {turn}: the chat template's generation prompt is not how the turn begins.")
    end = len(through.rstrip())  # white space after the stop token (ChatML's newline) is not written by the model
    content = messages[index]["content"].strip()
    written = through[len(before) : end]
    if not written or (content and written.endswith(content) and not _stops(messages[:turn], template)):
        raise UserError(
            f"turn {turn}: the chat template writes no stop token after an assistant turn, so the model would never "
            f"learn to stop. Add {{{{ eos_token }}}} after it in data.chat_template."
        )
    return Cut(turn, len(before), end)


def _stops(messages: Messages, template: Callable[[Messages, bool], str]) -> bool:
    """Whether something follows the words of the last turn; they themselves may be the end of a stop token, as `>`."""
    probe = [*messages[:-1], {**messages[-1], "content": "words"}]
    return not _call(template, probe, False, turn=len(messages)).rstrip().endswith("words")


def _call(template: Callable[[Messages, bool], str], messages: Messages, generation: bool, *, turn: int) -> str:
    try:
        return template(messages, generation)
    except Exception as error:  # a Jinja template may raise anything
        raise UserError(f"turn {turn}: the chat template failed: {type(error).__name__}: {error}") from error


def template_of(tokenizer: Any) -> Callable[[Messages, bool], str]:
    """The tokenizer's template as a function of messages.

    Raises:
        UserError: the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which conversations need. Set data.chat_template to a Jinja file, as "
            f"{folder('recipes')}/chat_templates/chatml.jinja, or use format prompt_completion or text."
        )

    def template(messages: Messages, generation: bool) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)

    return template
