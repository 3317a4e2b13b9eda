"""The rows of a bench as CSV, whole or not at all."""

import csv
import os
from pathlib import Path
from typing import Any


def write_rows(path: Path, fields: list[str], rows: list[dict[str, Any]]) -> None:
    """Replaces `path` by these rows once they are written; columns that a row lacks stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
