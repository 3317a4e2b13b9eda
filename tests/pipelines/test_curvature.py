"""The metric of block outputs, against plain autograd."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import linear
from compressor.pipelines import load
from compressor.pipelines.curvature import SAMPLE, Curvature, sampled
from tests.pipelines import toys

IDS = torch.randint(5, 320, (6, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom", "gptj"])
def test_it_is_the_second_moment_of_gradients_that_autograd_finds(tmp_path: Path, family: str) -> None:
    """Also where blocks return tuples."""
    folder = toys.make(tmp_path / family, family, rotary_dim=8, n_layer=3, n_head=4, n_embd=32, num_layers=3)
    model = load.load(str(folder), "cpu").model
    blocks = linear.find_blocks(model)[1]
    found = Curvature(model, blocks, IDS, 2, 7, lambda name: [])
    draw = torch.Generator().manual_seed(7)
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        return lambda _m, _args, out: outputs.update({index: out[0] if isinstance(out, tuple) else out})

    hooks = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    model.get_input_embeddings().weight.requires_grad_(True)
    sums = [torch.zeros(()) for _ in blocks]
    for rows in IDS.split(1):
        log_p = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
        y = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=draw).view(*rows.shape, 1)
        slopes = torch.autograd.grad(-log_p.gather(-1, y).sum(), [outputs[i] for i in range(len(sums))])
        for i, slope in enumerate(slopes):
            felt = (slope * outputs[i].detach().norm(dim=-1, keepdim=True)).flatten(0, 1)
            sums[i] = sums[i] + felt.T @ felt
    for hook in hooks:
        hook.remove()
    for i, total in enumerate(sums):
        torch.testing.assert_close(found[i], total * len(total) / total.trace(), rtol=1e-3, atol=1e-4)
        assert abs(float(found[i].trace()) - len(total)) < 1e-2


def test_a_model_whose_predictions_feel_nothing_gets_the_identity(tmp_path: Path) -> None:
    model = load.load(str(toys.make(tmp_path / "llama", "llama")), "cpu").model
    with torch.no_grad():
        model.lm_head.weight.zero_()
    flags = [p.requires_grad for p in model.parameters()]
    found = Curvature(model, model.model.layers, IDS, 2, 7, lambda name: [])
    assert all(torch.equal(found[i], torch.eye(len(found[i]))) for i in range(len(model.model.layers)))
    assert flags == [p.requires_grad for p in model.parameters()]


def test_a_sample_is_at_least_one_window() -> None:
    assert len(sampled(torch.zeros(128, 256, dtype=torch.long))) == SAMPLE // 256
    assert len(sampled(torch.zeros(3, 2 * SAMPLE, dtype=torch.long))) == 1
