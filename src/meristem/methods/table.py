"""The table that helps to choose a method, made from what the classes declare.

python -m meristem.methods.table docs/methods.md      # writes it between the two marks of that file
"""

from __future__ import annotations

import sys
from pathlib import Path

from meristem.errors import BadInput
from meristem.methods.facts import TRAINERS, Facts, all_facts

BEGIN = "<!-- made by `python -m meristem.methods.table docs/methods.md` -->"
END = "<!-- end -->"

OLD_DATA = {
    "none": "no",
    "first": "once, where it has no saved state",
    "sample": "a sample, kept in its state",
    "all": "all of it",
}
TASK_ID = {"none": "no", "training": "in training", "inference": "at inference"}
HEADINGS = {
    "name": "method",
    "about": "what it does",
    "old_data": "old data?",
    "task_id": "task id?",
    "memory": "held while training",
    "grows": "each task adds",
    "stages": "stages",
    "trainers": "trainers",
    "sharded": "sharded?",
    "claims": "claims, tested",
}


def cells(name: str, facts: Facts) -> dict[str, str]:
    """What the table says of one method, by the keys of ``HEADINGS``."""
    copies = facts.weight_copies
    short = [trainer.removesuffix("Trainer") or trainer for trainer in facts.trainers]
    return {
        "name": name,
        "about": facts.about.removesuffix("."),
        "old_data": OLD_DATA[facts.old_data],
        "task_id": TASK_ID[facts.task_id],
        "memory": f"{copies} x the trained weights" if copies else "-",
        "grows": facts.grows or "-",
        "stages": " ".join(stage for stage in ("cpt", "cit", "ca", "rl") if stage in facts.stages),
        "trainers": "all" if len(short) == len(TRAINERS) else " ".join(short),
        "sharded": "yes" if facts.sharded else "no",
        "claims": ", ".join(facts.claims) or "-",
    }


def markdown() -> str:
    """Every registered method, the baselines last."""
    found = sorted(all_facts().items(), key=lambda one: (one[1].alone, one[0]))
    rows = [[f"`{name}`", *list(cells(name, facts).values())[1:]] for name, facts in found]
    lines = [list(HEADINGS.values()), ["---"] * len(HEADINGS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def replaced(text: str, table: str) -> str:
    """``text`` with ``table`` between the marks. Raises ``BadInput`` when they are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise BadInput(f"the table stands between {BEGIN} and {END}, and the text has no such lines")
    return f"{before}{begin}\n\n{table}\n{end}{after}"


def main(path: Path) -> None:
    path.write_text(replaced(path.read_text(encoding="utf-8"), markdown()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
