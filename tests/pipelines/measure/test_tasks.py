"""Scores of task files and their errors: as counted by hand, without a network, and nothing but the result on stdout."""

import json
import math
import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from compressor.errors import DataError, MissingExtra, RecipeError
from compressor.pipelines import load
from compressor.pipelines.measure import task_files, tasks

WORDS = ["ship", "harbour", "dawn", "task", "response", "question", "answer", "user"]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"question": f"Which {rng.choice(WORDS)}?", "choices": rng.sample(WORDS, 3), "answer": rng.randrange(3)} for _ in range(count)]


@pytest.fixture
def loaded(model: Any, tokenizer: Any) -> load.Loaded:
    return load.Loaded(model, tokenizer, Path("nowhere"), "random", {}, torch.float32)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@torch.no_grad()
def plainly(loaded: load.Loaded, text: str, choice: str) -> float:
    """log p of " choice" after the text, token by token."""
    ids, begin = loaded.tokenizer(f"{text} {choice}")["input_ids"], len(loaded.tokenizer(text)["input_ids"])
    p = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(p[i - 1, ids[i]]) for i in range(begin, len(ids)))


def test_accuracy_as_counted_by_hand(loaded: load.Loaded, tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture) -> None:
    name, told = write(tmp_path / "q.jsonl", questions(30)), []
    found = tasks.measure(loaded, [name], limit=20, progress=lambda *a: told.append(a))[name]
    rows = task_files.read(Path(name)).rows[:20]
    scores = [[plainly(loaded, row["text"], c) for c in row["choices"]] for row in rows]
    by_length = [[s / len(c) for s, c in zip(ss, row["choices"], strict=True)] for ss, row in zip(scores, rows, strict=True)]
    right, fair = ([max(range(3), key=s.__getitem__) == r["gold"] for s, r in zip(ss, rows, strict=True)] for ss in (scores, by_length))
    share = sum(right) / 20
    assert found["value"] == pytest.approx(share) and found["value_normalised"] == pytest.approx(sum(fair) / 20)
    assert 0 < share < 1 and found["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 19))
    assert (found["metric"], found["examples"], found["shots"], found["limit"], found["shape"]) == ("accuracy", 20, 0, 20, "choices")
    assert (found["low"], found["high"]) == tasks.interval(share, 20) and 0 < found["low"] < share < found["high"] < 1
    assert found["engine"].startswith("lm-eval 0.") and found["data_sha256"] == task_files.read(Path(name)).sha256
    assert told[-1] == (name, 60, 60)
    assert capfd.readouterr() == ("", "")
    json.dumps(found, allow_nan=False)


def test_written_answers(loaded: load.Loaded, tmp_path: Path, no_network: None) -> None:
    asked = [{"prompt": f"The {word}", "answer": "x"} for word in WORDS[:4]]
    rows = tasks.load_task(write(tmp_path / "a.jsonl", asked), 0, 8)["tasks"]
    assert next(iter(rows.values())).config.generation_kwargs["max_gen_toks"] == 8
    with_answers = _with_what_is_written(loaded, asked)
    name = write(tmp_path / "b.jsonl", with_answers + [{"prompt": "user", "answer": "no such words"}])
    found = tasks.measure(loaded, [name])[name]
    assert (found["metric"], found["value"], found["examples"], found["shape"]) == ("exact_match", 0.8, 5, "match")
    one = write(tmp_path / "one.jsonl", with_answers[:1])
    assert tasks.measure(loaded, [one])[one]["stderr"] is None


def _with_what_is_written(loaded: load.Loaded, asked: list[dict]) -> list[dict]:
    from compressor.pipelines.measure import harness

    with harness.serving(loaded) as lm:
        settings = {"until": harness.STOPS[False], "max_gen_toks": 32, "do_sample": False, "temperature": 0.0}
        out = lm.generate_until([SimpleNamespace(args=(row["prompt"], dict(settings))) for row in asked])
    return [row | {"answer": text.strip() or "x"} for row, text in zip(asked, out, strict=True)]


def test_examples_are_shown_by_the_seed(loaded: load.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write(tmp_path / "test.jsonl", questions(6))
    with pytest.raises(RecipeError, match="shots=2 needs examples"):
        tasks.measure(loaded, [name], shots=2)
    same = questions(6)  # what is asked is not shown, though it stands among the examples
    write(tmp_path / "train.jsonl", same + [q | {"question": f"Shown {i}?"} for i, q in enumerate(questions(9, 1))])
    asked: list[str] = []
    from compressor.pipelines.measure import harness

    keep = harness.LoadedLM.loglikelihood
    monkeypatch.setattr(harness.LoadedLM, "loglikelihood", lambda lm, r, **o: (asked.extend(x.args[0] for x in r), keep(lm, r))[1])
    runs = []
    for seed in (1, 1, 2):
        asked.clear()
        assert tasks.measure(loaded, [name], shots=2, seed=seed)[name]["shots"] == 2
        runs.append(list(asked))
    assert runs[0] == runs[1] != runs[2]
    assert all(text.count("Shown") == 2 and text.endswith("?\nAnswer:") for text in runs[0])
    first = task_files.read(tmp_path / "train.jsonl").rows
    assert any(f"{row['text']} {row['choices'][row['gold']]}\n\n" in runs[0][0] for row in first)


def test_the_seeds_of_others_are_left_alone(loaded: load.Loaded, tmp_path: Path) -> None:
    name = write(tmp_path / "q.jsonl", questions(3))
    torch.manual_seed(5)
    random.seed(5)
    wanted = torch.rand(1).item(), random.random()
    torch.manual_seed(5)
    random.seed(5)
    tasks.measure(loaded, [name])
    assert (torch.rand(1).item(), random.random()) == wanted


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 100, 0.0, 0.0370), (100, 100, 0.9630, 1.0), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1)]
)
def test_intervals_are_wilsons(right: int, count: int, low: float, high: float) -> None:
    """Against published values of the score interval."""
    assert tasks.interval(right / count, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", questions(3)), write(tmp_path / "b.jsonl", questions(3))
    assert tasks.digest([a]) == tasks.digest([b]) != tasks.digest([a, b]) != tasks.digest([a, "arc_easy"])
    before = tasks.digest([a])
    write(tmp_path / "a.jsonl", questions(4))
    assert tasks.digest([a]) != before


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: load.Loaded) -> None:
    tasks.check([write(tmp_path / "q.jsonl", questions(2))])
    with pytest.raises(RecipeError, match="there is no task file"):
        tasks.check([str(tmp_path / "none.jsonl")])
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match="bad.jsonl line 1 is not JSON"):
        tasks.check([str(tmp_path / "bad.jsonl")])
    with pytest.raises(RecipeError, match="no task was named"):
        tasks.check([])
    with pytest.raises(RecipeError, match="limit=-1 and shots=0 must be 0 or more"):
        tasks.measure(loaded, ["q"], limit=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'compressor\[eval\]'"):
        tasks.check(["arc_easy"])


def test_names_of_the_hub_need_no_network(no_network: None) -> None:
    tasks.check(["arc_easy", "hellaswag", "gsm8k", "mmlu"])
    for name, said in [
        ("arc_easi", "there is no task 'arc_easi': did you mean .*arc_easy"),
        ("qqqqqqqqqqqqqqqqqqqq", "task files end in .jsonl or .json"),
        ("ai2_arc", "'ai2_arc' names several tasks without a score of their own; name some of them: arc_challenge, arc_easy"),
    ]:
        with pytest.raises(RecipeError, match=said):
            tasks.check([name])


def test_a_hub_that_cannot_be_reached_is_one_sentence(loaded: load.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_nothing(names: list[str]) -> Any:
        raise ConnectionError("Couldn't reach the hub\nand more")

    entry = SimpleNamespace(kind=SimpleNamespace(name="TASK"), cfg={})
    monkeypatch.setattr(tasks, "_hub", lambda: SimpleNamespace(load=load_nothing, task_index={"boolq": entry}, all_tasks=["boolq"]))
    tasks.reach([write(tmp_path / "q.jsonl", questions(2))])
    with pytest.raises(DataError, match="the data of task 'boolq' could not be had"):
        tasks.reach(["boolq"])
    with pytest.raises(DataError, match="the data of task 'boolq' could not be had from the hub: Couldn't reach the hub; a task file") as caught:
        tasks.measure(loaded, ["boolq"])
    assert "\n" not in str(caught.value)


def test_what_lm_eval_refuses_is_one_sentence(loaded: load.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write(tmp_path / "q.jsonl", questions(2))
    monkeypatch.setattr("compressor.pipelines.measure.harness.evaluate", lambda **o: (_ for _ in ()).throw(ValueError("marked as unsafe\nx")))
    with pytest.raises(RecipeError, match=r"lm-eval cannot run the task .* on this model: marked as unsafe$"):
        tasks.measure(loaded, [name])


def test_digest_covers_the_examples_shown(tmp_path: Path) -> None:
    row = {"question": "one?", "choices": ["a", "b"], "answer": 0}
    test, train = tmp_path / "test.json", tmp_path / "train.json"
    test.write_text(json.dumps([row]))
    other = row | {"question": "two?"}
    train.write_text(json.dumps([other, other]))
    before, plain = tasks.digest([str(test)], 1), tasks.digest([str(test)])
    assert before != plain
    train.write_text(json.dumps([other, other | {"answer": 1}]))
    assert tasks.digest([str(test)], 1) != before
    assert tasks.digest([str(test)]) == plain


def test_digest_covers_the_definition_of_a_hub_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks.digest(["arc_easy"]) == tasks.digest(["arc_easy"]) != tasks.digest(["boolq"])
    file, found = tmp_path / "a.yaml", []
    monkeypatch.setattr(tasks, "_hub", lambda: SimpleNamespace(task_index={"arc_easy": SimpleNamespace(yaml_path=file)}))
    for version in (1, 2):
        file.write_text(f"version: {version}")
        found.append(tasks.digest(["arc_easy"]))
    assert found[0] != found[1]
