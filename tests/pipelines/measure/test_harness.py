"""Our model class of lm-eval against lm-eval's own on the same model: the same tokens, the same log-likelihoods, the same texts."""

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compressor import linear
from compressor.errors import DataError, ModelError, NumericError
from compressor.pipelines import compress, load
from compressor.pipelines.measure import harness
from compressor.recipe import Quant

LONG = "The ship left the harbour at dawn. " * 12  # more tokens than the model's context of 128
PAIRS = [
    ("The ship left", " the harbour"), ("The ship left", " the"), ("The ship left", " a"), ("The ship left ", "at dawn"), ("", "Question"),
    (LONG, " The ship"), (LONG, " dawn"), ("<s>The", " ship"), ("Answer:\n", "user"),
]  # fmt: skip


def loaded(model: Any, tokenizer: Any) -> load.Loaded:
    return load.Loaded(model, tokenizer, Path("nowhere"), "random", {}, torch.float32)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("t", i, 1)) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def packed(model: Any) -> Any:
    made = copy.deepcopy(model)
    compress.compress(made, Quant(packer="rtn", bits=3, group=32, symmetric=False), torch.float16, None)
    return made


@pytest.fixture(scope="module")
def dequantised(packed: Any) -> Any:
    made = copy.deepcopy(packed)
    for name, layer in linear.packed_linears(packed).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight.data = layer.packed().dequantize().float()
        made.set_submodule(name, plain)
    return made.eval()


@pytest.mark.parametrize("kind", ["tokenizer", "adding", "same_ends"])
@pytest.mark.parametrize("limit", [1, 8192])
def test_as_hflm_on_the_dequantised_model(
    packed: Any, dequantised: Any, kind: str, limit: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "BATCH_TOKENS", limit)
    tokenizer = request.getfixturevalue(kind)
    stock = HFLM(pretrained=dequantised, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    with harness.serving(loaded(packed, tokenizer)) as lm:
        for found, wanted in zip(*(m.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for m in (lm, stock)), strict=True):
            assert found[0] == pytest.approx(wanted[0], abs=1e-4) and found[1] == wanted[1]
        texts = [(LONG,), ("The ship",), ("Question: Answer:",)]
        rolling = [m.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for m in (lm, stock)]
        assert rolling[0] == pytest.approx(rolling[1], abs=1e-3)
        settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
        asked = [(text, dict(settings)) for text in ("The ship", "Question:", LONG, "user")]
        written = [m.generate_until(requests("generate_until", asked), disable_tqdm=True) for m in (lm, stock)]
        assert written[0] == written[1] and any(written[0]) and not any("e" in text for text in written[0])
    assert linear.packed_linears(packed), "the model was unpacked"


def test_logits_are_kept_for_continuations_only(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], model.forward

    def watched(*args: Any, logits_to_keep: int = 0, **options: Any) -> Any:
        out = forward(*args, logits_to_keep=logits_to_keep, **options)
        seen.append((tuple(options["input_ids"].shape), out.logits.shape[1]))
        return out

    with harness.serving(loaded(model, tokenizer)) as lm:
        whole = lm.loglikelihood(requests("loglikelihood", PAIRS))
        monkeypatch.setattr(model, "forward", watched)
        monkeypatch.setattr(harness, "BATCH_TOKENS", 300)
        assert [x[0] for x in lm.loglikelihood(requests("loglikelihood", PAIRS))] == pytest.approx([x[0] for x in whole], abs=1e-4)
        assert all(rows * width <= 300 for (rows, width), _ in seen) and len(seen) > 1
        assert max(width for (_, width), _ in seen) == 128 and all(kept < width for (_, width), kept in seen if width == 128)
        seen.clear()
        lm.loglikelihood(requests("loglikelihood", [("user", "!"), ("user", "?"), ("user", "!?"), ("user", "?!")]))
        assert sum(rows for (rows, _), _ in seen) == 3, "one token after the same context is one input"
        monkeypatch.setattr(harness, "LOGIT_BYTES", 1)
        seen.clear()
        lm.loglikelihood(requests("loglikelihood", PAIRS))
        assert all(rows == 1 for (rows, _), _ in seen)
        lm.keeps = False
        assert [x[0] for x in lm.loglikelihood(requests("loglikelihood", PAIRS))] == pytest.approx([x[0] for x in whole], abs=1e-4)


def test_progress_and_what_is_given_back(model: Any, tokenizer: Any) -> None:
    told: list[tuple[int, int]] = []
    given, before, level = loaded(model.train(), tokenizer), len(tokenizer), logging.getLogger("lm_eval").level
    settings = model.generation_config
    with harness.serving(given, lambda done, total: told.append((done, total))) as lm:
        assert not model.training
        lm.loglikelihood(requests("loglikelihood", PAIRS))
        lm.generate_until(requests("generate_until", [("The", {"until": ["\n"], "max_gen_toks": 2})]))
    assert told[-2] == (len(PAIRS), len(PAIRS)) and told[-1] == (1, 1)
    assert model.training and model.generation_config is settings and len(tokenizer) == before
    assert logging.getLogger("lm_eval").level == level
    model.eval()


def test_what_cannot_be_asked(model: Any, tokenizer: Any, no_ends: Any) -> None:
    with pytest.raises(ModelError, match="the tokenizer of random has neither BOS nor EOS"), harness.serving(loaded(model, no_ends)):
        pass
    with harness.serving(loaded(model, tokenizer)) as lm:
        with pytest.raises(DataError, match="more than the 128 that the model was made for"):
            lm.loglikelihood(requests("loglikelihood", [("The", LONG)]))
        with pytest.raises(DataError, match="has no tokens of its own"):
            lm.loglikelihood(requests("loglikelihood", [("The", "")]))


def test_a_model_that_does_not_predict(model: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = float("nan")
    with harness.serving(loaded(broken, tokenizer)) as lm, pytest.raises(NumericError, match="is not a number"):
        lm.loglikelihood(requests("loglikelihood", PAIRS))


def test_nothing_of_the_harness_reaches_stdout(capsys: pytest.CaptureFixture) -> None:
    with harness.quiet():
        sys.stdout.write("chatter")
        logging.getLogger("lm_eval").warning("chatter")
    assert capsys.readouterr() == ("", "")
