"""Training refuses data whose tokens the model would misread, under a real Trainer and before the first step."""

import pytest
from helpers import LLAMA, tiny_llama
from lightning.pytorch import Trainer
from small_tokenizers import TEXT, byte_level, sentencepiece_like

from lightning_longrope import LongRoPEModule
from lightning_longrope.datamodules import PackedTextDataModule

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


class NoStep(LongRoPEModule):
    def training_step(self, batch, batch_idx):
        raise AssertionError("a step was taken")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a tokenizer of its own, text, and the same tokenizer with more tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sentencepiece_like().save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "more")
    (folder / "a.txt").write_text(TEXT)
    return folder


def fit(module, folder, tokenizer):
    data = PackedTextDataModule([str(folder / "a.txt")], tokenizer=tokenizer, seq_len=32, cache_dir=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "barebones": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, datamodule=data)


def test_a_foreign_tokenizer_is_refused(folder):
    with pytest.raises(ValueError, match=r"not that of the model .*: token \d+ is '.*' in one and '.*' in the other"):
        fit(NoStep(str(folder / "model")), folder, str(folder / "other"))


def test_tokens_without_a_row_in_the_embedding_are_refused(folder):
    small = {**LLAMA, "vocab_size": 40}
    with pytest.raises(ValueError, match=r"The data holds token \d+, but the model's embedding has 40 rows"):
        fit(NoStep(config=small), folder, str(folder / "model"))


@pytest.mark.parametrize("tokenizer", [None, "model", "more"])
def test_the_same_tokens_under_another_name_are_trained_on(folder, tokenizer):
    with pytest.raises(AssertionError, match="a step was taken"):
        fit(NoStep(str(folder / "model")), folder, tokenizer and str(folder / tokenizer))
