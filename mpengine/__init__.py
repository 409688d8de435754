"""mpengine: fp16 training with FP32 master weights, a dynamic scale for every loss, and one fused step."""

from mpengine import amp, graphs, optim, reference, rules, schedules
from mpengine.grad_scaler import GradScaler
from mpengine.optimizer import MixedPrecisionOptimizer
from mpengine.precision import prepare
from mpengine.report import LossReport, Report
from mpengine.watchdog import LossScaleCollapse

__version__ = "0.1.0"

__all__ = [
    "GradScaler",
    "LossReport",
    "LossScaleCollapse",
    "MixedPrecisionOptimizer",
    "Report",
    "amp",
    "graphs",
    "optim",
    "prepare",
    "reference",
    "rules",
    "schedules",
]
