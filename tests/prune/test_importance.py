"""Importance of weights against autograd's own gradients, its sums over units against loops, and what of it stays in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import ModelError
from compressor.kernels import layout
from compressor.prune.importance import (
    EPSILON,
    IMPORTANCES,
    Activations,
    FullGradients,
    LoraGradients,
    Magnitude,
    PaperGradients,
    inverse,
    unit_scores,
)
from compressor.prune.lowrank import LowRank
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import Family, Part, families
from tests.prune.helpers import backward, causal, pack, paths_of, windows
from tests.tolerances import RELATIVE, error

ALL = slice(0, 1 << 20)
FLOAT = 20 * RELATIVE[torch.float32]  # sums of a whole backward pass


class Layer:
    """One path of 20 outputs and 12 inputs after a step, and the gradient of its merged weight in float64 by autograd."""

    def __init__(self, rank: int, size: float = 0.5, n: int = 20, k: int = 12):
        torch.manual_seed(rank)
        self.path = LowRank(nn.Linear(k, n, bias=False).requires_grad_(False), rank, 6.0, torch.Generator().manual_seed(0))
        self.path.b.data = size * torch.randn(n, rank)
        x, wanted = torch.randn(40, k), torch.randn(40, n)
        (torch.tanh(self.path(x)) * wanted).sum().backward()
        self.w = self.path.merged(ALL).double().requires_grad_(True)
        (torch.tanh(nn.functional.linear(x.double(), self.w)) * wanted.double()).sum().backward()
        self.full = self.w.grad
        self.a, self.b = self.path.a.detach().double(), self.path.b.detach().double()
        self.ga, self.gb = self.path.a.grad.double(), self.path.b.grad.double()

    def entries(self, kind: type[LoraGradients] = LoraGradients) -> Tensor:
        return kind({"x": self.path}).entries("x", slice(0, 20))


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


@pytest.mark.parametrize(("rank", "size"), [(24, 0.5), (24, 0.0), (40, 0.5)])
def test_a_path_of_full_rank_shows_the_whole_gradient(rank: int, size: float) -> None:
    layer = Layer(rank, size)
    assert error(layer.entries(), layer.full * layer.w) < 1e3 * RELATIVE[torch.float32]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_narrow_path_shows_the_projections_of_the_gradient_once(rank: int) -> None:
    layer = Layer(rank)
    g, onto_a, onto_b = layer.full, projector(layer.a.T), projector(layer.b)
    assert g is not None
    expected = g @ onto_a + onto_b @ g - onto_b @ g @ onto_a
    assert error(layer.entries(), expected * layer.w) < 1e2 * RELATIVE[torch.float32]
    assert error(expected, g) > 0.1, "the rank must be low for this to test anything"


def test_with_nothing_in_b_the_gradient_is_seen_through_a_alone() -> None:
    layer = Layer(3, size=0.0)
    assert layer.full is not None and not layer.ga.any()
    assert error(layer.entries(), layer.full @ projector(layer.a.T) * layer.w) < 1e2 * RELATIVE[torch.float32]


def test_the_papers_estimate_is_the_change_of_the_product_in_one_step() -> None:
    layer = Layer(3)
    change = layer.b @ layer.a - (layer.b - layer.gb) @ (layer.a - layer.ga)
    assert error(layer.gb @ layer.a + layer.b @ layer.ga - layer.gb @ layer.ga, change) < RELATIVE[torch.float64]
    assert error(layer.entries(PaperGradients), change * layer.w) < 1e2 * RELATIVE[torch.float32]


def test_alpha_scales_what_the_path_sees_and_not_the_estimate() -> None:
    """y = x (W + gamma B A)T: the same W + gamma B A by another gamma has the same gradient."""
    layer, other = Layer(3), Layer(3)
    other.path.gamma *= 4
    other.path.b.data /= 4
    other.path.zero_grad()
    torch.manual_seed(3)
    nn.Linear(12, 20, bias=False)
    torch.randn(20, 3)
    x, wanted = torch.randn(40, 12), torch.randn(40, 20)
    (torch.tanh(other.path(x)) * wanted).sum().backward()
    assert error(other.path.merged(ALL), layer.path.merged(ALL)) < RELATIVE[torch.float32]
    assert error(other.entries(), layer.entries()) < 1e2 * RELATIVE[torch.float32]


def test_the_inverse_leaves_out_directions_that_are_noise() -> None:
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    gram = q @ torch.diag(torch.tensor([4.0, 1.0, 1e-5, 0.0])) @ q.T
    assert error(inverse(gram), q @ torch.diag(torch.tensor([0.25, 1.0, 0.0, 0.0])) @ q.T) < 1e-4
    assert not inverse(torch.zeros(3, 3)).any()


# --- the other kinds -----------------------------------------------------------------------------------------------------------------------


def step(kind: str, model: Any, ids: Tensor | None = None, **keys: Any) -> tuple[Any, dict[str, LowRank]]:
    """An importance after one training step of the model with paths."""
    paths = paths_of(model, **keys)
    importance = IMPORTANCES[kind](paths)
    backward(model, windows() if ids is None else ids)
    return importance, paths


def full_gradients(ids: Tensor) -> dict[str, Tensor]:
    """dL / dW of every linear at W + gamma B A, by autograd, times that weight."""
    model, paths = causal(), paths_of(causal())
    for name, path in paths.items():
        model.get_submodule(name).weight.data = path.merged(ALL)
    backward(model, ids)
    return {name: model.get_submodule(name).weight.grad * model.get_submodule(name).weight for name in paths}


def test_taylor_is_the_gradient_times_the_weight_in_use() -> None:
    ids = windows()
    importance, paths = step("taylor", causal(), ids)
    for name, expected in full_gradients(ids).items():
        assert error(importance.entries(name, slice(0, len(expected))), expected) < FLOAT, name
    importance.clear()
    assert all(path.base.weight.grad is None and path.base.weight.requires_grad for path in paths.values())
    importance.detach()
    assert not any(path.base.weight.requires_grad for path in paths.values())


def test_the_estimate_of_a_whole_model_is_its_gradient_when_the_paths_are_wide() -> None:
    ids, model = windows(), causal()
    importance, paths = step("loraprune", model, ids, rank=160)
    exact = FullGradients(paths)
    backward(model, ids)
    for name, path in paths.items():
        rows = slice(0, path.out_features)
        for p in (path.a, path.b):
            p.grad /= 2  # two backward passes
        importance.clear()
        assert error(importance.entries(name, rows), exact.entries(name, rows)) < 1e3 * RELATIVE[torch.float32], name


def test_wanda_is_the_weight_times_the_norm_of_its_inputs_over_the_step() -> None:
    model, ids = causal(), windows()
    paths = paths_of(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in paths}
    for name, path in paths.items():
        path.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].detach().flatten(0, -2)))
    importance = Activations(paths)
    for half in ids.split(3):
        model(input_ids=half)
    with torch.no_grad():
        expected = {n: path.merged(ALL).abs() * torch.cat(seen[n]).double().square().sum(0).sqrt() for n, path in paths.items()}
        model(input_ids=ids)  # without gradients: no part of the step
    for name, value in expected.items():
        assert error(importance.entries(name, slice(0, len(value))), value) < RELATIVE[torch.float32]
    importance.clear()
    with pytest.raises(ModelError, match="model.layers.0.self_attn.q_proj saw no inputs to score it by"):
        importance.entries("model.layers.0.self_attn.q_proj", slice(0, 4))
    importance.detach()
    model(input_ids=ids)
    assert not importance.squares


def test_magnitude_is_the_size_of_the_weight_in_use() -> None:
    paths = paths_of(causal())
    name = "model.layers.2.mlp.up_proj"
    assert torch.equal(Magnitude(paths).entries(name, slice(0, 48)), paths[name].merged(slice(0, 48)).abs())


def test_what_took_no_part_is_named() -> None:
    paths = paths_of(causal())
    for kind in ("loraprune", "taylor"):
        with pytest.raises(ModelError, match="model.layers.1.mlp.up_proj has no gradients? to score it by: it took no part"):
            IMPORTANCES[kind](paths).entries("model.layers.1.mlp.up_proj", slice(0, 4))
    path = paths["model.layers.1.mlp.up_proj"]
    path.a.grad = torch.zeros_like(path.a)
    with pytest.raises(ModelError, match="has no gradients"):
        LoraGradients(paths).entries("model.layers.1.mlp.up_proj", slice(0, 4))


def test_codes_have_no_gradient() -> None:
    with pytest.raises(ModelError, match="model.layers.0.self_attn.q_proj is packed, and its codes have no gradient"):
        FullGradients(paths_of(pack(causal())))


def test_gradients_of_the_step_before_are_forgotten() -> None:
    model = causal()
    importance, paths = step("loraprune", model)
    name = "model.layers.0.mlp.down_proj"
    first = importance.entries(name, slice(0, 64)).clone()
    for path in paths.values():
        path.zero_grad()
    backward(model, windows(seed=9))
    assert torch.equal(importance.entries(name, slice(0, 64)), first)
    importance.clear()
    assert error(importance.entries(name, slice(0, 64)), first) > 0.1


@pytest.mark.parametrize("kind", ["loraprune", "wanda", "magnitude"])
@pytest.mark.parametrize("table", [False, True])
def test_a_packed_base_counts_as_the_weight_it_decodes_to(kind: str, table: bool) -> None:
    packed = pack(causal(), 3, table)
    dense = causal()
    for name, layer in [(n, m) for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        layer.weight.data = packed.get_submodule(name).packed().dequantize(torch.float32)
    (ours, paths), (theirs, _) = step(kind, packed), step(kind, dense)
    for name, path in paths.items():
        rows = slice(0, path.out_features)
        assert error(ours.entries(name, rows), theirs.entries(name, rows)) < 50 * FLOAT, name


# --- units ---------------------------------------------------------------------------------------------------------------------------------


def by_hand(family: Family, paths: dict[str, LowRank], importance: Any, gate: bool) -> Tensor:
    """Scores by loops over units and their rows and columns, float64."""
    total = torch.zeros(family.count, dtype=torch.float64)
    for part in family.parts[-1:] if gate else family.parts:
        entries = importance.entries(part.name, slice(0, paths[part.name].out_features)).double()
        entries = entries if part.axis == 0 else entries.T
        scores = [float(entries[unit * part.width : (unit + 1) * part.width].abs().sum()) for unit in range(family.count)]
        column = torch.tensor(scores, dtype=torch.float64)
        total += column / (column.norm() + EPSILON)
    return total


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("keys", "unit"), [(2, "group"), (2, "query"), (8, "group")])
@pytest.mark.parametrize("kind", ["loraprune", "taylor"])
def test_units_sum_their_rows_and_columns_of_every_linear(gate: bool, keys: int, unit: str, kind: str) -> None:
    model = causal(keys=keys)
    units = families(model, unit)
    importance, paths = step(kind, model)
    for family in units:
        scores = unit_scores(family, paths, importance, gate)
        assert scores.shape == (family.count,) and error(scores, by_hand(family, paths, importance, gate)) < 1e2 * RELATIVE[torch.float32]
        assert (
            error(unit_scores(family, paths, importance), scores) == 0 if not gate else error(unit_scores(family, paths, importance), scores) > 0.01
        )


class Given:
    """An importance that is a table."""

    def __init__(self, tables: dict[str, Tensor]):
        self.tables = tables

    def entries(self, name: str, rows: slice) -> Tensor:
        return self.tables[name][rows].clone()

    def clear(self) -> None: ...

    def detach(self) -> None: ...


def test_each_linear_counts_alike_whatever_its_scale() -> None:
    model = causal()
    family, paths = families(model)[1], paths_of(model)
    torch.manual_seed(0)
    tables = {part.name: torch.randn(paths[part.name].out_features, paths[part.name].in_features) for part in family.parts}
    plain = unit_scores(family, paths, Given(tables))
    scaled = {name: t * factor for (name, t), factor in zip(tables.items(), (1e3, 1e-3, 7.0), strict=True)}
    assert error(unit_scores(family, paths, Given(scaled)), plain) < 1e-4
    assert 1 < float(plain.norm()) <= 3, "three linears of norm 1 each"
    assert not unit_scores(family, paths, Given({name: 0 * t for name, t in tables.items()})).any()


def test_known_entries_give_known_scores() -> None:
    paths = {"x": LowRank(nn.Linear(4, 3), 1, 1.0, torch.Generator())}
    table = {"x": torch.tensor([[3.0, -3.0, 1.0, 1.0], [0.0, 0.0, 0.0, -2.0], [1.0, 1.0, 1.0, 1.0]])}
    columns, rows = Family(0, "ffn", 2, (Part("x", 1, 2),)), Family(0, "ffn", 3, (Part("x", 0, 1),))
    for family, expected in ((columns, [4.0 + 4.0, 2.0 + 4.0]), (rows, [8.0, 2.0, 4.0])):
        wanted = torch.tensor(expected)
        torch.testing.assert_close(unit_scores(family, paths, Given(table)), wanted / wanted.norm())


@pytest.mark.parametrize("kind", ["taylor", "wanda"])
def test_masked_units_show_no_gradient_or_input_at_their_gate(kind: str) -> None:
    model = causal()
    units = families(model)
    paths = paths_of(model)
    masks = UnitMasks(model, units)
    masks.masks["1.ffn"][10:20] = 0
    masks.masks["1.heads"][1] = 0
    importance = IMPORTANCES[kind](paths)
    backward(model, windows())
    gone = {"mlp.down_proj": (1, 10, 20), "self_attn.o_proj": (1, 64, 128)}
    if kind == "taylor":  # rows that feed a masked input have no gradient
        gone |= {"mlp.up_proj": (0, 10, 20), "self_attn.q_proj": (0, 64, 128), "self_attn.k_proj": (0, 16, 32), "self_attn.v_proj": (0, 16, 32)}
    for name, (axis, start, stop) in gone.items():
        entries = importance.entries(f"model.layers.1.{name}", slice(0, 128 if axis == 0 else 64))
        assert not entries.narrow(axis, start, stop - start).any() and bool(entries.narrow(axis, 0, start).any()), name


# --- memory --------------------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers that a tensor with memory of its own had."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inside(values: Any) -> list[Tensor]:
            return [t for v in values for t in (inside(v) if isinstance(v, tuple | list) else [v] if isinstance(v, Tensor) else [])]

        given = {t.untyped_storage().data_ptr() for t in inside(args)}
        out = func(*args, **(kwargs or {}))
        made = [t for t in inside([out]) if t.untyped_storage().data_ptr() not in given]
        self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        return out


@pytest.mark.parametrize("base", ["dense", "packed"])
@pytest.mark.parametrize("kind", ["loraprune", "taylor", "wanda", "magnitude"])
def test_tiles_do_not_change_scores_and_bound_what_is_formed(kind: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (kind, base) == ("taylor", "packed"):
        return
    model = causal(intermediate_size=640, hidden_size=192, num_hidden_layers=1)
    if base == "packed":
        pack(model)
    units = families(model)
    importance, paths = step(kind, model)
    whole = [unit_scores(f, paths, importance) for f in units]
    monkeypatch.setattr("compressor.packing.PANEL", 1)
    assert paths["model.layers.0.mlp.up_proj"].tiles() == [slice(i, i + layout.ROWS) for i in range(0, 640, layout.ROWS)]
    importance.clear() if kind == "loraprune" else None
    with Largest() as made:
        tiled = [unit_scores(f, paths, importance) for f in units]
    for a, b in zip(tiled, whole, strict=True):
        assert error(a, b) < 10 * RELATIVE[torch.float32]
    tile = layout.ROWS * max(path.in_features for path in paths.values())
    assert 0 < made.numbers <= tile * (2 if base == "packed" else 1), "a tile decodes to whole words, which may be more than its columns"
    assert min(path.out_features * path.in_features for name, path in paths.items() if "mlp" in name) > 2 * tile
    kept = [t for value in vars(importance).values() if isinstance(value, dict) for t in _tensors(value.values())]
    if kind != "taylor":
        assert all(t.numel() <= 4 * 640 for t in kept)


def _tensors(values: Any) -> list[Tensor]:
    return [t for v in values for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, Tensor)]
