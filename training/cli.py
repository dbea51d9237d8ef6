"""The command line: presets whose fields are flags, and one line for each thing that goes wrong."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from training.config import PRESETS, Config


def main(train: Callable[[Config], None]) -> None:
    """Run with the preset and flags of the command line."""
    config = tyro.extras.overridable_config_cli(PRESETS, description=train.__doc__)
    guard(lambda: train(config), "the same command with --resume goes on")


def guard(work: Callable[[], Any], interrupted: str) -> None:
    """Do it; say in one line why it could not be done."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
