"""`prepare`: which layers stay FP32, how a model is cast, and how FP32 layers meet fp16 activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from mpengine import distributed, weights
from mpengine.grad_scaler import GradScaler
from mpengine.gradients import parameters
from mpengine.nested import mapped, tensors
from mpengine.optimizer import MixedPrecisionOptimizer
from mpengine.validation import check_wrappable

# Their CPU and CUDA implementations take fp16 input beside FP32 weights and compute in FP32.
_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)
_LOW = (torch.float16, torch.bfloat16)

NORMALIZATION: tuple[type[nn.Module], ...] = (
    *_BATCH_NORMS,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)

KeepFp32 = Callable[[str, nn.Module], bool] | Iterable[type[nn.Module] | str]


def is_normalization(name: str, module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: one of torch's, or of a class whose name ends in "Norm"."""
    return isinstance(module, NORMALIZATION) or type(module).__name__.endswith("Norm")


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    keep_fp32: KeepFp32 | None = None,
    max_grad_norm: float | None = None,
) -> MixedPrecisionOptimizer:
    """Casts a model's weights to fp16 in place, and wraps its optimizer: its FP32 masters are the weights as they were.

    Parameter objects keep their identity. Normalisation layers stay FP32, and take and return the activations' dtype.
    Buffers stay FP32: counters, averages and codebooks would saturate in fp16. Weights that are trained by no
    optimizer are cast too; weights that another optimizer will train stay FP32 until that one is prepared. FP32 weights
    that `load_state_dict` brings later reach the masters as they are.

    Args:
        model: On its final device.
        optimizer: Any torch optimizer over (some of) the model's parameters.
        scaler: Whose scales the losses will carry; None for bf16, or where `torch.amp.GradScaler` scales.
        dtype: torch.float16 or torch.bfloat16.
        keep_fp32: What stays FP32 besides normalisation layers: module classes and names (a name covers what lies
            below it), or a function of (name, module).
        max_grad_norm: See `MixedPrecisionOptimizer`.

    Returns:
        The wrapper; use it in the optimizer's place.

    Raises:
        TypeError: `optimizer` cannot be wrapped, or `model` is no module.
        ValueError: The optimizer has no parameters, holds one that the model does not own or that is wrapped
            already; the model is in DistributedDataParallel; `dtype` is another; a weight does not fit into it. Nothing
            is changed then.

    Example:
        >>> scaler = mpengine.GradScaler()
        >>> optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-4), scaler)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the torch.nn.Module whose weights are to be cast.")
    if dtype not in _LOW:
        raise ValueError(f"dtype is {dtype}; it must be torch.float16 or torch.bfloat16.")
    if distributed.wraps(model):
        raise ValueError(
            "model is in DistributedDataParallel already, which would no longer average the gradients of weights that "
            "are cast now. Prepare first, wrap then: optimizer = prepare(model, ...); model = "
            "DistributedDataParallel(model)."
        )
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters(remove_duplicate=False)}
    check_wrappable(optimizer, names)
    strangers = [i for i, param in enumerate(parameters(optimizer)) if param not in names]
    if strangers:
        raise ValueError(
            f"parameters {strangers[:8]} of this {type(optimizer).__name__} do not belong to the model; give prepare "
            "the model that owns all of them (a torch.nn.ModuleList of several, say)."
        )
    chosen = _chosen(model, keep_fp32)
    kept = kept_modules(model, chosen)
    trained = set(map(id, parameters(optimizer)))
    params = [p for p in castable(model, kept) if id(p) in trained or not p.requires_grad]
    for param in params:
        check_fits(param, names[param], dtype, f"keep_fp32=['{names[param].rpartition('.')[0]}']")
    originals: dict[Tensor, Tensor] = {param: param.data for param in params}
    try:
        for param in params:
            param.data = param.data.to(dtype)
        wrapper = MixedPrecisionOptimizer(
            optimizer, scaler, max_grad_norm=max_grad_norm, _names=names, _originals=originals
        )
    except BaseException:
        for param, original in originals.items():
            param.data = original
        raise
    compute_in_float32(kept, dtype, chosen)
    weights.watch(model)
    return wrapper


def _chosen(model: nn.Module, keep_fp32: KeepFp32 | None) -> set[nn.Module]:
    """The modules that `keep_fp32` names."""
    if keep_fp32 is None:
        return set()
    if callable(keep_fp32) and not isinstance(keep_fp32, type):
        return {module for name, module in model.named_modules() if keep_fp32(name, module)}
    if not isinstance(keep_fp32, (str, type, Iterable)):
        raise TypeError(f"keep_fp32 is {keep_fp32!r}; give module classes and names in a list, or a function.")
    kinds = [keep_fp32] if isinstance(keep_fp32, (str, type)) else list(keep_fp32)
    known = dict(model.named_modules())
    for kind in kinds:
        if not isinstance(kind, (str, type)):
            raise TypeError(f"keep_fp32 holds {kind!r}; it may hold module classes and names of modules.")
        if isinstance(kind, str) and kind not in known:
            raise ValueError(f"keep_fp32 names the module '{kind}', which the model does not have.")
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    return {module for name, module in known.items() if isinstance(module, types) or name in kinds}


def kept_modules(model: nn.Module, chosen: Set[nn.Module] = frozenset()) -> list[nn.Module]:
    """The modules whose own parameters and buffers stay FP32: norms, the chosen ones and all below these."""
    below = {module for root in chosen for module in root.modules()}
    return [module for name, module in model.named_modules() if module in below or is_normalization(name, module)]


def castable(model: nn.Module, kept: Sequence[nn.Module]) -> list[Tensor]:
    """The FP32 parameters of a model that no module of `kept` has."""
    spared = {id(p) for module in kept for p in module.parameters(recurse=False)}
    return [p for p in model.parameters() if id(p) not in spared and p.dtype == torch.float32]


def check_fits(param: Tensor, name: str, dtype: torch.dtype, remedy: str) -> None:
    """Raises ValueError where a weight would become infinite."""
    if not weights.fits(param, dtype):
        raise ValueError(
            f"parameter '{name}' holds {float(param.detach().abs().max()):g}, beyond {dtype}'s largest number "
            f"({torch.finfo(dtype).max:g}); keep its module in FP32: {remedy}."
        )


def compute_in_float32(kept: Sequence[nn.Module], dtype: torch.dtype, chosen: Set[nn.Module] = frozenset()) -> None:
    """Lets FP32 modules among those of `dtype` take and return its activations; the user named `chosen`."""
    for module in kept:
        if not isinstance(module, _BATCH_NORMS) and _has_float32(module, below=module in chosen):
            _compute_in_float32(module, dtype, shielded=not is_normalization("", module))


def release(module: nn.Module) -> None:
    """Undoes `compute_in_float32` for one module."""
    for hooks, own in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
    module.__dict__.pop("_result_dtype", None)


def _compute_in_float32(module: nn.Module, dtype: torch.dtype, shielded: bool) -> None:
    """Lets an FP32 module take low-precision activations and return their dtype, on every device, and compute in FP32.

    Where no argument is floating (an embedding's), the result becomes `dtype`.

    Args:
        module: A module with FP32 parameters.
        dtype: Of the weights around it.
        shielded: Whether autocast is off within, where it would cast FP32 weights down. Normalisation layers need no
            shield, for autocast leaves them in FP32; and torch.compile cannot trace it within an autocast region.
    """
    module.__dict__["_result_dtype"] = dtype
    module.__dict__["_shielded"] = shielded
    if _enter not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_enter, with_kwargs=True)
        module.register_forward_hook(_leave, with_kwargs=True, always_call=True)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = list(tensors((args, kwargs)))
    dtypes = [t.dtype for t in given if t.is_floating_point()]
    device = (given or list(_own_tensors(module, below=True)))[0].device.type
    outside = (dtypes[0] if dtypes else module.__dict__["_result_dtype"], device, torch.is_autocast_enabled(device))
    module.__dict__.setdefault("_outside", []).append(outside)
    if module.__dict__["_shielded"]:
        torch.set_autocast_enabled(device, False)
    return _to_float32(args), _to_float32(kwargs)


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    dtype, device, autocast = module.__dict__["_outside"].pop()
    if module.__dict__["_shielded"]:
        torch.set_autocast_enabled(device, autocast)
    return mapped(lambda t: t.to(dtype) if t.dtype == torch.float32 else t, output) if dtype in _LOW else output


def _to_float32(value: Any) -> Any:
    return mapped(lambda t: t.float() if t.dtype in _LOW else t, value)


def _own_tensors(module: nn.Module, below: bool) -> Iterator[Tensor]:
    yield from module.parameters(recurse=below)
    yield from module.buffers(recurse=below)


def _has_float32(module: nn.Module, below: bool) -> bool:
    return any(tensor.dtype == torch.float32 for tensor in _own_tensors(module, below))
