"""Make the rows of configs/recipes/dpo.yaml: for each definition its category and a wrong one.

`python benchmarks/wordnet_pairs.py` writes them beside the rows they are made of. The wrong
category follows from the word, so that the files are the same whenever they are made.
"""

import hashlib
import json
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "configs" / "data"
ROWS = {"train": 800, "test": 200}


def main() -> None:
    """Write both files."""
    for split, count in ROWS.items():
        lines = (DATA / f"wordnet_category_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        names = sorted({row["completion"] for row in rows})
        pairs = []
        for row in rows[:count]:
            right = row["completion"]
            rejected = wrong(row["word"], [name for name in names if name != right])
            pairs.append({"prompt": row["prompt"], "chosen": right, "rejected": rejected})
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (DATA / f"wordnet_pairs_{split}.jsonl").write_text(text, encoding="utf-8")


def wrong(word: str, others: list[str]) -> str:
    """Return one of the other categories, as the word has it."""
    digest = hashlib.sha256(word.encode()).digest()
    return others[int.from_bytes(digest[:8], "big") % len(others)]


if __name__ == "__main__":
    main()
