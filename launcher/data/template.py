"""Calls a tokenizer's own chat template: one compiled Jinja program, no tokenising, the same text on any day."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from traceback import walk_tb
from typing import Any

from launcher.errors import UserError
from launcher.jinja import syntax_error
from launcher.shipped import chat_template, chat_templates, folder

Messages = Sequence[Mapping[str, Any]]

# Llama 3.1 and others write today's date. A mask or a store that changed over night could not be made again, so every
# day is the one that Llama 3.1's template itself falls back to.
DATE = datetime(2024, 7, 26)
_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
_NEEDS = re.compile(r"\A\s*\{#-?.*?Special tokens:([^\n]*?)\s*(?:-?#\}|\n)", re.DOTALL)
_MOST_REMEMBERED = 4096
_OWN_KEYS = ("train", "weight")  # what a message says to us, not to the model
_COMPILED = "<template>"  # what Jinja calls the file of a template that it was given as text


class Template:
    """A chat template as a function of messages.

    marks: whether it says by `{% generation %}` what the assistant writes
    end_token: the tokenizer's, or None

    Args:
        text: the template; with_tools: the one for conversations with tools, where the tokenizer has two.
        variables: what else it may read, as bos_token.
        called: what messages call it.
    Raises:
        UserError: it is no Jinja program.
    """

    def __init__(
        self, text: str, variables: Mapping[str, str], with_tools: str | None = None, *, called: str = "chat template"
    ) -> None:
        self.text = text
        self.called = called
        for program in (text, with_tools or text):
            if wrong := syntax_error(program):
                raise UserError(f"{called}, line {wrong[0]}: not a Jinja template: {wrong[1]}. Correct the line.")
        self._memory: dict[Any, Any] = {}
        self._with_tools = with_tools or text
        self._variables = {**variables, "strftime_now": DATE.strftime, "documents": None}
        self.end_token = variables.get("eos_token")
        self._calls_as_text = False
        self.marks = bool(_GENERATION.search(self._with_tools))

    def render(self, messages: Messages, *, tools: Any = None, generation: bool = False) -> str:
        """The text of a conversation; with `generation` also what asks the model for the next turn.

        Raises:
            UserError: the template refuses the conversation.
        """
        return str(self._call(tools, lambda program: program.render(**self._given(messages, tools, generation))))

    def marked(self, messages: Messages, *, tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters begin:end of each `{% generation %}` block in it.

        Raises:
            UserError: the template refuses the conversation.
        """
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []

        def write(program: Any) -> None:
            blocks.clear()
            spans.clear()
            with program.environment.activate_tracker(blocks, spans):
                for block in program.generate(**self._given(messages, tools, False)):
                    blocks.append(block)

        self._call(tools, write)
        return "".join(blocks), spans

    def remembered(self, key: Any, find: Callable[[], Any]) -> Any:
        """What was found out about this template once; all is forgotten when it becomes too much."""
        if key not in self._memory:
            found = find()
            if len(self._memory) >= _MOST_REMEMBERED:
                self._memory.clear()
            self._memory[key] = found
        return self._memory[key]

    def _call(self, tools: Any, use: Callable[[Any], Any]) -> Any:
        # `apply_chat_template` and `render_jinja_template` copy and check every message before this; it takes longer
        # than the rendering. Our messages are plain JSON already.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return use(_compile_jinja_template(self._with_tools if tools else self.text))
        except TypeError as error:
            if self._calls_as_text:
                raise self._failed(error) from error
            self._calls_as_text = True  # some templates, as DeepSeek's, take arguments as the text that OpenAI sends
            try:
                return self._call(tools, use)
            except UserError:
                self._calls_as_text = False
                raise
        except Exception as error:  # a Jinja template may raise anything
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        """Reason, place in the template, and what helps."""
        place = f"{self.called}, line {line}" if (line := _line(error)) else self.called
        if type(error).__name__ == "TemplateError":  # what `raise_exception` in a template raises
            fix = "The template takes no such conversation: change the record, or use another data.chat_template."
        else:
            fix = "Correct the template, or use another data.chat_template."
        return UserError(f"the chat template failed: {type(error).__name__}: {error} ({place}). {fix}")

    def _given(self, messages: Messages, tools: Any, generation: bool) -> dict[str, Any]:
        shown = [_plain(message) for message in messages]
        if self._calls_as_text:
            for message in shown:
                message |= (
                    {"tool_calls": [_as_text(c) for c in message["tool_calls"]]} if "tool_calls" in message else {}
                )
        return {**self._variables, "messages": shown, "tools": tools or None, "add_generation_prompt": generation}


def _line(error: Exception) -> int:
    """The innermost line of a template that an error passed; 0 where there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    return next((line for file, line in reversed(frames) if file == _COMPILED), 0)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """What `apply_chat_template` would show of a message: no empty keys; reasoning under each name that is in use."""
    shown = {key: value for key, value in message.items() if value is not None and key not in _OWN_KEYS}
    if "reasoning_content" in shown:
        shown.setdefault("thinking", shown["reasoning_content"])
    return shown


def special_tokens(text: str) -> list[str]:
    """What a template's opening comment names after `Special tokens:`, as every shipped one does."""
    found = _NEEDS.match(text)
    return found[1].split() if found else []


def missing_tokens(tokenizer: Any, text: str) -> list[str]:
    """Special tokens that a template needs and the tokenizer would read as plain text."""
    added = tokenizer.get_added_vocab()
    own = {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token}
    return [token for token in special_tokens(text) if (own[token] is None if token in own else token not in added)]


def _check_tokens(tokenizer: Any, text: str) -> None:
    if missing := missing_tokens(tokenizer, text):
        fit = [n for n in chat_templates() if not missing_tokens(tokenizer, chat_template(n).read_text("utf-8"))]
        other = f"Choose a template whose tokens it has ({', '.join(fit)})" if fit else "Choose another template"
        raise UserError(
            f"data.chat_template: it writes {', '.join(missing)}, which the tokenizer does not have as special tokens: "
            f"they would be learnt as plain text. {other}, or add them to the tokenizer and the model."
        )


def _as_text(call: Any) -> Any:
    arguments = json.dumps(call["function"].get("arguments") or {}, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def template_of(tokenizer: Any, called: str = "the tokenizer's chat template") -> Template:
    """The tokenizer's template.

    Args:
        called: what messages call it.
    Raises:
        UserError: the tokenizer has none, or one that is no Jinja program, or that names special tokens which the
            tokenizer lacks.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which conversations need. Set data.chat_template to a shipped one, as "
            f"chatml ({folder('recipes')}/chat_templates/chatml.jinja), or to a Jinja file, or use format "
            f"prompt_completion or text."
        )
    variables = dict(tokenizer.special_tokens_map)
    if isinstance(tokenizer.chat_template, str):
        _check_tokens(tokenizer, tokenizer.chat_template)
        return Template(tokenizer.chat_template, variables, called=called)
    texts = tokenizer.chat_template
    if "default" not in texts:
        raise UserError(
            f"the tokenizer has the chat templates {', '.join(sorted(texts))} but none named default. Set "
            f"data.chat_template to a file with one of them."
        )
    return Template(texts["default"], variables, texts.get("tool_use"), called=called)
