"""What several tests of the trainer begin with."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models that a run makes itself are kept: made once, whichever test asks first."""
    return tmp_path_factory.mktemp("models")
