"""`check_rule`: what mpengine's own rules are tested for, for the author of another one."""

from __future__ import annotations

from mpengine.testing.checking import RuleReport, check_rule

__all__ = ["RuleReport", "check_rule"]
