"""The tests, in folders that mirror the product; what several of them share is in `tests.helpers`."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
