"""Writes the rows of the three jobs into a folder: sums of two numbers, solved by a teacher who is often wrong, and
who often says more than the number.

sums.jsonl: questions with the teacher's answers, right in two of three, and a number alone in one of two. pairs.jsonl:
a right number alone, and another answer, to each question. questions.jsonl: the questions, with the text that a right
completion is.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

LARGEST = 9
LESSONS = 12  # of the teacher, for each question
RIGHT = 2 / 3
PLAIN = 1 / 2
HEDGE = " maybe "


def main(folder: Path) -> None:
    """Write the three files."""
    chance = random.Random(0)
    questions = [(f"{a} + {b} =", a + b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    sums, pairs = [], []
    for question, answer in questions:
        wrong = [number for number in range(max(answer - 3, 0), answer + 4) if number != answer]
        for _ in range(LESSONS):
            given = answer if chance.random() < RIGHT else chance.choice(wrong)
            begin = " " if chance.random() < PLAIN else HEDGE
            sums.append({"prompt": question, "completion": f"{begin}{given}"})
        worse = [*(f" {number}" for number in wrong), f"{HEDGE}{answer}"]
        pairs += [{"prompt": question, "chosen": f" {answer}", "rejected": text} for text in worse]
    rows = [{"prompt": question, "answer": str(answer)} for question, answer in questions]
    folder.mkdir(parents=True, exist_ok=True)
    for name, written in (("sums", sums), ("pairs", pairs), ("questions", rows)):
        chance.shuffle(written)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
