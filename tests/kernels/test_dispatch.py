"""The door: which implementation takes a call, and that torch's tracing, compiling and checking machinery accepts the operators."""

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import ModelError, RecipeError, UserError
from compressor.kernels import cpu, dispatch, layout, reference
from tests.tolerances import RELATIVE, error

N, K, GROUP, BITS = 70, 352, 32, 3


def arguments(kind: str = "affine", trained: bool = False, low: bool = False) -> tuple[Any, ...]:
    """x, words, values, zero, u, b, bits, group, n, path of compressor::linear."""
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << BITS, (N, K), dtype=torch.uint8)
    x = torch.randn(5, K)
    if kind == "affine":
        group, values, zero = GROUP, torch.rand(N, K // GROUP) + 0.5, 7 * torch.rand(N, K // GROUP)
    else:
        group, values, zero = 192, torch.randn(N, 2, 1 << BITS), None
    u, b = (torch.randn(5, 4), torch.randn(N, 4)) if low else (None, None)
    for leaf in (x, values, zero, u, b):
        if leaf is not None:
            leaf.requires_grad_(trained)
    return x, layout.pack_tiles(codes, BITS, reference.order(values)), values, zero, u, b, BITS, group, N, "auto"


def test_who_takes_what() -> None:
    """Also after the tests of the Triton kernels, which run its interpreter on CPU tensors in this process."""
    x = torch.zeros(1, K)
    fast = cpu if cpu.available() else reference
    assert dispatch.choose(x, 2, 32, K) is fast
    assert dispatch.choose(x, 3, 64, K) is fast
    assert dispatch.choose(x, 2, 11, K) is reference
    assert dispatch.choose(x.double(), 2, 32, K) is reference
    assert dispatch.choose(x, 2, 32, K, "reference") is reference


@pytest.mark.parametrize(("path", "group", "words"), [("fast", 32, "unknown"), ("triton", 32, "not able"), ("cpu", 11, "groups of 11")])
def test_a_path_that_cannot_serve_is_an_error(path: str, group: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        dispatch.choose(torch.zeros(1, K), 2, group, K, path)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("x", lambda x: x[:, :96], "do not fit a weight of 70 x 96"),
        ("words", lambda w: w[:, :1], "words of shape"),
        ("words", lambda w: w.to("meta"), "words are on meta and x is on cpu"),
        ("values", lambda v: v[:8], "values of shape"),
        ("zero", lambda z: z[:, :2], "zero of shape"),
        ("x", lambda x: x.int(), "floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(name: str, wrong: Any, words: str) -> None:
    """Kernels would read whatever lies there."""
    args = dict(zip(("x", "words", "values", "zero", "u", "b", "bits", "group", "n", "path"), arguments(), strict=True))
    args[name] = wrong(args[name])
    with pytest.raises(ModelError, match=words):
        dispatch.linear(**{key: value for key, value in args.items() if key not in ("u", "b")}, bias=None)


def test_who_watches_sees_the_operator() -> None:
    """Flop counters, transforms and autocast: nobody is passed by, and autocast rounds nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    x, words, values, zero, _, _, bits, group, n, _ = arguments()
    call = lambda x: dispatch.linear(x, words, values, zero, None, bits, group, n)
    plain = call(x)
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        call(x)
    assert "compressor.linear.default" in seen
    with FlopCounterMode(display=False):
        assert torch.equal(call(x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(x), plain)
        doubled = dispatch.linear(x.double(), words, values, zero, None, bits, group, n)
    assert error(doubled, plain) <= RELATIVE[torch.float32]
    with pytest.raises(UserError, match="forward-mode"):
        torch.func.jvp(call, (x,), (x,))
    assert torch.equal(call(x), plain), "what failed above left nothing behind"


@pytest.mark.parametrize(("trained", "low"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["affine", "table"])
def test_operators_pass_torchs_own_check(kind: str, trained: bool, low: bool) -> None:
    found = torch.library.opcheck(torch.ops.compressor.linear.default, arguments(kind, trained, low))
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("kind", ["affine", "table"])
def test_backward_operators_pass_torchs_own_check(kind: str) -> None:
    x, words, values, zero, _, _, bits, group, n, path = arguments(kind)
    dy = torch.randn(5, n)
    for op, args in (
        (torch.ops.compressor.grad_input, (dy, words, values, zero, bits, group, K, path)),
        (torch.ops.compressor.grad_values, (x, dy, words, zero, bits, group, kind == "table", path)),
    ):
        found = torch.library.opcheck(op.default, args)
        assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("kind", ["affine", "table"])
def test_gradients_match_dense_autograd(kind: str) -> None:
    one, words, values, zero, u, b, bits, group, n, path = arguments(kind, trained=True, low=True)
    bias, dy = torch.randn(N, requires_grad=True), torch.randn(2, 5, N)
    x, u = (torch.stack([t, -t]).detach().requires_grad_() for t in (one, u))
    leaves = [x, values, bias, u, b] + ([] if zero is None else [zero])
    dispatch.linear(x, words, values, zero, bias, bits, group, n, (u, b), path).backward(dy)
    ours = [leaf.grad for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    codes = layout.unpack_tiles(words, bits, N, K, reference.order(values))
    if kind == "affine":
        weight = (codes.double() - wide[5].repeat_interleave(GROUP, 1)) * wide[1].repeat_interleave(GROUP, 1)
    else:
        weight = wide[1].reshape(N, -1).gather(1, reference.flat_codes(words, bits, group, N, K))
    (torch.nn.functional.linear(wide[0], weight, wide[2]) + wide[3] @ wide[4].T).backward(dy.double())
    for leaf, mine in zip(wide, ours, strict=True):
        assert mine is not None and leaf.grad is not None
        assert error(mine, leaf.grad) <= RELATIVE[torch.float32]


def test_gradcheck_of_the_operator() -> None:
    torch.manual_seed(0)
    for values, zero, group in (
        (torch.rand(4, 2) + 0.5, torch.rand(4, 2), 16),
        (torch.randn(4, 1, 4), None, 32),
    ):
        codes = torch.randint(0, 4, (4, 32), dtype=torch.uint8)
        words = layout.pack_tiles(codes, 2, reference.order(values))
        leaves = [torch.randn(3, 32), values] + ([] if zero is None else [zero])
        doubles = [leaf.double().requires_grad_() for leaf in leaves]

        def call(x: Tensor, v: Tensor, z: Tensor | None = None, words: Tensor = words, group: int = group) -> Tensor:
            return dispatch.linear(x, words, v, z, None, 2, group, 4)

        assert torch.autograd.gradcheck(call, doubles)


def test_no_operator_is_hidden_from_the_compiler() -> None:
    """torch.compile takes a packed call, forward and backward, in one graph, and gives the same numbers."""
    x, words, values, zero, _, _, bits, group, n, _ = arguments("affine", trained=True)

    def call(x: Tensor, values: Tensor) -> Tensor:
        return torch.relu(dispatch.linear(x, words, values, zero, None, bits, group, n)).square().sum()

    eager = torch.autograd.grad(call(x, values), (x, values))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, values), (x, values)), eager, strict=True):
        assert error(a, b) <= RELATIVE[torch.float32]


def test_without_gradients_the_same_numbers() -> None:
    x, words, values, zero, u, b, bits, group, n, path = arguments("table", low=True)
    direct = dispatch.linear(x, words, values, zero, None, bits, group, n, (u, b))
    through = torch.ops.compressor.linear(x, words, values, zero, u, b, bits, group, n, path)
    assert torch.equal(direct, through)
