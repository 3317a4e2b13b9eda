"""Fisher blocks: against the inverse in float64 and the paper's recursion, faults, and what is asked of the caller of gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import DataError, ModelError, RecipeError
from compressor.prune.fisher import BlockFisher, collect


def filled(gradients: Tensor, block: int, damp: float, count: int | None = None, held: int = 16) -> BlockFisher:
    """The finished matrix of gradients [m, d]."""
    fisher = BlockFisher(gradients.shape[1], block, damp, count or len(gradients), held=held)
    for g in gradients:
        fisher.add(g)
    fisher.finish()
    return fisher


def inverses(fisher: BlockFisher) -> Tensor:
    return torch.cat([fisher.inverse(rows) for rows in fisher.chunks()])


def direct(gradients: Tensor, block: int, damp: float, count: int) -> Tensor:
    g = nn.functional.pad(gradients.double(), (0, -gradients.shape[1] % block)).unflatten(1, (-1, block)).movedim(0, 1)  # [blocks, m, B]
    return torch.linalg.inv(damp * torch.eye(block, dtype=torch.float64) + g.mT @ g / count)


def spectra(kind: str, count: int, entries: int) -> Tensor:
    gradients = torch.randn(count, entries, generator=torch.Generator().manual_seed(count))
    if kind == "decaying":  # eight decades of curvature along directions that are not the axes
        turn = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(1)))[0]
        gradients = ((gradients.view(count, -1, 50) * torch.logspace(0, -4, 50)) @ turn).reshape(count, entries)
    return gradients


@pytest.mark.parametrize("kind", ["flat", "decaying"])
@pytest.mark.parametrize("count", [30, 400])
@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("damp", [1e-7, 1e-5, 1e-3])
def test_equals_the_direct_inverse(kind: str, count: int, size: float, damp: float) -> None:
    gradients = spectra(kind, count, 200) * size
    found, true = inverses(filled(gradients, 50, damp)), direct(gradients, 50, damp, count)
    assert float(((found - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).max()) < 1e-6
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), true.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=0)


def test_equals_the_recursion_of_the_paper() -> None:
    gradients, damp = torch.randn(40, 7).double(), 1e-2
    inverse = torch.eye(7, dtype=torch.float64) / damp
    for g in gradients:
        pull = inverse @ g
        inverse -= torch.outer(pull, pull) / (len(gradients) + g @ pull)
    torch.testing.assert_close(inverses(filled(gradients.float(), 7, damp))[0], inverse, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("held", [1, 3, 16])
def test_tail_blocks_and_passes_of_any_size(held: int) -> None:
    gradients = torch.randn(20, 23)
    torch.testing.assert_close(inverses(filled(gradients, 5, 1e-3, held=held)), direct(gradients, 5, 1e-3, 20), rtol=1e-6, atol=1e-6)


def test_blocks_of_one_are_the_damped_mean_square() -> None:
    gradients, w = torch.randn(64, 30), torch.randn(30)
    curvature = 1 / inverses(filled(gradients, 1, 1e-2)).flatten()
    torch.testing.assert_close(curvature.float(), 1e-2 + gradients.square().mean(0))
    assert (w.square() * curvature).argsort().tolist() == (w.square() * (1e-2 + gradients.square().mean(0))).argsort().tolist()


def test_the_planned_number_divides_and_half_precision_is_taken() -> None:
    gradients = torch.randn(10, 8).to(torch.bfloat16)
    torch.testing.assert_close(inverses(filled(gradients, 4, 1e-2, count=40)), direct(gradients, 4, 1e-2, 40))


def test_memory_is_what_the_docstring_says() -> None:
    fisher = BlockFisher(50_000, 50, 1e-7, 1024)
    assert fisher.nbytes < 50_000 * (4 * 50 + 8 + 4 * 16) * 1.01
    fisher.add(torch.randn(50_000))
    fisher.finish()
    assert fisher.nbytes < 50_000 * (4 * 50 + 8) * 1.01


def test_lost_gradients_are_left_out_of_their_block() -> None:
    gradients = torch.randn(12, 8)
    broken = gradients.clone()
    broken[3, 1], broken[5, 0] = float("nan"), float("inf")
    fisher = BlockFisher(8, 4, 1e-3, 12)
    for g in broken:
        fisher.add(g)
    faults = fisher.finish()
    assert (faults.lost, faults.diagonal, faults.magnitude) == (1, 0, 0)
    others = gradients[[i for i in range(12) if i not in (3, 5)]]
    torch.testing.assert_close(inverses(fisher)[0], direct(others, 4, 1e-3, 10)[0])
    torch.testing.assert_close(inverses(fisher)[1], direct(gradients, 4, 1e-3, 12)[1])
    assert "layer.weight: of 2 blocks of its Fisher matrix 1 had gradients that are not finite" in faults.sentence("layer.weight")


def test_singular_and_overflowing_blocks_fall_back_to_their_diagonal() -> None:
    gradients = torch.randn(4, 12)
    gradients[:, 4:8] = 1e12 * torch.ones(4, 4)  # rank one, twenty-four decades above the damping
    gradients[:, 8:] *= 1e25  # squares that float32 does not hold
    fisher = BlockFisher(12, 4, 1e-7, 4)
    for g in gradients:
        fisher.add(g)
    assert fisher.finish().diagonal == 2
    expected = torch.diag_embed(1 / (1e-7 + gradients[:, 4:].double().square().mean(0))).diagonal()
    torch.testing.assert_close(inverses(fisher)[1:].diagonal(dim1=1, dim2=2).flatten(), expected)
    assert float(inverses(fisher)[1:].triu(1).abs().max()) == 0


def test_blocks_without_a_finite_gradient_rank_by_magnitude_beside_the_others() -> None:
    gradients = torch.randn(30, 8)
    gradients[:, :4] = float("nan")
    fisher = BlockFisher(8, 4, 1e-3, 30)
    for g in gradients:
        fisher.add(g)
    assert fisher.finish().magnitude == 1
    mean = float(gradients[:, 4:].square().mean()) + 1e-3
    torch.testing.assert_close(inverses(fisher)[0], torch.eye(4, dtype=torch.float64) / mean, rtol=1e-5, atol=1e-9)


def test_nothing_finite_at_all_is_not_fatal() -> None:
    fisher = filled(torch.full((3, 8), float("nan")), 4, 1e-3)
    torch.testing.assert_close(inverses(fisher), torch.eye(4, dtype=torch.float64).expand(2, 4, 4) / 1e-3)


def test_values_that_cannot_work_are_refused() -> None:
    for block, damp, count in ((0, 1e-7, 4), (4, 0.0, 4), (4, float("inf"), 4), (4, 1e-7, 0)):
        with pytest.raises(RecipeError, match="above 0"):
            BlockFisher(8, block, damp, count)


class Line(nn.Module):
    """A layer, a dropout, and a weight that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.idle = nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(4, 3)

    def gradients(self, count: int) -> Iterator[None]:
        for i in range(count):
            assert not self.training
            self.drop(self.layer(torch.randn(5, 4, generator=torch.Generator().manual_seed(i)))).square().sum().backward()
            yield


def test_collecting_masks_gradients_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = Line()
    w = model.layer.weight
    w.grad = torch.ones_like(w)
    kept, mask = w.grad, torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = False
    found, notes = collect(model, {"layer.weight": w}, {"layer.weight": mask}, model.gradients, 6, 1e-3, {"layer.weight": 4})
    assert notes == [] and model.training and model.drop.training
    assert w.grad is kept and not kept.any() and model.idle.weight.grad is None
    inverse = inverses(found["layer.weight"])[0]
    assert float(inverse[1, 1]) == pytest.approx(1e3) and float(inverse[1, [0, 2, 3]].abs().max()) == 0


def test_what_the_caller_of_gradients_owes() -> None:
    model = Line()
    with pytest.raises(ModelError, match="idle.weight got no gradient"):
        collect(model, {"idle.weight": model.idle.weight}, {}, model.gradients, 2, 1e-3, {"idle.weight": 4})
    with pytest.raises(DataError, match="no mini-batch"):
        collect(model, {"w": model.layer.weight}, {}, lambda count: iter(()), 2, 1e-3, {"w": 4})
    _, notes = collect(model, {"w": model.layer.weight}, {}, lambda count: model.gradients(2), 5, 1e-3, {"w": 4})
    assert notes == ["only 2 of 5 mini-batches came for the Fisher matrix"]
