"""A whole iteration in one CUDA graph: `GraphedIteration` captures it, and replays it with new inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mpengine import capturable, capture, inputs
from mpengine.grad_scaler import GradScaler
from mpengine.gradients import parameters
from mpengine.optimizer import MixedPrecisionOptimizer

Iteration = Callable[..., Any]


class GraphedIteration:
    """Runs a function that is one whole iteration: eagerly a few times, then captured and replayed.

    ```
    call 1 .. warmup    eager, on the stream that the capture will use
    call warmup + 1     captured, which executes nothing, then replayed
    each call after     inputs copied into static buffers, hyperparameters uploaded where they changed, one launch
    ```

    Every call is one iteration of training, on its inputs, and its results are those of the plain function bit for
    bit. Between calls the learning rate may be set, checkpoints loaded, weights written, statistics read, the plain
    function called. What a captured step can no longer follow (groups added, layers frozen, state replaced) makes it
    warm up and capture again. Without a GPU nothing is captured: the function runs each time, by the same rules.

    Python runs in warm-up and capture only, so what it decides is baked in: `train()` or `eval()`, branches, values
    that are no tensors. Nothing in the function may wait for the device (`loss.item()`), and learning rates are set
    outside. Gradients from before a call must not reach its step: begin or end the function with
    `optimizer.zero_grad()`.

    Args:
        iteration: Zeroes gradients, runs the models, and with each loss `scaler.scale(loss).backward()`, then steps and
            `scaler.update()`; autocast is entered within. Its arguments are tensors and plain values, in nested tuples,
            lists and dicts; CPU tensors arrive on the parameters' device.
        optimizers: All `MixedPrecisionOptimizer`s that it steps, one or several, of fused rules, on one device.
        warmup: Eager calls before a capture, at least 2: the first makes tables and compiles, the last is watched.
        pool: The memory pool to capture into, of `torch.cuda.graph_pool_handle()`; None: one of its own. Graphs that
            are not replayed at the same time may share one.

    Attributes:
        captures: How often the iteration was captured; on a CPU, would have been.
        replays: How many calls were replays; on a CPU, would have been.

    Raises:
        TypeError: Something other than mpengine's optimizers is given.
        ValueError: No optimizer, one that waits for the device, several devices, or `warmup` below 2.

    Example:
        >>> train = mpengine.graphs.GraphedIteration(iteration, optimizer)
        >>> for x, y in loader:
        ...     loss = train(x, y)
    """

    def __init__(
        self,
        iteration: Iteration,
        optimizers: MixedPrecisionOptimizer | Iterable[MixedPrecisionOptimizer],
        *,
        warmup: int = 3,
        pool: Any = None,
    ) -> None:
        if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 2:
            raise ValueError(f"warmup is {warmup!r}; it must be an int of at least 2.")
        self._iteration = iteration
        self._optimizers = capturable.checked(optimizers)
        self._device = capturable.only_device(self._optimizers)
        self._warmup, self._pool = warmup, pool
        self._names = _positional_names(iteration)
        self._inputs: inputs.StaticInputs | None = None
        self._recorded: _Recorded | None = None
        self._warm = 0  # eager calls so far, since the last capture was given up
        self._problem: str | None = None  # why the last eager call could not have been captured
        self._unread: set[Tensor] = set()  # parameters of which an eager call has shown that it drops old gradients
        self.captures = 0
        self.replays = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one iteration.

        Returns:
            What the function returned, tensors detached. Those of a replay are static: the next one overwrites them
            (clone what is to be kept); what is no tensor is of the capture.

        Raises:
            ValueError: An argument is not as at the first call. Nothing has changed then.
            RuntimeError: The iteration cannot be captured. The call has not run then; training may go on, eagerly or by
                calling again, which watches the next eager iteration.
        """
        capturable.refuse_autocast(self._device)
        if self._inputs is None:
            self._inputs = inputs.StaticInputs(self._names, args, kwargs, self._device)
        tensors = self._inputs.check(args, kwargs)
        if self._recorded is None and self._warm < self._warmup:
            return self._run_eagerly(tensors)
        current = all([optimizer._before_replay() for optimizer in self._optimizers])  # each of them: it uploads
        if not current or (self._recorded is not None and not self._recorded.is_current()):
            self._recorded, self._warm = None, 0  # its memory is free for the warm-up
            return self._run_eagerly(tensors)
        if self._problem is not None:
            problem, self._problem, self._warm = self._problem, None, self._warmup - 1
            self._recorded = None
            raise RuntimeError(
                f"this iteration cannot be captured in a CUDA graph: {problem} Nothing of this call ran."
            )
        if any(p.grad is not None and p not in self._unread for p in self._parameters()):
            return self._run_eagerly(tensors)
        self._inputs.fill(tensors)
        if self._recorded is None:
            self._recorded = self._capture()
            self.captures += 1
        self.replays += 1
        return self._recorded.replay()

    def _parameters(self) -> Iterator[Tensor]:
        return (param for optimizer in self._optimizers for param in parameters(optimizer))

    def _call(self) -> Any:
        assert self._inputs is not None
        args, kwargs = self._inputs.values()
        return inputs.mapped(self._iteration(*args, **kwargs), Tensor.detach)

    def _run_eagerly(self, tensors: list[Tensor]) -> Any:
        """A real iteration, watched for what a capture would not survive."""
        assert self._inputs is not None
        with capture.on_capture_stream(self._device):
            self._inputs.fill(tensors)
            with capturable.Watch(self._optimizers, self._device) as watch:
                outputs = self._call()
        self._problem = watch.problem(host_reads=self._warm > 0)  # the first call makes tables, and may wait
        self._unread |= watch.unread
        self._warm += 1
        return outputs

    def _capture(self) -> _Recorded:
        before = [optimizer._tables() for optimizer in self._optimizers]
        undo = [scaler._before_capture() for scaler in _scalers(self._optimizers)]
        undo += [optimizer._before_capture() for optimizer in self._optimizers]
        raised: list[Exception] = []

        def call() -> Any:
            try:
                return self._call()
            except Exception as error:  # ending the capture may raise another
                raised.append(error)
                raise

        for optimizer in self._optimizers:
            optimizer.zero_grad()  # old gradients are not read, as was seen; their memory is free for the graph
        graph = capture.make_graph(self._device, self._pool)
        try:
            outputs = graph.record(call if graph.executes_later else self._call)
            if not all(_same(o._tables(), tables) for o, tables in zip(self._optimizers, before, strict=True)):
                raise RuntimeError(
                    "its tables changed while it was captured: other parameters had gradients than before"
                )
        except BaseException as error:
            for restore in undo:
                restore()
            self._warm, self._problem = self._warmup - 1, None
            if not isinstance(error, Exception) or not graph.executes_later:
                raise
            cause = next(iter(raised), error)
            raise RuntimeError(
                f"this iteration could not be captured in a CUDA graph ({type(cause).__name__}: {cause}). Nothing of "
                "this call has run. Nothing in it may wait for the device (.item(), .cpu(), print or branches on "
                "tensors, torch.cuda.synchronize()), use a stream that it does not join, or keep the graph of an "
                "earlier loss alive. Go on with the plain function, or mend it and call again."
            ) from error
        return _Recorded(graph, outputs, self._optimizers)


class _Recorded:
    """A captured iteration, and what has to stay as it was at the capture."""

    def __init__(self, graph: capture.Graph, outputs: Any, optimizers: list[MixedPrecisionOptimizer]) -> None:
        self._graph, self._outputs, self._optimizers = graph, outputs, optimizers
        self._tables = [optimizer._tables() for optimizer in optimizers]
        self._trained = self._requires_grad()
        params = [param for optimizer in optimizers for param in parameters(optimizer)]
        self._left = [(param, param.grad) for param in params]
        # Written by the iteration itself after its step (weights clipped, say): masters follow before the next one.
        self._written = [param for optimizer in optimizers for param in optimizer._written_elsewhere()]

    def _requires_grad(self) -> list[tuple[Tensor, bool]]:
        return [(p, p.requires_grad) for optimizer in self._optimizers for p in parameters(optimizer)]

    def is_current(self) -> bool:
        """Whether the graph still steps what the optimizers hold."""
        same = all(_same(o._tables(), tables) for o, tables in zip(self._optimizers, self._tables, strict=True))
        trained = self._requires_grad()
        return (
            same
            and len(trained) == len(self._trained)
            and all(p is q and now == then for (p, now), (q, then) in zip(trained, self._trained, strict=True))
        )

    def replay(self) -> Any:
        """Runs it on the current stream."""
        if not self._graph.executes_later:
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            return self._graph.replay()
        for param, grad in self._left:
            if param.grad is not grad:
                param.grad = None  # an eager iteration left it; the graph writes its own
        self._graph.replay()
        for optimizer in self._optimizers:
            optimizer._after_replay()
        torch.autograd.graph.increment_version(self._written)
        for scaler in _scalers(self._optimizers):
            scaler._after_replay()
        return inputs.mapped(self._outputs, lambda tensor: tensor)


def _same(tables: Iterable[object], others: Iterable[object]) -> bool:
    return all(a is b for a, b in zip(tables, others, strict=True))


def _scalers(optimizers: list[MixedPrecisionOptimizer]) -> list[GradScaler]:
    return list(dict.fromkeys(o.scaler for o in optimizers if o.scaler is not None))


def _positional_names(iteration: Iteration) -> list[str]:
    try:
        found = inspect.signature(iteration).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return []
    return [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
