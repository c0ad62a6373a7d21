from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = (
    "def return self import class tokens teacher student the of and (x): = + value for in".split()
)


def text_of(seed: int, lines: int = 30) -> str:
    draw = random.Random(seed)
    return "".join(
        "    " * draw.randrange(3) + " ".join(draw.choices(WORDS, k=6)) + "\n" for _ in range(lines)
    )


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder with 40 text files and a JSONL file of 60 documents."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for number in range(40):
        (folder / ("sub" if number % 2 else ".") / f"{number:02d}.txt").write_text(text_of(number))
    lines = [json.dumps({"text": text_of(100 + number)}) for number in range(60)]
    (folder / "more.jsonl").write_text("\n".join(lines) + "\n")
    return folder
