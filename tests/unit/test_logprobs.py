"""Chunked log-probabilities: the same values and gradients as the plain formula, in one chunk's memory."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uniopd_mm.errors import AlignmentError
from uniopd_mm.models import logprobs
from uniopd_mm.models.logprobs import token_logprobs, token_statistics

M, V, H = 13, 50, 8
CHUNKINGS = {"whole": 2**26, "one position": 1, "four positions": 4 * V + 3, "one too few": (M - 1) * V}
Scored = tuple[Tensor, dict[str, Tensor]]


class Reported(nn.Linear):
    """A head that is not the plain class, so it must be run as a module; it reports the rows of every call."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.rows: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        self.rows.append(len(input))
        return super().forward(input)


class Wrapped(nn.Module):
    """What an adapter looks like: another module around the linear one, with parameters of its own."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)
        self.out_features = base.out_features

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.up(self.down(input))


def plain(hidden: Tensor, head: nn.Module, target: Tensor, temperature: float = 1.0) -> Tensor:
    return (head(hidden).float() / temperature).log_softmax(-1).gather(-1, target[:, None])[:, 0]


def problem(kind: type[nn.Linear] = nn.Linear, bias: bool = True) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Hidden states, head, targets, and a gradient of either sign that is 0 somewhere."""
    generator = torch.Generator().manual_seed(0)
    head = kind(H, V, bias=bias)
    for parameter in head.parameters():
        parameter.data.normal_(generator=generator)
    hidden = torch.randn(M, H, generator=generator)
    return hidden, head, torch.randint(0, V, (M,), generator=generator), torch.arange(M) - 4.0


def scored(
    score: Callable[..., Tensor],
    hidden: Tensor,
    head: nn.Module,
    target: Tensor,
    grad: Tensor,
    temperature: float = 1.0,
) -> Scored:
    """Values, and gradients of hidden states and of every parameter that trains."""
    head.zero_grad()
    hidden = hidden.detach().clone().requires_grad_(True)
    values = score(hidden, head, target, temperature)
    values.backward(grad)
    gradients = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
    assert hidden.grad is not None
    return values.detach(), {"hidden": hidden.grad, **gradients}


def assert_same(ours: Scored, wanted: Scored, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours[0], wanted[0], rtol=rtol, atol=atol)
    assert ours[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def set_chunk_logits(patch: pytest.MonkeyPatch, n_logits: int) -> None:
    patch.setattr(logprobs, "CHUNK_LOGITS", n_logits)
    patch.setattr(logprobs, "CHUNK_ROWS", 1)


@pytest.fixture(params=CHUNKINGS)
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    set_chunk_logits(monkeypatch, CHUNKINGS[request.param])
    return CHUNKINGS[request.param]


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("kind", [nn.Linear, Reported])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_plain_formula(
    chunking: int, kind: type[nn.Linear], bias: bool, temperature: float
) -> None:
    hidden, head, target, grad = problem(kind, bias)
    ours = scored(token_logprobs, hidden, head, target, grad, temperature)
    assert ours[0].dtype == torch.float32
    assert ours[1].keys() == {"hidden", "weight"} | ({"bias"} if bias else set())
    assert_same(ours, scored(plain, hidden, head, target, grad, temperature))


@pytest.mark.parametrize("trains", ["nothing", "bias", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(chunking: int, trains: str) -> None:
    hidden, head, target, grad = problem()
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name == trains)
    ours = scored(token_logprobs, hidden, head, target, grad, 0.7)
    assert ours[1].keys() == {"hidden", trains} - {"nothing"}
    assert_same(ours, scored(plain, hidden, head, target, grad, 0.7))


def test_a_head_learns_from_hidden_states_that_do_not(chunking: int) -> None:
    hidden, head, target, grad = problem()
    wanted = scored(plain, hidden, head, target, grad)[1]
    head.zero_grad()
    token_logprobs(hidden, head, target).backward(grad)
    torch.testing.assert_close(head.weight.grad, wanted["weight"], rtol=1e-5, atol=1e-5)


def test_a_tied_weight_gets_the_sum_of_both_uses_once(chunking: int) -> None:
    _, head, target, grad = problem(bias=False)
    embedding = nn.Embedding(V, H)
    embedding.weight = head.weight
    gradients, arrivals = [], []
    head.weight.register_hook(lambda g: arrivals.append(g.shape))
    for score in (token_logprobs, plain):
        head.weight.grad = None
        score(embedding(target).tanh(), head, target.roll(-1)).backward(grad)
        assert head.weight.grad is not None
        gradients.append(head.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert arrivals == [(V, H)] * 2


def test_an_adapter_around_the_head_is_run_and_trained(chunking: int) -> None:
    hidden, base, target, grad = problem()
    head = Wrapped(base)
    ours = scored(token_logprobs, hidden, head, target, grad)
    assert ours[1].keys() == {"hidden", "down.weight", "down.bias", "up.weight", "up.bias"}
    assert_same(ours, scored(plain, hidden, head, target, grad))


def test_dropout_in_the_head_is_the_same_in_the_recomputation(chunking: int) -> None:
    hidden, base, target, grad = problem()
    base.requires_grad_(False)
    head = nn.Sequential(nn.Dropout(0.5), base)
    head.out_features = V  # type: ignore[assignment]
    torch.manual_seed(1)
    x = hidden.clone().requires_grad_(True)
    values = token_logprobs(x, head, target)
    values.backward(grad)
    torch.manual_seed(1)
    dropped = torch.cat(
        [head[0](rows) for rows in hidden.tensor_split(max(1, -(-M // max(1, chunking // V))))]
    )
    torch.testing.assert_close(values, plain(dropped, base, target))
    assert x.grad is not None
    assert ((x.grad == 0) >= (dropped == 0)).all()


def test_a_hook_on_the_head_is_obeyed(chunking: int) -> None:
    hidden, head, target, grad = problem()
    head.register_forward_hook(lambda module, inputs, output: output * 2)
    wanted = scored(plain, hidden, head, target, grad)
    assert_same(scored(token_logprobs, hidden, head, target, grad), wanted)


def test_a_replaced_forward_is_obeyed(chunking: int) -> None:
    hidden, head, target, _ = problem()
    unscaled = head.forward
    head.forward = lambda input: 2 * unscaled(input)  # type: ignore[method-assign]
    torch.testing.assert_close(token_logprobs(hidden, head, target), plain(hidden, head, target))


class Quantized(nn.Parameter):
    """A weight whose numbers mean something else."""


def test_only_a_plain_whole_linear_layer_is_computed_by_hand() -> None:
    _, head, _, _ = problem()
    assert logprobs._is_plain_linear(head)
    partitioned, quantized = copy.deepcopy(head), copy.deepcopy(head)
    partitioned.bias.ds_id = 0  # type: ignore[attr-defined]
    quantized.weight = Quantized(head.weight)
    others = (partitioned, quantized, Wrapped(copy.deepcopy(head)), Reported(H, V), nn.LazyLinear(V))
    assert not any(logprobs._is_plain_linear(other) for other in others)


# ---------------------------------------------------------------------- weights partitioned over ranks


def partition(head: nn.Linear) -> None:
    """As ZeRO-3 does it: the weight is empty, and hooks fill it for the time of a call."""
    weight = head.weight.data

    def gather(module: nn.Module, inputs: object) -> None:
        head.weight.data = weight

    def release(module: nn.Module, inputs: object, output: object) -> None:
        head.weight.data = torch.empty(0)

    head.weight.ds_id = 0  # type: ignore[attr-defined]
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.weight.data = torch.empty(0)


def test_a_partitioned_weight_is_read_only_inside_the_module(chunking: int) -> None:
    hidden, head, target, _ = problem(bias=False)
    wanted = plain(hidden, head, target)
    partition(head)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(hidden, head, target), wanted)


@pytest.mark.parametrize("n", [0, 2, M])
def test_all_ranks_call_a_partitioned_head_as_often_as_the_one_with_most_positions(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 5  # chunks, on some other rank
    hidden, head, target, grad = problem(Reported)
    hidden, target, grad = hidden[:n], target[:n], grad[:n]
    wanted = scored(plain, hidden, head, target, grad)
    head.weight.ds_id = 0  # type: ignore[attr-defined]
    set_chunk_logits(monkeypatch, 4 * V)
    monkeypatch.setattr(logprobs.dist, "is_initialized", lambda: True)
    reduced = {dist.ReduceOp.MAX: lambda count: count.clamp_(min=most)}
    monkeypatch.setattr(logprobs.dist, "all_reduce", lambda count, op: reduced[op](count))
    assert isinstance(head, Reported)
    head.rows.clear()
    assert_same(scored(token_logprobs, hidden, head, target, grad), wanted)
    assert len(head.rows) == 2 * most  # forward, and again for the backward pass


def test_no_rank_waits_for_another_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with a head that is whole, nor where no gradient is taken; a collective would fail here."""
    hidden, head, target, _ = problem()
    wanted = plain(hidden, head, target)
    monkeypatch.setattr(logprobs.dist, "is_initialized", lambda: True)
    torch.testing.assert_close(token_logprobs(hidden, head, target), wanted)
    head.weight.ds_id = 0  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(hidden, head, target), wanted)


# ---------------------------------------------------------------------- as part of a graph


def test_a_second_backward_pass_gives_the_same_gradient_again(chunking: int) -> None:
    hidden, head, target, grad = problem()
    hidden.requires_grad_(True)
    values = token_logprobs(hidden, head, target)
    wanted = torch.autograd.grad(values, [hidden, head.weight], grad, retain_graph=True)
    again = torch.autograd.grad(values, [hidden, head.weight], grad)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    hidden, head, target, grad = problem()
    hidden.requires_grad_(True)
    (first,) = torch.autograd.grad(
        token_logprobs(hidden, head, target), hidden, grad.requires_grad_(True), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@given(
    n=st.integers(0, 7),
    n_vocabulary=st.integers(1, 6),
    width=st.integers(1, 4),
    limit=st.integers(1, 40),
    temperature=st.floats(0.3, 3.0),
    scale=st.floats(0.0, 30.0),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=100, deadline=None)
def test_no_shape_and_no_chunking_changes_the_result(
    n: int, n_vocabulary: int, width: int, limit: int, temperature: float, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    head = nn.Linear(width, n_vocabulary).double()
    hidden = scale * torch.randn(n, width, dtype=torch.float64)
    target, grad = torch.randint(0, n_vocabulary, (n,)), torch.randn(n, dtype=torch.float64)
    wanted = scored(
        lambda h, f, y, t: (f(h) / t).log_softmax(-1).gather(-1, y[:, None])[:, 0],
        *(hidden, head, target, grad, temperature),
    )
    with pytest.MonkeyPatch.context() as patch:
        set_chunk_logits(patch, limit)
        for kind in (nn.Linear, Reported):
            same = kind(width, n_vocabulary).double()
            same.load_state_dict(head.state_dict())
            assert_same(scored(token_logprobs, hidden, same, target, grad, temperature), wanted, 1e-9, 1e-9)


def test_the_gradient_is_that_of_finite_differences(chunking: int) -> None:
    hidden, head, target, _ = problem()
    head.double()
    torch.autograd.gradcheck(
        lambda h, w, b: logprobs._LinearStatistics.apply(h, w, b, target, 0.7, 3, False, 0)[0],
        (hidden.double().requires_grad_(True), head.weight, head.bias),
    )


def test_no_positions_give_an_empty_result_with_a_graph(chunking: int) -> None:
    for kind in (nn.Linear, Reported):
        _, head, _, _ = problem(kind)
        hidden = torch.empty(0, H, requires_grad=True)
        statistics = token_statistics(hidden, head, torch.empty(0, dtype=torch.long), entropy=True, top_k=3)
        assert statistics.logprob_M.shape == statistics.entropy_M.shape == (0,)  # type: ignore[union-attr]
        assert statistics.top_ids_MK.shape == statistics.top_logprobs_MK.shape == (0, 3)  # type: ignore[union-attr]
        statistics.logprob_M.sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == (0, H)
        assert head.weight.grad is not None and not head.weight.grad.any()


@pytest.mark.parametrize("outside", [-1, V])
def test_a_target_outside_the_vocabulary_is_an_error(outside: int) -> None:
    hidden, head, target, _ = problem()
    target[3] = outside
    with pytest.raises(AlignmentError, match=rf"{outside}.*0 to {V - 1}"):
        token_logprobs(hidden, head, target)


# ---------------------------------------------------------------------- half precision


def test_bf16_is_as_close_to_fp32_as_autograd_is(chunking: int) -> None:
    hidden, head, target, grad = problem()
    head.bfloat16()
    wanted = scored(plain, hidden.bfloat16().float(), copy.deepcopy(head).float(), target, grad)
    ours = scored(token_logprobs, hidden.bfloat16(), head, target, grad)
    autograd = scored(plain, hidden.bfloat16(), head, target, grad)
    assert ours[0].dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in ours[1].values())
    torch.testing.assert_close(ours[0], autograd[0], rtol=1e-6, atol=1e-5)
    for name, exact in wanted[1].items():
        error, theirs = ((g[1][name].float() - exact).norm() / exact.norm() for g in (ours, autograd))
        assert error <= max(2 * theirs, 4e-3), name


def test_bf16_keeps_the_gradient_of_a_token_that_is_almost_certain(chunking: int) -> None:
    head = nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[8.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    hidden, target, grad = torch.tensor([[1.0, 0.5]]), torch.tensor([0]), torch.ones(1)
    exact = scored(plain, hidden, head, target, grad)
    ours = scored(token_logprobs, hidden.bfloat16(), head.bfloat16(), target, grad)
    for name, gradient in exact[1].items():
        torch.testing.assert_close(ours[1][name].float(), gradient, rtol=2e-2, atol=1e-6)


def test_the_gradient_of_a_bf16_weight_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 equal positions, one per chunk: a bf16 sum would stand still at 256 times the first."""
    n = 300
    head = nn.Linear(1, 2, bias=True).bfloat16()
    for parameter in head.parameters():
        parameter.data.zero_()
    set_chunk_logits(monkeypatch, 1)
    hidden, target = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.long)
    token_logprobs(hidden, head, target).sum().backward()
    assert head.weight.grad is not None and head.bias.grad is not None
    assert head.weight.grad[:, 0].tolist() == [n / 2, -n / 2]
    assert head.bias.grad.tolist() == [n / 2, -n / 2]


# ---------------------------------------------------------------------- bounded


def profiled(work: Callable[[], object]) -> list[Any]:
    """The operators ``work`` runs, in order, with the bytes each one leaves allocated."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        work()
    return sorted(seen.events(), key=lambda event: event.time_range.start)


def n_matrix_products(work: Callable[[], object]) -> int:
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profiled(work))


class HeldTensors(TorchFunctionMode):
    """Most bytes in tensors that Python code made and still holds, seen after each of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        self.made += [weakref.ref(each) for each in outputs if isinstance(each, Tensor)]
        alive = [tensor for ref in self.made if (tensor := ref()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        self.peak = max(self.peak, sum(storages.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_short_way_holds_one_chunk_of_logits(
    frozen: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, n_vocabulary, width, chunk = 256, 2000, 2, 16
    head = nn.Linear(width, n_vocabulary, bias=False, dtype=dtype).requires_grad_(not frozen)
    hidden, target = torch.randn(n, width, dtype=dtype), torch.randint(0, n_vocabulary, (n,))
    set_chunk_logits(monkeypatch, chunk * n_vocabulary)
    with HeldTensors() as held:
        values = token_logprobs(hidden.requires_grad_(True), head, target, 0.7)
        if not frozen:  # called by hand: a mode sees nothing of what the autograd engine calls
            with torch.no_grad():
                logprobs._head_gradients(values.grad_fn, torch.ones(n, 1))
    n_bytes = 4 if dtype == torch.float32 else 4 + 2  # the logits, and what goes into the matrix products
    assert chunk * n_vocabulary * 4 <= held.peak <= 1.3 * chunk * n_vocabulary * n_bytes
    events = profiled(lambda: token_logprobs(hidden, head, target, 0.7).sum().backward())
    assert max(event.self_cpu_memory_usage for event in events) <= chunk * n_vocabulary * 4


@pytest.mark.parametrize("frozen", [True, False])
def test_a_head_that_is_run_as_a_module_holds_a_few_chunks(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, n_vocabulary, width, chunk = 256, 2000, 2, 16
    head = Reported(width, n_vocabulary, bias=False).requires_grad_(not frozen)
    hidden, target = torch.randn(n, width, requires_grad=True), torch.randint(0, n_vocabulary, (n,))
    set_chunk_logits(monkeypatch, chunk * n_vocabulary)
    peaks = []
    for score in (plain, token_logprobs):
        head.rows.clear()
        events = profiled(lambda s=score: s(hidden, head, target, 0.7).sum().backward())
        peaks.append(max(itertools.accumulate(event.self_cpu_memory_usage for event in events)))
    assert peaks[0] >= 4 * n * n_vocabulary
    assert peaks[1] <= 3.5 * 4 * chunk * n_vocabulary
    assert max(head.rows) <= chunk


@pytest.mark.parametrize(("n_chunks", "wanted"), [(1, (1, 2, 3)), (M, (1, 2, 4))])
def test_only_the_products_that_are_needed_are_taken(
    n_chunks: int, wanted: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits; towards the hidden states; for a head that trains its own, with the logits again if not kept."""
    hidden, head, target, grad = problem(bias=False)
    hidden.requires_grad_(True)
    set_chunk_logits(monkeypatch, M * V // n_chunks)

    def score() -> Tensor:
        return token_logprobs(hidden, head, target)

    with torch.no_grad():
        counts = [n_matrix_products(score)]
    head.requires_grad_(False)
    counts.append(n_matrix_products(lambda: score().backward(grad)))
    head.requires_grad_(True)
    counts.append(n_matrix_products(lambda: score().backward(grad)))
    assert counts == [n_chunks * each for each in wanted]


def test_without_gradient_nothing_is_remembered(chunking: int) -> None:
    hidden, head, target, _ = problem()
    with torch.no_grad():
        values = token_logprobs(hidden.requires_grad_(True), head, target)
    assert not values.requires_grad
    torch.testing.assert_close(values, plain(hidden, head, target).detach())


# ---------------------------------------------------------------------- entropy and the most likely tokens


@pytest.mark.parametrize("kind", [nn.Linear, Reported])
def test_entropy_and_most_likely_tokens_are_those_of_the_tempered_distribution(
    chunking: int, kind: type[nn.Linear]
) -> None:
    hidden, head, target, grad = problem(kind)
    hidden.requires_grad_(True)
    statistics = token_statistics(hidden, head, target, 0.7, entropy=True, top_k=3)
    log_p = (head(hidden) / 0.7).log_softmax(-1)
    torch.testing.assert_close(statistics.entropy_M, -(log_p.exp() * log_p).sum(-1).detach())
    top = log_p.topk(3)
    torch.testing.assert_close(statistics.top_logprobs_MK, top.values.detach())
    assert statistics.top_ids_MK is not None and torch.equal(statistics.top_ids_MK, top.indices)
    assert statistics.logprob_M.requires_grad
    assert statistics.entropy_M is not None and not statistics.entropy_M.requires_grad
    assert statistics.top_logprobs_MK is not None and not statistics.top_logprobs_MK.requires_grad
    statistics.logprob_M.backward(grad)
    assert hidden.grad is not None
    wanted = scored(plain, hidden.detach(), head, target, grad, 0.7)[1]["hidden"]
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-5, atol=1e-5)


def test_entropy_runs_from_nothing_to_log_vocabulary(chunking: int) -> None:
    head = nn.Linear(1, V, bias=False)
    head.weight.data = torch.eye(V)[:, :1]
    hidden = torch.tensor([[0.0], [1e4]])
    entropy = token_statistics(hidden, head, torch.tensor([1, 1]), entropy=True).entropy_M
    torch.testing.assert_close(entropy, torch.tensor([V, 1]).log())


def test_what_is_not_asked_for_is_none() -> None:
    for kind in (nn.Linear, Reported):
        hidden, head, target, _ = problem(kind)
        statistics = token_statistics(hidden, head, target)
        assert statistics.entropy_M is statistics.top_ids_MK is statistics.top_logprobs_MK is None


def test_a_large_vocabulary_still_gets_whole_blocks_of_positions() -> None:
    head = Reported(4, logprobs.CHUNK_LOGITS // 100)
    token_logprobs(torch.zeros(2 * logprobs.CHUNK_ROWS, 4), head, torch.zeros(2 * logprobs.CHUNK_ROWS).long())
    assert head.rows == [logprobs.CHUNK_ROWS] * 2
