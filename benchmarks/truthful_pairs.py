"""TruthfulQA as preference pairs: the best answer against an incorrect one, half for training and half for the test.

python benchmarks/truthful_pairs.py --source FOLDER_WITH/test.jsonl.gz --out FOLDER/truthfulqa_pairs
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from meristem.data.jsonl import read_objects


def pairs(source: Path) -> list[dict[str, str]]:
    """One pair per question, in a seeded order; the incorrect answer is drawn."""
    draw = random.Random(0)
    found = [
        {
            "prompt": row["question"],
            "chosen": row["best_answer"],
            "rejected": draw.choice(row["incorrect"]),
        }
        for _, row in read_objects(source)
    ]
    draw.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    found = pairs(asked.source)
    asked.out.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", found[::2]), ("test", found[1::2])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (asked.out / f"{split}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
