"""vLLM has pins of its own, so an environment of its own (`make test-vllm`); elsewhere this is skipped."""

import importlib.util
import os

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
if not HAS_VLLM:
    collect_ignore_glob = ["*.py"]
else:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",  # GiB; it would take 4
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )


def pytest_configure(config: pytest.Config) -> None:
    if HAS_VLLM:  # its imports warn of what is not installed
        config.addinivalue_line("filterwarnings", "ignore")
