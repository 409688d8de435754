"""Package layout; the metadata is in pyproject.toml.

The Triton kernels lie in the top-level folder kernels/ and are installed as mpengine.kernels. In a checkout the
symlink mpengine/kernels gives them the same name, for bare use and for type checkers.
"""

from setuptools import setup

setup(
    packages=[
        "mpengine",
        "mpengine.amp",
        "mpengine.apex",
        "mpengine.integrations",
        "mpengine.kernels",
        "mpengine.kernels.rules",
        "mpengine.rules",
    ],
    package_dir={"mpengine.kernels": "kernels"},
    package_data={"mpengine": ["py.typed"]},
)
