"""verl has pins of its own, so an environment of its own (`make test-verl`); elsewhere this is skipped."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

HAS_VERL = importlib.util.find_spec("verl") is not None
if not HAS_VERL:
    collect_ignore_glob = ["*.py"]
else:
    os.environ.update(
        VERL_PLATFORM="cpu",
        VERL_USE_EXTERNAL_MODULES="tests.verl.cpu_platform",  # by every process that imports verl
        PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        VERL_LOGGING_LEVEL="WARNING",
        RAY_AUTH_MODE="disabled",  # or ray writes a token into the home folder
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        HYDRA_FULL_ERROR="1",
    )


def pytest_configure(config: pytest.Config) -> None:
    if HAS_VERL:  # its imports warn of every engine that is not installed
        config.addinivalue_line("filterwarnings", "ignore")
        config.addinivalue_line("filterwarnings", "error::DeprecationWarning:aer_fast")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 20,000 parameters, saved as verl expects a model."""
    from tests.verl.driver import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What ray gives verl's workers: a rank, a world of one, and a process group."""
    import torch.distributed as dist

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{store}")
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def queue() -> Iterator[Any]:
    """verl's TransferQueue, on a ray of its own."""
    import ray
    import transfer_queue as tq
    import verl.trainer
    from omegaconf import OmegaConf

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    folder = Path(verl.trainer.__file__).parent / "config" / "transfer_queue"
    config = OmegaConf.load(folder / "transfer_queue.yaml")
    config.enable = True
    config.backend.SimpleStorage.num_data_storage_units = 1
    tq.init(config)
    yield tq
    tq.close()
    ray.shutdown()
