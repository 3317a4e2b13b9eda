"""The table of rows for a terminal: numbers stay whole, whatever an error says."""

import io
from dataclasses import replace

from rich.console import Console

from compressor.pipelines.sweeps import rows
from compressor.pipelines.sweeps.grid import Grid


def shown(found: list[rows.Row], width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(rows.table(found))
    return file.getvalue().splitlines()


def test_long_errors_leave_the_table_its_numbers() -> None:
    (e,) = Grid("tiny", {"quant.bits": [4]}).experiments()
    good = rows.blank(replace(e, id="w4g128-gptq-peqa-5a092fea"), "ok") | {"perplexity": 39.665, "folder_bytes": 1_103_197, "wall_seconds": 73.0}
    good |= {"outside": 80.321, "bits_per_weight": 4.25}
    bad = rows.failed(replace(e, id="w2g48-gptq-lora-d8ba080c"), f"[bold]{'a long reason ' * 40}", 1.0, 1)
    for width in (80, 200):
        lines = shown([good, bad], width)
        assert any(all(text in line for text in ("39.665", "80.321", "4.250", "1.10 MB", "1 min 13 s")) for line in lines), lines
        assert any("failed" in line and "1.0 s" in line for line in lines) and all(len(line) <= width for line in lines)
        assert " ".join(" ".join(lines).split()).count("a long reason") == 40 and "[bold]" in "".join(lines)
    assert "w4g128-gptq-peqa-5a092fea" in "".join(shown([good, bad], 200))


def test_every_row_is_in_the_table() -> None:
    experiments = Grid("tiny", {"quant.bits": [2, 3, 4]}).experiments()
    found = [rows.blank(e, "ok") | {"folder_bytes": None if i else 10, "perplexity": 9.0, "front": not i} for i, e in enumerate(experiments)]
    lines = shown(found, 120)
    assert all(any(e.id in line for line in lines) for e in experiments) and sum("*" in line for line in lines[1:]) == 1
