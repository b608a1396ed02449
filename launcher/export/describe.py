"""Everything of a Hugging Face folder but the weights: architecture, generation settings, tokenizer and template."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from launcher.data.chat import MaskRule, render, template_of
from launcher.data.corpora import tokenizer_of
from launcher.data.formats import Chat
from launcher.data.tokenizer import load_tokenizer
from launcher.errors import UserError
from launcher.recipe.schema import Adapter, Recipe, from_dict
from launcher.run.directory import RunDirectory
from launcher.trainer.adapters import target_layers
from launcher.trainer.checkpoint.reader import Reader
from launcher.trainer.model import DTYPES, load_config, named_state, parameters_on_meta

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_recipe(run: RunDirectory) -> Recipe:
    """The recipe that the run was made from."""
    return from_dict(run.read_recipe())


def build_skeleton(recipe: Recipe, reader: Reader) -> Any:
    """The model's class without weights, which costs no memory; of a run with an adapter the base model's.

    Raises:
        UserError: the parameters of the checkpoint are not those of the model and its adapter.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(recipe.model)
    config.use_cache = True
    with parameters_on_meta():
        lm = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[recipe.model.dtype], trust_remote_code=recipe.model.trust_remote_code
        )
    wanted = {name: list(tensor.shape) for name, tensor in named_state(lm)}
    stored = {name: list(entry["shape"]) for name, entry in reader.manifest["params"].items()}
    if recipe.adapter.kind == "lora":
        learnt = _adapter_shapes(lm, recipe.adapter)
        frozen = {name for name, _ in lm.named_parameters()}
        wanted = {name: shape for name, shape in wanted.items() if name in stored or name not in frozen} | learnt
    if wanted != stored:
        odd = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
        raise UserError(f"{reader.folder}: is of another model than the recipe's; they differ in {', '.join(odd[:5])}.")
    return lm


def _adapter_shapes(lm: Any, adapter: Adapter) -> dict[str, list[int]]:
    shapes = {}
    for name in target_layers(lm, adapter.targets):
        layer = lm.get_submodule(name)
        out, width = layer.weight.shape
        if type(layer).__name__ == "Conv1D":
            out, width = width, out
        shapes[f"{name}.lora_A.weight"] = [adapter.rank, width]
        shapes[f"{name}.lora_B.weight"] = [out, adapter.rank]
    return shapes


def write_description(recipe: Recipe, lm: Any, folder: Path, *, dtype: str) -> None:
    """Write config.json, generation_config.json, tokenizer files, and the model's own code where it brings some.

    Args:
        dtype: torch's name of the type of the weights in the folder
    """
    tokenizer = load_tokenizer(tokenizer_of(recipe))
    config = lm.config
    config.dtype = dtype
    config.architectures = [type(lm).__name__]
    if recipe.model.config is not None:  # a new architecture takes its special tokens from the tokenizer
        for key in TOKENS:
            if key not in recipe.model.config:
                setattr(config.get_text_config(), key, getattr(tokenizer, key))
    if lm.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(lm, str(folder), config=config)
    config.save_pretrained(folder)
    _save_generation_config(_generation_config(recipe, config, tokenizer), folder)
    tokenizer.save_pretrained(folder)


def write_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Write the tokenizer's files and the chat template."""
    load_tokenizer(tokenizer_of(recipe)).save_pretrained(folder)


def _generation_config(recipe: Recipe, config: Any, tokenizer: Any) -> Any:
    """The base model's, or a plain one; generation ends at every token that the training taught as an end."""
    from transformers import GenerationConfig

    generation = GenerationConfig.from_model_config(config)
    if recipe.model.name is not None:
        with contextlib.suppress(OSError):  # many base models have none; then it follows from the config
            generation = GenerationConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision)
    known = generation.eos_token_id
    ends = list(known) if isinstance(known, (list, tuple)) else [known]
    if recipe.model.config is not None and "eos_token_id" not in recipe.model.config:
        ends = []
    ends += [tokenizer.eos_token_id, _turn_end(tokenizer)]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation._from_model_config = False  # else transformers may make it anew from the config, without our end tokens
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    return generation


def _turn_end(tokenizer: Any) -> int | None:
    """The token that ends an assistant turn in the chat template; None without one, or where it is no single token."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        rendered = render(Chat(turns), template_of(tokenizer), MaskRule())
    except UserError:
        return None  # the template has no provable end of turn; data preparation says so where it matters
    ids = tokenizer(rendered.text[: rendered.spans[-1].end], add_special_tokens=False)["input_ids"]
    return int(ids[-1]) if ids[-1] in tokenizer.added_tokens_decoder else None


def _save_generation_config(generation: Any, folder: Path) -> None:
    try:
        generation.save_pretrained(folder)
    except ValueError:  # sampling values without do_sample, as some published models have them
        generation.do_sample = True
        generation.save_pretrained(folder)
