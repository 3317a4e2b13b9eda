"""Saliencies and moves against explicit minimisers of the quadratic model of the loss."""

import pytest
import torch
from torch import Tensor

from compressor.prune.fisher import BlockFisher
from compressor.prune.obs import group_saliency, independent_step, joint_step, remove, saliency, single_saliency


def blocks(count: int = 3, size: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [c, B], F [c, B, B] with correlated entries, and its inverse, in float64."""
    torch.manual_seed(0)
    root = torch.randn(count, size, size, dtype=torch.float64)
    matrix = root @ root.mT + 0.05 * torch.eye(size, dtype=torch.float64)
    return torch.randn(count, size, dtype=torch.float64), matrix, torch.linalg.inv(matrix)


def minimiser(w: Tensor, matrix: Tensor, keep: Tensor) -> tuple[Tensor, float]:
    """dw of one block that minimises 1/2 dwT F dw with dw = -w where not kept, by the Lagrangian's linear system, and its cost."""
    size, gone = len(w), (~keep).nonzero().flatten()
    bound = torch.eye(size, dtype=w.dtype)[gone]
    system = torch.cat([torch.cat([matrix, bound.T], 1), torch.cat([bound, torch.zeros(len(gone), len(gone), dtype=w.dtype)], 1)])
    dw = torch.linalg.solve(system, torch.cat([torch.zeros(size, dtype=w.dtype), -w[gone]]))[:size]
    return dw, float(0.5 * dw @ matrix @ dw)


def test_joint_move_is_the_constrained_minimiser() -> None:
    w, matrix, inverse = blocks()
    keep = torch.rand(w.shape) > 0.5
    found = joint_step(w, matrix, keep)
    for i in range(len(w)):
        torch.testing.assert_close(found[i], minimiser(w[i], matrix[i], keep[i])[0])
        gone = ~keep[i]
        textbook = -inverse[i][:, gone] @ torch.linalg.solve(inverse[i][gone][:, gone], w[i][gone])
        torch.testing.assert_close(found[i], textbook)


def test_joint_move_is_elimination_one_by_one_in_any_order() -> None:
    w, matrix, inverse = blocks(1)
    keep = torch.rand(w.shape) > 0.5
    gone = (~keep[0]).nonzero().flatten()
    for order in (gone, gone.flip(0)):
        left, now = inverse[0].clone(), w[0].clone()
        for i in order.tolist():
            now = now - left[:, i] * now[i] / left[i, i]
            left = left - torch.outer(left[:, i], left[i]) / left[i, i]
        torch.testing.assert_close((w + joint_step(w, matrix, keep))[0], now)


def test_saliencies_are_the_costs_of_lone_minimisers() -> None:
    w, matrix, inverse = blocks()
    for q in (1, 3, 4, 12):
        found = group_saliency(w, inverse, q)
        for b in range(len(w)):
            for group in range(12 // q):
                keep = torch.ones(12, dtype=torch.bool)
                keep[group * q : (group + 1) * q] = False
                assert float(found[b, group]) == pytest.approx(minimiser(w[b], matrix[b], keep)[1])
    torch.testing.assert_close(single_saliency(w, inverse), group_saliency(w, inverse, 1))


@pytest.mark.parametrize("q", [1, 4])
def test_independent_move_is_the_sum_of_lone_ones(q: int) -> None:
    w, matrix, inverse = blocks()
    keep = (torch.rand(3, 12 // q) > 0.5).repeat_interleave(q, 1)
    expected = torch.zeros_like(w)
    for b, group in (~keep[:, ::q]).nonzero().tolist():
        alone = torch.ones(12, dtype=torch.bool)
        alone[group * q : (group + 1) * q] = False
        expected[b] += minimiser(w[b], matrix[b], alone)[0]
    found = independent_step(w, inverse, keep, q)
    torch.testing.assert_close(found[keep], expected[keep])
    assert torch.equal((w + found)[~keep], torch.zeros(int((~keep).sum()), dtype=w.dtype))


def test_one_removal_is_the_same_move_either_way_and_joint_costs_least_for_many() -> None:
    w, matrix, inverse = blocks()
    keep = torch.ones_like(w, dtype=torch.bool)
    keep[:, 5] = False
    torch.testing.assert_close(independent_step(w, inverse, keep), joint_step(w, matrix, keep))
    keep[:, ::2] = False
    cost = [
        float((0.5 * (s.unsqueeze(1) @ matrix @ s.unsqueeze(2))).sum()) for s in (joint_step(w, matrix, keep), independent_step(w, inverse, keep))
    ]
    assert cost[0] < cost[1]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_treated_block_by_block_with_its_tail(joint: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    w, keep = torch.randn(5, 7).to(dtype), torch.rand(5, 7) > 0.4
    fisher, gradients = BlockFisher(35, 4, 1e-3, 20), torch.randn(20, 35)
    for g in gradients:
        fisher.add(g)
    fisher.finish()
    whole = torch.cat([fisher.matrix(rows) for rows in fisher.chunks()])  # [9, 4, 4]
    flat, kept = torch.nn.functional.pad(w.flatten().double(), (0, 1)).view(9, 4), torch.nn.functional.pad(keep.flatten(), (0, 1)).view(9, 4)
    step = joint_step(flat, whole, kept) if joint else independent_step(flat, torch.linalg.inv(whole), kept)
    expected = (flat + step).flatten()[:35].view(5, 7)
    scores = saliency(fisher, w)
    torch.testing.assert_close(scores, single_saliency(flat, torch.linalg.inv(whole)).flatten()[:35].float())
    remove(fisher, w, keep, joint=joint)
    torch.testing.assert_close(w, expected.to(dtype))
    assert int((w == 0).sum()) == int((~keep).sum())


def test_groups_as_wide_as_a_block_use_the_matrix_itself() -> None:
    fisher, w = BlockFisher(32, 8, 1e-3, 40), torch.randn(4, 8)
    for g in torch.randn(40, 32):
        fisher.add(g)
    fisher.finish()
    whole = torch.cat([fisher.inverse(rows) for rows in fisher.chunks()])
    torch.testing.assert_close(saliency(fisher, w, 8), group_saliency(w.double(), whole, 8).flatten().float())
    assert saliency(fisher, w, 2).shape == (16,)
