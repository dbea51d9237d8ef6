"""Which versions of other packages the integrations were written against."""

from __future__ import annotations

import sys
from importlib import metadata

from packaging.specifiers import SpecifierSet

# The extras of pyproject.toml say the same (tests/integrations/test_versions.py). TRL and verl are reached
# into below their public names, so one minor release each; transformers only through what all its models
# share.
SUPPORTED = {
    "transformers": ">=5.0,<6",
    "trl": ">=1.16,<1.17",
    "verl": ">=0.9.1,<0.10",
}
# The oldest Python of those versions, where the library's own is older.
PYTHON = {"trl": (3, 11)}


def require(package: str) -> None:
    """Raise ImportError unless a supported version of the package is installed."""
    supported = SUPPORTED[package]
    oldest = PYTHON.get(package, ())
    if sys.version_info < oldest:
        raise ImportError(
            f"aer_fast.integrations.{package} needs {package}{supported}, which needs Python "
            f"{'.'.join(map(str, oldest))} or newer, and this is Python {sys.version.split()[0]}"
        )
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(
            f'aer_fast.integrations.{package} needs {package}{supported}: pip install "{package}{supported}"'
        ) from None
    if not SpecifierSet(supported).contains(installed, prereleases=True):
        raise ImportError(
            f"aer_fast.integrations.{package} supports {package}{supported}, and {package} {installed} is "
            f'installed: pip install "{package}{supported}", or a newer aer_fast'
        )
