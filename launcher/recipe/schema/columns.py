"""Columns that each format of records has, and the tags of messages: the names that `columns` and `tags` may give."""

from __future__ import annotations

_BESIDE = ("system", "history", "tools")
_ASKED = ("messages", "prompt", "instruction", "input", "query")
# format -> (columns a record must have, columns it may have)
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("messages",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", *_BESIDE)),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "query_response": (("query", "response"), ("messages", *_BESIDE)),
    "preference": (("chosen", "rejected"), (*_ASKED, "output", *_BESIDE)),
    "unpaired": (("label",), (*_ASKED, "output", "response", "completion", *_BESIDE)),
    "text": (("text",), ()),
    "tokens": (("input_ids",), ("labels", "attention_mask", "loss_mask")),
}
OTHER_NAME = {"conversations": "messages"}  # what columns may also call ours
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


def columns_of(form: str) -> list[str]:
    """Our names of the columns that a format has; of every format for `auto`."""
    if form == "auto":
        return list(dict.fromkeys(name for form in COLUMNS for name in columns_of(form)))
    return [name for names in COLUMNS[form] for name in names]
