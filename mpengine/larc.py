"""`LARC`, around another optimizer: a rate for each layer, as large as its weights ask for."""

from __future__ import annotations

import math
from typing import Any

import torch

from mpengine.rules import RuleOptimizer, family_of, larc


class LARC(RuleOptimizer):
    """Scales each parameter's gradient, so that the wrapped optimizer moves it by a share of its own norm.

    ```
    a = trust_coefficient * ||p|| / (||g|| + weight_decay * ||p|| + eps);   clip: a = min(a / lr, 1)
    g = (g + weight_decay * p) * a        g itself where one of the norms is 0
    ```

    You et al. 2017, arXiv 1708.03888, with the arguments and semantics of `apex.parallel.LARC`: the wrapped optimizer
    then steps without its weight decay. `mpengine.prepare` steps both in the fused pass; by itself LARC steps FP32
    weights. Groups and state are the wrapped optimizer's own, and so is what is saved.

    Args:
        optimizer: torch.optim.SGD, Adam or AdamW, or apex's FusedSGD or FusedAdam.
        trust_coefficient: At least 0.
        clip: Whether a step is at most the wrapped optimizer's.
        eps: Added to the divisor, at least 0.

    Attributes:
        optim: The wrapped optimizer.

    Raises:
        TypeError: The wrapped optimizer is another one.
        ValueError: A number is out of its bounds, or a group has maximize=True.

    Example:
        >>> optimizer = LARC(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), trust_coefficient=0.001)
        >>> optimizer = mpengine.prepare(model, optimizer, scaler)
    """

    optim: torch.optim.Optimizer
    trust_coefficient: float
    clip: bool
    eps: float
    hyperparameters = {}  # noqa: RUF012 - the groups are the wrapped optimizer's

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trust_coefficient: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("trust_coefficient", trust_coefficient), ("eps", eps)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be a number, at least 0.")
        if not isinstance(clip, (bool, int)):
            raise ValueError(f"clip is {clip!r}; it must be True or False.")
        self.__setstate__({"optim": optimizer, "trust_coefficient": trust_coefficient, "clip": clip, "eps": eps})

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optim", "trust_coefficient", "clip", "eps")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optim" not in state:  # load_state_dict's
            self.optim.__setstate__(state)
            return
        inner = state["optim"]
        is_taken = "_amp_optimizer" in getattr(inner, "__dict__", {})
        inner_family = family_of(inner) if isinstance(inner, torch.optim.Optimizer) and not is_taken else None
        family = None if inner_family is None else larc.family(inner_family, self._numbers)
        if family is None:
            of = " of amp.initialize" if is_taken else ""
            raise TypeError(
                f"LARC is around a {type(inner).__name__}{of}; it works around torch.optim.SGD, Adam and AdamW, and "
                "around FusedSGD and FusedAdam of mpengine.apex.optimizers. Wrap LARC first: "
                "LARC(torch.optim.SGD(...)), then amp.initialize or mpengine.prepare."
            )
        for group in inner.param_groups:
            family.variant(group)
        torch.optim.Optimizer.__setstate__(self, {**state, "defaults": {}, "family": family})
        self.defaults = inner.defaults  # now, for torch adds to them
        self.register_step_pre_hook(_note_step)

    def _numbers(self) -> tuple[float, float, float]:
        return self.trust_coefficient, self.eps, float(self.clip)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optim.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.optim.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optim.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer."""
        self.family.variant({**self.defaults, **param_group})
        self.optim.add_param_group(param_group)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Calls the wrapped optimizer's."""
        self.optim.zero_grad(*args, **kwargs)


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Schedulers that were made for the wrapped optimizer ask whether it has stepped."""
    if isinstance(optimizer, LARC):
        optimizer.optim._opt_called = True  # type: ignore[attr-defined]
