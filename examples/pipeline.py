"""An extended model in a transformers pipeline, with the right table at every length, in generation too.

Run it with an exported folder or a checkpoint, and a prompt: ``python examples/pipeline.py runs/mine/hf "Long ago"``.
"""

import sys
from typing import Any

from transformers import GenerationConfig, pipeline

from lightning_longrope import load_model
from lightning_longrope.loading import load_tokenizer
from lightning_longrope.model import window


def main(name: str, prompt: str, max_new_tokens: int = 64) -> Any:
    """Prints the answer and returns it."""
    model, tokenizer = load_model(name), load_tokenizer(name)
    sys.stdout.write(f"window: {window(model)} tokens\n")
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id
    )
    answer = writer(prompt, generation_config=greedy, return_full_text=False)[0]["generated_text"]
    sys.stdout.write(f"{answer}\n")
    return answer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
