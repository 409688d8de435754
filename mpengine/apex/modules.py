"""`install`: the modules of apex, and what stands behind each of them."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal

from mpengine.apex import missing

Outcome = Literal["provided", "completed", "kept"]

# Each module of apex and the module that does its work, parents first; None: only its children are of use.
PROVIDED: dict[str, str | None] = {
    "apex": None,
    "apex.amp": "mpengine.amp",
    "apex.amp._amp_state": "mpengine.amp",
    "apex.amp.amp": "mpengine.amp",
    "apex.amp.frontend": "mpengine.amp",
    "apex.amp.handle": "mpengine.amp",
    "apex.contrib": None,
    "apex.fp16_utils": "mpengine.apex.fp16_utils",
    "apex.fp16_utils.fp16_optimizer": "mpengine.apex.fp16_utils",
    "apex.fp16_utils.fp16util": "mpengine.apex.fp16_utils",
    "apex.fp16_utils.loss_scaler": "mpengine.apex.fp16_utils",
    "apex.multi_tensor_apply": "mpengine.apex.multi_tensor_apply",
    "apex.multi_tensor_apply.multi_tensor_apply": "mpengine.apex.multi_tensor_apply",
    "apex.normalization": "mpengine.apex.normalization",
    "apex.normalization.fused_layer_norm": "mpengine.apex.normalization",
    "apex.optimizers": "mpengine.apex.optimizers",
    "apex.optimizers.fused_adagrad": "mpengine.apex.optimizers",
    "apex.optimizers.fused_adam": "mpengine.apex.optimizers",
    "apex.optimizers.fused_lamb": "mpengine.apex.optimizers",
    "apex.optimizers.fused_novograd": "mpengine.apex.optimizers",
    "apex.optimizers.fused_sgd": "mpengine.apex.optimizers",
    "apex.parallel": "mpengine.apex.parallel",
    "apex.parallel.LARC": "mpengine.apex.parallel",
    "apex.parallel.distributed": "mpengine.apex.parallel",
    "apex.parallel.optimized_sync_batchnorm": "mpengine.apex.parallel",
    "apex.parallel.sync_batchnorm": "mpengine.apex.parallel",
    "amp_C": "mpengine.apex.amp_c",
    "apex_C": "mpengine.apex.apex_c",
}

_outcome: Outcome | None = None


class StandIn(ModuleType):
    """A module of apex. What is asked of it is looked up in the module that does the work, and refused with a remedy.

    A module of its own, not the other one under a second name: the import system writes children into their parents.
    """

    def __init__(self, name: str, source: ModuleType | None) -> None:
        super().__init__(name, None if source is None else source.__doc__)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        self.__dict__["_source"] = source

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("_source")
        if source is not None and name in (*source.__all__, "__all__"):
            return getattr(source, name)
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        raise AttributeError(missing.message(f"{self.__name__}.{name}"))

    def __dir__(self) -> list[str]:
        source = self.__dict__["_source"]
        return sorted({*self.__dict__, *(() if source is None else source.__all__)})


def install(force: bool = False) -> Outcome:
    """Lets `import apex`, and the imports of its modules, find mpengine. A second call changes nothing.

    Call it before apex is imported. An installed apex that has amp is left alone. Of one without amp every module and
    name stays as it is, and those that it lacks are added.

    Args:
        force: Whether ours replaces an installed apex, whole, and `amp_C` and `apex_C`. Names that were imported
            before stay.

    Returns:
        "provided": all of apex is ours, since none could be imported or `force` was given; "completed": what the
        installed one lacks was added; "kept": the installed one has amp, nothing was done.

    Example:
        >>> mpengine.apex.install()
        'provided'
        >>> from apex import amp
    """
    global _outcome
    if _outcome is None or (force and _outcome != "provided"):
        if force or _imported("apex") is None:
            _provide()
            _outcome = "provided"
        elif _imported("apex.amp") is not None:
            _outcome = "kept"
        else:
            _complete()
            _outcome = "completed"
    return _outcome


def _imported(name: str) -> ModuleType | None:
    """An installed module; None where there is none, or its import fails (another package of that name, say)."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def _provide() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C", "apex_C")]:
        del sys.modules[name]
    for name in PROVIDED:
        _put(name)
    sys.meta_path.append(missing.Finder())


def _complete() -> None:
    ours = set()
    for name, source in PROVIDED.items():
        theirs = None if name.rpartition(".")[0] in ours else _imported(name)
        if theirs is None:
            ours.add(name)
            _put(name)
        elif source is not None:
            _fill(theirs, importlib.import_module(source))


def _put(name: str) -> None:
    source = PROVIDED[name]
    module = sys.modules[name] = StandIn(name, None if source is None else importlib.import_module(source))
    parent, _, child = name.rpartition(".")
    if parent and not hasattr(sys.modules[parent], child):  # apex.parallel.LARC is a class, and its module, too
        setattr(sys.modules[parent], child, module)


def _fill(theirs: ModuleType, source: ModuleType) -> None:
    for name in source.__all__:
        if not hasattr(theirs, name):
            setattr(theirs, name, getattr(source, name))
