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
from compressor.pipelines import render
from compressor.pipelines.pages import figures, layer_plots, run_plots
from compressor.pipelines.report import STATES, Report
from compressor.recipe import Recipe
from tests.pipelines.reports import full

EVIL = "<script>alert(1)</script> `x` | [a](http://e.example) $y$ {z} \x1b[31m\u202e\n---\n# h ```"


DRAWN: dict[str, str] = {}


@pytest.fixture(autouse=True)
def draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of equal names and numbers are drawn once for all tests here: most of a page's time goes there."""
    draw = figures.inline

    def inline(panel: figures.Panel) -> str:
        key = f"{panel.name} {panel.paint}"
        if key not in DRAWN:
            DRAWN[key] = draw(panel)
        return DRAWN[key]

    monkeypatch.setattr(figures, "inline", inline)


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
    titles = (
        "Results",
        "Tasks",
        "Divergence from the dense model",
        "Quality against size",
        "Choice of bits by layer",
        "Protocol",
        "Pruning",
        "Training",
    )
    for title in (*titles, "Packing error", "Bits per layer", "Layers", "Time and memory", "Samples", "Recipe"):
        assert f"<h2>{title}</h2>" in page
    quality, choice, training, pruning, layers = 3 * 3, 2, 2, 1, 1  # quality: two texts and a task against bits, bytes and speed; no memory is known
    assert page.count("<svg ") == page.count("</svg>") == quality + choice + training + pruning + layers
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
        "0.550 ± 0.015",
        "engine lm-eval 0.4.13",
        "87.50%",
        "Asked for: bits: 3.2.",
        "uniform w2g128",
        "All 12 packed linears have 3 bits in groups of 128.",
    ):
        assert text in page


def test_figures_follow_the_colours_of_the_page() -> None:
    svg = "".join(figures.inline(panel) for panel in render.figures_of(full()))
    assert not re.findall(r"(?:fill|stroke): ?#(?!fff)", svg)
    assert set(re.findall(r"var\(--(\w+)\)", svg)) >= {"ink", "muted", "dense", "packed", "tuned", "accent"}
    assert "mlp.experts.*.up_proj" in svg and not re.search(r"<g id=", svg)
    assert set(re.findall(r"--(\w+)\)", svg)) <= set(figures.LIGHT) and set(figures.LIGHT) == set(figures.DARK)


def test_layers_without_blocks_become_bars() -> None:
    report = full()
    report.layers = [{"name": f"part{'abc'[i]}", "error": 0.1 * i} for i in range(3)]
    svg = figures.inline(layer_plots.errors(report)[0])
    assert "parta" in svg and "faint" not in svg


def test_bits_are_drawn_only_where_they_differ() -> None:
    report = full()
    assert layer_plots.bits(report) == []
    report.layers[0] |= {"bits": 4, "group": 64}
    assert "4 g64" in figures.inline(layer_plots.bits(report)[0]) and "packed linears have" not in render.page(report)


def test_every_measured_state_is_a_point_of_every_panel_that_knows_its_size() -> None:
    report = full()
    report.peak_bytes |= {"evaluate dense": 3e9, "evaluate packed": 3e9}  # of the process: says more of the order of stages than of models
    assert not [panel.name for panel in run_plots.quality(report) if "memory" in panel.name]
    report.peak_bytes |= {"evaluate dense_gpu": 1e9, "evaluate tuned_gpu": 2e9}
    points = {panel.name: set(re.findall(r"<title>(\w+): ", figures.inline(panel))) for panel in run_plots.quality(report)}
    assert points["perplexity-domain-by-bits"] == points["perplexity-outside-by-size"] == {"dense", "pruned", "packed", "tuned"}
    assert points["task-0-by-size"] == {"dense", "packed", "tuned"} and points["perplexity-domain-by-memory"] == {"dense", "tuned"}


def test_numbers_that_no_axis_holds_are_left_out() -> None:
    report = full()
    report.dense["domain"]["perplexity"], report.packed["domain"]["perplexity"], report.tuned["bits_per_weight"] = 1e300, 1e-300, 10**400
    report.choice["uniform"][0]["loss"] = report.training["evals"][0]["perplexity"] = 1e250
    report.layers[0]["error"] = 1e300
    drawn = {panel.name: figures.inline(panel) for panel in render.figures_of(report)}
    assert set(re.findall(r"<title>(\w+): ", drawn["perplexity-domain-by-bits"])) == {"pruned"}
    assert "w2g128" not in drawn["choice-by-bits"] and "training-perplexity" not in drawn and "from 0 (faint) to 0.06" in drawn["error-by-layer"]


def test_error_bars_are_those_of_the_paired_difference() -> None:
    report = full()
    paint: Any = next(p.paint for p in run_plots.quality(report) if p.name == "perplexity-domain-by-bits")
    errors = {state: error for state, _, _, error in paint.keywords["points"]}
    assert errors == {"dense": 0.0, "pruned": 0.0, "packed": 6.4522 * 0.02, "tuned": 5.9 * 0.02}
    page = render.page(report)
    assert "4,096 tokens in 8 windows" in page and "<td>0.21 ± 0.02</td>" in page and "<td>0.21 ± 0.01</td>" in page


def test_hostile_text_stays_text() -> None:
    report = full()
    report.model["name"] = report.command = EVIL
    report.samples = [dict.fromkeys(("prompt", *STATES), EVIL)]
    report.notes, report.recipe["model"] = [EVIL], EVIL
    report.protocol["domain"] = {"name": EVIL, "data_sha256": EVIL, EVIL: EVIL}
    report.layers[0] |= {"name": f"m.0.{EVIL}", "note": EVIL, "packer": EVIL}
    report.unpacked[0]["reason"] = report.export["format"] = EVIL
    report.seconds[EVIL] = 1.0
    report.packed["tasks"] = {EVIL: {"mean": 1.0, "value": 0.5, "metric": EVIL, "engine": EVIL}}
    report.choice = {"target": {EVIL: EVIL}, "solver": {EVIL: EVIL}, "uniform": [{"spec": EVIL, "bits_per_weight": 3.0, "loss": 1.0}]}
    report.choice["units"] = [{"layers": [EVIL], "chosen": EVIL, "options": [{"spec": EVIL, "bits": 3.0, "damage": 0.1}]}]
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
    report.choice = {
        "target": 3,
        "predicted": "damaged",
        "reached": {"loss": None},
        "uniform": [3, {}],
        "units": [{}, {"layers": 3, "options": [{}]}],
    }
    report.dense["tasks"], report.dense["divergence"] = {"boolq": None, "arc": {"value": "x"}}, {"mean": "x"}
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


def test_card_names_tasks_and_the_choice_of_bits() -> None:
    card = cards.card(full())
    assert "| boolq | 0.620 ± 0.015 | 0.550 ± 0.015 | 0.600 ± 0.015 |" in card and "Perplexity and the tasks above are the only qualities" in card
    assert "Bits were chosen layer by layer for bits: 3.2; reached: 3.190 bits per weight, loss 0.1200." in card
    report = full()
    report.choice = {}
    for state in STATES:
        getattr(report, state).pop("tasks", None)
    assert "chosen layer by layer" not in cards.card(report) and "safety and tasks were not" in cards.card(report)


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
    assert page.count("<td>float zeros</td>") == 3 + 1 and page.count("<td>symmetric</td>") == 6 + 1
    assert page.count("experts.*.up_proj (2)</td>") == 3  # two experts' rows in one
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
    page = render.page(report)
    DRAWN.clear()
    assert page == render.page(again)
    assert cards.card(report) == cards.card(again)


def test_many_blocks_and_large_ranges() -> None:
    report = full(blocks=80)
    report.packed["domain"]["perplexity"] = 5e6
    report.layers.append({"name": "lm_head", "error": 0.5})
    report.training["curve"] = [{"step": i, "loss": 1.0} for i in range(5000)]
    page = render.page(report)
    assert "5e+06" in page and "outside the blocks: lm_head 0.5" in page and len(page) < 1_500_000
