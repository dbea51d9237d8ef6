"""Which versions of other packages the integrations were written against."""

from importlib import metadata

from packaging.specifiers import SpecifierSet

# The extras of pyproject.toml say the same (tests/test_integrations.py). TRL and verl are reached into below
# their public names, so one minor release each; transformers only through what all its models share.
SUPPORTED = {
    "transformers": ">=5.0,<6",
    "trl": ">=1.16,<1.17",
    "verl": ">=0.9.1,<0.10",
}


def require(package: str) -> None:
    """Raise ImportError unless a supported version of the package is installed."""
    supported = SUPPORTED[package]
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
