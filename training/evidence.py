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
# part: title, and its tables with their captions
SECTIONS: dict[str, tuple[str, dict[str, Table]]] = {
    "admission": ("What no bonus does", {"": findings.admission}),
    "controller": (
        "Laws of α on carry's tuning seeds",
        {"mean1: weights divided by their mean.": findings.laws},
    ),
    "tuning": ("Settings of the rivals", {"": findings.tuning}),
    "carry": (
        "Carry",
        {
            "The primary comparisons:": findings.primary,
            "All arms; the last 50 steps of their runs:": findings.arms,
            "Differences, secondary and not tested:": findings.differences,
            "The coefficient of aer, α·w, beside what is sampled later, Spearman's correlation by class;"
            " mean over seeds, least and most:": findings.exploration,
        },
    ),
    "ablation": ("Ablation", {"": findings.cells, "Differences, not tested:": findings.differences}),
    "elsewhere": ("Other domains", {}),
}
THREATS = """
- Everything hangs on the admission: two tasks of a few characters, built so that a collapsing policy loses
  something, and kept because it is lost on two seeds without a bonus; a third, logic, was given up because it
  is learned without one. They say what can happen, not how often it does in the training of language models.
- On carry's ten seeds, unlike on the tuning seeds, no bonus ends no lower in pass@32 than it began: what
  AER is ahead by there was gained, not kept. On control entropy does not collapse, yet pass@32 is lost all
  the same, and AER does not prevent it.
- The models have 0.4 million parameters and are made from scratch. The entropy that they lose is that of a
  habit and of the noise of its demonstrations, not that of a pretrained model.
- pass@32 on the hard classes is the score because it is what collapse destroys. AER's settings were chosen
  for the control of entropy alone, on two seeds; its rivals' for this score, on the same two: the noise of
  that choice is to the rivals' disadvantage, the choice by the score itself to their advantage. Skywork's
  and Clip-Cov's best settings lie at the edge of their grids, which only the fixed coefficient's had to
  leave.
- A level of entropy and how it is held are mixed up: arms with an absolute target aim at 0.4 of AER's, the
  fixed coefficient's entropy is what it is, and `difficulty` has the fixed arm's α untuned.
- Bootstrap intervals of five to ten seeds are too narrow: one that leaves out 0 is no test.
- A domain has one learning rate, one batch size, one number of steps. A slower rival may need more of them.
- The law of α was chosen on carry, the task of the primary comparisons, and holds its target better there
  than on programs, which alone miss three of the four goals. Seeds 0-2 of it had been looked at before.
  What is compared elsewhere, and in the ablation, has five or six seeds and is not tested.
- A few hundred problems, the same for all seeds. Ten seeds tell one standard deviation of a paired
  difference.
- Seconds were taken on a machine that did other work: an order of magnitude.
- Most runs were interrupted and went on from a checkpoint, with the numbers that they would have had. A run
  made again has the same ones at the commit named under its table; later ones may round differently, and
  then the curves part after some steps.
"""


def report() -> str:
    """The evidence in Markdown; of a part that is not whole, how much of it there is."""
    text = "# Does adaptive entropy help? The evidence\n\nRendered by `python -m training.evidence` from"
    first = git("log", "--diff-filter=A", "--format=%h", "--", "STUDY.md")
    text += " [training/results](../training/results); judged by [the protocol](../training/STUDY.md)"
    text += f", which was first committed as {first}.\n" if first else ".\n"
    for part, (title, tables) in SECTIONS.items():
        results = load(PARTS[part])
        text += f"\n## {title}\n\n{len(results)} of {len(PARTS[part])} runs.\n"
        if not results:
            continue
        for caption, table in tables.items():
            text += (f"\n{caption}\n" if caption else "") + markdown(table(results))
        if part == "elsewhere":
            for domain in dict.fromkeys(run.domain for run in results):
                own = of_domain(results, domain)
                text += f"\n### {domain}\n" + markdown(findings.arms(own))
                text += markdown(findings.differences(own))
        text += failures(results) + provenance(results)
        if part == "carry":
            text += "\n![pass@32 of the hard classes by arm, a dot a seed](evidence-arms.png)\n"
            text += "\n![Coefficient and sampling by class](evidence-exploration.png)\n"
    text += "\n## The controller on the seeds of the evaluation\n"
    if aer := evaluated("aer"):
        text += markdown(findings.goals(aer)) + "\n![Entropy over its target, and α](evidence-control.png)\n"
    else:
        text += "\nNone has run.\n"
    return text + f"\n## Threats to validity\n{THREATS}"


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
