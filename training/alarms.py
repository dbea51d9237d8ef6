"""Signs that a run is failing, named while there is time. docs/training.md says what answers each.

Each is a function of the metrics so far, so that a resumed run warns as an uninterrupted one would.
"""

import statistics
from typing import Any

Row = dict[str, Any]
BOUND_STEPS = 10  # α at its bound for so long
RATIO = 10.0  # a ratio above this
GRADIENT = 10.0  # a gradient norm above so many medians of the last 50


def alarms(rows: list[Row], alpha_range: tuple[float, float]) -> list[str]:
    """What is wrong as of the last row; nothing that was said of the row before it."""
    before = dict(_signs(rows[:-1], alpha_range))
    return [text for name, text in _signs(rows, alpha_range) if name not in before]


def _signs(rows: list[Row], alpha_range: tuple[float, float]) -> list[tuple[str, str]]:
    if not rows:
        return []
    row, found = rows[-1], []
    entropy, initial = row["entropy"], row["initial_entropy"]
    if entropy > 1.2 * initial:
        found.append(("explosion", f"entropy {entropy:.3f} is above 1.2 times its initial {initial:.3f}"))
    if entropy < 0.1 * initial:
        found.append(("collapse", f"entropy {entropy:.3f} is below a tenth of its initial {initial:.3f}"))
    low, high = alpha_range
    recent = [r["alpha"] for r in rows[-BOUND_STEPS:]]
    moved = any(r["alpha"] != rows[0]["alpha"] for r in rows)
    for bound, name in ((low, "lower"), (high, "upper")):
        stuck = len(recent) == BOUND_STEPS and set(recent) == {bound}
        wrong_side = entropy < row["target"] if bound == high else moved and entropy > row["target"]
        if stuck and wrong_side and low < high:
            text = f"alpha is at its {name} bound {bound:g} for {BOUND_STEPS} steps, entropy {entropy:.3f}"
            found.append((f"alpha {name}", f"{text} against a target of {row['target']:.3f}"))
    if row["ratio_max"] > RATIO:
        found.append(("ratio", f"a probability ratio of {row['ratio_max']:.3g} within one step"))
    before = [r["grad_norm"] for r in rows[-51:-1]]
    if len(before) >= 10 and row["grad_norm"] > GRADIENT * statistics.median(before) > 0:
        norms = f"{row['grad_norm']:.3g}, its median was {statistics.median(before):.3g}"
        found.append(("gradient", f"gradient norm {norms}"))
    return found
