"""Our own model, with its factors, under the lm-evaluation-harness: what its ``HFLM`` would say, in flat memory.

``HFLM`` builds the logits of whole padded batches; here only positions that predict go through the output head, rows
that differ in their last token share a forward pass, and the factors installed in the model are used as they are.

Needs the extra ``lm-eval``, which is imported where it is used.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_longrope.isolation import fit_for_long_rows
from lightning_longrope.metrics import Measurement
from lightning_longrope.model import table_of_length
from lightning_longrope.scoring import continuation_scores

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

GENERATED_TOKENS = 256  # where a task sets no limit of its own, and at most half of the length
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Request = tuple[list[int], list[int]]
"""Tokens of a context and of the continuation to be scored."""


@dataclass(frozen=True)
class Ranks:
    """How the processes of a run share the forward passes.

    Attributes:
        share: This rank's passes of all passes, as many as every other rank's, each with whether it counts.
        sum: Sum of a float64 tensor over the ranks.
    """

    share: Callable[[Sequence[Any]], Iterable[tuple[Any, bool]]] = lambda items: ((item, True) for item in items)
    sum: Callable[[Tensor], Tensor] = lambda values: values


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    lengths: Sequence[int],
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    batch_tokens: int = 16384,
    seed: int = 0,
    ranks: Ranks = Ranks(),
) -> list[Measurement]:
    """Runs tasks of the lm-evaluation-harness.

    Args:
        model: A Hugging Face causal language model in eval mode.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        lengths: Lengths of the tasks that make prompts of a length (RULER), in tokens; prompts of other tasks are cut
            to the longest.
        num_fewshot: Examples before each question; the task's own number by default.
        limit: Most documents of each task.
        include_path: Folder with further tasks.
        batch_tokens: Tokens of a forward pass.
        seed: Of the examples.
        ranks: How the processes share the work.

    Returns:
        ``{task}_{metric}`` of every task and group, with 95 % intervals from its standard errors.

    Raises:
        ValueError: If the harness is not installed, a task is unknown, or its own requirements are missing.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"Benchmark tasks need the extra `lm-eval`: pip install lightning-longrope[lm-eval] ({error})."
        ) from error
    metadata = {"max_seq_lengths": list(lengths), "tokenizer": getattr(tokenizer, "name_or_path", None)}
    manager = TaskManager(include_path=include_path, metadata=metadata)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"The lm-evaluation-harness has no task {', '.join(unknown)}:"
            " see `lm-eval ls tasks`, or name a folder with tasks in `include_path`."
        )
    try:
        found = simple_evaluate(
            model=harness_model(model, tokenizer, max(lengths), batch_tokens, ranks),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except ImportError as error:
        raise ValueError(f"A task of {', '.join(tasks)} needs another package: {error}.") from error
    assert found is not None  # which it is on ranks other than 0, and to the harness there is one rank
    return measurements(found, max(lengths))


def measurements(found: Any, length: int) -> list[Measurement]:
    """The numbers in what the harness returns; those of a RULER task belong to the length that is their name.

    Args:
        found: What ``simple_evaluate`` returned.
        length: Length in tokens of numbers that have none of their own.
    """
    rows = []
    for task, values in found["results"].items():
        documents = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            half = 1.96 * error if isinstance(error, int | float) else float("nan")
            name = f"{task}_{metric}" if kind == "none" else f"{task}_{metric}_{kind}"
            if metric.isdecimal():
                if value >= 0:  # -1: that length was not asked for
                    rows.append(Measurement(task, int(metric), None, value, value - half, value + half, documents))
            else:
                rows.append(Measurement(name, length, None, value, value - half, value + half, documents))
    return rows


def harness_model(
    model: Any,
    tokenizer: Any,
    max_length: int,
    batch_tokens: int = 16384,
    ranks: Ranks = Ranks(),
) -> "TemplateLM":
    """The model as the harness wants it; to the harness there is one process, whatever ``ranks`` share inside.

    Args:
        model: A Hugging Face causal language model in eval mode.
        tokenizer: Its tokenizer.
        max_length: Most tokens of a prompt; longer ones lose their beginning.
        batch_tokens: Tokens of a forward pass.
        ranks: How the processes share the work.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class RescaledLM(TemplateLM):
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        tokenizer_name = str(getattr(tokenizer, "name_or_path", "")).replace("/", "__")

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            opened = tokenizer.bos_token is not None and string.startswith(tokenizer.bos_token)
            special = not opened if add_special_tokens is None else add_special_tokens
            return list(tokenizer.encode(string, add_special_tokens=special))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(model, pairs, max_length, batch_tokens, ranks)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [
                [
                    make_disjoint_window(pair)
                    for pair in get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id, max_length, context_len=1
                    )
                ]
                for request in requests
            ]
            scores = iter(self._loglikelihood_tokens([(None, *pair) for text in texts for pair in text]))
            return [sum(next(scores)[0] for _ in text) for text in texts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [
                generate(model, tokenizer, self.tok_encode(request.args[0]), request.args[1], max_length)
                for request in requests
            ]

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    return RescaledLM()


def log_likelihoods(
    model: Any, requests: Sequence[Request], max_length: int, batch_tokens: int, ranks: Ranks
) -> list[tuple[float, bool]]:
    """Log-probability of every continuation and whether greedy decoding would give it; rows met twice run once.

    Raises:
        ValueError: If a continuation has more than ``max_length`` tokens; contexts lose their beginning.
    """
    if (longest := max((len(continuation) for _, continuation in requests), default=0)) > max_length:
        raise ValueError(
            f"A task asks for the likelihood of a continuation of {longest} tokens, more than the longest of `lengths`,"
            f" {max_length}: give a length of at least {longest}."
        )
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        rows.setdefault(tuple([*context, *continuation][-max_length - 1 : -1]), []).append(number)
    found = torch.zeros(len(requests), 2, dtype=torch.float64)
    for batch, counts in ranks.share(_batches(model, list(rows), batch_tokens)):
        asked = [(place, number) for place, row in enumerate(batch) for number in rows[row]]
        nll, right = continuation_scores(model, batch, [(place, requests[number][1]) for place, number in asked])
        if counts:
            found[[number for _, number in asked]] = torch.stack([-nll, right.double()], dim=1)
    return [(value, bool(right)) for value, right in ranks.sum(found).tolist()]


def _batches(model: Any, rows: Sequence[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Rows by falling length, as many together as fit with their padding and are read with the same table."""
    batches: list[list[tuple[int, ...]]] = []
    for _, alike in groupby(sorted(rows, key=len, reverse=True), lambda row: table_of_length(model, len(row))):
        batches.append([])
        for row in alike:
            if batches[-1] and (len(batches[-1]) + 1) * len(batches[-1][0]) > batch_tokens:
                batches.append([])
            batches[-1].append(row)
    return batches


def generate(model: Any, tokenizer: Any, context: Sequence[int], options: dict[str, Any], max_length: int) -> str:
    """How the model goes on until one of the stop texts; one prompt at a time, without padding.

    Every rank generates the same: a sharded model needs all of them in every step.

    Args:
        model: A Hugging Face causal language model in eval mode.
        tokenizer: Its tokenizer.
        context: Tokens of the prompt.
        options: The harness's: ``until``, a limit of tokens, and arguments of ``generate``.
        max_length: Most tokens of prompt and continuation; the prompt loses its beginning.

    Raises:
        ValueError: If the limit of tokens leaves no room for a prompt.
    """
    rest = dict(options)
    until = rest.pop("until", None) or []
    stops = [text for text in ([until] if isinstance(until, str) else until) if text]
    limits = {name: int(rest.pop(name)) for name in _LIMITS if name in rest}
    name, tokens = next(iter(limits.items()), ("", max(1, min(GENERATED_TOKENS, max_length // 2))))
    if name and tokens >= max_length:
        raise ValueError(
            f"A task sets `{name}` to {tokens}, which leaves no room for its prompt in the longest of `lengths`,"
            f" {max_length}: give a length above {tokens}."
        )
    sampled = bool(rest.pop("do_sample", rest.get("temperature", 0.0) > 0))
    if not sampled:
        rest = {name: value for name, value in rest.items() if name not in ("temperature", "top_p", "top_k")}
    input_ids = torch.tensor(context[-max(1, max_length - tokens) :], device=next(model.parameters()).device)[None]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if stops:
        rest |= {"stop_strings": stops, "tokenizer": tokenizer}
    mask = torch.ones_like(input_ids)
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    settings = {"max_new_tokens": tokens, "do_sample": sampled, "pad_token_id": padding, **rest}
    settings |= {"eos_token_id": sorted(ends)} if ends else {}
    fit_for_long_rows(model, input_ids.shape[1])
    written = model.generate(input_ids, attention_mask=mask, **settings)[0, input_ids.shape[1] :]
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
