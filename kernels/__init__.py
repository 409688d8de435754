"""The Triton kernels of mpengine, installed as `mpengine.kernels`. Importing this package needs no Triton.

`launch` holds the launchers (`inspect`, `decide`, `update`, `update_scale`); `mpengine.reference` holds the
specification of each under the same name. This package imports nothing of mpengine outside itself.
"""
