"""Whether a model can read the tokens it is about to be given: said before the first step, not by an index error."""

from typing import Any


def check_tokenizer(tokenizer: Any, model_name: str | None) -> None:
    """Refuses a tokenizer whose numbers mean other tokens than those of the model's own.

    Added tokens that only one of them has are no difference, nor is a tokenizer that cannot be found by the model's
    name, as where the name is that of a checkpoint.

    Args:
        tokenizer: What made the tokens.
        model_name: Hugging Face name or folder of the model.

    Raises:
        ValueError: If a number stands for two different tokens.
    """
    from lightning_longrope.loading import load_tokenizer

    if model_name is None or getattr(tokenizer, "name_or_path", None) == model_name:
        return
    try:
        own = load_tokenizer(model_name).get_vocab()
    except ValueError:
        return
    names = {number: name for name, number in own.items()}
    for name, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if names.get(number, name) != name:
            raise ValueError(
                f"The data's tokenizer ({getattr(tokenizer, 'name_or_path', '') or 'unnamed'}) is not that of the model"
                f" {model_name!r}: token {number} is {name!r} in one and {names[number]!r} in the other. Leave"
                " `tokenizer` out of the datamodule to take the model's own."
            )


def check_vocabulary(largest_token: int, model: Any) -> None:
    """Refuses tokens that the embedding of a model has no row for.

    Args:
        largest_token: The largest number among the tokens.
        model: A Hugging Face model; anything else is not asked.

    Raises:
        ValueError: If it is out of range.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = getattr(text, "vocab_size", None)
    if rows is not None and largest_token >= rows:
        raise ValueError(
            f"The data holds token {largest_token}, but the model's embedding has {rows} rows: tokenise the text with"
            " the model's own tokenizer, or give the model's config a `vocab_size` that holds the tokenizer's."
        )
