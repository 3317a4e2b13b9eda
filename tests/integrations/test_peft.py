"""peft on packed linears: in a user's own script, in the training loop, in folders."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.errors import ModelError, RecipeError
from compressor.integrations import attach, fused
from compressor.integrations import peft as adapters
from compressor.linear import packed_linears
from compressor.packed import PackedWeight
from compressor.recipe import Tune
from compressor.tune.batches import CausalLM
from compressor.tune.loop import train
from tests.tolerances import error
from tests.tune.conftest import VOCAB, dense_llama

LEAVES = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, VOCAB, (4, 16), generator=torch.Generator().manual_seed(3))
SAME: dict[str, Any] = {"target_modules": LEAVES, "task_type": "CAUSAL_LM"}
METHODS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, **SAME),
    "rsLoRA": peft.LoraConfig(r=4, use_rslora=True, **SAME),
    "LoRA, gaussian start": peft.LoraConfig(r=4, init_lora_weights="gaussian", **SAME),
    "LoRA, orthogonal start": peft.LoraConfig(r=4, init_lora_weights="orthogonal", **SAME),
    "LoRA, EVA start": peft.LoraConfig(r=4, init_lora_weights="eva", eva_config=peft.EvaConfig(), **SAME),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, **SAME),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=1, tfinal=4, **SAME),
    "LoHa": peft.LoHaConfig(r=2, **SAME),
    "LoKr": peft.LoKrConfig(r=2, **SAME),
    "IA3": peft.IA3Config(feedforward_modules=["down_proj"], **SAME),
    "OFT": peft.OFTConfig(r=0, oft_block_size=16, **SAME),
    "BOFT": peft.BOFTConfig(boft_block_size=16, **SAME),
    "HRA": peft.HRAConfig(r=4, **SAME),
    "MiSS": peft.MissConfig(r=4, **SAME),
    "RoAd": peft.RoadConfig(group_size=16, **SAME),
    "WaveFT": peft.WaveFTConfig(n_frequency=50, **SAME),
    "FourierFT": peft.FourierFTConfig(n_frequency=50, scaling=1.0, **SAME),
    "SHiRA": peft.ShiraConfig(r=4, **SAME),
    "VeRA": peft.VeraConfig(r=8, **SAME | {"target_modules": ["q_proj"]}),
    "RandLoRA": peft.RandLoraConfig(r=8, **SAME | {"target_modules": ["q_proj"]}),
    "C3A": peft.C3AConfig(block_size=16, **SAME | {"target_modules": ["q_proj"]}),
    "VB-LoRA": peft.VBLoRAConfig(r=4, num_vectors=32, vector_length=16, topk=2, **SAME),
    "aLoRA": peft.LoraConfig(r=4, alora_invocation_tokens=[int(IDS[0, 0])], **SAME),
    "LoRA with biases": peft.LoraConfig(r=4, lora_bias=True, **SAME),
    "BEFT": peft.BeftConfig(**SAME),
    "DEFT": peft.DeftConfig(r=4, **SAME),
    "DeLoRA": peft.DeloraConfig(r=4, **SAME),
    "FRoD": peft.FrodConfig(progressbar=False, **SAME | {"target_modules": ["q_proj"]}),
    "GraLoRA": peft.GraloraConfig(r=4, alpha=8, **SAME),
    "HiRA": peft.HiraConfig(r=4, **SAME),
    "Lily": peft.LilyConfig(r=4, **SAME),
    "PEANuT": peft.PeanutConfig(r=4, **SAME),
    "Poly": peft.PolyConfig(r=4, n_tasks=1, **SAME),
    "PSOFT": peft.PsoftConfig(r=4, psoft_alpha=4, **SAME),
    "PVeRA": peft.PveraConfig(r=8, **SAME | {"target_modules": ["q_proj"]}),
    "Supertuning": peft.SupertuningConfig(**SAME),
    "TinyLoRA": peft.TinyLoraConfig(r=2, u=16, **SAME),
    "UniLoRA": peft.UniLoraConfig(r=4, theta_d_length=64, **SAME),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[1, 2, 3], target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "LayerNorm tuning": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "multitask prompt tuning": peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, task_type="CAUSAL_LM"),
    "CPT": peft.CPTConfig(
        num_virtual_tokens=4, cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4], task_type="CAUSAL_LM"
    ),
    "Cartridge": peft.CartridgeConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
DECODE = ("DoRA", "HRA", "HiRA", "PEANuT", "SHiRA", "Supertuning")  # whose forward pass reads the weight
PROMPTS = ("prompt tuning", "prefix tuning", "P-tuning", "multitask prompt tuning", "CPT", "Cartridge")
FAR_START = ("FourierFT", "C3A", "VB-LoRA", "UniLoRA", *PROMPTS)  # peft starts them away from the base, of dense ones too
NO_MERGE = (
    "LayerNorm tuning",
    "trainable tokens",
    "BEFT",
    "Lily",
    "aLoRA",
    "Poly",
    *PROMPTS,
)  # nothing to merge, or never merged
TASK_IDS = ("Poly", "multitask prompt tuning")
REFUSED = {
    "PiSSA": peft.LoraConfig(r=4, init_lora_weights="pissa", **SAME),
    "PiSSA, fast": peft.LoraConfig(r=4, init_lora_weights="pissa_niter_2", **SAME),
    "OLoRA": peft.LoraConfig(r=4, init_lora_weights="olora", **SAME),
}


def save(model: Any, folder: Path) -> int:
    return attach.write(folder, attach.plain(model) | {attach.BASE: "base"}, adapters.state(model))


def logits(model: Any, ids: Tensor = IDS, **more: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def codes(model: nn.Module) -> list[Tensor]:
    return [t for layer in packed_linears(model).values() for t in (layer.words, layer.learned)]


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_starts_at_the_base_trains_saves_and_reloads(
    packed_llama, sketched_llama, tmp_path: Path, monkeypatch, name: str, tables: bool
) -> None:
    if tables and name not in ("LoRA", "DoRA", "IA3", "prompt tuning"):
        return  # one of each way to work is enough
    base = (sketched_llama if tables else packed_llama)()
    before, start, read = [t.clone() for t in codes(base)], logits(base), []
    decode = PackedWeight.dequantize
    monkeypatch.setattr(PackedWeight, "dequantize", lambda *a: read.append(1) or decode(*a))
    more = {"task_ids": torch.zeros(len(IDS), dtype=torch.long)} if name in TASK_IDS else {}
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(METHODS[name]))
    if name == "LoRA, EVA start":
        peft.initialize_lora_eva_weights(model, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 2, show_progress_bar=False)
    read.clear()
    if name not in FAR_START:
        assert error(logits(model, **more), start) < 1e-4
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3), []
    model.train()
    for step in range(6):
        loss = model(input_ids=IDS, labels=IDS, **more).loss
        loss.backward()
        optimizer.step()
        if name == "AdaLoRA":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses
    assert bool(read) == (name in DECODE), "which methods decode weights in each pass is said in docs/methods.md"
    after = logits(model, **more)
    assert all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True)), "codes and values are not what is trained"
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again, **more), after)
    if name not in NO_MERGE:
        with pytest.raises(ModelError, match="cannot be changed in place"):
            model.merge_and_unload()


@pytest.mark.parametrize("name", REFUSED)
def test_starts_that_would_write_into_the_weight_are_refused(packed_llama, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be changed in place"):
        peft.get_peft_model(packed_llama(), REFUSED[name])


def test_corda_which_would_write_into_the_weight_is_refused(packed_llama) -> None:
    model = packed_llama()
    for layer in packed_linears(model).values():
        u, sigma, v = torch.linalg.svd(layer.packed().dequantize(), full_matrices=False)
        layer.eigens = SimpleNamespace(S_WC=sigma[:4], U_WC=u[:, :4], V_WC=v[:4].T)  # what peft's preprocess_corda leaves there
    with pytest.raises(ModelError, match="cannot be changed in place"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights="corda", corda_config=CordaConfig(), **SAME))


def test_lora_of_a_packed_weight_is_that_of_the_decoded_one(packed_llama) -> None:
    packed, dense = packed_llama(), dense_llama()
    for name, layer in packed_linears(packed).items():
        dense.get_submodule(name).weight.data = layer.packed().dequantize()
    found = []
    for base in (packed, dense):
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, **SAME))
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == len(found[1]) == 16
    assert all(error(a, b) < 1e-4 for a, b in zip(*found, strict=True) if float(b.norm()) > 0)


# --- the tuner ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paths_in_one_pass_are_those_of_peft(packed_llama, sketched_llama, monkeypatch, tables: bool, dtype: torch.dtype) -> None:
    passes, found, real = [], [], fused.PackedLinear.forward
    monkeypatch.setattr(fused.PackedLinear, "forward", lambda self, x, low=None: passes.append(low is not None) or real(self, x, low))
    for fuse in (True, False):
        model = (sketched_llama if tables else packed_llama)().to(dtype)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **SAME)
        torch.manual_seed(5)
        made = peft.get_peft_model(model, fused.fuse(config) if fuse else config).eval()
        passes.clear()
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert sum(passes) == (8 if fuse else 0) and len(passes) == 14
        found.append([loss.detach().float(), *(p.grad.float() for p in made.parameters() if p.requires_grad)])
    assert len(found[0]) == 17 and all(error(a, b) < (1e-5 if dtype == torch.float32 else 0.1) for a, b in zip(*found, strict=True))


def test_what_is_no_plain_path_goes_the_way_of_peft(packed_llama) -> None:
    for config in ({"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {}):
        both = []
        for fuse in (fused.fuse, lambda c: c):
            torch.manual_seed(5)
            made = peft.get_peft_model(packed_llama(), fuse(peft.LoraConfig(r=4, init_lora_weights=not config, **config, **SAME))).train()
            torch.manual_seed(6)
            with torch.no_grad():
                both.append(made(input_ids=IDS).logits)
                if not config:
                    made.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, **SAME))
                    made.base_model.set_adapter(["default", "second"])
                    both[-1] = made(input_ids=IDS).logits
                    with made.disable_adapter():
                        assert torch.equal(made(input_ids=IDS).logits, logits(packed_llama()))
        assert error(*both) < 1e-5


def run(model: Any, kind: str, windows: tuple[Tensor, Tensor], folder: Path | None = None, on_step: Any = None, **keys: Any) -> tuple[Any, Any]:
    options = Tune(**{"method": kind, "steps": 10, "lr": 5e-3, "batch": 4, "warmup": 0.0, "eval_every": 0, "checkpoint_every": 2, "rank": 4} | keys)
    tuner = adapters.KINDS[kind](options)
    parameters = tuner.attach(model, None, options.steps or 0)
    log = train(model, parameters, CausalLM(*windows), options, 3, folder, "a", None, on_step, tuner.pruner)
    tuner.detach(model)
    return tuner, log


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_every_kind_trains_in_the_loop_and_comes_off_again(packed_llama, windows, tmp_path: Path, kind: str) -> None:
    model, base = packed_llama(), packed_llama()
    start = logits(base)
    tuner, log = run(model, kind, windows, steps=30)
    assert log.curve[-1]["loss"] < log.curve[0]["loss"] and log.notes == []
    tuned = logits(model)
    assert error(tuned, start) > 1e-3
    size = save(tuner.model, tmp_path / "adapter")
    assert size == sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir())
    assert json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())["base_model_name_or_path"] == "base"
    assert torch.equal(logits(peft.PeftModel.from_pretrained(packed_llama(), tmp_path / "adapter")), tuned), "peft itself reads the folder"
    adapters.strip(model)
    assert torch.equal(logits(model), start)
    assert packed_linears(model).keys() == packed_linears(base).keys()
    attach.load(base, tmp_path / "adapter")
    assert torch.equal(logits(base), tuned)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(packed_llama, windows, tmp_path: Path, kind: str) -> None:
    class Killed(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 7:
            raise Killed

    whole, one = run(packed_llama(), kind, windows, dropout=0.1)
    with pytest.raises(Killed):
        run(packed_llama(), kind, windows, tmp_path, kill, dropout=0.1)
    again, two = run(packed_llama(), kind, windows, tmp_path, dropout=0.1)
    assert two.resumed_from == 6 and two.curve == one.curve
    assert all(torch.equal(a, b) for a, b in zip(adapters.state(whole.model).values(), adapters.state(again.model).values(), strict=True))


def test_adalora_ends_with_its_budget(packed_llama, windows) -> None:
    tuner, _ = run(packed_llama(), "adalora", windows, steps=30)
    left = sum(int(mask.sum()) for mask in tuner.pruner.kept.values())
    assert left <= 4 * len(tuner.pruner.kept) < sum(mask.numel() for mask in tuner.pruner.kept.values())
    assert all(not bool(tuner.pruner.paths[name][~mask].any()) for name, mask in tuner.pruner.kept.items())


def test_starts_set_the_product_of_the_path(packed_llama, windows) -> None:
    model, name = packed_llama(), "model.layers.1.mlp.up_proj"
    a, b = torch.randn(4, 64), torch.randn(96, 4)
    dense = model.get_submodule(name).packed().dequantize()
    tuner = adapters.KINDS["lora"](Tune(method="lora", rank=4, alpha=12.0))
    tuner.attach(model, {name: (a, b)})
    x = torch.randn(7, 64)
    assert error(model.get_submodule(name)(x), x @ (dense + b @ a).T) < 1e-5


def test_targets_and_models_that_do_not_fit_are_refused(packed_llama) -> None:
    with pytest.raises(ModelError, match="no packed linear layers"):
        adapters.KINDS["lora"](Tune(method="lora")).attach(dense_llama())
    with pytest.raises(RecipeError, match="no packed linear is named nose: choose targets among down_proj"):
        adapters.KINDS["lora"](Tune(method="lora", targets="q_proj,nose")).attach(packed_llama())
    chosen = adapters.KINDS["lora"](Tune(method="lora", targets="q_proj, v_proj")).attach(packed_llama())
    assert len(chosen) == 8 and all("q_proj" in name or "v_proj" in name for name in chosen)


DAMAGES: dict[str, Any] = {
    "no weights": lambda f: (f / adapters.WEIGHTS).unlink(),
    "pickled weights": lambda f: (f / adapters.WEIGHTS).rename(f / "adapter_model.bin"),
    "noise": lambda f: (f / adapters.WEIGHTS).write_bytes(b"noise" * 100),
    "no configuration": lambda f: (f / adapters.CONFIG).unlink(),
    "strange configuration": lambda f: (f / adapters.CONFIG).write_text('{"peft_type": "MAGIC"}'),
    "another rank": lambda f: (f / adapters.CONFIG).write_text((f / adapters.CONFIG).read_text().replace('"r": 4', '"r": 8')),
    "a list": lambda f: (f / adapters.CONFIG).write_text("[]"),
    "a module to import": lambda f: (f / adapters.CONFIG).write_text('{"megatron_config": {"a": 1}, "megatron_core": "os", "peft_type": "LORA"}'),
    "a pattern": lambda f: say(f, target_modules="(.*)*(.*)*q_proj_x"),
    "a rank for giants": lambda f: say(f, r=200_000),
    "biases of the base": lambda f: say(f, bias="all"),
    "a start in the weight": lambda f: say(f, init_lora_weights="olora"),
    "more modules": lambda f: say(f, modules_to_save=["embed_tokens"]),
    "a tensor of the base": lambda f: change(f, lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)})),
    "not finite": lambda f: change(f, lambda t: next(iter(t.values())).fill_(float("nan"))),
    "a tensor less": lambda f: change(f, lambda t: t.pop(next(iter(t)))),
    "a tensor more": lambda f: change(f, lambda t: t.update({"base_model.model.nose.lora_A.weight": torch.ones(4, 64)})),
}


def say(folder: Path, **keys: Any) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change(folder: Path, how: Any) -> None:
    tensors = load_file(folder / adapters.WEIGHTS)
    how(tensors)
    save_file(tensors, folder / adapters.WEIGHTS)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapters_give_one_sentence(packed_llama, windows, tmp_path: Path, name: str) -> None:
    save(run(packed_llama(), "lora", windows, steps=2)[0].model, tmp_path / "a")
    DAMAGES[name](tmp_path / "a")
    base = packed_llama()
    with pytest.raises(ModelError) as caught:
        attach.load(base, tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)
    adapters.strip(base)
    assert torch.equal(logits(base), logits(packed_llama())), "the base was changed"


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_half_an_adapter_is_refused(packed_llama, windows, tmp_path: Path, kind: str) -> None:
    save(run(packed_llama(), kind, windows, steps=2, **{} if kind != "ia3" else {"rank": 8})[0].model, tmp_path / "a")
    change(tmp_path / "a", lambda t: [t.pop(key) for key in sorted(t)[::2]])
    with pytest.raises(ModelError, match="does not fit this model"):
        attach.load(packed_llama(), tmp_path / "a")


def test_an_adapter_of_another_model_is_refused(packed_llama, windows, tmp_path: Path) -> None:
    save(run(packed_llama(), "lora", windows, steps=2)[0].model, tmp_path / "a")
    with pytest.raises(ModelError, match="cannot attach this adapter|does not fit this model"):
        attach.load(packed_llama(num_key_value_heads=4), tmp_path / "a")
