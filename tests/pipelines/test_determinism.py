"""The same recipe writes the same bytes in another process with another order of sets; all methods and conditions: bench/determinism.py."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from compressor.pipelines.run import run
from compressor.recipe import Recipe
from tests.pipelines.foreign_folders import dense_folder


def test_the_same_recipe_writes_the_same_bytes_in_another_process(tmp_path: Path, tokenizer: Any) -> None:
    model = dense_folder(tmp_path / "dense", tokenizer)
    text = str(model / "notes.txt")
    recipe = Recipe.from_dict(
        {
            "model": str(model), "device": "cpu", "quant": {"group": 32}, "data": {"data": text, "outside": text, "nsamples": 4, "seqlen": 32},
            "tune": {"method": "lora", "rank": 2, "dropout": 0.1, "start": "loftq", "steps": 3, "batch": 2}, "eval": {"max_tokens": 64},
        }
    )  # fmt: skip
    assert torch.get_num_threads() == 1
    run(recipe, tmp_path / "here")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "compressor", "run", "recipe.yaml", "-o", "there"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
