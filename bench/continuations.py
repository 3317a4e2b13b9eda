"""A multiple-choice set cut from any text: which of four pieces goes on from here? Small models score far above chance on it, and feel compression.

A question is a passage of about 200 characters, the words that follow it, and three pieces as long cut from elsewhere in the same document (from
other documents where it is too short). All cuts are at single spaces, so that prompt + " " + right choice is the text itself. No choice is in the
prompt, no two choices have the same first word, no wrong one overlaps the passage, and no two questions share their right words; passages may
overlap, so that standard errors are a little too small. Longer pieces are easier: `PIECE` sets the difficulty.

    python bench/continuations.py --data python --out /tmp/python.jsonl [--count 500] [--seed 0]
"""

import argparse
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

from compressor.pipelines import data

PROMPT, PIECE, CHOICES = 200, 16, 4  # characters, characters, pieces
TRIES = 50  # draws for one question
_SPACE = re.compile(r"(?<=\S) (?=\S)")


def write(path: Path, documents: Sequence[str], count: int = 500, seed: int = 0, piece: int = PIECE) -> int:
    """Writes up to `count` rows {"prompt", "choices", "answer"} as JSON lines; how many there are. The same texts and seed give the same bytes."""
    rows = questions(documents, count, seed, piece)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
    return len(rows)


def questions(documents: Sequence[str], count: int, seed: int, piece: int = PIECE) -> list[dict]:
    """Up to `count` questions over the documents in turn, none twice; fewer where the text gives no more."""
    rng = random.Random(seed)
    cuts = [[m.start() for m in _SPACE.finditer(text)] for text in documents]  # places of single spaces
    starts = [(i, at) for i, places in enumerate(cuts) for at in places if PROMPT <= at < len(documents[i]) - 2 * piece]
    rng.shuffle(starts)
    rows: list[dict] = []
    taken: list[tuple[int, int, int]] = []
    for document, at in starts:
        if len(rows) == count:
            break
        right = _piece(documents[document], cuts[document], at, piece)
        if right is None or any(document == d and at < b and a < at + len(right) for d, a, b in taken):
            continue
        if (row := _question(documents, cuts, document, at, right, piece, rng)) is not None:
            taken.append((document, at, at + len(right)))
            rows.append(row)
    return rows


def _question(documents: Sequence[str], cuts: list[list[int]], document: int, at: int, right: str, piece: int, rng: random.Random) -> dict | None:
    """The question whose passage ends at the space `at`, or None where no three wrong pieces fit."""
    text = documents[document]
    begin = next((c + 1 for c in cuts[document] if c >= at - PROMPT), 0)
    prompt = text[begin:at]
    if right in prompt:
        return None
    choices = [right]
    for attempt in range(TRIES):
        other = document if attempt < TRIES // 2 else rng.randrange(len(documents))
        if not cuts[other]:
            continue
        place = rng.choice(cuts[other])
        if other == document and begin - 2 * piece <= place <= at + 2 * piece:
            continue
        wrong = _piece(documents[other], cuts[other], place, piece)
        if wrong and wrong not in prompt and all(wrong.split()[0] != c.split()[0] for c in choices):
            choices.append(wrong)
        if len(choices) == CHOICES:
            rng.shuffle(choices)
            return {"prompt": prompt, "choices": choices, "answer": choices.index(right)}
    return None


def _piece(text: str, cuts: list[int], at: int, piece: int) -> str | None:
    """The words after the space `at`, up to the first single space `piece` characters on; None at the end of the text."""
    end = next((c for c in cuts if c >= at + piece), None)
    return text[at + 1 : end] if end is not None and end <= at + 2 * piece else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="python", help="a text as --data of the command takes it; its held-out part is used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--piece", type=int, default=PIECE)
    args = parser.parse_args()
    held_out = data.load(args.data).test
    print(json.dumps({"data": held_out.name, "questions": write(args.out, [d.text for d in held_out.documents], args.count, args.seed, args.piece)}))


if __name__ == "__main__":
    main()
