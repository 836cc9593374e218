"""Token stores on disk: what is written is what the tokenizer says, whole or not at all, and never another's."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest

from lightning_longrope.datamodules import store_writing
from lightning_longrope.datamodules.readers import Document
from lightning_longrope.datamodules.sample_text import train_tokenizer
from lightning_longrope.datamodules.token_store import TokenStore, tokenizer_fingerprint

TEXTS = ["The grass is green.", "", "12345 and <|eos|> is text here", "ünïcödé 漢字 " * 50]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, "The sky is blue. " * 20], vocab_size=300)


def written(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def test_a_store_holds_the_tokens_of_every_document_and_reads_back(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store_writing, "TEXTS", 2)  # several batches
    expected = [[tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize(text)] for text in TEXTS[:2]]
    store = TokenStore.write(tmp_path / "store", iter(TEXTS), tokenizer)
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.dtype == np.uint16
    assert written(store)[:2] == expected
    assert [tokenizer.decode(row) for row in written(store)] == TEXTS
    assert tokenizer.eos_token_id not in store.tokens  # spelled out in a text it is text
    assert len(store.documents) == 3  # the empty one is kept in the store only
    memory, again = TokenStore.in_memory(TEXTS, tokenizer), TokenStore.open(tmp_path / "store", tokenizer)
    assert written(memory) == written(again) == written(store)
    assert store.manifest == again.manifest == json.loads((tmp_path / "store/manifest.json").read_text())
    assert memory.manifest.items() <= again.manifest.items()
    assert again.manifest["documents"] == 4
    assert again.manifest["text_bytes"] == len("".join(TEXTS).encode())
    assert again.manifest["tokens"] == len(again.tokens)
    assert sorted(os.listdir(tmp_path)) == ["store"]


def test_large_vocabularies_take_four_bytes(tokenizer):
    class Large:
        bos_token_id = eos_token_id = None

        def __len__(self):
            return 70_000

        def get_vocab(self):
            return {"last": 70_000}

        def __call__(self, batch, **options):
            return {"input_ids": [[70_000, 5] for _ in batch]}

    store = TokenStore.in_memory(["a", "b"], Large())
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [70_000, 5, 70_000, 5]
    assert store.manifest["vocabulary"] == 70_001


def test_a_store_of_another_tokenizer_is_refused(tmp_path, tokenizer):
    TokenStore.write(tmp_path / "store", TEXTS, tokenizer)
    other = train_tokenizer(["quite another text " * 30, *TEXTS], vocab_size=300)
    assert len(other) == len(tokenizer)
    with pytest.raises(ValueError, match=r"store was made with another tokenizer .* another `cache_dir`"):
        TokenStore.open(tmp_path / "store", other)


def test_the_fingerprint_sees_how_text_is_cut_and_nothing_else(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == before
    loaded.backend_tokenizer.enable_truncation(4)
    loaded.backend_tokenizer.enable_padding()
    assert tokenizer_fingerprint(loaded) == before
    loaded.add_tokens(["grass"])
    assert tokenizer_fingerprint(loaded) != before


@pytest.mark.parametrize("damage", ["shorter", "flipped"])
def test_a_damaged_store_is_refused(tmp_path, tokenizer, damage):
    store = TokenStore.write(tmp_path / "store", TEXTS, tokenizer)
    data = (tmp_path / "store/tokens.bin").read_bytes()
    flipped = data[:9] + bytes([data[9] ^ 1]) + data[10:]
    del store
    (tmp_path / "store/tokens.bin").write_bytes(data[:-2] if damage == "shorter" else flipped)
    with pytest.raises(ValueError, match=r"tokens\.bin is damaged: .* Delete the store"):
        TokenStore.open(tmp_path / "store", tokenizer)


def test_a_crash_leaves_nothing_behind(tmp_path, tokenizer):
    def crash():
        yield TEXTS[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        TokenStore.write(tmp_path / "store", crash(), tokenizer)
    assert os.listdir(tmp_path) == []


def test_the_store_of_a_faster_process_is_taken(tmp_path, tokenizer):
    def slower():
        yield TEXTS[0]
        os.rename(tmp_path / "fast", tmp_path / "store")  # another process finishes first

    TokenStore.write(tmp_path / "fast", TEXTS, tokenizer)
    store = TokenStore.write(tmp_path / "store", slower(), tokenizer)
    assert store.manifest["documents"] == len(TEXTS)
    assert os.listdir(tmp_path) == ["store"]


def test_no_text_at_all_makes_an_empty_store(tmp_path, tokenizer):
    store = TokenStore.write(tmp_path / "store", [], tokenizer)
    assert len(store.tokens) == len(store.documents) == store.manifest["documents"] == 0


def test_every_document_keeps_its_source_on_disk_and_in_selections(tmp_path, tokenizer):
    labels = ["web", "books", "web", "", "code", "books"]
    documents = [Document(f"document {number}" if number else "", label=name) for number, name in enumerate(labels)]
    memory = TokenStore.in_memory(documents, tokenizer)
    for store in (memory, TokenStore.write(tmp_path / "store", documents, tokenizer)):
        assert store.source_names == ("web", "books", "", "code")
        assert store.sources.dtype == np.uint16
        assert [store.source_names[source] for source in store.sources] == labels
        kept = store.documents  # without the empty first one
        assert [store.source_names[source] for source in kept.sources] == labels[1:]
        assert kept.select(np.array([4, 0])).sources.tolist() == [1, 1]
        assert pickle.loads(pickle.dumps(kept)).sources.tolist() == kept.sources.tolist()


def test_too_many_sources_are_a_wrong_field(tokenizer, monkeypatch):
    monkeypatch.setattr(store_writing, "MOST_SOURCES", 2)
    with pytest.raises(ValueError, match=r"more than 2 sources, one of them '3': `source_field` must name a field"):
        TokenStore.in_memory([Document("text", label=name) for name in "123"], tokenizer)


def test_a_store_of_another_version_is_refused(tmp_path, tokenizer):
    TokenStore.write(tmp_path / "store", TEXTS, tokenizer)
    path = tmp_path / "store/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="store is of another version"):
        TokenStore.open(tmp_path / "store", tokenizer)


def test_the_hash_of_a_document_depends_on_its_tokens_alone(tmp_path, tokenizer, monkeypatch):
    texts = ["the green lamp " * 40, "x", "the green lamp " * 40, "", "some grass " * 200, "x"]
    whole = TokenStore.in_memory(texts, tokenizer)
    monkeypatch.setattr("lightning_longrope.tokenizing.PIECE", 60)
    monkeypatch.setattr("lightning_longrope.datamodules.store_writing.PIECE", 8)
    cut = TokenStore.write(tmp_path / "store", texts, tokenizer)
    pairs = zip(whole.offsets, whole.offsets[1:], strict=False)
    expected = [
        int.from_bytes(hashlib.blake2b(whole.tokens[start:end].tobytes(), digest_size=8).digest(), "little")
        for start, end in pairs
    ]
    assert whole.hashes.tolist() == cut.hashes.tolist() == expected
    assert (len(expected), len(set(expected))) == (6, 4)
