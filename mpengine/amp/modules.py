"""What `initialize` does to models: cast weights, a `forward` that casts what goes in and out; and how it is undone."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpengine import distributed, holdings, nested, precision, weights
from mpengine.amp import casts
from mpengine.amp.properties import Properties

_LOW = (torch.float16, torch.bfloat16)


class Forward:
    """Stands in for the `forward` of one model: casts its inputs and outputs, and runs it under O1's autocast.

    An object and not a closure, so that a copy of the model, by deepcopy or pickle, calls itself.

    Args:
        module: The model.
        inputs: What floating-point inputs are cast to; None: they stay.
        outputs: The same for outputs.
        autocast: Whether it runs under fp16 autocast.
    """

    def __init__(
        self, module: nn.Module, inputs: torch.dtype | None, outputs: torch.dtype | None, autocast: bool
    ) -> None:
        self.own = module.__dict__.get("forward")  # one that somebody set on the instance
        self.module, self.inputs, self.outputs, self.autocast = module, inputs, outputs, autocast
        with contextlib.suppress(TypeError, ValueError):
            self.__signature__ = inspect.signature(module.forward)
        self.__doc__ = module.forward.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        if self.inputs is not None:
            args, kwargs = nested.cast((args, kwargs), self.inputs)
        forward = self.own or functools.partial(type(self.module).forward, self.module)
        with self._autocast(args, kwargs):
            result = forward(*args, **kwargs)
        return result if self.outputs is None else nested.cast(result, self.outputs)

    def _autocast(self, args: Any, kwargs: Any) -> Any:
        if not self.autocast or casts.is_disabled():
            return contextlib.nullcontext()
        first: Tensor | None = next(self.module.parameters(), None)
        if first is None:
            first = next(nested.tensors((args, kwargs)), None)
        device = (
            "cuda" if first is None and torch.cuda.is_available() else "cpu" if first is None else first.device.type
        )
        return torch.autocast(device, torch.float16)


def check_unwrapped(models: Sequence[nn.Module]) -> None:
    """Raises RuntimeError where a model was given to a parallel wrapper already."""
    for model in models:
        is_wrapper = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        if is_wrapper or distributed.wraps(model):
            what = "Incoming model is an instance" if is_wrapper else "Incoming model holds, or is held by, an instance"
            name = f"{type(model).__module__}.{type(model).__name__}" if is_wrapper else "DistributedDataParallel"
            raise RuntimeError(
                f"{what} of {name}. Parallel wrappers should only be applied to the model(s) AFTER the model(s) have "
                "been returned from amp.initialize."
            )


def check(models: Sequence[nn.Module], earlier: Sequence[nn.Module], properties: Properties) -> None:
    """Raises RuntimeError or ValueError where a model cannot be cast.

    Args:
        models: The models.
        earlier: Those of earlier calls, whose casts will be undone.
        properties: What is to be done.
    """
    check_unwrapped(models)
    ours = {id(tensor) for model in earlier for tensor in _tensors(model)}
    for model in models:
        for kind, named in (("param", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                if tensor.dtype == torch.float16 and id(tensor) not in ours:
                    raise RuntimeError(
                        f"Found {kind} {name} with type {tensor.type()}, expected torch.FloatTensor. When using "
                        "amp.initialize, you do not need to call .half() on your model before passing it, no matter "
                        "what optimization level you choose."
                    )
        known: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        for param in precision.castable(model, _kept(model, properties)) if properties.is_low else ():
            assert properties.cast_model_type is not None
            precision.check_fits(param, known[param], properties.cast_model_type, "use opt_level='O1'")


def is_patched(module: nn.Module) -> bool:
    """Whether `initialize` was given this very module."""
    return isinstance(module.__dict__.get("forward"), Forward)


def names(models: Sequence[nn.Module]) -> dict[Tensor, str]:
    """The name of every parameter in its model; of several models with the model's number before it."""
    several = len(models) > 1
    return {
        param: f"model {i}: {name}" if several else name
        for i, model in enumerate(models)
        for name, param in model.named_parameters(remove_duplicate=False)
    }


def _kept(model: nn.Module, properties: Properties) -> list[nn.Module]:
    return precision.kept_modules(model) if properties.keep_batchnorm_fp32 else []


def cast_params(models: Sequence[nn.Module], properties: Properties) -> dict[Tensor, Tensor]:
    """Casts the FP32 parameters that a level wants fp16, in place; returns what they were."""
    originals: dict[Tensor, Tensor] = {}
    for model in models if properties.is_low else ():
        for param in precision.castable(model, _kept(model, properties)):
            originals[param] = param.data
            param.data = param.data.to(properties.cast_model_type)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # cuDNN wants them in one piece
    return originals


def patch(model: nn.Module, properties: Properties, outputs: torch.dtype | None) -> None:
    """Patches `forward`; of a model whose parameters became fp16 also its buffers, norms and state dict."""
    dtype = properties.cast_model_type
    if properties.is_low and dtype is not None:
        kept = _kept(model, properties)
        spared = set(kept)
        for module in model.modules():
            for buffer in () if module in spared else module.buffers(recurse=False):
                if buffer.dtype == torch.float32:
                    buffer.data = buffer.data.to(dtype)
        precision.compute_in_float32(kept, dtype)
        weights.watch(model)
        for module in model.modules():
            if _widen not in module._state_dict_hooks.values():
                module.register_state_dict_post_hook(_widen)
    elif dtype is torch.float32:
        model.float()
    casts_outputs = dtype is not None or properties.patch_torch_functions
    outputs = outputs or (torch.float32 if casts_outputs else None)
    if dtype is not None or outputs is not None or properties.patch_torch_functions:
        model.__dict__["forward"] = Forward(model, dtype, outputs, properties.patch_torch_functions)


def _widen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> None:
    """A state dict hook: fp16 entries of this module in FP32, the master's value where there is one."""
    own = {**module._parameters, **module._buffers}
    for name, tensor in own.items():
        value = state_dict.get(prefix + name)
        if tensor is None or not isinstance(value, Tensor) or value is tensor or value.dtype not in _LOW:
            continue  # with keep_vars=True it is the parameter itself that is asked for
        holder = weights.holder_of(tensor)
        wide = value if holder is None else holdings.settled(holder, tensor)
        state_dict[prefix + name] = wide.to(torch.float32, copy=True)


def undo(model: nn.Module) -> None:
    """Undoes `patch`; fp16 weights become FP32, whose value is the master's where one is alive."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Forward):
            del module.__dict__["forward"]
            if forward.own is not None:
                module.__dict__["forward"] = forward.own
        for key in [key for key, hook in module._state_dict_hooks.items() if hook is _widen]:
            del module._state_dict_hooks[key]
        precision.release(module)
        for tensor in _tensors(module):
            if tensor.dtype in _LOW:
                holder = weights.holder_of(tensor)
                tensor.grad = None
                tensor.data = (tensor.detach() if holder is None else holdings.settled(holder, tensor)).float().clone()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
