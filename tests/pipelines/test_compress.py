"""Packing block by block: what is found, what shares statistics, what a work folder gives back, other architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError, NumericError, RecipeError
from compressor.linear import find_blocks, linears, packed_linears
from compressor.packing import Packer
from compressor.pipelines import calibrate, compress, load
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats

IDS = torch.randint(1, 2000, (6, 48), generator=torch.Generator().manual_seed(0))


def fresh() -> nn.Module:
    return load.load("tiny", "cpu").model


def test_plan_finds_all_block_linears_and_nothing_else() -> None:
    plan = compress.plan(fresh(), Quant(ignore=(r"layers\.0\..*down_proj",)))
    assert len(plan.packed()) == 7 * 4 - 1
    assert [t.name for block in plan.targets for t in block if t.reason] == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(ModelError, match="nothing is left to pack"):
        compress.plan(fresh(), Quant(ignore=(".*",)))
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        compress.plan(fresh(), Quant(group=7))


def test_linears_that_read_the_same_input_share_statistics() -> None:
    model = fresh()
    block = model.model.layers[1]
    calibration = calibrate.Calibration(model, model.model.layers, IDS)
    names = [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    groups = calibrate.shared_inputs(block, names, lambda: calibration.run(block, 1, keep=False, batches=1))
    leaves = [[n.rpartition(".")[2] for n in group] for group in groups]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_calibration_walks_the_model_as_the_model_itself() -> None:
    model = fresh()
    calibration = calibrate.Calibration(model, model.model.layers, IDS)
    for index, block in enumerate(model.model.layers):
        calibration.run(block, index, keep=True)
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
        walked = model.model.norm(torch.cat(calibration.hidden))
    assert torch.allclose(walked, expected, atol=1e-5)


def test_recording_stops_before_the_last_block_runs() -> None:
    model = fresh()

    def refuse(*_: object) -> None:
        raise AssertionError("ran in vain")

    layers = model.model.layers
    for module in (model.lm_head, model.model.norm, layers[-1].self_attn):
        module.register_forward_pre_hook(refuse)
    calibration = calibrate.Calibration(model, layers, IDS)
    assert all(calibration.arguments) and len(torch.cat(calibration.hidden)) == len(IDS)


def test_a_single_block_is_recorded() -> None:
    model = fresh()
    model.model.layers = model.model.layers[:1]
    calibration = calibrate.Calibration(model, model.model.layers, IDS)
    assert len(calibration.hidden) == 1 and list(calibration.arguments[0]) == [len(IDS)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # eager makes masks of the batch's size
def test_seven_windows_in_batches_of_three_are_as_one_by_one(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()["mistral"], attn_implementation=attention).eval()
    blocks, ids = model.model.layers, torch.cat([IDS, IDS[:1] + 7]) % 96
    walked = []
    for size, sizes in ((1, [1] * 7), (3, [3, 3, 1])):
        monkeypatch.setattr(calibrate, "BATCH_TOKENS", size * ids.shape[1])
        calibration = calibrate.Calibration(model, blocks, ids)
        assert [len(batch) for batch in calibration.batches] == sizes
        for index, block in enumerate(blocks):
            calibration.run(block, index, keep=True)
        assert [len(hidden) for hidden in calibration.hidden] == sizes
        walked.append(torch.cat(calibration.hidden))
    torch.testing.assert_close(walked[1], walked[0], rtol=1e-4, atol=1e-4)


def test_statistics_stop_the_block_once_they_are_taken() -> None:
    model = fresh()
    block = model.model.layers[1]
    calibration = calibrate.Calibration(model, model.model.layers, IDS)
    ran = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"), 0)

    def count(leaf: str) -> None:
        def hook(*_: object) -> None:
            ran[leaf] += 1

        block.get_submodule(leaf).register_forward_hook(hook)

    for leaf in ran:
        count(leaf)
    stats = calibrate.collect(block, 1, ["self_attn.o_proj"], ("hessian",), calibration, "o_proj")
    assert stats.tokens == IDS.numel()
    assert ran == {"self_attn.q_proj": len(calibration.batches), "self_attn.o_proj": 0, "mlp.down_proj": 0}


def second_moments(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Mean of x xT at the inputs of the named layers, from one pass of the model itself."""
    stats = {name: LayerStats(model.get_submodule(name).in_features) for name in names}
    hooks = [model.get_submodule(n).register_forward_pre_hook(lambda _m, args, n=n: stats[n].add(args[0])) for n in names]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return {name: s.hessian for name, s in stats.items() if s.hessian is not None}


def test_every_layer_is_packed_on_what_its_packed_predecessors_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tensor] = []

    def recording(w: Tensor, stats: LayerStats, *rest: Any) -> Any:
        assert stats.hessian is not None
        used.append(stats.hessian.clone())
        return gptq.pack(w, stats, *rest)

    gptq = PACKERS["gptq"]
    monkeypatch.setitem(PACKERS, "gptq", Packer(recording, gptq.resolve, gptq.needs))
    model = fresh()
    rows, _, _ = compress.compress(model, Quant(packer="gptq", bits=2), torch.float16, IDS)
    names = [row["name"] for row in rows]
    packed, dense = second_moments(model, names), second_moments(fresh(), names)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    assert len(used) == len(names) == 28
    assert max(apart(hessian, packed[name]) for name, hessian in zip(names, used, strict=True)) < 1e-4
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"):
        assert apart(used[names.index(name)], dense[name]) > 0.01


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(8))


def test_lists_inside_a_block_are_not_the_blocks() -> None:
    model = nn.Module()
    model.short = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    model.layers = nn.ModuleList(Experts() for _ in range(4))
    assert find_blocks(model)[0] == "layers"
    model.layers_of_another_kind = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(5))  # beside, not inside
    assert find_blocks(model)[0] == "layers_of_another_kind"


@pytest.mark.parametrize("packer", sorted(PACKERS))
def test_work_folder_gives_back_the_same_weights(packer: str, tmp_path: Path) -> None:
    def run(work: Path | None, after: int | None = None) -> tuple[dict[str, torch.Tensor], list[dict], int]:
        model = fresh()
        seen = 0

        def on_layer(_row: dict) -> None:
            nonlocal seen
            seen += 1
            if after is not None and seen > after:
                raise KeyboardInterrupt

        try:
            rows, _, resumed = compress.compress(model, Quant(packer=packer), torch.float16, IDS, work, on_layer)
        except KeyboardInterrupt:
            return {}, [], -1
        return {n: p.packed().dequantize() for n, p in packed_linears(model).items()}, rows, resumed

    whole, rows, resumed = run(None)
    assert resumed == 0
    assert len(rows) == 28
    run(tmp_path, after=10)  # stops while it reports the second block
    (tmp_path / "block-00001.safetensors").write_bytes(b"cut off")  # a damaged file counts as absent
    again, rows_again, resumed = run(tmp_path)
    assert resumed == 1
    assert [r["error"] for r in rows_again] == [r["error"] for r in rows]
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def packed_with(packer: str, start: str, work: Path | None = None, rank: int = 4, **options: Any) -> tuple[nn.Module, list[dict], dict, int]:
    model, starts = fresh(), {}
    ids = None if packer == "rtn" else IDS
    rows, _, resumed = compress.compress(
        model, Quant(packer=packer, bits=2), torch.float16, ids, work, start=start, rank=rank, starts=starts, **options
    )
    return model, rows, starts, resumed


@pytest.mark.parametrize(("packer", "start"), [("gptq", "residual"), ("rtn", "loftq"), ("gptq", "principal"), ("gptq", "eva")])
def test_paths_start_beside_every_layer_and_lie_in_the_work_folder(packer: str, start: str, tmp_path: Path) -> None:
    model, rows, starts, _ = packed_with(packer, start, tmp_path)
    layers = packed_linears(model)
    assert set(starts) == set(layers)
    for row in rows:
        a, b = starts[row["name"]]
        assert a.shape == (4, row["shape"][1]) and b.shape == (row["shape"][0], 4) and a.dtype == b.dtype == torch.float32
        assert row["start_error"] == row["error"] if start == "eva" else row["start_error"] < row["error"]
    (tmp_path / "block-00002.safetensors").unlink()
    again, rows_again, starts_again, resumed = packed_with(packer, start, tmp_path)
    assert resumed == 3 and [r["start_error"] for r in rows_again] == [r["start_error"] for r in rows]
    for name, layer in packed_linears(again).items():
        assert torch.equal(layer.packed().dequantize(), layers[name].packed().dequantize())
        assert all(torch.equal(x, y) for x, y in zip(starts_again[name], starts[name], strict=True))


def test_without_a_start_nothing_changes() -> None:
    plain = fresh()
    rows, _, _ = compress.compress(plain, Quant(bits=2), torch.float16, IDS)
    model, _, starts, _ = packed_with("gptq", "eva")  # packs the dense weights as they are
    other, zero_rows, none, _ = packed_with("gptq", "zero", rank=4096)
    assert not none and starts and all("start_error" not in row for row in rows + zero_rows)
    for name, layer in packed_linears(plain).items():
        for same in (model, other):
            assert all(torch.equal(t, packed_linears(same)[name].packed().tensors()[k]) for k, t in layer.packed().tensors().items())


def test_layers_are_packed_on_what_predecessors_put_out_with_their_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tensor] = []
    gptq = PACKERS["gptq"]

    def recording(w: Tensor, stats: LayerStats, *rest: Any) -> Any:
        assert stats.hessian is not None
        used.append(stats.hessian.clone())
        return gptq.pack(w, stats, *rest)

    monkeypatch.setitem(PACKERS, "gptq", Packer(recording, gptq.resolve, gptq.needs))
    model, rows, starts, _ = packed_with("gptq", "principal")
    names = [row["name"] for row in rows]
    without = second_moments(model, names)
    for name, (a, b) in starts.items():
        model.get_submodule(name).register_forward_hook(lambda _m, args, out, a=a, b=b: out + args[0] @ a.T @ b.T)
    beside = second_moments(model, names)
    far = [float((used[i] - beside[n]).norm() / beside[n].norm()) for i, n in enumerate(names)]
    assert max(far) < 1e-3
    assert float((without[names[-1]] - beside[names[-1]]).norm() / beside[names[-1]].norm()) > 0.1


def test_paths_beside_some_layers_only() -> None:
    model, rows, starts, _ = packed_with("gptq", "principal", beside=("q_proj", "down_proj"))
    assert {name.rpartition(".")[2] for name in starts} == {"q_proj", "down_proj"} and len(starts) == 8
    assert all(("start_error" in row) == (row["name"] in starts) for row in rows)
    assert all(row["error"] < 0.6 for row in rows if row["name"] not in starts)
    assert len(packed_linears(model)) == 28


def test_starts_that_cannot_be_are_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match="choose zero"):
        packed_with("gptq", "pissa")
    with pytest.raises(RecipeError, match="needs statistics of the inputs"):
        packed_with("rtn", "eva")
    with pytest.raises(RecipeError, match=r"tune\.rank=4096 does not fit"):
        packed_with("rtn", "residual", rank=4096)


@pytest.mark.parametrize("start", ["loftq", "principal"])
@pytest.mark.parametrize("packer", ["rtn", "gptq"])
def test_pruned_weights_stay_zero_beside_a_path(start: str, packer: str) -> None:
    model = fresh()
    masks = {}
    for name, layer in linears(model.model.layers).items():
        layer.weight.data[:, ::2] = 0
        masks[f"model.layers.{name}"] = layer.weight == 0
    ids = None if packer == "rtn" else IDS
    compress.compress(model, Quant(packer=packer), torch.float16, ids, keep_zeros=True, start=start, rank=4, starts={})
    assert all(not layer.packed().dequantize()[masks[name]].any() for name, layer in packed_linears(model).items())


def test_gptq_beats_rtn_on_the_outputs_of_every_block_it_calibrates() -> None:
    errors = {}
    for packer in ("rtn", "gptq"):
        model, dense = fresh(), fresh()
        compress.compress(model, Quant(packer=packer, bits=2), torch.float16, IDS)
        with torch.no_grad():
            errors[packer] = float((model.model(IDS).last_hidden_state - dense.model(IDS).last_hidden_state).norm())
    assert errors["gptq"] < errors["rtn"]


def test_nan_weights_are_named() -> None:
    model = fresh()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.gate_proj\.weight holds NaN"):
        compress.check_finite(model)
    with pytest.raises(NumericError, match=r"model\.layers\.2\.mlp\.gate_proj"):
        compress.compress(model, Quant(packer="rtn"), torch.float16, None)


def configs() -> dict[str, object]:
    import transformers as t

    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    }
    neox = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    return {
        "mistral": t.MistralConfig(**small, head_dim=16, sliding_window=32),
        "qwen2": t.Qwen2Config(**small),
        "qwen3": t.Qwen3Config(**small, head_dim=16),
        "gemma2": t.Gemma2Config(**small, head_dim=16, sliding_window=16),
        "gemma3": t.Gemma3TextConfig(**small, head_dim=16, sliding_window=16),
        "phi3": t.Phi3Config(**small, pad_token_id=0, bos_token_id=0, eos_token_id=0),
        "phi": t.PhiConfig(**small),
        "gpt_neox": t.GPTNeoXConfig(**neox),
    }


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi", "gpt_neox"])
def test_other_families_pack_and_still_predict(family: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()[family]).eval()
    ids = IDS % 96
    with torch.no_grad():
        before = model(ids).logits
    rows, unpacked, _ = compress.compress(model, Quant(bits=4, group=32), torch.float16, ids)
    assert len(rows) == len(packed_linears(model)) >= 8
    assert all(row["note"] == "" for row in rows)  # every layer saw calibration text
    assert all(u["reason"] == "outside the decoder blocks" for u in unpacked)
    with torch.no_grad():
        after = model(ids).logits
    assert (after - before).norm() < 0.3 * before.norm()


def test_gpt2_is_refused_with_the_reason() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96))
    with pytest.raises(ModelError, match="Conv1D"):
        compress.plan(model, Quant())


def test_linears_are_packed_as_their_names_say() -> None:
    quant = Quant(bits=3, packer="rtn", layers={"model.layers.0.mlp.down_proj": "w4g64:gptq", "re:down_proj": "2bit", "re:[qkv]_proj$": "w4g32:asym"})
    model = fresh()
    rows, _, _ = compress.compress(model, quant, torch.float16, IDS)
    found = {r["name"].removeprefix("model.layers."): (r["bits"], r["group"], r["packer"], r["symmetric"]) for r in rows}
    assert found["0.mlp.down_proj"] == (4, 64, "gptq", True)
    assert found["1.mlp.down_proj"] == (2, 128, "rtn", True)
    assert found["1.self_attn.v_proj"] == (4, 32, "rtn", False)
    assert found["3.self_attn.o_proj"] == found["3.mlp.up_proj"] == (3, 128, "rtn", True)
    alone = fresh()
    compress.compress(alone, Quant(bits=4, group=32, symmetric=False, packer="rtn"), torch.float16, None)
    name = "model.layers.2.self_attn.k_proj"
    assert torch.equal(packed_linears(model)[name].packed().dequantize(), packed_linears(alone)[name].packed().dequantize())


def test_a_name_that_no_linear_has_is_an_error_before_any_work() -> None:
    with pytest.raises(RecipeError, match="no linear of the decoder blocks is called so"):
        compress.plan(fresh(), Quant(layers={"down_proj": "w4g64"}))
