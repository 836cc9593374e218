"""The parts of ``gpu.py``: each yields rows as it finds them, and goes on where one of its cases fails.

Shapes: S tokens of a row, H heads, D head size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from _results import Row, lower_is_better
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

from lightning_longrope import long_rows
from lightning_longrope.callbacks import FactorSearch
from lightning_longrope.callbacks.throughput import DENSE
from lightning_longrope.estimate import forward_flops, utilisation
from lightning_longrope.factors import RescaleFactors
from lightning_longrope.layers import decoder_layers
from lightning_longrope.loading import load_model, new_config
from lightning_longrope.losses import LOSSES
from lightning_longrope.losses import token_nll as flat_token_nll
from lightning_longrope.memory import Memory, save_memory
from lightning_longrope.model import candidate_rows, hidden_states, output_head
from lightning_longrope.scoring import token_nll
from lightning_longrope.search import RampSearch
from lightning_longrope.sizes import model_size

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TOY = {**LLAMA_2_7B, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
TOY |= {"num_hidden_layers": 4, "vocab_size": 96}
CARD = 141.0  # GB of an H200
LAST = 64  # queries whose attention is computed again in float64
BATCH_TOKENS = 16_384  # of the default search


@dataclass(frozen=True)
class Plan:
    """Sizes of all parts.

    Attributes:
        device: Where it runs.
        fields: Config of the whole model.
        attention: Lengths at which kernels are timed, forwards; backwards up to the first but one.
        slices: Lengths of the two-layer slice.
        windows: Lengths of the one-layer pass, the last that of the whole window.
        losses: Tokens of the losses.
        batched: Lengths of the rows that candidates share a pass with.
        candidates: How many there are.
        repeats: Timings of which the best counts.
    """

    device: str = "cuda"
    fields: Any = None
    attention: tuple[int, ...] = (8_192, 32_768, 70_000, 131_072, 262_144)
    slices: tuple[int, ...] = (8_192, 32_768, 131_072, 262_144)
    windows: tuple[int, ...] = (524_288, 2_097_152)
    losses: tuple[int, ...] = (8_192, 65_536)
    batched: tuple[int, ...] = (512, 2_048, 8_192)
    candidates: int = 32
    repeats: int = 3


def plan_for(toy: bool, quick: bool) -> Plan | None:
    """Sizes for this machine; None where there is no GPU and it is no toy."""
    if toy:
        long_rows.TOKENS, long_rows.TILE, long_rows.GROUP = 255, 100, 2 * 256 * 16
        return Plan("cpu", TOY, (128, 192), (128, 192), (224, 256), (128,), (32,), 4, 1)
    if not torch.cuda.is_available():
        return None
    plan = Plan(fields=LLAMA_2_7B)
    short = {name: tuple(s for s in getattr(plan, name) if s <= 131_072) for name in ("attention", "slices", "windows")}
    return replace(plan, **short) if quick else plan


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
        seconds, _ = measured(plan, lambda: kernel(*parts))
    # a kernel that is wrong beyond 65,536 tokens is one that this package does not let long rows have
    yield Row(f"{what}: error of the largest value", error, None, "", error, "<= 0.02" if name in RIGHT else None)
    yield rate(f"{what}: forward", flops, seconds)
    if backwards:
        parts = [part.detach().requires_grad_() for part in parts]
        slope = torch.randn_like(parts[0])
        seconds, _ = measured(plan, lambda: torch.autograd.grad(kernel(*parts), parts, slope))
        yield rate(f"{what}: forward and backward", 3.5 * flops, seconds)


RIGHT = {"flash", "cudnn", "varlen", "flash-attn"}


def rate(name: str, flops: float, seconds: float) -> Row:
    """Operations over time."""
    return Row(name, flops / seconds / 1e12, None, "TFLOP/s", flops / seconds / 1e12)


def kernels(device: str) -> dict[str, Callable[..., Tensor]]:
    """Kernels by name, each of queries, keys and values [1, H, S, D]."""
    names = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device == "cuda":
        names = {"flash": names["flash"], "cudnn": SDPBackend.CUDNN_ATTENTION}
        names["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    found: dict[str, Callable[..., Tensor]] = {name: partial(by_sdpa, which) for name, which in names.items()}
    if device == "cuda":
        found["varlen"] = by_varlen
        if find_spec("flash_attn") is not None:
            found["flash-attn"] = by_flash_attn
    return found


def by_sdpa(which: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One backend of torch's SDPA."""
    with sdpa_kernel(which):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def by_varlen(*parts: Tensor) -> Tensor:
    """Torch's variable-length kernel, of one document."""
    length = parts[0].shape[2]
    bounds = torch.tensor([0, length], dtype=torch.int32, device=parts[0].device)
    flat = [part[0].transpose(0, 1) for part in parts]
    output = varlen.varlen_attn(*flat, bounds, bounds, length, length, window_size=(-1, 0))
    return output.transpose(0, 1)[None]


def by_flash_attn(*parts: Tensor) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(part.transpose(1, 2) for part in parts), causal=True).transpose(1, 2)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last queries of the first and last head in float64, [1, 2, LAST, D]."""
    query, key, value = (part[:, (0, -1)].double() for part in (query[:, :, -LAST:], key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    later = torch.ones(LAST, LAST, dtype=torch.bool, device=query.device).triu(1)
    scores[..., -LAST:].masked_fill_(later, -torch.inf)
    return scores.softmax(-1) @ value


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
        whole, _ = measured(plan, lambda: token_nll(ours, tokens))
        yield Row(layer_name(length), mine[0] / 2, None, "s", mine[0] / 2)
        yield Row(head_name(length), max(0.0, whole - mine[0]), None, "s", max(0.0, whole - mine[0]))
        yield from beside(
            plan,
            f"2 layers without gradients, {length:,} tokens",
            mine,
            lambda: stock.eval().get_decoder()(input_ids=tokens, use_cache=False),
        )


def training(plan: Plan, ours: Any, stock: Any, tokens: Tensor) -> Iterator[Row]:
    """Forward and backward pass with checkpointed layers; Hugging Face's has the logits of the whole row."""

    def step(model: Any) -> None:
        model.train().zero_grad()
        if model is stock:
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            return
        hidden = hidden_states(model, tokens)[:, :-1].flatten(0, 1)
        nll, count = LOSSES["fused"](hidden, output_head(model), tokens[:, 1:].flatten())
        (nll / count).backward()

    mine = measured(plan, lambda: step(ours))
    yield from beside(plan, f"2 layers, training step, {tokens.shape[1]:,} tokens", mine, lambda: step(stock))


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
        seconds, _ = measured(plan, lambda: hidden_states(model, tokens))
        yield Row(layer_name(length), seconds, None, "s", seconds)
        hidden = torch.zeros(1, length, plan.fields["hidden_size"], dtype=torch.bfloat16, device=plan.device)
        head, labels = output_head(model), tokens.flatten()
        seconds, _ = measured(plan, lambda: flat_token_nll(hidden.flatten(0, 1), head, labels))
    yield Row(head_name(length), seconds, None, "s", seconds)
    if plan.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        peak, taken = torch.cuda.max_memory_allocated() / 1e9, (total - free) / 1e9
        goal = f"<= {CARD:g}" if length == plan.windows[-1] else None
        yield Row(f"peak with the weights of all layers, {length:,} tokens", peak, None, "GB", peak)
        yield Row(f"taken from the card, {length:,} tokens", taken, None, "GB", taken, goal)


def loss(plan: Plan) -> Iterator[Row]:
    """Losses of hidden states, forward and backward, each beside the logits of the whole row."""
    model = built(plan, 1)
    for tokens in plan.losses:
        hidden = torch.randn(tokens, plan.fields["hidden_size"], device=plan.device, dtype=torch.bfloat16)
        labels, head = tokens_of(plan, tokens).flatten(), output_head(model)

        def step(nll: Callable[..., Tensor], hidden: Tensor = hidden, labels: Tensor = labels) -> None:
            model.zero_grad()
            (nll(hidden.requires_grad_(), labels) / len(labels)).backward()

        def whole(hidden: Tensor, labels: Tensor, head: Any = head) -> Tensor:
            return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

        for name, function in LOSSES.items():
            if name == "liger" and (plan.device != "cuda" or find_spec("liger_kernel") is None):
                continue
            run = partial(step, lambda h, y, function=function, head=head: function(h, head, y)[0])
            what = f"{name} loss, {tokens:,} tokens"
            yield from tried(what, partial(both, plan, what, run, partial(step, whole)))


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


PARTS = {"attention": attention, "slice": slices, "window": window, "loss": loss, "batching": batching}


def projection(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """Hours of a default search of the whole model at each length that was timed, beside those of its operations."""
    figures, found = {row.name: row.ours for row in rows}, []
    size, layers = model_size(new_config(dict(plan.fields))), plan.fields["num_hidden_layers"]
    for length in sorted({*plan.slices, *plan.windows}):
        if layer_name(length) not in figures or head_name(length) not in figures:
            continue
        seconds = layers * figures[layer_name(length)] + figures[head_name(length)]
        floor = forward_flops(size, length) / (peak_flops(plan.device) * utilisation(length))
        name = f"default search, {forwards()} forwards of {length:,} tokens, projected"
        hours = forwards() * seconds / 3600, forwards() * floor / 3600
        goal = "<= 1.25" if length == 131_072 else None
        found.append(Row(name, *hours, "h", hours[0] / hours[1], goal))
    return found


def forwards() -> int:
    """Forward passes of a search with the default settings: candidates, the formulas beside them, held-out text."""
    defaults = {name: parameter.default for name, parameter in signature(FactorSearch).parameters.items()}
    candidates = defaults["max_evaluations"] or signature(RampSearch).parameters["max_evaluations"].default
    return int(defaults["documents"] * (candidates + 3) + defaults["held_out"] * 4)


def peak_flops(device: str) -> float:
    """Operations a second of the device in half types, of a CPU a teraflop for the sake of the arithmetic."""
    if device == "cpu":
        return 1e12
    name = torch.cuda.get_device_name(0).lower()
    return 1e12 * next((tflops for key, tflops in DENSE.items() if key in name), 989.0)


def layer_name(length: int) -> str:
    """Row of the time of one layer."""
    return f"1 layer without gradients, {length:,} tokens"


def head_name(length: int) -> str:
    """Row of the time of output head and loss."""
    return f"output head and loss without gradients, {length:,} tokens"


def built(plan: Plan, layers: int) -> Any:
    """So many layers of the model, with random weights."""
    torch.manual_seed(0)
    fields = {**plan.fields, "num_hidden_layers": layers}
    return load_model(config=fields, dtype="bfloat16", attn_implementation="sdpa").to(plan.device)


def tokens_of(plan: Plan, length: int) -> Tensor:
    """A random row, [1, S]."""
    return torch.randint(plan.fields["vocab_size"], (1, length), device=plan.device)


def measured(plan: Plan, work: Callable[[], Any]) -> tuple[float, int]:
    """Best seconds of a few runs after one that does not count, and the peak of bytes they add on a GPU, 0 on a CPU."""
    cuda, times, added = plan.device == "cuda", [], 0
    for _ in range(plan.repeats + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begun = perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
            added = torch.cuda.max_memory_allocated() - before
        times.append(perf_counter() - begun)
    return min(times[1:] or times), added


def beside(plan: Plan, name: str, ours: tuple[float, int], peer: Callable[[], Any]) -> Iterator[Row]:
    """Rows of seconds and, on a GPU, of peak memory; ours alone where the peer runs out of memory."""
    try:
        seconds, added = measured(plan, peer)
    except torch.OutOfMemoryError:
        yield Row(f"{name}: time (the peer ran out of memory)", ours[0], None, "s", ours[0])
        yield Row(f"{name}: peak memory (the peer ran out)", ours[1] / 1e9, None, "GB", ours[1] / 1e9)
        return
    yield lower_is_better(f"{name}: time", ours[0], seconds, "s")
    if ours[1]:
        yield lower_is_better(f"{name}: peak memory", ours[1] / 1e9, added / 1e9, "GB")


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
        yield Row(f"{name}: {text}", 0.0, None, "failed", 0.0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
