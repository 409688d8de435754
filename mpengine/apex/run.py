"""The runner: a script, or a module, as `python` runs it, and `import apex` finds mpengine."""

from __future__ import annotations

import builtins
import importlib.util
import logging
import os
import sys
import zipfile
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from mpengine.apex.modules import install

USAGE = """usage: python -m mpengine.apex [--force] SCRIPT [ARGS...]
       python -m mpengine.apex [--force] -m MODULE [ARGS...]

Runs an unmodified script of apex's users: where apex is not installed, or has no amp, `import apex` finds mpengine.
Under torchrun: torchrun ... -m mpengine.apex SCRIPT [ARGS...]

--force  also where an installed apex has amp"""

_OURS = {__file__, str(Path(__file__).with_name("__main__.py")), "<frozen runpy>"}
_OURS |= {"<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>", "<frozen zipimport>"}


def main(arguments: list[str]) -> None:
    """Runs what the arguments name: sys.argv, sys.path[0], `__main__`, errors and exit codes are as `python` has them.

    Args:
        arguments: [--force] SCRIPT or -m MODULE, and what the script shall find in sys.argv[1:].

    Raises:
        SystemExit: There is nothing to run, or the script exits.
    """
    force = arguments[:1] == ["--force"]
    arguments = arguments[force:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments or arguments == ["-m"] or (arguments[0].startswith("-") and arguments[0] != "-m"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    sys.excepthook = _excepthook
    if arguments[0] == "-m":
        _run_module(arguments[1], arguments[2:], force)
    else:
        _run_script(arguments[0], arguments[1:], force)


def start(force: bool = False) -> None:
    """Installs, and prints the messages of the logger mpengine.amp from INFO on, as apex printed them.

    Args:
        force: See `mpengine.apex.install`.
    """
    install(force)
    logger = logging.getLogger("mpengine.amp")
    if not any(isinstance(handler, _Printing) for handler in logger.handlers):
        logger.addHandler(_Printing())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _Printing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


# What is run.


def _run_script(script: str, arguments: list[str], force: bool) -> None:
    path = os.path.abspath(script)
    sys.argv = [script, *arguments]
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        _begin(path, force)
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None:
            sys.exit(f"{sys.executable}: can't find '__main__' module in {path!r}")
        _run_spec(spec)
        return
    loader = SourceFileLoader("__main__", path)
    try:
        source = loader.get_data(path)
    except OSError as error:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        sys.exit(2)
    _begin(os.path.dirname(os.path.realpath(path)), force)
    _execute(lambda: loader.source_to_code(source, path), __file__=path, __loader__=loader)


def _run_module(name: str, arguments: list[str], force: bool) -> None:
    sys.argv = ["-m", *arguments]
    _begin(os.getcwd(), force)
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
        if spec is None:
            sys.exit(
                f"{sys.executable}: No module named {name}.__main__; {name!r} is a package and cannot be directly "
                "executed"
            )
    if spec is None:
        sys.exit(f"{sys.executable}: No module named {name}")
    sys.argv[0] = str(spec.origin)
    _run_spec(spec)


def _run_spec(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    names = {"__file__": spec.origin, "__cached__": spec.cached, "__package__": spec.parent}
    _execute(lambda: loader.get_code(spec.name), __spec__=spec, __loader__=loader, **names)


def _execute(compiled: Any, **names: Any) -> None:
    module = ModuleType("__main__")
    vars(module).update({"__builtins__": builtins, "__annotations__": {}, "__cached__": None, **names})
    sys.modules["__main__"] = module
    code: CodeType = compiled()
    exec(code, vars(module))


def _begin(folder: str, force: bool) -> None:
    """An apex that lies in the folder of the script is an installed one, as `python` has it."""
    if not sys.flags.safe_path:  # which keeps python from putting a folder there
        sys.path[0] = _Folder(folder, force)
    start(force)


class _Folder(str):
    """sys.path[0]. multiprocessing pickles sys.path for the processes that it spawns: unpickled, it installs there.

    A spawned process imports the script anew before it does anything else, and so needs apex at once.
    """

    force: bool

    def __new__(cls, path: str, force: bool) -> _Folder:
        folder = super().__new__(cls, path)
        folder.force = force
        return folder

    def __reduce__(self) -> tuple[Any, ...]:
        return _folder_of_a_child, (str(self), self.force)


def _folder_of_a_child(path: str, force: bool) -> _Folder:
    start(force)
    return _Folder(path, force)


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The script's own traceback, without the frames of its runner."""
    while trace is not None and trace.tb_frame.f_code.co_filename in _OURS:
        trace = trace.tb_next
    error.__traceback__ = trace
    sys.__excepthook__(kind, error, trace)
