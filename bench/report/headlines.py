"""The figures that a page begins with: one shape of the losses, beside eager."""

from bench.cases import DISTILL
from bench.report.results import Group, Results
from bench.report.tables import command, error, label, number, provenance, table, title

HEADLINES = ("linear_ppo_loss", "ppo_loss", f"{DISTILL}reverse_kl")
OTHERS = 3  # other projects in a table of the README; docs/benchmarks.md has them all


def relative_table(group: Group) -> str:
    """Beside eager."""
    by_name = {row.provider: row for row in group}
    base = by_name.get("eager")
    head = ["", "ms", "MiB", "of eager's time", "of eager's memory", "error of the gradient"]
    lines = []
    for row in group:
        if row.status == "missing":
            continue
        name = label(row) + ("" if row.work in ("all", "products alone") else f" ({row.work})")
        if row.ms is None or row.ms_iqr is None or row.peak_mib is None:
            lines.append([name, row.status, *["–"] * 3, error(row, True)])
            continue
        ratios = ["–", "–"]
        if base and base.ms and base.peak_mib:
            ratios = [f"{row.ms / base.ms:.2f}", f"{row.peak_mib / base.peak_mib:.2f}"]
        costs = [f"{number(row.ms)} ± {number(row.ms_iqr, 2)}", number(row.peak_mib)]
        lines.append([name, *costs, *ratios, error(row, True)])
    return table(head, lines)


def headline(results: Results) -> str:
    """Every provider of every headline."""
    groups = [group for op in HEADLINES for group in results.of(op, headline=True)]
    return beside_eager(results, groups)


def shortened(results: Results) -> str:
    """The README's: of the policy losses, the providers that matter to a first look."""
    groups = [group for op in HEADLINES[:2] for group in results.of(op, headline=True)]
    return beside_eager(results, [few(group) for group in groups])


def few(group: Group) -> Group:
    """Ours, eager, and the fastest others, of those that do the whole work."""
    whole = [row for row in group if row.work == "all" and row.ms is not None]
    ours = [row for row in whole if row.provider.startswith("aer_fast") or row.provider == "eager"]
    others = sorted((row for row in whole if row not in ours), key=lambda row: row.ms or 0.0)
    return [*ours, *others[:OTHERS]]


def beside_eager(results: Results, groups: list[Group]) -> str:
    parts = [f"{title(group[0])}, forward and backward:\n\n{relative_table(group)}" for group in groups]
    return "\n\n".join([*parts, f"{command(results)} on {provenance(results.where)}."])
