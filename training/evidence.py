"""What the runs of STUDY.md show: a report with tables and pictures, from the results alone.

python -m training.evidence        # writes docs/evidence.md and its pictures; what has not run is said
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections.abc import Callable, Sequence

from training import findings
from training.figures import draw_arms, draw_control, draw_exploration
from training.files import write_file, write_text
from training.findings import MEASURES, Results, Row, by_arm, hard, load, of_domain, series
from training.judgement import score
from training.processes import command
from training.study import BEST, DOMAINS, PARTS, RESULTS, git

DOCS = RESULTS.parent.parent / "docs"
Table = Callable[[Results], list[Row]]
INTRODUCTION = """# Does adaptive entropy help? The evidence

This page reports a study of that question. [The protocol](../training/STUDY.md), which judges it,
{committed}. `python -m training.evidence` renders this page from the results of the runs, which are kept in
`training/results`.

A few words recur:

- An *arm* is the same training with another entropy bonus: `none` has no bonus, `fixed-0.03` a fixed
  coefficient, `aer` the defaults of `AdaptiveEntropy`. The protocol explains the others.
- *pass@32* is the share of held-out problems that at least one of 32 samples gets right, *pass@1* that of one
  sample.
- The *hard classes* of a task are the kinds of problems that the initial model hardly ever gets right in one
  sample, and sometimes in 32. pass@32 on them is the score, because it is what a collapse of entropy
  destroys.
- Brackets are 95% intervals over seeds and problems. *H₀* is the initial entropy, in nats per token.
"""
SUMMARY = """
## In short

- **Carry**, three-digit addition, is the task of the primary comparisons, on {seeds} seeds that nobody tuned
  on. AER's pass@32 minus that of no bonus is {aer − none} (p = {p none} by Holm; in the protocol's words:
  *{verdict none}*). Minus that of the best fixed coefficient it is {aer − fixed} (p = {p fixed}:
  *{verdict fixed}*).
- **Program**, what small programs print, had {program seeds} seeds and nothing tuned anew. There the same
  differences are {program none} and {program fixed}.
- **Control**, two-digit addition, is a task where entropy does not collapse. pass@32 is lost there all the
  same, from {control initial} to {control none} without a bonus. AER does not prevent that ({control aer});
  the fixed coefficient keeps {control fixed}.
- **What it is owed to.** As far as these runs tell, to the entropy that is held, and not to the difficulty of
  prompts. AER cannot be told from `target`, which is AER without weights by difficulty ({aer − target}), nor
  from Skywork's law with settings tuned for this very score ({aer − skywork tuned}). It is above clip-higher
  ({aer − clip-higher}), Clip-Cov ({aer − clip-cov}) and Skywork's law as released ({aer − skywork}). It is
  also above `absolute`, whose target is copied from another task instead of anchored ({aer − absolute},
  {absolute seeds} seeds).
- **The controller.** Once the target was met, means of ten steps lay within 15% of it in {held carry} of the
  steps of carry, {held program} of program, {held control} of control, and {held all} of all. The goal was
  0.80, which program alone misses.

Intervals of so few seeds are too narrow to be tests: only the two primary comparisons are tested.
"""
# part: title, what it is for, and its tables with their captions
SECTIONS: dict[str, tuple[str, str, dict[str, Table]]] = {
    "admission": (
        "What no bonus does",
        "Before anything was compared, each task had to show that something is lost on it without a bonus:"
        " entropy, and pass@32 of its hard classes, on two seeds. A task that shows it is *admitted*."
        " `control` is kept for the opposite: its entropy does not collapse.",
        {"": findings.admission},
    ),
    "controller": (
        "Laws of α on carry's tuning seeds",
        "A law says how the coefficient α follows the entropy. The default of `AdaptiveEntropy` is the one"
        " that held the target best on the two tuning seeds.",
        {"`mean1` stands for weights that are divided by their mean.": findings.laws},
    ),
    "tuning": (
        "Settings of the rivals",
        "Each rival gets the setting with the best score on the two tuning seeds. AER's settings were chosen"
        " above, for control alone.",
        {"": findings.tuning},
    ),
    "carry": (
        "Carry",
        "The main task: three-digit addition, whose hard problems have one carry or more.",
        {
            "The primary comparisons, the only ones that are tested:": findings.primary,
            "All arms; entropy and prompts are those of the last 50 steps:": findings.arms,
            "Differences, secondary and not tested:": findings.differences,
            "Does the policy explore more where the coefficient is large? These are Spearman's"
            " correlations of AER's coefficient, α·w, with what is sampled some steps later, by class: the"
            " mean over seeds, with the least and the most.": findings.exploration,
        },
    ),
    "ablation": (
        "Ablation",
        "AER has three components. These arms leave out one or more of them, on five of carry's seeds.",
        {"": findings.cells, "Differences, not tested:": findings.differences},
    ),
    "elsewhere": ("Other domains", "The same arms on the two other tasks, with nothing tuned anew.", {}),
}
THREATS = """
What speaks against these results, or limits them:

- Everything depends on the admission. Two tasks of a few characters were built so that a collapsing policy
  loses something, and were kept because it does on two seeds without a bonus. A third, logic, was given up
  because a policy learns it without one. They say what can happen, not how often it happens in the training
  of language models.
- On carry's ten seeds, unlike on the tuning seeds, no bonus ends no lower in pass@32 than it began. What AER
  is ahead by there was gained, not kept. On control, entropy does not collapse, yet pass@32 is lost all the
  same, and AER does not prevent it.
- The models have 0.4 million parameters and are made from scratch. The entropy that they lose is that of a
  habit and of the noise of its demonstrations, not that of a pretrained model.
- AER's settings were chosen for the control of entropy alone, on two seeds, and its rivals' for the score, on
  the same two. The noise of that choice is to the rivals' disadvantage; that they were chosen by the score
  itself is to their advantage. Skywork's and Clip-Cov's best settings lie at the edge of their grids. Only
  the grid of the fixed coefficient had to go on until its best did not.
- The level of entropy and the way it is held are mixed up. Arms with an absolute target aim at 0.4 of AER's,
  the entropy of the fixed coefficient is what it is, and `difficulty` has the fixed arm's α without tuning.
- Bootstrap intervals of five to ten seeds are too narrow: one that leaves out 0 is no test.
- A domain has one learning rate, one batch size and one number of steps. A slower rival may need more of
  them.
- The law of α was chosen on carry, the task of the primary comparisons, and holds its target better there
  than on programs, which alone miss three of the four goals. Seeds 0–2 of carry had been looked at before.
- What is compared elsewhere, and in the ablation, has five or six seeds and is not tested.
- There are a few hundred problems, the same for all seeds. With ten seeds, a difference has to be about as
  large as one standard deviation of the paired differences to be seen.
- Seconds were taken on a machine that did other work. Read them as an order of magnitude.
- Most runs were interrupted and went on from a checkpoint, with the numbers that they would have had. A run
  made again has the same numbers at the commit named under its table. Later commits may round differently,
  and then the curves part after some steps.
"""


def report() -> str:
    """The evidence in Markdown; of a part that is not whole, how much of it there is."""
    first = git("log", "--diff-filter=A", "--format=%h", "--", "STUDY.md")
    committed = (
        f"was written before the runs and first committed as {first}" if first else "was written before"
    )
    text = INTRODUCTION.format(committed=committed)
    every = {part: load(PARTS[part]) for part in SECTIONS}
    tables = {part: tables_of(part, results) for part, results in every.items() if results}
    aer = evaluated("aer")
    goals = findings.goals(aer) if aer else []
    if all(len(results) == len(PARTS[part]) for part, results in every.items()):
        text += SUMMARY.format_map(figures(tables, goals))
    for part, (title, what, _) in SECTIONS.items():
        results = every[part]
        text += f"\n## {title}\n\n{what} {len(results)} of {len(PARTS[part])} runs.\n"
        if not results:
            continue
        for caption, rows in tables[part].items():
            text += (f"\n{caption}\n" if caption else "") + markdown(rows)
        text += failures(results) + provenance(results)
        if part == "carry":
            text += "\n![pass@32 of the hard classes by arm, a dot a seed](evidence-arms.png)\n"
            text += "\n![Coefficient and sampling by class](evidence-exploration.png)\n"
    text += "\n## The controller on the seeds of the evaluation\n\n"
    text += (
        "AER promises to hold entropy at its target. This is how well it did on seeds that nobody tuned on.\n"
    )
    if goals:
        text += markdown(goals) + "\n![Entropy over its target, and α](evidence-control.png)\n"
    else:
        text += "\nNone has run.\n"
    return text + f"\n## Threats to validity\n{THREATS}"


def tables_of(part: str, results: Results) -> dict[str, list[Row]]:
    """The tables of a part, by their captions."""
    if part != "elsewhere":
        return {caption: table(results) for caption, table in SECTIONS[part][2].items()}
    found: dict[str, list[Row]] = {}
    for domain in dict.fromkeys(run.domain for run in results):
        own = of_domain(results, domain)
        found[f"### {domain}"] = findings.arms(own)
        found[f"Differences on {domain}, not tested:"] = findings.differences(own)
    return found


def figures(tables: dict[str, dict[str, list[Row]]], goals: list[Row]) -> dict[str, str]:
    """What the summary says in numbers: cells of the report's tables."""

    def beside_aer(rows: list[Row]) -> dict[str, Row]:
        return {row[0].removeprefix("aer − "): row for row in rows[1:]}

    fixed = BEST["fixed"]
    primary, _, differences, _ = tables["carry"].values()
    found: dict[str, str] = {}
    for arm, row in zip(("none", "fixed"), primary[1:]):
        _, found["seeds"], found[f"aer − {arm}"], _, found[f"p {arm}"], found[f"verdict {arm}"] = row
    carry = beside_aer(differences)
    rivals = {"clip-cov": BEST["clip-cov"], "skywork tuned": BEST["skywork"]}
    rivals |= {arm: arm for arm in ("target", "clip-higher", "skywork")}
    found |= {f"aer − {name}": carry[arm][2] for name, arm in rivals.items()}
    _, ablation = tables["ablation"].values()
    _, found["absolute seeds"], found["aer − absolute"], _ = beside_aer(ablation)["absolute"]
    program = beside_aer(tables["elsewhere"]["Differences on program, not tested:"])
    _, found["program seeds"], found["program none"], _ = program["none"]
    found["program fixed"] = program[fixed][2]
    heading, *arms = tables["elsewhere"]["### control"]
    scores = {row[0]: row[heading.index("pass@32 [95%]")].split()[0] for row in arms}
    found |= {f"control {arm}": scores[arm] for arm in ("initial", "none", "aer")}
    found["control fixed"] = scores[fixed]
    return found | {f"held {row[0]}": row[2] for row in goals[1:]}


def evaluated(*arms: str) -> Results:
    """The runs of these arms on the seeds of the evaluation."""
    return {
        run: result for run, result in load([*PARTS["carry"], *PARTS["elsewhere"]]).items() if run.arm in arms
    }


def markdown(rows: Sequence[Row]) -> str:
    heading, *others = rows
    lines = (heading, ("---",) * len(heading), *others)
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in lines)


def failures(results: Results) -> str:
    named = [f"{run.name} ({result['error']})" for run, result in results.items() if "error" in result]
    if not named:
        return ""
    return f"\nStopped with an error, and count as their initial models: {'; '.join(named)}.\n"


def provenance(results: Results) -> str:
    """Where and when they ran."""
    machines, commits, dates = (
        sorted({result[name] for result in results.values()}) for name in ("machine", "commit", "date")
    )
    versions = sorted({f"{k} {v}" for result in results.values() for k, v in result["versions"].items()})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    text = f"\n{', '.join(machines)}, one thread a run; {', '.join(versions)}; {when};"
    return f"{text} commit {', '.join(commit[:7] for commit in commits)}.\n"


def draw() -> None:
    """The pictures, of what has run."""
    carry = load(PARTS["carry"])
    labels, arms = hard("carry"), by_arm(carry)
    shown = evaluated("none", BEST["fixed"], "aer")
    if arms and labels:
        scores = {arm: [score(run, labels) for run in runs] for arm, runs in arms.items()}
        heading = "pass@32, mean over carry's hard classes"
        write_file(DOCS / "evidence-arms.png", lambda path: draw_arms(scores, heading, path))
    if runs := arms.get("aer"):
        panels = {
            name.replace("_", " "): {
                label: [series(run, f"{name}/{label}") for run in runs]
                for label in runs[0]["scores"]["classes"]
            }
            for name in ("coefficient", *MEASURES)
        }
        write_file(DOCS / "evidence-exploration.png", lambda path: draw_exploration(panels, path))
    domains = {domain: by_arm(own) for domain in DOMAINS if (own := of_domain(shown, domain))}
    if domains:
        write_file(DOCS / "evidence-control.png", lambda path: draw_control(domains, path))


def main() -> None:
    path = DOCS / "evidence.md"
    write_text(path, report())
    draw()
    print(path)


if __name__ == "__main__":
    command(lambda: None, lambda _: main(), "nothing was written", lambda _: RESULTS)
