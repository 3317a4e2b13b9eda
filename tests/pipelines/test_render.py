"""The page, the card and the terminal table: complete, equal in their numbers, safe with hostile text, the same every time."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from compressor.pipelines import card as cards
from compressor.pipelines import plots, render
from compressor.pipelines.report import STATES, Report
from compressor.recipe import Recipe

EVIL = "<script>alert(1)</script> `x` | [a](http://e.example) $y$ {z} \x1b[31m\u202e\n---\n# h ```"


def full(blocks: int = 3) -> Report:
    out = Report(created="2025-01-01T00:00:00+00:00", command="compressor run tiny")
    out.recipe = Recipe().with_(tune__method="peqa").to_dict()
    out.model = {"name": "some-model", "source": "org/some-model", "parameters": 1_000_000, "packed_parameters": 800_000, "dense_bytes": 2_000_000}
    out.model |= {"dense_dtype": "float16", "architecture": "LlamaForCausalLM"}
    text = {"name": "python", "data_sha256": "ab" * 32, "window": 512, "stride": 512, "tokens": 4096}
    out.protocol = {"domain": text, "outside": text | {"name": "other", "data_sha256": "cd" * 32}}
    for state, inside, outside, bits, folder in (
        ("dense", 5.68129, 3.2, 16.0, 2_000_000),
        ("pruned", 6.1, 3.5, 16.0, 1_500_000),
        ("packed", 6.4522, 3.7, 3.125, 450_000),
        ("tuned", 5.9, 3.75, 3.125, 450_000),
    ):
        texts = {"domain": {"perplexity": inside, "tokens": 4096, "tokens_per_second": 321.5}, "outside": {"perplexity": outside, "tokens": 4096}}
        setattr(out, state, texts | {"bits_per_weight": bits, "folder_bytes": folder, "ratio": 2_000_000 / folder})
    kinds = ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
    row = {"shape": [64, 256], "bits": 3, "group": 128, "symmetric": True, "packer": "gptq", "damp": 0.01, "seconds": 0.5, "note": None}
    out.layers = [row | {"name": f"model.layers.{b}.{k}", "error": 0.01 * (b + i + 1)} for b in range(blocks) for i, k in enumerate(kinds)]
    out.unpacked = [{"name": "lm_head", "shape": [512, 64], "reason": "output embeddings stay dense"}]
    out.training = {
        "curve": [{"step": i, "loss": 2 - i / 100, "lr": 1e-3} for i in range(1, 41)],
        "evals": [{"step": 20, "perplexity": 6.0}],
        "notes": [],
    }
    out.pruning = {"method": "loraprune", "ratio": 0.25, "prunable": 800_000, "heads": 2, "ffn": 256, "curve": out.training["curve"]}
    out.seconds, out.peak_bytes = {"compress": 12.5, "tune": 400.0}, {"compress": 10_000_000, "tune": 20_000_000, "tune_gpu": 30_000_000}
    out.samples = [{"prompt": "def f", "dense": "(x):", "packed": "(y):", "tuned": "(z):"}]
    out.export = {"format": "compressed-tensors pack-quantized", "verified": True, "files": {"model.safetensors": 450_000}}
    return out


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.seen


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def shown(report: Report) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(render.summary(report))
    return file.getvalue()


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    render.write_html(full(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not {tag for tag, _ in tags(page)} & {"script", "link", "img", "image", "iframe", "object", "embed", "base", "a"}
    for _, attrs in tags(page):
        for key, value in attrs.items():
            assert not key.startswith("on") and key != "src"
            assert key not in ("href", "xlink:href") or str(value).startswith("#")
    assert re.search(r"https?://|@import|url\((?!#)", page) is None
    assert "default-src 'none'" in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_page_shows_every_section() -> None:
    page = render.page(full())
    for title in ("Results", "Protocol", "Quality against size", "Training", "Packing error", "Layers", "Time and memory", "Samples", "Recipe"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg ") == 4 and page.count("</svg>") == 4
    for text in (
        "ab" * 32,
        "5.681",
        "6.452",
        "4.44×",
        "output embeddings stay dense",
        "6 min 40 s",
        "30.00 MB",
        "(z):",
        "packer: gptq",
        "model.layers.2.mlp.down_proj",
    ):
        assert text in page


def test_plots_follow_the_colours_of_the_page() -> None:
    svg = "".join(str(draw(full())) for draw in (plots.quality, plots.training, plots.layers))
    assert not re.findall(r"(?:fill|stroke): ?#(?!fff)", svg)
    assert set(re.findall(r"var\(--(\w+)\)", svg)) >= {"ink", "muted", "dense", "packed", "tuned", "accent"}
    assert "mlp.experts.*.up_proj" in svg and not re.search(r"<g id=", svg)


def test_layers_without_blocks_become_bars() -> None:
    report = full()
    report.layers = [{"name": f"part{'abc'[i]}", "error": 0.1 * i} for i in range(3)]
    svg = str(plots.layers(report))
    assert "parta" in svg and "faint" not in svg


def test_hostile_text_stays_text() -> None:
    report = full()
    report.model["name"] = report.command = EVIL
    report.samples = [dict.fromkeys(("prompt", *STATES), EVIL)]
    report.notes, report.recipe["model"] = [EVIL], EVIL
    report.protocol["domain"] = {"name": EVIL, "data_sha256": EVIL, EVIL: EVIL}
    report.layers[0] |= {"name": f"m.0.{EVIL}", "note": EVIL, "packer": EVIL}
    report.unpacked[0]["reason"] = report.export["format"] = EVIL
    report.seconds[EVIL] = 1.0
    page, card, text = render.page(report), cards.card(report), shown(report)
    assert "script" not in {tag for tag, _ in tags(page)} and "<script" not in page and "&lt;script&gt;" in page
    assert not re.search("[\x1b\u202e]", page + card) and "\u202e" not in text
    assert set(front_matter(card)) == {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}
    outside_fences = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card.split("---\n", 2)[2], flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_fences and not re.search(r"(?<!\\)\]\(", outside_fences) and "://" not in outside_fences
    assert outside_fences.count("\n# ") + outside_fences.startswith("# ") == 1


@pytest.mark.parametrize("gone", [name for name in full().to_dict() if name not in ("compressor", "created", "resumed")])
def test_any_section_may_be_missing(gone: str) -> None:
    values = full().to_dict()
    del values[gone]
    report = Report.from_dict(values)
    assert "</html>" in render.page(report)
    assert front_matter(cards.card(report))["library_name"] == "transformers"
    assert shown(report)


def test_a_run_that_stopped_midway_renders() -> None:
    assert "</html>" in render.page(Report()) and "# a model" in cards.card(Report()) and shown(Report()) is not None
    report = full()
    report.tuned = report.export = report.training = {}
    report.packed = {"domain": {"perplexity": None}, "outside": None}
    report.layers = [{}, "damaged", {"name": "x", "error": None}, {"shape": 3, "bits": [3], "packer": ["a"]}]
    report.samples, report.unpacked = [{}, None, {"prompt": "only"}], [None, {}]
    page = render.page(report)
    assert "only" in page and "5.681" in page and "–" in page
    assert "–" in cards.card(report) and "–" in shown(report)


def test_card_front_matter() -> None:
    front = front_matter(cards.card(full()))
    assert front["base_model"] == "org/some-model" and front["base_model_relation"] == "quantized"
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert {"compressor", "compressed-tensors", "3-bit", "gptq", "peqa"} <= set(front["tags"])


@pytest.mark.parametrize("source", ["/data/org/model", "tiny", "../org/model", "org/a/b", None])
def test_only_a_hub_id_is_a_base_model(source: str | None) -> None:
    report = full()
    report.model |= {"source": source, "name": "/data/private/model"}
    card = cards.card(report)
    assert "base_model" not in front_matter(card) and "private" not in card and "# model, 25.0% pruned, 3 bits" in card


def test_card_says_how_to_load() -> None:
    report = full()
    card = cards.card(report)
    assert '"compressed-tensors>=0.18"' in card and "3-bit weights need" in card and "dequantize" not in card
    assert "compressor eval FOLDER" in card and "compressor generate FOLDER" in card
    for row in report.layers:
        row |= {"symmetric": False, "bits": 4}
    card = cards.card(report)
    assert "quantization_config=CompressedTensorsConfig(dequantize=True)" in card and "3-bit weights need" not in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")
    report.export["format"] = "gguf"
    assert "from_pretrained" not in cards.card(report)


def test_card_of_a_sketch_says_what_teaches_transformers_its_format() -> None:
    report = full()
    for row in report.layers:
        row |= {"symmetric": None, "packer": "sketch", "group": 256}
    report.export["format"] = "compressor table"
    card = cards.card(report)
    assert "import compressor" in card and "compressed-tensors" not in card and "bits per weight, with tables" in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")
    assert "<td>table</td>" in render.page(report)


@pytest.mark.parametrize(("kind", "rank", "words"), [
    ("lora", 8, "vllm serve FOLDER --enable-lora --max-lora-rank 8 --lora-modules tuned=FOLDER/adapter"), ("rslora", 65, "--max-lora-rank 128 "),
    ("dora", 8, "Servers take adapters of the kind LoRA only, and this one is dora."),
])  # fmt: skip
def test_card_says_who_serves_an_adapter(kind: str, rank: int, words: str) -> None:
    report = full()
    report.recipe = Recipe().with_(tune__method=kind, tune__rank=rank).to_dict()
    report.export["adapter_bytes"] = 1_230_000
    card = cards.card(report)
    assert words in card and ("vllm" in card) is (kind != "dora")
    assert "the folder `adapter`, 1.23 MB" in card and 'compressor.load("FOLDER").model' in card and "PeftModel" not in card
    report.model["architecture"] = "BertForTokenClassification"
    assert "vllm" not in cards.card(report) and "load.load_packed" in cards.card(report)
    report.export["format"] = "compressor sparse"
    assert "PeftModel.from_pretrained(model, folder" in cards.card(report) and "vllm" not in cards.card(report)


def test_card_of_an_absorbed_adapter_survives_damage() -> None:
    report = full()
    report.recipe = Recipe().with_(tune__method="lora").to_dict()
    report.training["absorb"] = {"absorbed": True, "before": 6.0, "after": None, "rise": None}
    assert "perplexity 6.000 with the adapter beside, – absorbed, logits change by – at most" in cards.card(report)
    report.training["absorb"] = {"absorbed": False}
    assert "absorbed" not in cards.card(report)


def test_the_layer_table_names_float_zeros_and_errors_with_paths() -> None:
    report = full()
    assert "error with its path" not in render.page(report) and "<td>float zeros</td>" not in render.page(report)
    report.layers[0]["start_error"] = 0.0042
    report.recipe = Recipe().with_(tune__method="qalora", tune__targets="q_proj").to_dict()
    page = render.page(report)
    assert "<th>error with its path</th>" in page and "<td>0.0042</td>" in page
    assert page.count("<td>float zeros</td>") == 3 + 1 and page.count("<td>symmetric</td>") == 9 + 1
    report.tuned = {}
    assert "<td>float zeros</td>" not in render.page(report)


def test_numbers_agree_everywhere() -> None:
    report = full()
    card, page, text = cards.card(report), render.page(report), shown(report)
    rows = {cells[0]: cells for line in card.splitlines() if line.startswith("| ") and (cells := [c.strip() for c in line.strip("|").split("|")])}
    for state in STATES:
        values = getattr(report, state)
        wanted = [values["domain"]["perplexity"], values["outside"]["perplexity"], values["bits_per_weight"], values["folder_bytes"] * 8 / 1_000_000]
        assert [float(c) for c in rows[state][1:5]] == [round(w, 3) for w in wanted]
        assert rows[state][6] == f"{values['ratio']:.2f}×"
        for cell in rows[state]:
            assert cell in page and cell in text
    for text_name in ("domain", "outside"):
        assert report.protocol[text_name]["data_sha256"] in card
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])
    assert recipe == report.recipe


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    report = full()
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert render.page(report) == render.page(again)
    assert cards.card(report) == cards.card(again)


def test_many_blocks_and_large_ranges() -> None:
    report = full(blocks=80)
    report.packed["domain"]["perplexity"] = 5e6
    report.layers.append({"name": "lm_head", "error": 0.5})
    report.training["curve"] = [{"step": i, "loss": 1.0} for i in range(5000)]
    page = render.page(report)
    assert "5e+06" in page and "outside the blocks: lm_head 0.5" in page and len(page) < 1_500_000
