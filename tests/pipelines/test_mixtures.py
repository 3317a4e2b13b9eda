"""Mixtures of experts from a dense folder to a packed one: what is packed on what, coverage, resuming, tuning, choosing, other software."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import ModelError
from compressor.integrations import experts, peft
from compressor.linear import packed_linears
from compressor.pipelines import api, calibrate, compress, coverage, export, folder_facts, load, render, servers, write
from compressor.pipelines.choose import sensitivity
from compressor.pipelines.projection import Target
from compressor.pipelines.report import Report
from compressor.pipelines.run import dry_run, run
from compressor.pipelines.show import Show
from compressor.recipe import Quant, Recipe
from tests.pipelines import mixtures

IDS = torch.randint(3, 320, (12, 48), generator=torch.Generator().manual_seed(0))
RTN = Quant(packer="rtn", bits=3, group=32)


def fresh(kind: str, **more: Any) -> Any:
    return experts.unfuse(mixtures.model(kind, **more))


def one_sided(kind: str = "qwen3_moe") -> Any:
    """Nearly all tokens go to experts 0 and 1 of block 0: the router's other rows speak against every token."""
    model = fresh(kind)
    router = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        model.model.embed_tokens.weight += 2.0  # a direction that all tokens share
        router[:2], router[2:] = 1.0, -1.0
    return model


def packed(kind: str, quant: Quant, place: Path) -> load.Loaded:
    """A dense folder of this kind, packed without data and written."""
    loaded = load.load(str(place), "cpu")
    write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, quant).packed()})
    loaded.rows, loaded.unpacked, _ = compress.compress(loaded.model, quant, torch.float16, None)
    return loaded


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS[:2], use_cache=False).logits


def test_plan_takes_experts_and_leaves_routers() -> None:
    plan = compress.plan(fresh("qwen2_moe"), RTN)
    assert len(plan.packed()) == 2 * (4 + 8 * 3 + 3)
    assert [t.name for row in plan.targets for t in row if t.reason] == [f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)]
    some = compress.plan(fresh("mixtral"), Quant(packer="rtn", group=32, ignore=(r"experts\.1\.",), layers={"re:experts.*w2": "w4g32"}))
    assert {t.quant.bits for t in some.packed() if t.name.endswith("w2")} == {4} and len(some.packed()) == 2 * (4 + 3 * 3)
    fused = compress.plan(fresh("llama4"), RTN)
    assert any("only its own code knows" in t.reason for row in fused.targets for t in row)
    routers = [t for row in fused.targets for t in row if t.name.endswith("router")]
    assert routers and all("router stays dense" in t.reason for t in routers)


def test_linears_that_compute_in_a_way_of_their_own_stay_dense() -> None:
    class Odd(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    model = fresh("qwen2_moe")
    model.model.layers[0].self_attn.o_proj.__class__ = Odd
    reasons = {t.name: t.reason for row in compress.plan(model, RTN).targets for t in row}
    assert "Odd computes in a way of its own" in reasons["model.layers.0.self_attn.o_proj"] and not reasons["model.layers.1.self_attn.o_proj"]


def test_one_pass_gathers_the_sums_of_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    step = calibrate.collect_step
    monkeypatch.setattr(compress, "collect_step", lambda *args: passes.append(len(args[2])) or step(*args))
    monkeypatch.setattr(calibrate, "LEAST", 0)
    model = fresh("mixtral")
    rows, _, _ = compress.compress(model, Quant(bits=3, group=32), torch.float16, IDS)
    assert passes == [1, 1, 4, 4] * 2  # q k v; o; gate and up of four experts; their downs
    mine = [row for row in rows if "experts" in row["name"]]
    assert sum(row["tokens"] for row in mine if row["name"].endswith(".w1")) == 2 * 2 * IDS.numel()  # two blocks, two experts a token
    assert all("tokens" not in row for row in rows if "experts" not in row["name"]) and {row["packer"] for row in rows} == {"gptq"}
    monkeypatch.setattr(calibrate, "SUMS", 3 * 4 * 64 * 64)  # three experts' sums of gate and up, one of down
    passes.clear()
    again = fresh("mixtral")
    compress.compress(again, Quant(bits=3, group=32), torch.float16, IDS)
    assert passes == [1, 1, 3, 1, 1, 1, 1, 1] * 2
    for name, layer in packed_linears(again).items():
        assert torch.equal(layer.words, packed_linears(model)[name].words), name


@pytest.mark.parametrize(("packer", "instead"), [("gptq", "rtn"), ("sketch", "kmeans"), ("squeezellm", "squeezellm")])
def test_experts_without_enough_tokens_are_packed_without_data(packer: str, instead: str) -> None:
    model = one_sided()
    rows, _, _ = compress.compress(model, Quant(bits=3, group=32, packer=packer, gpr=None), torch.float16, IDS)
    first = {row["name"]: row for row in rows if row["name"].startswith("model.layers.0.mlp.experts")}
    unseen = [row for row in first.values() if row["tokens"] == 0]
    assert len(first) == 24 and len(unseen) == 18 and {row["packer"] for row in unseen} == {instead}
    assert all(row["note"] for row in unseen) and all(row["error"] < 1 for row in unseen)
    assert first["model.layers.0.mlp.experts.0.up_proj"]["packer"] == packer
    found = coverage.coverage(rows)
    assert found["experts"] == 16 and found["unseen"] >= 6 and found["most_tokens"] == IDS.numel() and found["least_tokens"] == 0
    assert "saw no calibration tokens" in coverage.sentence(found) and bool(torch.isfinite(logits(model)).all())


def test_too_few_tokens_say_so_and_experts_that_did_not_run_are_grouped_like_others() -> None:
    stats = calibrate.LayerStats(4)
    stats.add(torch.ones(3, 4))
    stats.require(8)
    assert stats.hessian is None and stats.tokens == 3 and "only 3 calibration tokens" in stats.why
    groups = [["q", "k"], ["experts.2.w1", "experts.2.w3"], ["experts.2.w2"], ["experts.0.w1"], ["experts.0.w3"], ["experts.0.w2"], ["late"]]
    ups = [["experts.0.w1", "experts.0.w3"], ["experts.2.w1", "experts.2.w3"]]
    assert calibrate.places(groups) == [[["q", "k"]], ups, [["experts.0.w2"], ["experts.2.w2"]], [["late"]]]


def test_a_killed_packing_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    quant = Quant(bits=3, group=32)
    whole = fresh("qwen3_moe")
    rows, _, _ = compress.compress(whole, quant, torch.float16, IDS, tmp_path)
    (tmp_path / "block-00001.safetensors").unlink()
    again = fresh("qwen3_moe")
    rows_again, _, resumed = compress.compress(again, quant, torch.float16, IDS, tmp_path)
    assert resumed == 1 and [r["tokens"] for r in rows_again if "tokens" in r] == [r["tokens"] for r in rows if "tokens" in r]
    assert torch.equal(logits(again), logits(whole))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("mixtures")
    return {kind: mixtures.folder(place / kind, kind, tokenizer) for kind in ("mixtral", "qwen2_moe", "gpt_oss")}


@pytest.mark.parametrize(("kind", "packer"), [("mixtral", "rtn"), ("qwen2_moe", "rtn"), ("gpt_oss", "rtn"), ("mixtral", "sketch")])
def test_folders_read_back_and_plain_transformers_loads_those_it_can(
    kind: str, packer: str, dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    loaded = packed(kind, Quant(packer=packer, bits=3, group=16, gpr=1 if packer == "sketch" else None), dense[kind])
    assert write.write_folder(loaded, tmp_path)["verified"]
    monkeypatch.setattr(experts, "_proven", lambda *_: pytest.fail("nothing is proven where weights are still to come"))
    again = load.load(str(tmp_path), "cpu").model
    assert torch.equal(logits(again), logits(loaded.model)) and packed_linears(again).keys() == packed_linears(loaded.model).keys()
    told = servers.judge("transformers", folder_facts.facts(tmp_path), tmp_path)
    if kind == "gpt_oss":
        assert told.verdict == "no" and "leave packed ones random" in told.reasons[0]
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    if packer == "sketch":  # through compressor's hook, packed
        assert torch.equal(logits(theirs), logits(again))
        return
    assert told.verdict == "with conditions" and any("dtype of their scales" in why for why in told.reasons)
    gap = [a - b for a, b in zip(_experts(theirs, kind), _experts(again, kind), strict=True)]  # float16 of weights below 2
    assert max(float(d.abs().max()) for d in gap) <= 2**-11


def _experts(model: Any, kind: str) -> list[torch.Tensor]:
    """down of all experts, float32, by transformers' fused model or by ours."""
    names = {"mixtral": "block_sparse_moe.experts.{}.w2", "qwen2_moe": "mlp.experts.{}.down_proj"}[kind]
    out = []
    for block in model.model.layers:
        held = block.mlp.experts
        if isinstance(held, experts.Experts):
            out += [block.get_submodule(names.format(i)).packed().dequantize() for i in range(held.count)]
        else:
            out += [held.down_proj[i].detach().float() for i in range(held.num_experts)]
    return out


def test_experts_that_transformers_would_read_wrongly_are_told(dense: dict[str, Path], tmp_path: Path) -> None:
    mixed = packed("mixtral", Quant(packer="rtn", bits=4, group=32, layers={"re:layers.1.*experts": "w2g32"}), dense["mixtral"])
    write.write_folder(mixed, tmp_path)
    assert torch.equal(logits(load.load(str(tmp_path), "cpu").model), logits(mixed.model))
    config = load.read_config(tmp_path)["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(targets) < 9 and "model.layers.0.block_sparse_moe.gate" in config["ignore"]
    found = folder_facts.facts(tmp_path)
    assert "by one scheme" in servers.judge("transformers", found, tmp_path).reasons[0]
    assert "4 and 8 bits" in servers.judge("vllm", found, tmp_path).reasons[0]


@pytest.mark.parametrize("to", ["gptq", "bf16"])
def test_exports_work(to: str, dense: dict[str, Path], tmp_path: Path) -> None:
    loaded = packed("mixtral", Quant(packer="rtn", bits=4, group=32), dense["mixtral"])
    write.write_folder(loaded, tmp_path / "in")
    export.export(str(tmp_path / "in"), tmp_path / "out", Target(to, device="cpu", consumers=False))
    out = load.load(str(tmp_path / "out"), "cpu").model
    if to == "gptq":
        torch.testing.assert_close(logits(out), logits(loaded.model), rtol=1e-4, atol=1e-4)
    for name, layer in packed_linears(loaded.model).items():
        torch.testing.assert_close(out.get_submodule(name).weight[:], layer.packed().dequantize(), rtol=2**-8, atol=0)


def test_gguf_is_refused_before_any_work(dense: dict[str, Path], tmp_path: Path) -> None:
    write.write_folder(packed("mixtral", RTN, dense["mixtral"]), tmp_path / "in")
    with pytest.raises(ModelError, match="it is MixtralForCausalLM"):
        export.export(str(tmp_path / "in"), tmp_path / "out", Target("gguf", device="cpu", consumers=False))
    assert not (tmp_path / "out").exists()


def test_a_unit_of_the_choice_is_all_experts_of_a_block(tmp_path: Path) -> None:
    model = fresh("mixtral")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    ways = {"w2g32": Quant(bits=2, group=32), "w4g32": Quant(bits=4, group=32)}
    units = sensitivity.measure(model, compress.plan(model, Quant(group=32)), ways, torch.float16, IDS, None, tmp_path, lambda *_: None)
    assert [len(unit.layers) for unit in units] == [3, 1, 12] * 2
    assert all(unit.options[0].damage > unit.options[1].damage and unit.options[0].bits < unit.options[1].bits for unit in units)
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in before.items())


def test_a_run_tunes_packed_experts_and_its_folder_reads_back(dense: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The ship left the harbour at dawn. Below is an instruction that describes a task. " * 120)
    recipe = Recipe(model=str(dense["qwen2_moe"])).with_(
        device="cpu", quant__bits=3, quant__packer="gptq", quant__group=16, tune__method="peqa", tune__steps=3, tune__batch=1,
        data__data=str(text), data__outside=str(text), data__nsamples=4, data__seqlen=32, eval__max_tokens=256,
    )  # fmt: skip
    costs = dry_run(recipe, tmp_path / "dry", Show())
    assert costs["packed_layers"] == 62 and len(costs["left_dense"]) == 2
    document = run(recipe, tmp_path / "out")
    assert document["tuned"]["folder_bytes"] < 0.5 * document["dense"]["folder_bytes"]
    assert abs(costs["folder_bytes"] / document["tuned"]["folder_bytes"] - 1) < 0.1 + 2e4 / document["tuned"]["folder_bytes"]
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.experts["experts"] == 16 and report.experts["median_tokens"] > 0 and any("experts" in note for note in report.notes)
    page = render.page(report)
    assert "experts.*.down_proj (8)" in page and "mlp.experts.3.down_proj</td>" not in page
    first, second = (load.load(str(tmp_path / "out"), "cpu").model for _ in range(2))
    assert torch.equal(logits(first), logits(second)) and len(packed_linears(first)) == 62


def test_lora_beside_experts_and_its_targets_by_last_part(dense: dict[str, Path], tmp_path: Path) -> None:
    write.write_folder(packed("mixtral", RTN, dense["mixtral"]), tmp_path / "in")
    model = api.load(str(tmp_path / "in"), device="cpu")
    text = tmp_path / "text.txt"
    text.write_text("The ship left the harbour at dawn. " * 60)
    log = model.tune(str(text), "lora", seqlen=16, steps=2, batch=1, rank=2, targets="w2")
    assert all(step["loss"] is not None for step in log.curve)
    model.save(tmp_path / "out")
    again = load.load(str(tmp_path / "out"), "cpu")
    paths = {key.partition(".lora")[0] for key in peft.state(again.adapter)}
    assert len(paths) == 8 and all(path.endswith(".w2") for path in paths)
    assert torch.equal(logits(again.model), logits(model.model))
