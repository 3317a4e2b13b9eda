"""What a run's optimizer and offload do to its estimate, and what is refused before any work."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import RecipeError
from compressor.pipelines import checkpoint, compress, estimate, tuners
from compressor.pipelines.cli import FLAGS, recipe_of
from compressor.pipelines.run import Run, dry_run
from compressor.pipelines.show import Show
from compressor.recipe import Quant, Recipe, Tune

QUICK = Recipe().with_(device="cpu", data__seqlen=32, eval__max_tokens=128, quant__packer="rtn", tune__steps=2)
LORA = 77_824  # numbers of a rank-8 adapter of tiny
KEPT = {"adamw": 28, "adamw8bit": 8 + 4 + 4 * (1 + 4 / 256)}


def told(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    return dry_run(QUICK.with_(**{f"tune__{key}": value for key, value in keys.items()}), tmp_path / "out", Show())


def test_the_estimate_knows_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(estimate, "matmul_speed", lambda device: 1e6)
    plain, eight = (told(tmp_path, method="lora", optimizer=name)["peak_bytes"]["tune"] for name in KEPT)
    assert plain - eight == 28 * LORA - math.ceil(KEPT["adamw8bit"] * LORA)
    gpu = torch.device("cuda")
    assert [estimate._kept(Tune(optimizer=name), gpu, 1 << 20) / (1 << 20) for name in KEPT] == [16, 8 + 2 * (1 + 4 / 256)]


def test_the_estimate_knows_offload() -> None:
    model, counts = estimate.shell(checkpoint.TINY), estimate.Counts(calibration=0, tuning=512, step=256, evaluation=128)
    packed = compress.plan(model, Quant()).packed()
    codes, layers = sum(t.shape[0] * t.shape[1] for t in packed) * 3 // 8, model.config.num_hidden_layers
    recipe = QUICK.with_(tune__method="peqa", tune__gradient_checkpointing=True)

    def tune(offload: str) -> int:
        found = estimate._memory(recipe.with_(tune__offload=offload), model, torch.device("cuda"), counts, 1 << 20, 1 << 19, codes, 0)
        return found["tune"]

    assert tune("none") - tune("cpu") == codes * (layers - 1) // layers > 0


def test_what_cannot_be_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "read", lambda self: pytest.fail("work was begun"))
    for keys, said in (
        ({"tune__offload": "cpu", "tune__gradient_checkpointing": True}, "this run is on the CPU: leave --offload out"),
        ({"tune__optimizer": "paged-adamw"}, "this run is on the CPU: use adamw$"),
    ):
        with pytest.raises(RecipeError, match=said):
            Run(QUICK.with_(tune__method="peqa", **keys), tmp_path / "out", Show())
    assert tuners.optimizer(Tune(offload="cpu", gradient_checkpointing=True), torch.device("cuda")) is tuners.own("adamw")


def test_flags_set_the_keys() -> None:
    given = dict.fromkeys((*FLAGS, "prune", "preset"))
    recipe = recipe_of("tiny", "3bit:rtn", given | {"tune": "peqa", "optimizer": "adamw8bit", "offload": "cpu", "gradient_checkpointing": True})
    assert (recipe.tune.optimizer, recipe.tune.offload) == ("adamw8bit", "cpu")
