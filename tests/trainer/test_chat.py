"""Conversations in rows: every answer is learnt once and nothing else, under templates of several families."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML, FORGETFUL, LLAMA3, MARKED, chat_tokenizer
from helpers import LLAMA
from lightning.pytorch import Trainer
from small_tokenizers import byte_level

from lightning_longrope import LongRoPEModule, tokenizing
from lightning_longrope.__main__ import main
from lightning_longrope.datamodules import ChatDataModule
from lightning_longrope.packing import IGNORED

ROOT = Path(__file__).parents[2]
ENDS = {CHATML: "<|im_end|>", MARKED: "<|im_end|>", LLAMA3: "<|eot_id|>"}
MODEL = {**LLAMA, "vocab_size": 712, "hidden_size": 32, "num_hidden_layers": 1}


def turns(number, rounds=2, words=4):
    """A conversation whose answers are like no other's."""
    asked = [{"role": "user", "content": f"Question {number}.{r}?" + " please" * words} for r in range(rounds)]
    said = [
        {"role": "assistant", "content": f"Answer {number}.{r}" + " garden" * (words + number)} for r in range(rounds)
    ]
    return [message for pair in zip(asked, said, strict=True) for message in pair]


def answers(conversations):
    return Counter(m["content"] for messages in conversations for m in messages if m["role"] == "assistant")


@pytest.fixture
def conversations():
    return [turns(number, rounds=1 + number % 3) for number in range(12)]


@pytest.fixture
def file(tmp_path, conversations):
    """All forms of a record in one file."""
    records = []
    for number, messages in enumerate(conversations):
        if len(messages) == 2 and number % 2:
            records.append({"prompt": messages[0]["content"], "completion": messages[1]["content"]})
        elif number % 3 == 1:
            names = {"user": "human", "assistant": "gpt"}
            chat = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
            records.append({"id": number, "conversations": chat})
        else:
            records.append({"messages": messages})
    return write(tmp_path / "chats.jsonl", records)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat(file, template=CHATML, **options):
    defaults = {"tokenizer": chat_tokenizer(template), "seq_len": 512, "cache_dir": None, "train_files": [file]}
    return ChatDataModule(**{**defaults, **options})


def learnt(datamodule, end):
    """Texts of the stretches of all rows that are learnt."""
    found = Counter()
    for batch in datamodule.train_dataloader():
        for row, labels in zip(batch["input_ids"].numpy(), batch["labels"].numpy(), strict=True):
            kept = labels != IGNORED
            assert (row[kept] == labels[kept]).all()
            edges = np.flatnonzero(np.diff(kept.astype(int), prepend=0, append=0)).reshape(-1, 2)
            texts = [datamodule.tokenizer.decode(row[a:b], clean_up_tokenization_spaces=False) for a, b in edges]
            assert all(text.endswith(end) for text in texts)
            found.update(text.removesuffix(end) for text in texts)
    return found


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
@pytest.mark.parametrize("template", ENDS, ids=["chatml", "marked", "llama3"])
def test_every_answer_is_learnt_once_and_nothing_else(file, conversations, template, packing):
    datamodule = chat(file, template, packing=packing)
    assert learnt(datamodule, ENDS[template]) == answers(conversations)
    rows = datamodule.rows("train")
    assert len(rows) == 12 if packing == "padded" else len(rows) < 10
    stored = {tuple(datamodule.filler("train").tolist())}
    whole = [datamodule.tokenizer.apply_chat_template(messages)["input_ids"] for messages in conversations]
    assert stored == {tuple(token for tokens in whole for token in tokens)}


def test_conversations_of_a_row_do_not_see_each_other_and_padding_is_not_learnt(file):
    batch = next(iter(chat(file).train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    assert len(starts) > 2
    opening = chat_tokenizer().convert_tokens_to_ids("<|im_start|>")
    assert all(batch["input_ids"][0, start] in (opening, chat_tokenizer().eos_token_id) for start in starts)
    padded = next(iter(chat(file, packing="padded").train_dataloader()))
    assert set(padded) == {"input_ids", "labels", "stretch_lengths"}
    filled = [int((row != chat_tokenizer().eos_token_id).nonzero().max()) + 1 for row in padded["input_ids"]]
    assert all(last <= found <= last + 1 for last, found in zip(filled, padded["stretch_lengths"], strict=True))
    assert padded["input_ids"][0, -1] == chat_tokenizer().eos_token_id
    assert padded["labels"][0, -1] == IGNORED


def test_long_conversations_are_dropped_or_cut_and_counted(tmp_path, caplog):
    long = [*turns(1, words=2), *turns(2, words=80)]  # its first answers fit
    hopeless = turns(3, rounds=1, words=100)
    file = write(tmp_path / "long.jsonl", [{"messages": m} for m in (turns(0, words=2), long, hopeless)])
    assert learnt(chat(file, seq_len=160), "<|im_end|>") == answers([turns(0, words=2)])
    assert "train: 2 of 3 conversations are longer than `seq_len` 160: 2 dropped, 0 cut." in caplog.text
    cut = learnt(chat(file, seq_len=160, too_long="cut"), "")
    assert "2 of 3 conversations are longer than `seq_len` 160: 1 dropped, 1 cut." in caplog.text
    expected = {f"{text}<|im_end|>" for text in answers([turns(0, words=2), turns(1, words=2)])}
    assert set(cut) == expected
    with pytest.raises(ValueError, match=r"No conversation .* fits `seq_len` 8: the shortest of 3 has \d+ tokens"):
        chat(file, seq_len=8).train_dataloader()


def test_records_that_give_nothing_to_learn_are_named_by_file_and_line(tmp_path, caplog, conversations):
    records = [{"messages": conversations[0]}, {"messages": conversations[0][:1]}, {"text": "a"}]
    file = write(tmp_path / "bad.jsonl", records)
    with pytest.raises(ValueError, match=r"bad.jsonl, record 2: no message of the role `assistant`"):
        chat(file).setup()
    assert learnt(chat(file, on_error="skip"), "<|im_end|>") == answers(conversations[:1])
    assert "Skipped 2 records" in caplog.text
    forgetful = write(tmp_path / "forgetful.jsonl", [{"messages": turns(0, rounds=2)}])
    with pytest.raises(
        ValueError, match=r"forgetful.jsonl, record 1: the chat template renders message 2 in another way"
    ):
        chat(forgetful, FORGETFUL).setup()


def test_a_tokenizer_without_a_template_needs_one_and_takes_a_file(file, tmp_path, conversations):
    with pytest.raises(ValueError, match="has no chat template.*give one as `chat_template`"):
        chat(file, tokenizer=byte_level()).setup()
    (tmp_path / "template.jinja").write_text(CHATML)
    for given in (CHATML, str(tmp_path / "template.jinja")):
        assert learnt(chat(file, None, chat_template=given), "<|im_end|>") == answers(conversations)


def test_stores_are_kept_by_template_and_long_texts_stay_whole(file, tmp_path, monkeypatch):
    cached = {"cache_dir": str(tmp_path / "cache")}
    first = chat(file, **cached)
    first.prepare_data()
    monkeypatch.setattr(tokenizing, "PIECE", 50)
    other = chat(file, MARKED, **cached)
    assert other.filler("train").tolist() == first.filler("train").tolist()
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2
    again = chat(file, **cached, seq_len=64, too_long="cut")
    monkeypatch.setattr("lightning_longrope.datamodules.base.write_store", None)
    again.prepare_data()
    workers = chat(file, LLAMA3, cache_dir=str(tmp_path / "other"))
    monkeypatch.undo()
    workers.tokenise(workers=1)
    assert workers.filler("train").tolist() == chat(file, LLAMA3).filler("train").tolist()


def test_a_model_is_trained_and_validated_on_conversations(file):
    for packing in ("best_fit", "padded"):
        trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        data = chat(None, train_files=None, files=[file], val_share=0.2, packing=packing)
        trainer.fit(LongRoPEModule(config=MODEL), datamodule=data)
        assert trainer.global_step == len(data.rows("train")) >= 2
        assert trainer.callback_metrics["train_loss"].isfinite()
        assert trainer.callback_metrics["val_perplexity"].isfinite()


def test_chat_from_the_command_line(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    words = ["--data=datamodules/chat.yaml", f"--data.train_files=[{file}]", f"--data.tokenizer={tmp_path}/tokenizer",
             "--data.seq_len=512", f"--data.cache_dir={tmp_path}/cache",
             f"--model.config={json.dumps(MODEL)}"]  # fmt: skip
    quiet = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.logger=false",
             "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]  # fmt: skip
    assert main(["fit", *words, *quiet, f"--trainer.default_root_dir={tmp_path}/run"]) == 0
    capsys.readouterr()
    assert main(["data", *words, "--rows=1", "--width=1000"]) == 0
    shown = "".join(line.removeprefix("│ ") for line in capsys.readouterr().out.splitlines())
    assert "train: 12 documents" in shown
    assert shown.count("⟦Answer") >= 3
    assert "⟧" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "concat"}, "`packing` of conversations must be best_fit or padded"),
        ({"too_long": "x"}, "`too_long`"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChatDataModule(train_files=["x"], **options)
