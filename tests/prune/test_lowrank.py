"""Low-rank paths: what they compute, where they start, what trains."""

import math

import pytest
import torch

from compressor.packing import dense_rows
from compressor.prune import lowrank
from compressor.prune.lowrank import LowRank
from tests.prune.helpers import backward, causal, logits, pack, paths_of, windows
from tests.tolerances import RELATIVE, error

PREPARE = {"dense": lambda m: m, "packed": pack, "sketch": lambda m: pack(m, 3, True)}


@pytest.mark.parametrize("base", PREPARE)
def test_a_fresh_path_changes_nothing_bit_for_bit(base: str) -> None:
    model, ids = PREPARE[base](causal()), windows()
    before = logits(model, ids)
    paths = lowrank.attach(model, 4, 8.0, seed=1)
    assert torch.equal(logits(model, ids), before)
    assert len(paths) == 3 * 7 and all(model.get_submodule(name) is path for name, path in paths.items())
    assert all(path.gamma == 2.0 and not path.b.any() and path.a.shape == (4, path.in_features) for path in paths.values())


@pytest.mark.parametrize("base", PREPARE)
def test_merged_rows_are_what_forward_computes(base: str) -> None:
    model = PREPARE[base](causal("qwen2", head_dim=16))
    for name, path in paths_of(model).items():
        x = torch.randn(3, 5, path.in_features, generator=torch.Generator().manual_seed(0))
        merged = path.merged(slice(0, path.out_features))
        assert error(torch.nn.functional.linear(x, merged, path.base.bias), path(x)) < RELATIVE[torch.float32], name
        whole = dense_rows(path.base.packed(), slice(0, path.out_features)) if base != "dense" else path.base.weight
        assert error(merged - whole, 2.0 * (path.b.double() @ path.a.double())) < 1e2 * RELATIVE[torch.float32]


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_tiles_cover_all_rows_and_give_the_same_weight(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = paths_of(PREPARE[base](causal()))["model.layers.1.self_attn.q_proj"]
    whole = path.merged(slice(0, 128))
    monkeypatch.setattr("compressor.packing.PANEL", 1)
    tiles = path.tiles()
    assert len(tiles) > 1 and error(torch.cat([path.merged(rows) for rows in tiles]), whole) < RELATIVE[torch.float32]


def test_starts_follow_from_the_seed_and_have_the_spread_of_a_linear() -> None:
    first, again, other = (lowrank.attach(causal(), 8, 16.0, seed) for seed in (1, 1, 2))
    for name, path in first.items():
        assert torch.equal(path.a, again[name].a) and not torch.equal(path.a, other[name].a)
        bound = 1 / math.sqrt(path.in_features)
        assert 0.8 * bound < float(path.a.detach().abs().max()) <= bound and abs(float(path.a.detach().mean())) < 0.2 * bound
    assert not torch.equal(first["model.layers.0.self_attn.q_proj"].a, first["model.layers.1.self_attn.q_proj"].a)


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_only_the_paths_get_gradients(base: str) -> None:
    model = PREPARE[base](causal())
    paths = paths_of(model)
    backward(model, windows())
    trained = lowrank.parameters(paths)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained) and len(trained) == 2 * len(paths)
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


def test_a_path_in_half_precision_answers_in_it() -> None:
    model = causal().to(torch.bfloat16)
    path = paths_of(model)["model.layers.0.mlp.up_proj"]
    out = path(torch.randn(2, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and path.a.dtype == torch.float32 and path.merged(slice(0, 8)).dtype == torch.float32


def _inputs(model: torch.nn.Module, path: LowRank, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = path.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, -2)))
    logits(model, ids)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_aligned_paths_span_the_leading_directions_of_their_inputs(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "ROUNDS", 24)  # until it has converged, to compare with an eigendecomposition
    model, ids = PREPARE[base](causal(num_hidden_layers=1 if base == "packed" else 2)).train(), windows(20)
    paths = lowrank.attach(model, 3, 6.0, seed=1)
    lowrank.align(model, paths, ids)
    assert model.training
    model.eval()
    compared = 0
    for name, path in paths.items():
        x = _inputs(model, path, ids[: lowrank.WINDOWS]).double()
        values, vectors = torch.linalg.eigh(x.T @ x)
        best, spanned = vectors[:, -3:] @ vectors[:, -3:].T, path.a.double().T @ path.a.double() * 3
        if values[-3] > 1.3 * values[-4]:  # a gap, so that the space is determined
            assert error(spanned, best) < 1e-2, name
            compared += 1
        caught = float((spanned @ x.T @ x).trace().detach())
        assert caught > 0.97 * float(values[-3:].sum()), name
        assert error(path.a @ path.a.T * 3, torch.eye(3)) < 1e-4  # rows as large as those of the start, and at right angles
        assert not path.b.any()
    assert compared > 1


def test_a_few_rounds_catch_more_than_chance() -> None:
    model, ids = causal(), windows(20)
    paths = lowrank.attach(model, 3, 6.0, seed=1)
    for aligned in (False, True):
        if aligned:
            lowrank.align(model, paths, ids)
        shares = []
        for path in paths.values():
            x = _inputs(model, path, ids).double()
            rows = torch.linalg.qr(path.a.detach().double().T).Q
            shares.append(float((x @ rows).square().sum() / x.square().sum()) / float(torch.linalg.eigvalsh(x.T @ x)[-3:].sum() / x.square().sum()))
        assert min(shares) > 0.8 if aligned else max(shares) < 0.6, (aligned, shares)


def test_paths_that_cannot_be_aligned_keep_their_start() -> None:
    model = causal()
    paths = lowrank.attach(model, 50, 8.0, seed=1)  # the FFN has 48 channels
    model.model.layers[0].mlp.down_proj.base.weight.data.fill_(torch.inf)
    before = {name: path.a.clone() for name, path in paths.items()}
    lowrank.align(model, paths, windows())
    moved = {name for name, path in paths.items() if not torch.equal(path.a, before[name])}
    first = {
        f"model.layers.0.{n}"
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    assert moved == first and not any(path._forward_pre_hooks for path in paths.values())
