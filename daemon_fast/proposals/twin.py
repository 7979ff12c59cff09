"""A causal language model as the library uses it: the user's own weights, in a module tree that is not the user's.

To draw candidates, attention is replaced, dropout and gradient checkpointing are off. On the user's own model any of
that would be seen by its other threads, and left behind by an exception. A twin has every module of the model again,
with the same parameters and buffers, but its own configuration and flags. It costs some milliseconds and is made for
each call, so that it has what the model has then: replaced modules, adapters, hooks.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from daemon_fast.errors import InvalidInput

__all__ = ["Twin", "context_of", "device_of", "rope_switch", "text_config", "unwrapped"]


def unwrapped(model: Any) -> Any:
    """The Transformers model inside torch.compile, DistributedDataParallel, PEFT's adapters or TRL's value heads.

    Raises
    ------
    InvalidInput
        An adapter of PEFT's that acts in its wrapper: prompt tuning, aLoRA, X-LoRA and the like.
    """
    while True:
        if _compiled(model):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            _check_adapters(model)
            model = model.get_base_model()
        elif isinstance(getattr(model, "pretrained_model", None), nn.Module):
            model = model.pretrained_model
        else:
            return model


# Of PEFT's adapters: those that act in its wrapper's forward, not in the layers of the model inside.
OUTSIDE_ADAPTERS = ("XLORA", "POLY", "SHADOW")


def _check_adapters(model: Any) -> None:
    if getattr(model, "_adapters_disabled", False):
        return
    configs = [model.active_peft_config, *(model.peft_config[name] for name in model.active_adapters)]
    for config in configs:
        kind, method = type(config).__name__, getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            raise InvalidInput(f"model has learned prompt tokens ({kind}), which candidates can't be drawn with")
        if getattr(config, "alora_invocation_tokens", None):
            kind, method = f"{kind} with alora_invocation_tokens", "aLoRA"
        elif method not in OUTSIDE_ADAPTERS:
            continue
        raise InvalidInput(
            f"model has an adapter of kind {method} ({kind}), which acts in PEFT's wrapper: candidates can't be drawn "
            "with it, as they can with one that acts in the layers of the model, such as LoRA"
        )


def _compiled(module: Any) -> bool:
    """Of torch.compile; to name its class would import the compiler."""
    return "_orig_mod" in getattr(module, "_modules", ())


def text_config(model: Any) -> Any:
    """The configuration of the model's language model: of a multimodal one, a part of its own."""
    config = getattr(unwrapped(model), "config", None)
    if config is None:
        raise InvalidInput(
            f"model is a {type(model).__name__} without a configuration: give a causal LM of Transformers"
        )
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def context_of(model: Any) -> int | None:
    """Tokens that the model can hold; None where it doesn't say, or any number."""
    config = text_config(model)
    sizes = [getattr(config, name, None) for name in CONTEXTS]
    size = next((n for n in sizes if isinstance(n, int) and n > 0), None)
    if size is None:
        return None
    # RoBERTa and its kind number positions from the one behind the padding's.
    tables = [module._modules.get("position_embeddings") for module in unwrapped(model).modules()]
    paddings = [t.padding_idx for t in tables if isinstance(t, nn.Embedding) and t.num_embeddings == size]
    return size - max((padding + 1 for padding in paddings if padding is not None), default=0)


# What configurations call the context.
CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def rope_switch(model: Any) -> int | None:
    """The length from which on rotary embeddings take other factors, for the tokens before, too (LongRoPE); or None."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if not any(kind.get("rope_type") == "longrope" for kind in kinds):
        return None
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds]
    return next((n for n in [*lengths, getattr(config, "original_max_position_embeddings", None)] if n), None)


def device_of(model: Any) -> torch.device:
    """Where the model computes; weights that are offloaded lie elsewhere."""
    for module in model.modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            for one in getattr(hook, "hooks", (hook,)):
                if (device := getattr(one, "execution_device", None)) is not None:
                    return torch.device(device)
    places = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    first = next((p.device for p in model.parameters() if p.device in places), None)
    return torch.device("cpu") if first is None else first


class Twin:
    """A model's twin, in evaluation mode.

    Attributes
    ----------
    model : the user's, unwrapped
    module : the twin
    config : of its language model
    way : how it is run, once that is known: see `daemon_fast.proposals.prompt_cache.way_of`
    """

    way: str | None = None

    def __init__(self, model: Any) -> None:
        self.model = unwrapped(model)
        self.device = device_of(self.model)
        self.module = _copied(self.model)
        self.config, self.context = text_config(self.module), context_of(self.model)
        self.rope_switch = rope_switch(self.model)
        self._attention = self.config._attn_implementation if hasattr(self.config, "_attn_implementation") else None
        self._accepts = set(inspect.signature(type(self.model).forward).parameters)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @functools.cached_property
    def structure(self) -> tuple[Any, ...]:
        """What decides how the model can be run: its classes, a `forward` of a module's own, hooks, switches (such as
        `is_causal`), its configuration; not its weights."""
        kinds = [
            (
                type(module),
                id(vars(module).get("forward")),
                (*module._forward_pre_hooks, *module._forward_hooks),  # numbers that torch gives out once
                tuple((k, v) for k, v in vars(module).items() if type(v) is bool and k not in MODES and k[0] != "_"),
            )
            for module in self.model.modules()
        ]
        return (*kinds, repr(self.config.to_dict()), self._attention)

    def state(self) -> int:
        """A hash of what a captured step depends on beside the values in its tensors: where these lie, and how modules
        are set. Some milliseconds for a large model; a capture takes tens.
        """
        parts: list[Any] = []
        for module in self.model.modules():
            parts.append(type(module))
            for name, value in vars(module).items():
                if name in ("_parameters", "_buffers"):
                    parts += [(k, None if t is None else (t.data_ptr(), t.shape, t.dtype)) for k, t in value.items()]
                elif name in SHARED:  # hooks
                    parts += [id(item) for item in value.values()] if isinstance(value, dict) else []
                elif name != "training":
                    parts.append((name, _plain(value)))
        return hash(tuple(parts))

    def set_attention(self, implementation: str | None) -> None:
        """Of the twin alone. None: the model's own."""
        self.config._attn_implementation = self._attention if implementation is None else implementation

    def __call__(self, ids: Tensor, positions: Tensor | None = None, **options: Any) -> Any:
        """The model's output for ids [B, T], in the dtype of its weights, whatever autocast says. `positions` and
        logits_to_keep are left out where it doesn't take them."""
        if positions is not None and "position_ids" in self._accepts:
            options["position_ids"] = positions
        if "logits_to_keep" not in self._accepts:
            options.pop("logits_to_keep", None)
        with torch.autocast(self.device.type, enabled=False):
            return self.module(input_ids=ids, return_dict=True, **options)

    def plain(self, ids: Tensor) -> Tensor:
        """[B, T, V] logits of ids [B, T] by one pass without a cache: what every other way is held against."""
        self.set_attention(None)
        logits: Tensor = self(ids, use_cache=False).logits
        return logits


def _copied(model: nn.Module) -> nn.Module:
    """The twin of a module tree. It shares parameters, buffers, hooks, and whatever else is no module."""
    configs: dict[int, Any] = {}

    def own_config(config: Any) -> Any:
        if id(config) not in configs:
            configs[id(config)] = made = copy.copy(config)
            made.__dict__.update({k: own_config(v) for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)})
        return configs[id(config)]

    twins: dict[int, nn.Module] = {}
    source: Any
    for module in model.modules():
        source = module._orig_mod if _compiled(module) else module
        if id(source) not in twins:
            twins[id(source)] = object.__new__(type(source))
            twins[id(source)].__dict__.update(source.__dict__)
        twins[id(module)] = twins[id(source)]

    def own(value: Any) -> Any:
        """What a module's attribute is in its twin: modules, and methods of modules, are those of the twins."""
        if isinstance(value, PreTrainedConfig):
            return own_config(value)
        if isinstance(value, nn.Module):
            return twins.get(id(value), value)
        if isinstance(value, types.MethodType) and id(value.__self__) in twins:
            return types.MethodType(value.__func__, twins[id(value.__self__)])
        if isinstance(value, functools.partial):
            return functools.partial(own(value.func), *map(own, value.args), **value.keywords)
        if type(value) in (list, tuple):
            return type(value)(map(own, value))
        if type(value) is dict:
            return {key: own(item) for key, item in value.items()}
        return value

    for module in model.modules():
        if _compiled(module):
            continue
        twin = twins[id(module)]
        for name, value in module.__dict__.items():
            if name not in SHARED:
                twin.__dict__[name] = own(value)
        # Dictionaries of its own: offloading hooks put weights there for a while, rotary embeddings other factors.
        twin.__dict__["_parameters"], twin.__dict__["_buffers"] = {**module._parameters}, {**module._buffers}
        twin.__dict__["_modules"] = {k: None if m is None else twins[id(m)] for k, m in module._modules.items()}
        twin.__dict__["training"] = False
        twin.__dict__["_compiled_call_impl"] = None
        if "gradient_checkpointing" in twin.__dict__:
            twin.__dict__["gradient_checkpointing"] = False
        # RWKV divides weights, in place, when it first runs in evaluation mode. They are the user's: not by the twin.
        if twin.__dict__.get("layers_are_rescaled") is False:
            twin.__dict__["config"].rescale_every = 0
        # torch.compile(model.forward) can't be given another module; the class's own does the same.
        if hasattr(twin.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            del twin.__dict__["forward"]
    return twins[id(model)]


def _plain(value: Any) -> Any:
    """A setting as something that can be compared; of an object, which one it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else id(value)


# Switches that a twin has its own of.
MODES = {"training", "gradient_checkpointing"}
# Of torch's modules: dictionaries that hold no module.
SHARED = {name for name in vars(nn.Module()) if name.startswith("_")}
