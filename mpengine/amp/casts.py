"""O1's casts: autocast in `forward`, functions that the user has registered or decorated, and turning them off."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch

from mpengine import nested

P = ParamSpec("P")
R = TypeVar("R")
_DEVICES = ("cpu", "cuda")
_INHERITED = object()

_enabled = False  # whether the latest initialize was one of O1
_disabled: ContextVar[bool] = ContextVar("disabled", default=False)  # by disable_casts
_registered: dict[tuple[Any, str], Callable[[Callable[..., Any]], Callable[..., Any]]] = {}
_patched: list[tuple[Any, str, Any, Any]] = []  # (module, name, the function before, ours)


def are_active() -> bool:
    """Whether O1's casts are in force here."""
    return _enabled and not _disabled.get()


def is_disabled() -> bool:
    """Whether this runs within `disable_casts`."""
    return _disabled.get()


@contextlib.contextmanager
def disable_casts() -> Iterator[None]:
    """Within this context O1 casts nothing: no autocast, and no registered or decorated function; inside `forward` too.

    An exception restores the casts as well.
    """
    token = _disabled.set(True)
    before = {device: torch.is_autocast_enabled(device) for device in _DEVICES}
    for device in _DEVICES:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)
        _disabled.reset(token)


def half_function(fn: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function: under O1 its floating-point tensor arguments are cast to fp16."""
    return _casting(fn, lambda args: nested.cast(args, torch.float16))


def float_function(fn: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function: under O1 its floating-point tensor arguments are cast to FP32; no autocast in it."""
    return _casting(fn, lambda args: nested.cast(args, torch.float32), autocast=False)


def promote_function(fn: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function: under O1 its floating-point tensor arguments are cast to the widest type among them."""

    def widest(args: Any) -> Any:
        dtypes = [tensor.dtype for tensor in nested.tensors(args) if tensor.is_floating_point()]
        return nested.cast(args, functools.reduce(torch.promote_types, dtypes)) if dtypes else args

    return _casting(fn, widest)


def _casting(fn: Callable[P, R], cast: Callable[[Any], Any], autocast: bool = True) -> Callable[P, R]:
    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not are_active():
            return fn(*args, **kwargs)
        positional, by_name = cast((args, kwargs))
        with contextlib.nullcontext() if autocast else _no_autocast():
            return fn(*positional, **by_name)

    return wrapper


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def register_half_function(module: Any, name: str) -> None:
    """Before `initialize`: under O1 `module.name` behaves as `half_function` has it.

    Raises:
        ValueError: `module` has no such function.
    """
    _register(module, name, half_function)


def register_float_function(module: Any, name: str) -> None:
    """Before `initialize`: under O1 `module.name` behaves as `float_function` has it.

    Raises:
        ValueError: `module` has no such function.
    """
    _register(module, name, float_function)


def register_promote_function(module: Any, name: str) -> None:
    """Before `initialize`: under O1 `module.name` behaves as `promote_function` has it.

    Raises:
        ValueError: `module` has no such function.
    """
    _register(module, name, promote_function)


def _register(module: Any, name: str, decorator: Callable[..., Any]) -> None:
    if not callable(getattr(module, name, None)):
        raise ValueError(f"No function named {name} in module {module}.")
    _registered[(module, name)] = decorator


def begin(enabled: bool) -> None:
    """Called by every `initialize`: patches the registered functions where it is one of O1, else undoes that."""
    global _enabled
    for module, name, before, ours in reversed(_patched):
        if inspect.getattr_static(module, name, None) is not ours:
            continue  # somebody has patched it since
        if before is _INHERITED:
            delattr(module, name)
        else:
            setattr(module, name, before)
    _patched.clear()
    _enabled = enabled
    for (module, name), decorator in _registered.items() if enabled else ():
        found = inspect.getattr_static(module, name)
        static = isinstance(found, staticmethod)
        ours = staticmethod(decorator(found.__func__)) if static else decorator(getattr(module, name))
        _patched.append((module, name, vars(module).get(name, _INHERITED), ours))
        setattr(module, name, ours)
