"""`python -m launcher.strategy._deepspeed_keys > launcher/strategy/deepspeed_keys.json`: every key DeepSpeed reads.

Run with the DeepSpeed that the snapshot is for. Sections that are pydantic models are described from them; the others
are found by handing `DeepSpeedConfig` a mapping that notes what is asked of it, and with which default.
"""

from __future__ import annotations

import enum
import json
import os
import types
import typing
from collections.abc import KeysView
from typing import Any

_UNTYPED = {  # keys whose default is None
    "steps_per_print": "int",
    "log_level": "str",
    "communication_data_type": "str",
    "data_types.grad_accum_dtype": "str",
    "data_types.param_dtype": "str",
    "data_types.buffer_dtype": "str",
    "data_types.keep_in_fp32_modules": "list",  # or the word auto
    "flops_profiler.output_file": "str",
    "vocabulary_size": "int",
}
_READ_BY_GET = ("aio", "flops_profiler", "activation_checkpointing", "data_types")  # sections without a model
_DTYPES = ["fp32", "bf16", "fp16"]
_LEVELS = ["debug", "info", "warning", "error", "critical"]
_IMPLIED = {  # least values that DeepSpeed takes for granted: it divides by them, or counts with them
    "steps_per_print": 1,
    "comet.samples_log_interval": 1,
    "flops_profiler.profile_step": 0,
    "flops_profiler.top_modules": 1,
    "flops_profiler.module_depth": -1,
    "flops_profiler.recompute_fwd_factor": 0,
    "aio.block_size": 1,
    "aio.queue_depth": 1,
    "aio.intra_op_parallelism": 1,
    "zero_optimization.module_granularity_threshold": 0,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.offload_optimizer.buffer_count": 1,
    "zero_optimization.offload_param.buffer_count": 1,
    "zero_optimization.offload_param.buffer_size": 1,
}


def snapshot() -> dict[str, Any]:
    """{"deepspeed": version, "keys": {key: leaf or {"keys": ...}}}; a leaf has `type` and bounds or choices."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime import config as ds
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    asked = _Asked({name: _Asked() for name in _READ_BY_GET})
    asked["train_batch_size"] = 1
    ds.DeepSpeedConfig(asked)
    keys = {**_leaves(asked, ""), "sequence_parallel_size": {"type": ["int"]}}  # read in the constructor itself
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": ds.HybridEngineConfig,
        "weight_quantization": WeightQuantConfig,
    }
    keys.update({name: _model(model) for name, model in models.items()})
    keys.update(_model(DeepSpeedMonitorConfig)["keys"])
    keys["timers"] = {"keys": {"throughput": _model(DeepSpeedThroughputTimerConfig)}}
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        keys[key]["choices"] = _DTYPES
    for key in ("grad_accum_dtype", "buffer_dtype"):
        keys["data_types"]["keys"][key]["choices"] = _DTYPES
    keys["data_types"]["keys"]["keep_in_fp32_modules"]["type"] = ["list", "str"]
    keys["log_level"]["choices"] = _LEVELS
    for key, least in _IMPLIED.items():
        _leaf_of(keys, key)["min"] = least
    keys.update({name: {"removed": _first(text)} for name, text in ds._REMOVED_TOP_LEVEL_CONFIG_KEYS.items()})
    gone = {name: {"removed": _first(text)} for name, text in ds._REMOVED_ZERO_CONFIG_KEYS.items()}
    keys["zero_optimization"]["keys"].update(gone)
    return {"deepspeed": deepspeed.__version__, "keys": _sorted(keys)}


class _Asked(dict[str, Any]):
    """A mapping that notes each key it is asked for and the default that comes with the question."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.defaults: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.defaults[key] = default if self.defaults.get(key) is None else self.defaults[key]
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.defaults.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        return _AskedKeys(self)

    def __copy__(self) -> _Asked:
        return self


class _AskedKeys(KeysView[str]):
    """`key in mapping.keys()` asks the mapping."""

    def __init__(self, asked: _Asked) -> None:
        super().__init__(asked)
        self.asked = asked

    def __contains__(self, key: object) -> bool:
        return key in self.asked


def _leaves(asked: _Asked, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, default in asked.defaults.items():
        value = dict.get(asked, key)
        if isinstance(value, _Asked):
            found[key] = {"keys": _leaves(value, f"{prefix}{key}.")}
        else:
            name = _UNTYPED.get(f"{prefix}{key}") or (type(default).__name__ if default is not None else "")
            found[key] = {"type": [name]} if name else {}
    return found


def _model(model: Any) -> dict[str, Any]:
    """A pydantic model's fields, by name and by alias, since DeepSpeed's models take both."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra or {}
        leaf = {"deprecated": extra["new_param"]} if extra.get("deprecated") else _field(field)
        found.update({key: leaf for key in (name, field.alias) if key is not None})
    return {"keys": found}


def _field(field: Any) -> dict[str, Any]:
    options = _options(field.annotation)
    models = [option for option in options if hasattr(option, "model_fields")]
    if models:
        return _model(models[0])
    choices = [choice for option in options for choice in _choices(option)]
    leaf: dict[str, Any] = {"type": sorted({_type(option) for option in options})}
    if choices:
        leaf = {"type": sorted({type(choice).__name__ for choice in choices}), "choices": choices}
        leaf["type"] += ["null"] if type(None) in options else []
    for bound in field.metadata:
        for name, ours in (("ge", "min"), ("gt", "above"), ("le", "max")):
            if getattr(bound, name, None) is not None:
                leaf[ours] = getattr(bound, name)
    return leaf


def _options(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for arg in typing.get_args(annotation) for inner in _options(arg)]
    return [annotation]


def _choices(option: Any) -> list[Any]:
    if typing.get_origin(option) is typing.Literal:
        return list(typing.get_args(option))
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return [member.value for member in option]
    return []


def _type(option: Any) -> str:
    plain = typing.get_origin(option) or option
    known = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict", type(None): "null"}
    return known.get(plain, "str")  # paths, torch's types


def _first(text: str) -> str:
    return text.partition(". ")[0].replace("'", "")


def _leaf_of(keys: dict[str, Any], dotted: str) -> Any:
    *sections, last = dotted.split(".")
    for section in sections:
        keys = keys[section]["keys"]
    return keys[last]


def _sorted(value: Any) -> Any:
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, dict) else value


if __name__ == "__main__":
    print(json.dumps(snapshot(), indent=1))
