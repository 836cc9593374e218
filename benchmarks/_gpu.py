"""The parts of ``gpu.py``: each yields rows as it finds them, and goes on where one of its cases fails.

Shapes: S tokens of a row, H heads, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from _gpu_kernels import LAST, exact, kernels
from _gpu_plan import Plan, error_name, goals, head_name, layer_name, loss_name, share_name, sides, taken_name
from _results import Row, failed, lower_is_better, machine
from loss import Case, loss_of
from torch import Tensor, nn

from lightning_longrope.callbacks.throughput import peak_flops
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.layers import decoder_layers
from lightning_longrope.loading import load_model
from lightning_longrope.losses import LOSSES
from lightning_longrope.losses import token_nll as flat_token_nll
from lightning_longrope.memory import Memory, save_memory
from lightning_longrope.model import candidate_rows, hidden_states, output_head
from lightning_longrope.scoring import token_nll

BATCH_TOKENS = 16_384  # of the default search


class Cost(NamedTuple):
    """What work takes: seconds, and on a GPU the peak of bytes, in all and above what was there before."""

    seconds: float
    added: int = 0
    peak: int = 0


def attention(plan: Plan) -> Iterator[Row]:
    """Causal attention by each kernel: its rate, and its error against float64 at the end of the row."""
    heads = plan.fields["num_attention_heads"]
    size = plan.fields["hidden_size"] // heads
    for length in plan.attention:
        torch.manual_seed(0)
        parts = [torch.randn(1, heads, length, size, device=plan.device, dtype=torch.bfloat16) for _ in range(3)]
        expected = exact(*parts)
        flops = 2 * length**2 * heads * size
        for name, kernel in kernels(plan.device).items():
            backwards = length < plan.attention[-1]
            yield from tried(
                f"attention by {name}, {length:,} tokens",
                partial(one_kernel, plan, name, kernel, parts, expected, flops, backwards),
            )


def one_kernel(
    plan: Plan,
    name: str,
    kernel: Callable[..., Tensor],
    parts: Sequence[Tensor],
    expected: Tensor,
    flops: float,
    backwards: bool,
) -> Iterator[Row]:
    """Rate and error of one kernel."""
    what = f"attention by {name}, {parts[0].shape[2]:,} tokens"
    with torch.no_grad():
        found = kernel(*parts)[:, (0, -1), -LAST:].double()
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        cost = measured(plan, lambda: kernel(*parts))
    wrong = error_name(name, parts[0].shape[2])
    yield Row(wrong, error, None, "", error, goals(plan).get(wrong))
    yield rate(f"{what}: forward", flops, cost.seconds)
    if backwards:
        parts = [part.detach().requires_grad_() for part in parts]
        slope = torch.randn_like(parts[0])
        cost = measured(plan, lambda: torch.autograd.grad(kernel(*parts), parts, slope))
        yield rate(f"{what}: forward and backward", 3.5 * flops, cost.seconds)


def rate(name: str, flops: float, seconds: float) -> Row:
    """Operations over time."""
    return Row(name, flops / seconds / 1e12, None, "TFLOP/s", flops / seconds / 1e12)


def slices(plan: Plan) -> Iterator[Row]:
    """Two layers with their head, Hugging Face's against ours: a training step, a pass without gradients."""
    ours = built(plan, 2)
    stock = deepcopy(ours)
    for model in (ours, stock):
        save_memory(model, decoder_layers(model), True, Memory())
    for length in plan.slices:
        tokens = tokens_of(plan, length)
        yield from tried(f"{length:,} tokens without gradients", partial(no_gradients, plan, ours, stock, tokens))
        if length <= 131_072:
            yield from tried(f"training step of {length:,} tokens", partial(training, plan, ours, stock, tokens))


def no_gradients(plan: Plan, ours: Any, stock: Any, tokens: Tensor) -> Iterator[Row]:
    """The decoder of both, and our head and loss, which ``projection`` reads."""
    length = tokens.shape[1]
    with torch.no_grad():
        mine = measured(plan, lambda: hidden_states(ours.eval(), tokens))
        head = max(0.0, measured(plan, lambda: token_nll(ours, tokens)).seconds - mine.seconds)
        yield Row(layer_name(length), mine.seconds / 2, None, "s", mine.seconds / 2)
        yield Row(head_name(length), head, None, "s", head)
        yield from beside(
            plan,
            f"2 layers without gradients, {length:,} tokens",
            mine,
            lambda: stock.eval().get_decoder()(input_ids=tokens, use_cache=False),
        )


def training(plan: Plan, ours: Any, stock: Any, tokens: Tensor) -> Iterator[Row]:
    """Forward and backward pass with checkpointed layers; Hugging Face's has the logits of the whole row."""

    def step(model: Any) -> None:
        model.train()
        if model is stock:
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            return
        hidden, head = hidden_states(model, tokens)[:, :-1].flatten(0, 1), output_head(model)
        nll, count = LOSSES["fused"](hidden, head, tokens[:, 1:].flatten(), None, head.tokens_at_a_time)
        (nll / count).backward()

    what = f"2 layers, training step, {tokens.shape[1]:,} tokens"
    mine = measured(plan, lambda: step(ours), list(ours.parameters()))
    yield from beside(plan, what, mine, lambda: step(stock), list(stock.parameters()))


def window(plan: Plan) -> Iterator[Row]:
    """One layer at the whole window, with the room that all layers' weights and one more row take beside it."""
    model, widths = built(plan, 1), plan.fields["hidden_size"]
    per_layer = 2 * sum(p.numel() for p in decoder_layers(model)[0].parameters())
    others = torch.empty(per_layer * (plan.fields["num_hidden_layers"] - 1), dtype=torch.uint8, device=plan.device)
    for length in plan.windows:
        embedded = torch.empty(length, widths, dtype=torch.bfloat16, device=plan.device)
        yield from tried(f"1 layer, {length:,} tokens", partial(one_layer, replace(plan, repeats=0), model, length))
        del embedded
    del others


def one_layer(plan: Plan, model: Any, length: int) -> Iterator[Row]:
    """Time and peak of an evaluation of the row; not repeated."""
    tokens = tokens_of(plan, length)
    with torch.no_grad():
        layer = measured(plan, lambda: hidden_states(model, tokens))
        yield Row(layer_name(length), layer.seconds, None, "s", layer.seconds)
        hidden = torch.zeros(1, length, plan.fields["hidden_size"], dtype=torch.bfloat16, device=plan.device)
        head, labels = output_head(model), tokens.flatten()
        end = measured(plan, lambda: flat_token_nll(hidden.flatten(0, 1), head, labels, head.tokens_at_a_time))
    yield Row(head_name(length), end.seconds, None, "s", end.seconds)
    if plan.gpu:
        free, total = torch.cuda.mem_get_info()
        peak, taken = max(layer.peak, end.peak) / 1e9, (total - free) / 1e9
        yield Row(f"peak with the weights of all layers, {length:,} tokens", peak, None, "GB", peak)
        yield Row(taken_name(length), taken, None, "GB", taken, goals(plan).get(taken_name(length)))


def loss(plan: Plan) -> Iterator[Row]:
    """Losses of hidden states and their gradients, each beside Hugging Face's on the logits of the whole row."""
    for case in plan.losses:
        for side in sides(plan):
            yield from tried(loss_name(case, side), partial(one_loss, plan, case, side))


def one_loss(plan: Plan, case: Case, side: str) -> Iterator[Row]:
    """Time and, on a GPU, peak memory of one loss; the gradient of the output layer is among it on both sides."""
    torch.manual_seed(0)
    kind = {"device": plan.device, "dtype": getattr(torch, case.dtype)}
    layer = nn.Linear(case.hidden, case.vocabulary, bias=False, **kind)
    hidden = torch.randn(case.tokens, case.hidden, **kind).requires_grad_()
    tokens = torch.randint(case.vocabulary, (case.tokens,), device=plan.device)

    def cost(which: str) -> Cost:
        compute = loss_of(which, layer)
        return measured(plan, lambda: compute(hidden, tokens).backward(), [hidden, layer.weight])

    ours, peer = cost(side), cost("huggingface")
    yield lower_is_better(f"{loss_name(case, side)}: time", ours.seconds, peer.seconds, "s")
    if plan.gpu:
        name = share_name(case, side)
        yield Row(name, ours.added / 1e9, peer.added / 1e9, "GB", ours.added / peer.added, goals(plan).get(name))


def batching(plan: Plan) -> Iterator[Row]:
    """Candidates that share a forward pass, beside one after another."""
    model, size = built(plan, 2), plan.fields["hidden_size"] // plan.fields["num_attention_heads"]
    shape = {"rotary_size": size, "base": 10_000.0, "original_length": 4096}
    tables = [RescaleFactors.yarn(target_length=8192 + 128 * n, **shape) for n in range(plan.candidates)]
    for length in plan.batched:
        rows = min(plan.candidates, max(1, BATCH_TOKENS // length))
        tokens = tokens_of(plan, length).expand(rows, -1)

        def together(rows: int, tokens: Tensor = tokens) -> None:
            for first in range(0, len(tables), rows):
                batch = tables[first : first + rows]
                with candidate_rows(model, batch):
                    token_nll(model, tokens[: len(batch)])

        what = f"{len(tables)} candidates of {length:,} tokens, {rows} a pass"
        yield from tried(what, partial(both, plan, what, partial(together, rows), partial(together, 1)))


PARTS = {"slice": slices, "window": window, "attention": attention, "batching": batching, "loss": loss}
"""Those whose figures the projection needs come first."""


def device(plan: Plan) -> Iterator[Any]:
    """The machine, then the peak of its GPU in operations a second; a teraflop on a CPU, for the arithmetic's sake."""
    yield machine()
    yield peak_flops(torch.device("cuda", 0), torch.bfloat16) if plan.gpu else 1e12


def built(plan: Plan, layers: int) -> Any:
    """So many layers of the model, with random weights."""
    torch.manual_seed(0)
    fields = {**plan.fields, "num_hidden_layers": layers}
    return load_model(config=fields, dtype="bfloat16", attn_implementation="sdpa").to(plan.device)


def tokens_of(plan: Plan, length: int) -> Tensor:
    """A random row, [1, S]."""
    return torch.randint(plan.fields["vocab_size"], (1, length), device=plan.device)


def measured(plan: Plan, work: Callable[[], Any], learned: Sequence[Tensor] = ()) -> Cost:
    """Best seconds of a few runs after one that does not count, and the peak of the last.

    Args:
        plan: Where, and how often.
        work: What is measured.
        learned: Tensors that it leaves gradients at: they are dropped after each run, so that each makes them anew.
    """
    times, before = [], 0
    while len(times) <= plan.repeats and sum(times[1:]) < plan.enough:
        if plan.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begun = perf_counter()
        try:
            work()
            if plan.gpu:
                torch.cuda.synchronize()
            times.append(perf_counter() - begun)
        finally:
            for tensor in learned:
                tensor.grad = None
    peak = torch.cuda.max_memory_allocated() if plan.gpu else 0
    return Cost(min(times[1:] or times), peak - before, peak)


def beside(plan: Plan, name: str, ours: Cost, peer: Callable[[], Any], learned: Sequence[Tensor] = ()) -> Iterator[Row]:
    """Rows of seconds and, on a GPU, of peak memory; ours alone where the peer runs out of memory."""
    try:
        theirs = measured(plan, peer, learned)
    except torch.OutOfMemoryError:
        yield Row(f"{name}: time (the peer ran out of memory)", ours.seconds, None, "s", ours.seconds)
        yield Row(f"{name}: peak memory (the peer ran out)", ours.added / 1e9, None, "GB", ours.added / 1e9)
        return
    yield lower_is_better(f"{name}: time", ours.seconds, theirs.seconds, "s")
    if plan.gpu:
        yield lower_is_better(f"{name}: peak memory", ours.added / 1e9, theirs.added / 1e9, "GB")


def both(plan: Plan, name: str, ours: Callable[[], Any], peer: Callable[[], Any]) -> Iterator[Row]:
    """Ours and a peer, measured one after the other."""
    yield from beside(plan, name, measured(plan, ours), peer)


def tried(name: str, case: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a case, and one that says so where it fails; what it held is given back."""
    text = None
    try:
        yield from case()
    except Exception as error:  # a row is better than none of those after it
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if text is not None:
        yield failed(name, text)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
