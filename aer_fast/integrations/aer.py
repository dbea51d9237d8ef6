"""What any trainer needs for AER: accuracies, coefficients, the entropy of a step, metrics, the state file.

A trainer adds what is its own: where scores and entropies come from, and who applies the coefficients.

Sizes: P prompts, G rollouts of a prompt.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aer_fast import AdaptiveEntropy

# The defaults of the controller, by the names of its arguments; and from which score on a rollout is right.
DEFAULTS: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(AdaptiveEntropy).parameters.items()
}
THRESHOLD = 1.0

# Prompts by accuracy, as the logs know them: from the first number on, below the second.
BINS = {"hard": (0.0, 1 / 3), "medium": (1 / 3, 2 / 3), "easy": (2 / 3, math.inf)}

STATE = "aer.json"  # in a checkpoint's folder

_LARGEST = sys.float_info.max

logger = logging.getLogger(__name__)


class Bookkeeping:
    """AER in a trainer: a controller, and what it needs to know of a step.

    Args:
        controller: an `AdaptiveEntropy`, which moves α.
        threshold: a rollout is right if its score is at least this, in the dtype of the scores.

    Raises:
        ValueError: if the threshold is not a finite number.

    Examples:
        >>> aer = Bookkeeping(AdaptiveEntropy(target=1.0, rho=1.0, alpha_init=0.1, eta=0.2))
        >>> accuracy = aer.accuracy(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # once rollouts are scored
        >>> aer.coefficient(accuracy)  # of each prompt, for the loss
        tensor([0.0500, 0.1000])
        >>> aer.observe(torch.tensor(8.0), 16, accuracy)  # every micro-batch
        >>> aer.update()  # every step; its metrics
        {'aer/entropy': 0.5, 'aer/target': 1.0, 'aer/alpha': 0.2}
    """

    def __init__(self, controller: AdaptiveEntropy, threshold: float = THRESHOLD) -> None:
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not -_LARGEST <= threshold <= _LARGEST:  # NaN is not within
            raise ValueError(f"threshold must be a finite number, got {threshold!r}")
        self.controller, self.threshold = controller, float(threshold)
        self._sums: Tensor | None = None  # what `observe` has been told in this step

    def accuracy(self, score: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The share of each prompt's rollouts that are right.

        Args:
            score: [P, G]. A NaN does not count: there was no judgement, or no rollout.
            dtype: of the result; None for that of the scores.

        Returns:
            Accuracies [P]; NaN for a prompt whose scores are all NaN.
        """
        right = (score >= self.threshold).to(dtype or score.dtype)
        return right.where(~score.isnan(), torch.nan).nanmean(-1)

    def coefficient(self, accuracy: Tensor) -> Tensor:
        """c(q), the coefficient of each prompt.

        Args:
            accuracy: accuracies of prompts, any shape.

        Returns:
            Coefficients of that shape; 0 where the accuracy is NaN.
        """
        coefficient = self.controller.coefficient(accuracy.nan_to_num(1.0))
        return coefficient.where(~accuracy.isnan(), 0.0)

    def observe(
        self,
        entropy: Tensor | float,
        count: Tensor | int,
        accuracy: Tensor | None = None,
        coefficient: Tensor | None = None,
    ) -> None:
        """Add a part of the step, such as a micro-batch, of this process.

        The host does not wait for a GPU if ``count`` lies there, too.

        Args:
            entropy: sum of the entropies of the part's tokens, before anything is filtered. Sums are kept in
                its dtype, float32 at least; a Python number is summed in float64.
            count: the number of these tokens.
            accuracy: [N], accuracies of rollouts or prompts. The mean of their weights normalises the
                coefficients from the next `update` on.
            coefficient: [N], their coefficients, if `update` shall return the mean coefficients by
                difficulty.
        """
        total = entropy if isinstance(entropy, Tensor) else torch.tensor(entropy, dtype=torch.float64)
        total = total.to(torch.promote_types(total.dtype, torch.float32))
        if accuracy is None:
            accuracy = total.new_zeros(0)
        known = ~accuracy.isnan()
        weight = self.controller.weight(accuracy.nan_to_num(1.0))
        if coefficient is None:
            accuracy = coefficient = total.new_zeros(0)
        parts = [total, count, (weight * known).sum(), known.sum()]
        parts += _sums_by_difficulty(accuracy, coefficient)
        sums = torch.stack([torch.as_tensor(x, dtype=total.dtype, device=total.device) for x in parts])
        self._sums = sums.detach() if self._sums is None else self._sums + sums.detach()

    def forget(self) -> None:
        """Drop what was observed since the last update: α rests in this step."""
        self._sums = None

    def update(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Move α by the mean entropy of all that was observed since the last update.

        Args:
            reduce: sums a tensor over the processes. All must call, and have observed in the same dtype and
                on the same kind of device; a process without a token observes a count of 0. None: this is the
                only process.

        Returns:
            The metrics aer/entropy, if there was a token; aer/target, if it is known; aer/alpha; and
            aer/coefficient/{hard,medium,easy}, those that were observed.

        Raises:
            ValueError: as `AdaptiveEntropy.update`. What was observed is dropped then, too.
        """
        if self._sums is None:
            self.observe(0.0, 0)
        assert self._sums is not None
        sums = self._sums if reduce is None else reduce(self._sums)
        self.forget()
        total, count, weight, prompts, *rest = sums.tolist()
        metrics = _means_by_difficulty(rest)
        mean = total / count if count else 0.0
        self.controller.update(mean, count, weight=weight / prompts if prompts else None, prompts=prompts)
        if count:
            metrics["aer/entropy"] = mean
        if self.controller.target is not None:
            metrics["aer/target"] = self.controller.target
        return metrics | {"aer/alpha": self.controller.alpha}

    def save(self, folder: Path | str) -> None:
        """Write the controller's state to aer.json. If this fails, the file is what it was before.

        Args:
            folder: of the checkpoint; it must exist.
        """
        path = Path(folder, STATE)
        partial = path.with_name(f"{STATE}.partial")
        with partial.open("w") as file:
            json.dump(self.controller.state_dict(), file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, folder: Path | str, settings: str) -> None:
        """Restore what `save` wrote. A folder without aer.json is a warning, and AER begins anew.

        Args:
            folder: of the checkpoint.
            settings: what the trainer calls its settings, for the error message.

        Raises:
            ValueError: if the file contradicts the settings. It names both.
        """
        path = Path(folder, STATE)
        if not path.exists():
            logger.warning(
                "%s is missing: %s has no %s, and AER begins anew, with the next entropy as H0",
                path,
                folder,
                STATE,
            )
            return
        try:
            self.controller.load_state_dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} does not fit {settings}: {error}") from error


def accuracy_metrics(accuracy: Tensor, coefficient: Tensor | None = None) -> dict[str, float]:
    """The metric aer/accuracy, and with coefficients aer/coefficient/{hard,medium,easy}.

    Args:
        accuracy: [P], accuracies of prompts; NaN does not count.
        coefficient: [P], their coefficients, or None.

    Returns:
        The mean accuracy, and the mean coefficient of the prompts whose accuracy is below 1/3 (hard), below
        2/3 (medium), and of the rest (easy), as far as there are such prompts. Empty without a prompt.
    """
    if not accuracy.numel():
        return {}
    metrics = {"aer/accuracy": accuracy.nanmean().item()}
    if coefficient is None:
        return metrics
    return metrics | _means_by_difficulty([x.item() for x in _sums_by_difficulty(accuracy, coefficient)])


def _sums_by_difficulty(accuracy: Tensor, coefficient: Tensor) -> list[Tensor]:
    """Of each bin in turn, the sum of the coefficients and their number."""
    inside = [(accuracy >= low) & (accuracy < high) for low, high in BINS.values()]
    return [x for mine in inside for x in ((coefficient * mine).sum(), mine.sum())]


def _means_by_difficulty(sums: Sequence[float]) -> dict[str, float]:
    pairs = zip(BINS, sums[::2], sums[1::2])
    return {f"aer/coefficient/{name}": used / number for name, used, number in pairs if number}
