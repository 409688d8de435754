"""apex for scripts that import it: `python -m mpengine.apex SCRIPT`, or `mpengine.apex.install()` before the import.

`from apex import amp` and what scripts used beside it run on mpengine; what is not provided says what to use instead.
"""

from mpengine.apex.modules import install

__all__ = ["install"]
