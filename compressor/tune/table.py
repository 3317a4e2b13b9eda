"""Table tuning: fine-tune the entries of a sketch's tables; codes and everything else stay as they are.

    weight[i, j] = t[i, segment of j, code[i, j]]        dL/dt[i, s, c] = sum over the columns j of segment s with code c of (dy^T x)[i, j]

Source: SketchTune (Zhang et al., 2024, arXiv 2410.06364). There the entry itself is trained (`absolute`). Rows of one model differ more than tenfold
in size, and so do their tables, so one learning rate suits few of them; the default here is `relative`,

    t = start + unit * delta        unit[i, s] = root mean square of the entries of start[i, s], fixed

where the rate acts on delta: it is the change of an entry as a share of the usual size of its table. A share of the entry's own size would hold
the small entries, of which every table has some, where they are.

The kernels form the gradient's sum in float32, without a dense dW (kernels/dispatch.py). Two things are ours besides `relative`. SketchTune's scripts
keep tables in bfloat16, where small steps round to nothing: simulated on entries N(0, 0.02), a full step of Adam leaves 69 percent unchanged at rates
of 2e-5 to 3e-5, and 12 percent at 8e-5. Here the master is float32, and the forward sees each entry as it will be stored (see snapped). And no
entry leaves the finite range of its stored dtype; at either end only the gradient that leads back is kept.

Price, on top of the stored entry: 32 bytes an entry and a rounding pass (see snapped), and with `relative` 4 bytes a table for its unit. A layer
of n rows with S tables of 2**bits entries each has n * S * 2**bits parameters: LLaMA-2-7B at 4 bits with 4 tables a row 87.0 M, 2.8 GB beside
the packed weights. Limit: an entry stored in bfloat16 moves in steps of 0.4 to 0.8 percent of itself; the master adds up smaller changes.
"""

import torch
from torch import Tensor

from compressor.tune.snapped import Snap, Snapped, ValueTuner

LEAST_UNIT = 2.0**-14  # of a table of zeros: the smallest normal float16


class EntryTuning(Snapped):
    """Returns the table [n, S, 2**bits] to use now; start alike in the stored dtype; the parameter is `delta` or `table`, float32 of that shape.

    unit float32 [n, S, 1], None if absolute.
    """

    unit: Tensor | None

    def __init__(self, start: Tensor, relative: bool = True):
        super().__init__(start, relative, "table")
        self.register_buffer("unit", sizes(start) if relative else None, persistent=False)

    def forward(self) -> Tensor:
        return Snap.apply(self.get_parameter(self.leaf), self.start, self.unit, _limited)


class TableTuner(ValueTuner):
    """Trains every entry of the tables of every packed linear.

    Default learning rates: of the relative change measured (docs/log.md); of the entry itself that of SketchTune's scripts for LLaMA-2-7B
    (github.com/LeanModels/SketchTune, train_script/), where it goes with AdamW's default betas, no weight decay, clipping at 1 and a linear
    schedule with 100 warm-up steps.
    """

    table, what = True, "table"
    rates = {"relative": 5e-3, "absolute": 8e-5}

    def snapped(self, start: Tensor) -> EntryTuning:
        return EntryTuning(start, self.relative)


def sizes(table: Tensor) -> Tensor:
    """Root mean square of the entries of each table [n, S, 2**bits], float32 [n, S, 1]; LEAST_UNIT where that is zero."""
    size = table.detach().double().square().mean(-1, keepdim=True).sqrt().float()
    return size.masked_fill_(size == 0, LEAST_UNIT)


def _limited(master: Tensor, start: Tensor, unit: Tensor | None) -> tuple[Tensor, float, float]:
    """The unlimited entries, float32 [n, S, 2**bits], and the ends of the finite range of the stored dtype."""
    top = torch.finfo(start.dtype).max
    return master if unit is None else torch.addcmul(start.float(), unit, master), -top, top
