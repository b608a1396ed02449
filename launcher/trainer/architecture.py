"""Which architecture is meant, as transformers knows it; what it does not know or cannot build is refused in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from launcher.errors import Problem, UserError, nearest, show_value

if TYPE_CHECKING:
    from launcher.recipe.schema import Model

_REMARKS = ("auto_map", "model_type", "task_specific_params")  # keys of a config.json that no architecture reads


def load_config(model: Model) -> Any:
    """The architecture, from the recipe's dict or from a name or folder.

    Raises:
        UserError: it cannot be found or read, or has keys that its kind does not know.
    """
    config = _of_name(model) if model.config is None else _of_words(model.config)
    config.use_cache = False
    return config


def cannot_be_built(model: Model, config: Any, error: Exception) -> UserError:
    """What to say of an architecture from which transformers could not make a model."""
    if isinstance(error, ValueError) and str(error).startswith("Unrecognized configuration class"):
        return _unknown_kind(config.model_type, model)
    return UserError(f"{_key(model)}: no model can be built from it: {reason(error)}.")


def refuse_what_looks_ahead(model: Model, lm: nn.Module) -> None:
    """An encoder, whose tokens see those that follow, learns nothing by predicting them.

    Raises:
        UserError: no attention layer of the model is causal.
    """
    causal = {module.is_causal for module in lm.modules() if hasattr(module, "is_causal")}
    if causal and not any(causal):
        kind = lm.config.model_type
        raise UserError(
            f"{_key(model)}: {kind} is an encoder, each of its tokens sees the whole row: expected a causal language "
            "model, whose tokens see those before them alone. Take e.g. llama or qwen3."
        )


def reason(error: Exception) -> str:
    """An exception of transformers as one short line; only a kind of error that says nothing by itself is named."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    validated = type(error).__name__.startswith("StrictDataclass")  # its first line names the validator
    text = re.sub(r"^\w+Error: ", "", lines[-1 if validated else 0]) if lines else ""
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return text.rstrip(".") if " " in text else f"{type(error).__name__} {text}".rstrip()


def _of_name(model: Model) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )  # fmt: skip
    except Exception as error:  # strict data classes raise errors of their own, which share no base
        if not model.trust_remote_code and "custom code" in str(error):
            fix = "Read it, and set model.trust_remote_code=true if you want it to run here"
            raise UserError(
                f"{_key(model)}: the model brings Python code of its own, which is not run. {fix}."
            ) from error
        raise UserError(f"{_key(model)}: the architecture cannot be read: {reason(error)}.") from error


def _of_words(words: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind, rest = words["model_type"], {key: value for key, value in words.items() if key != "model_type"}
    if kind not in CONFIG_MAPPING:
        raise _unknown_kind(kind)
    cls: Any = CONFIG_MAPPING[kind]
    try:
        default, config = cls(), cls(**rest)
    except Exception as error:
        raise UserError(f"model.config: no {kind} can be made of it: {reason(error)}.") from error
    known = {*vars(default), *cls.attribute_map}
    if unknown := [key for key in rest if not (key in known or _is_read(cls, key))]:
        said = f"a key that {kind} knows"
        fixes = [nearest(key, sorted(known)) or "Remove it." for key in unknown]
        raise UserError(
            "\n".join(
                str(Problem(f"model.config.{key}", rest[key], said, fix))
                for key, fix in zip(unknown, fixes, strict=True)
            )
        )
    return config


def _is_read(cls: type, key: str) -> bool:
    """Whether the code of a config class takes an older name, such as rope_theta, that it keeps under another."""
    own = (base for base in cls.__mro__ if base is not object)
    return key in _REMARKS or key.startswith("_") or any(f'"{key}"' in inspect.getsource(base) for base in own)


def _unknown_kind(kind: Any, model: Model | None = None) -> UserError:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    expected = "a causal language model that transformers knows"
    where = "model.config.model_type" if model is None or model.config is not None else f"{_key(model)}: model_type"
    fix = nearest(show_value(kind), KNOWN)
    return UserError(f"{where} = {show_value(kind)}: expected {expected}.{' ' + fix if fix else ''}")


def _key(model: Model) -> str:
    return "model.config" if model.config is not None else f"model.name = {model.name}"
