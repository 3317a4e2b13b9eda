import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from compressor.errors import ModelError, RecipeError
from compressor.linear import find_blocks, packed_linears
from compressor.recipe import Recipe, Tune
from compressor.tune import loop
from compressor.tune.loss import loss_function
from compressor.tune.offload import words_on_host
from compressor.tune.peqa import Peqa
from compressor.tune.state import TrainLog
from tests.tune.helpers import run, same

LAYERS = 5


class Device:
    """Stands for a device: counts the copies of words that are alive on it. What fetch returns is the only thing that counts as there."""

    def __init__(self):
        self.alive, self.peak, self.fetched = [], 0, 0

    def fetch(self, words):
        copy = words.clone()
        self.alive.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        self.fetched += copy.nbytes
        self.look()
        return copy

    def look(self):
        self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
        resident = sum(size for _, size in self.alive)
        self.peak = max(self.peak, resident)
        return resident


def words_of(module):
    return sum(layer.words.nbytes for layer in packed_linears(module).values())


def passed(model, windows, recompute):
    """Gradients of one pass both ways on a model whose words wait elsewhere, the stand-in for the device, and the bytes left on it."""
    options, device = Tune(method="peqa", gradient_checkpointing=recompute), Device()
    parameters = Peqa(options).attach(model)
    with loop._training(model, options, torch.device("cpu"), TrainLog(1)), words_on_host(model, torch.device("cpu"), device.fetch):
        loss_function(model, windows[0][:1, :8])(*windows).backward()
        resident = device.look()
    return {name: p.grad for name, p in parameters.items()}, device, resident


def test_one_block_at_a_time_is_on_the_device_both_ways(packed_llama, windows):
    model = packed_llama(num_hidden_layers=LAYERS)
    block = words_of(find_blocks(model)[1][0])
    _, device, resident = passed(model, windows, recompute=True)
    assert device.peak == block and resident == 0
    assert device.fetched == 4 * LAYERS * block, "two forward passes of the probe of the loss, one to learn from, one anew"
    _, kept, resident = passed(packed_llama(num_hidden_layers=LAYERS), windows, recompute=False)
    assert kept.peak == LAYERS * block and resident == 0, "without recomputing autograd holds them all, which is why it is required"


def test_results_are_the_same_with_and_without(packed_llama, options, windows):
    plain, expected = run(packed_llama, windows, options(steps=3, gradient_checkpointing=True))
    model = packed_llama()
    log, parameters = run(packed_llama, windows, options(steps=3, gradient_checkpointing=True, offload="cpu"), model=model, evaluate=lambda: 1.0)
    assert log.curve == plain.curve and same(parameters, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in packed_linears(model).values())
    gradients, _, _ = passed(packed_llama(), windows, recompute=True)
    others, _, _ = passed(packed_llama(), windows, recompute=False)
    assert same(gradients, others) and all(g.any() for g in gradients.values())


def test_words_come_back_after_an_error(packed_llama, windows):
    model, device = packed_llama(), Device()
    before = {name: layer.words.clone() for name, layer in packed_linears(model).items()}
    narrow = packed_linears(model)["model.layers.1.mlp.down_proj"]
    with pytest.raises(ModelError, match="of 96 inputs was given 95"), words_on_host(model, torch.device("cpu"), device.fetch):
        narrow(torch.ones(1, 95))
    assert device.look() == 0 and same(before, {name: layer.words for name, layer in packed_linears(model).items()})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in packed_linears(model).values())


def test_what_cannot_be_is_said_by_the_recipe():
    with pytest.raises(RecipeError, match="add --gradient-checkpointing"):
        Recipe().with_(tune__offload="cpu")
    with pytest.raises(RecipeError, match="choose none or cpu"):
        Recipe().with_(tune__offload="disk", tune__gradient_checkpointing=True)
    plain = Recipe().with_(tune__gradient_checkpointing=True)
    assert plain.with_(tune__offload="cpu").digest() == plain.digest() != Recipe().digest(), "the results are the same, so is the key"
