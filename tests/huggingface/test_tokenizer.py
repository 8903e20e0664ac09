"""Tokenizers against transformers and fixed ids; no text becomes a special token."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.fast_tokenizer import FastTokenizer
from flacuna_jax.huggingface.sentencepiece_tokenizer import SentencePieceTokenizer
from flacuna_jax.huggingface.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    tokenizer_files,
    tokenizer_fingerprint,
)
from tests.data.chat_templates import write_tokenizer

TEXTS = [
    "Once upon a time",
    "  two spaces, a tab\tand\na new line",
    "naïve façade 東京 🦙",
    "",
    " ",
    "USER: Hello! ASSISTANT:",
    "1234567890",
]
INJECTIONS = ["<s>", "</s>", "<unk>", "a</s>b", "</s></s>", "<|start_story|>", "x<|end_story|> y", " <unk> "]


def test_fixed_ids_of_the_llama_vocabulary(llama_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(llama_tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    for vector in json.loads((llama_tokenizer / "encode_vectors.json").read_text()):
        assert [1] * vector["add_bos"] + tokenizer.encode(vector["text"]) == vector["ids"]
    # FastChat's self-check of v1.1: text after </s> gets its own leading space.
    assert tokenizer.encode("USER: How are you? ASSISTANT:") == [
        3148, 1001, 29901, 1128, 526, 366, 29973, 319, 1799, 9047, 13566, 29901,
    ]  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS, *INJECTIONS])
def test_ids_of_a_tokenizer_json_equal_those_of_transformers(text: str, story_llama: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(story_llama / "tokenizer.json"))
    ours = load_tokenizer(story_llama)
    assert isinstance(ours, FastTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 2048)
    expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode(text) == expected
    assert ours.encode_batch([text, "x"]) == [expected, ours.encode("x")]


@pytest.fixture(params=["sentencepiece", "tokenizer.json"])
def tokenizer(
    request: pytest.FixtureRequest, tiny_sentencepiece: Path, story_llama: Path
) -> SentencePieceTokenizer | FastTokenizer:
    return load_tokenizer(tiny_sentencepiece if request.param == "sentencepiece" else story_llama)


def test_bytes_that_are_not_text_are_a_user_error(tokenizer: SentencePieceTokenizer | FastTokenizer) -> None:
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(UserError, match="is not UTF-8 text"):
            encode("caf\udce9")


@pytest.mark.parametrize("text", INJECTIONS)
def test_text_never_becomes_a_special_token(text: str, tokenizer: SentencePieceTokenizer | FastTokenizer) -> None:
    ids = tokenizer.encode(text)
    assert ids
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip() == text])
def test_decoding_inverts_encoding(text: str, tiny_sentencepiece: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


def test_bos_and_eos_are_special_even_if_tokenizer_json_differs(story_llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(story_llama / name, tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    expected, found = load_tokenizer(story_llama), load_tokenizer(tmp_path)
    for token in raw["added_tokens"][1:3]:
        for text in (token["content"], f"once {token['content']} more"):
            assert not {found.bos_id, found.eos_id} & set(found.encode(text))
            assert found.encode(text) == expected.encode(text)
            assert found.encode_batch([text]) == [expected.encode(text)]


def test_bos_and_eos_have_no_text(tokenizer: SentencePieceTokenizer | FastTokenizer) -> None:
    ids = tokenizer.encode("Once upon a time")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == tokenizer.decode(ids)


def test_batches_equal_single_texts(tokenizer: SentencePieceTokenizer | FastTokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_padding_and_truncation_settings_of_a_tokenizer_json_are_ignored(story_llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(story_llama / name, tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = "Once upon a time there was a llama"
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(story_llama).encode(text)


@pytest.fixture
def both(tiny_sentencepiece: Path, tmp_path: Path) -> Path:
    """tokenizer.model with LLaMA's settings (text is not normalised), and its tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tiny_sentencepiece / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=300, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **specials}))
    transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=True).save_pretrained(tmp_path / "fast")
    shutil.copy(tmp_path / "fast" / "tokenizer.json", tmp_path)
    return tmp_path


def test_tokenizer_model_is_preferred_if_both_agree(both: Path, story_llama: Path) -> None:
    assert isinstance(load_tokenizer(both), SentencePieceTokenizer)
    assert [path.name for path in tokenizer_files(both)][:2] == ["tokenizer.model", "tokenizer.json"]
    alone = tokenizer_fingerprint(both)
    (both / "tokenizer.json").unlink()
    assert tokenizer_fingerprint(both) == alone
    assert alone != tokenizer_fingerprint(story_llama)


def another_bos(tokenizer: dict) -> None:
    for token in tokenizer["added_tokens"]:
        token["content"] = {"<s>": "</s>", "</s>": "<s>"}.get(token["content"], token["content"])
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<s>"], vocabulary["</s>"] = vocabulary["</s>"], vocabulary["<s>"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tokenizer: tokenizer.update(normalizer=None, pre_tokenizer=None), "disagree"),
        (lambda tokenizer: tokenizer["model"].update(byte_fallback=False), "disagree"),
        (another_bos, "BOS is 1 in tokenizer.model but 2 in tokenizer.json"),
    ],
    ids=["no prefix", "no bytes", "bos"],
)
def test_two_tokenizers_that_disagree_are_an_error(change: Callable[[dict], None], says: str, both: Path) -> None:
    tokenizer = json.loads((both / "tokenizer.json").read_text())
    change(tokenizer)
    (both / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=says):
        load_tokenizer(both)


def test_special_tokens_are_found_in_any_settings_file(story_llama: Path, tmp_path: Path) -> None:
    shutil.copy(story_llama / "tokenizer.json", tmp_path)
    for name, content in {
        "tokenizer_config.json": {"bos_token": {"content": "<|start_story|>"}, "eos_token": "<|end_story|>"},
        "special_tokens_map.json": {"bos_token": "<|start_story|>", "eos_token": {"content": "<|end_story|>"}},
        "config.json": {"bos_token_id": 1, "eos_token_id": 2},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="does not name an eos_token"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_larger_than_the_embedding_is_an_error(tiny_sentencepiece: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece)
    check_vocabulary(tokenizer, 300, tiny_sentencepiece)
    with pytest.raises(UserError, match="300 tokens, but the model's embedding 299"):
        check_vocabulary(tokenizer, 299, tiny_sentencepiece)


def test_missing_and_damaged_files_are_named(tiny_sentencepiece: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer_fingerprint(tmp_path)
    for name, content in {"tokenizer.json": b"{}", "tokenizer.model": b"not a model"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path)
    content = (tiny_sentencepiece / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_model_without_eos_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("a b c d e f g\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=20, eos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(tmp_path)


def _chat_sentencepiece(directory: Path, source: Path, legacy: bool | None) -> Path:
    """tokenizer.model with two chat markers and a word added to it, as in fine-tunes of LLaMA."""
    directory.mkdir()
    shutil.copy(source / "tokenizer.model", directory)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")).vocab_size()
    contents = ("<|im_start|>", "<|im_end|>", "[word]")
    (directory / "added_tokens.json").write_text(json.dumps({c: pieces + i for i, c in enumerate(contents)}))
    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }  # fmt: skip
    settings |= {} if legacy is None else {"legacy": legacy}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_are_part_of_a_sentencepiece_tokenizer(
    legacy: bool, llama_tokenizer: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    directory = _chat_sentencepiece(tmp_path / "model", llama_tokenizer, legacy)
    ours = load_tokenizer(directory)
    assert isinstance(ours, SentencePieceTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 32001, 32003)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.eos_token_id == 32001
    ids = [32000, *ours.encode("user\nHi there", first=False), 32001, *ours.encode("\nyes", first=False)]
    assert ids == theirs.encode("<|im_start|>user\nHi there<|im_end|>\nyes", add_special_tokens=False)
    assert ours.decode(ids).split() == ["user", "Hi", "there", "yes"]
    assert 32002 in ours.encode("a [word] here")
    assert "[word]" in ours.decode(ours.encode("a [word] here"))
    assert not {32000, 32001} & set(ours.encode("<|im_start|> and <|im_end|>"))
    assert tokenizer_fingerprint(directory) != tokenizer_fingerprint(llama_tokenizer)


def test_tokens_of_the_settings_are_added_to_a_tokenizer_json(story_llama: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(story_llama / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["2048"] = {"content": "<|im_end|>", "special": True}
    settings["eos_token"] = "<|im_end|>"
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == theirs.eos_token_id == 2048
    assert 2048 not in ours.encode("x<|im_end|>")


def test_vocab_and_merges_are_read_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = write_tokenizer(tmp_path / "fast", ["<|im_start|>", "<|im_end|>"], bos=None)
    raw = json.loads((fast / "tokenizer.json").read_text())
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (plain / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in raw["model"]["merges"]))
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in raw["added_tokens"]}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    (plain / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    ours, theirs = load_tokenizer(plain), transformers.AutoTokenizer.from_pretrained(plain)
    assert (ours.bos_id, ours.eos_id) == (None, theirs.eos_token_id)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_a_tiktoken_file_is_ignored_if_there_is_a_tokenizer_json(story_llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(story_llama / name, tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    assert isinstance(load_tokenizer(tmp_path), FastTokenizer)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tiktoken"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_that_transformers_saved_with_a_tokenizer_model(llama_tokenizer: Path, tmp_path: Path) -> None:
    """transformers 5 saves added tokens only in tokenizer.json, so tokenizer.model lacks the EOS of the settings."""
    transformers = pytest.importorskip("transformers")
    original = _chat_sentencepiece(tmp_path / "model", llama_tokenizer, False)
    theirs = transformers.AutoTokenizer.from_pretrained(original)
    theirs.save_pretrained(tmp_path / "saved")
    shutil.copy(original / "tokenizer.model", tmp_path / "saved")
    ours = load_tokenizer(tmp_path / "saved")
    assert isinstance(ours, FastTokenizer)
    assert ours.eos_id == theirs.eos_token_id == 32001
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
