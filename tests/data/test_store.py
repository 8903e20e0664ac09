"""The token store and the build that fills it: contents, counts, length policies, fingerprint, description."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.data import build
from flacuna_jax.data.build import build_store
from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.layouts import system_text
from flacuna_jax.data.store import Piece, StoreBuilder, TokenStore, describe_example
from flacuna_jax.data.tokenization import TokenizedExample, tokenize
from flacuna_jax.errors import UserError
from tests.data.conftest import Characters, SentencePiece
from tests.vocabularies import llama_template


def write(path: Path, pairs: list[tuple[str, str]], **fields: str) -> SourceConfig:
    records = [{"prompt": q, "completion": a, "id": f"{path.stem}{i}", **fields} for i, (q, a) in enumerate(pairs)]
    path.write_text("\n".join(map(json.dumps, records)))
    return SourceConfig(path=str(path))


def config(*sources: SourceConfig, **settings: Any) -> DataConfig:
    return DataConfig(sources=sources, **settings)


def test_the_store_returns_what_was_added(
    tmp_path: Path, characters: Characters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BLOCK", 3)
    pairs = [(f"question {i}", "answer " * (i + 1)) for i in range(10)]
    store, report = build_store(
        config(
            write(tmp_path / "a.jsonl", [*pairs[:6], ("no answer", "")]),
            write(tmp_path / "b.jsonl", pairs[6:], source="cot"),
        ),
        characters,
    )
    assert len(store) == 10
    assert store.tokens.dtype == np.uint16
    assert store.source_index.tolist() == [0] * 6 + [1] * 4
    assert store.record_index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert store.tasks == ("a", "cot")
    for i, (question, answer) in enumerate(pairs):
        sample = Conversation("", "", (Turn("user", question), Turn("assistant", answer)))
        expected = tokenize(sample, llama_template("vicuna_v1.1"), characters)
        example = store.example(i)
        assert (example.id, example.source) == (f"a{i}", "a") if i < 6 else (f"b{i - 6}", "cot")
        np.testing.assert_array_equal(example.ids, expected.ids)
        np.testing.assert_array_equal(example.loss_mask, expected.loss_mask)
    assert (report.sources[0].read, report.sources[0].kept, report.kept) == (7, 6, 10)
    assert report.tokens == len(store.tokens) == store.lengths.sum()
    assert report.supervised_tokens == store.loss_mask.sum()
    assert store.supervised.tolist() == [int(store.example(i).loss_mask.sum()) for i in range(10)]
    assert "1: no answer in the record (first:" in "\n".join(report.lines())


def test_large_vocabularies_keep_their_ids() -> None:
    builder = StoreBuilder(["a"], 128_256)
    builder.add(0, [TokenizedExample(np.array([1, 128_255]), np.array([False, True]), "x", "y")], [0])
    assert builder.finish().example(0).ids.tolist() == [1, 128_255]


@pytest.mark.parametrize("mask", [[False, False], [True, True]])
def test_an_example_without_loss_is_an_error(mask: list[bool]) -> None:
    with pytest.raises(ValueError, match="no supervised token"):
        StoreBuilder(["a"], 10).add(0, [TokenizedExample(np.array([1, 2]), np.array(mask), "x", "y")], [0])


LONG = [("short", "yes"), ("word " * 200, "kept"), ("short", "word " * 200)]


def test_over_length_drop(tmp_path: Path, llama: SentencePiece) -> None:
    store, report = build_store(config(write(tmp_path / "a.jsonl", LONG), max_length=150), llama)
    (source,) = report.sources
    assert len(store) == 1
    assert source.dropped == {build.OVER_LENGTH: 2}
    assert source.tokens_lost > 400
    assert source.first_seen[build.OVER_LENGTH].endswith("line 2 (record 2): 242 tokens")


def test_over_length_truncate(tmp_path: Path, llama: SentencePiece) -> None:
    settings = config(write(tmp_path / "a.jsonl", LONG), max_length=150, over_length="truncate_prompt")
    store, report = build_store(settings, llama)
    (source,) = report.sources
    assert len(store) == 2
    assert store.lengths.max() <= 150
    assert source.dropped == {build.ANSWER_TOO_LONG: 1}
    assert source.changed == {build.TRUNCATED: 1}
    assert source.tokens_lost == (242 - store.lengths[1]) + 242


def test_over_length_error(tmp_path: Path, llama: SentencePiece) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"line 2 \(record 2\): 242 tokens, more than data.max_length 150"):
        build_store(config(write(path, LONG), max_length=150, over_length="error"), llama)


def test_a_source_without_examples_is_an_error(tmp_path: Path, characters: Characters) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: no usable example \(2 × no answer in the record\)"):
        build_store(config(write(tmp_path / "a.jsonl", [("q", "")] * 2)), characters)
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    of_another = SourceConfig(path=str(tmp_path / "a.jsonl"), format="flan_mini")
    with pytest.raises(UserError, match=r"first: .*'conversations' must be a list .*are those of format: alpaca"):
        build_store(config(of_another).model_copy(update={"on_bad_record": "skip"}), characters)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no usable example \\(no records\\)"):
        build_store(config(SourceConfig(path=str(tmp_path / "a.jsonl"))), characters)


def test_max_examples(tmp_path: Path, characters: Characters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BLOCK", 4)
    source = write(tmp_path / "a.jsonl", [("q", "" if i == 1 else f"a{i}") for i in range(20)])
    store, report = build_store(config(source.model_copy(update={"max_examples": 6})), characters)
    assert store.record_index.tolist() == [0, 2, 3, 4, 5, 6]
    assert (report.sources[0].read, report.kept) == (7, 6)


def test_bad_records_are_counted_with_on_bad_record_skip(tmp_path: Path, characters: Characters) -> None:
    source = write(tmp_path / "a.jsonl", [("q", "a")] * 3)
    with open(source.path, "a") as file:
        file.write('\n{"prompt": 1, "completion": "x"}\n{"prompt": ')
    with pytest.raises(UserError, match=r"line 4 .*'prompt' must be text.*on_bad_record: skip"):
        build_store(config(source), characters)
    store, report = build_store(config(source, on_bad_record="skip"), characters)
    assert len(store) == 3
    assert report.sources[0].dropped == {"wrong type": 1, "unreadable record": 1}
    assert report.sources[0].read == 5


def test_progress(tmp_path: Path, characters: Characters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BLOCK", 2)
    sources = [write(tmp_path / f"{name}.jsonl", [("q", "a")] * 3) for name in "ab"]
    seen: list[int] = []
    build_store(config(*sources), characters, seen.append)
    assert seen == [2, 3, 5, 6]


def test_fingerprint(tmp_path: Path, characters: Characters) -> None:
    def fingerprint(pairs: list[tuple[str, str]], **settings: Any) -> str:
        return build_store(config(write(tmp_path / "a.jsonl", pairs), **settings), characters)[0].fingerprint

    base = fingerprint([("q", "a"), ("r", "b")])
    assert base == fingerprint([("q", "a"), ("r", "b")])
    assert len({base, fingerprint([("q", "a"), ("r", "c")]), fingerprint([("r", "b"), ("q", "a")])}) == 3
    assert base != fingerprint([("q", "a"), ("r", "b")], train_on="all")
    assert base != fingerprint([("q", "a"), ("r", "b")], template="vicuna_v0")


def one(tokenizer: SentencePiece, *texts: str, template: str = "vicuna_v1.1") -> TokenStore:
    roles = ("user", "assistant")
    sample = Conversation("x", "y", tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)))
    builder = StoreBuilder(["a"], tokenizer.vocab_size)
    builder.add(0, [tokenize(sample, llama_template(template), tokenizer)], [0])
    return builder.finish()


def test_describe(llama: SentencePiece) -> None:
    system = system_text("vicuna_v1.1")
    assert describe_example(one(llama, "Hi", "Hello é 漢", "Bye", " See\nyou"), 0, llama) == [
        Piece("<s>", False, special=True),
        Piece(f"{system} USER: Hi ASSISTANT:", False),
        Piece(" Hello é 漢", True),
        Piece("</s>", True, special=True),
        Piece("USER: Bye ASSISTANT:", False),
        Piece("  See\nyou", True),
        Piece("</s>", True, special=True),
    ]
    v0 = describe_example(one(llama, "Hi", "Hello", "Bye", "Ciao", template="vicuna_v0"), 0, llama)
    assert [piece.text for piece in v0 if piece.supervised] == [" Hello\n###", " Ciao\n", "</s>"]


def test_real_data_in_one_store(test_data: Path, llama: SentencePiece) -> None:
    sources = (
        "stanford_alpaca/alpaca_5000.json",
        "sharegpt/dummy_conversation.json",
        "code_alpaca/code_alpaca_2k.json",
    )
    store, report = build_store(config(*(SourceConfig(path=str(test_data / name)) for name in sources)), llama)
    assert [source.read for source in report.sources] == [5000, 500, 2017]
    assert len(store) == report.kept == 7513
    assert (store.tokens[store.offsets[:-1]] == 1).all()
    assert (store.tokens[store.offsets[1:] - 1] == 2).all()
    assert store.loss_mask[store.offsets[1:] - 1].all()
    assert not store.loss_mask[store.offsets[:-1]].any()


NO_SYSTEM = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}"""


def test_a_record_that_the_template_rejects_is_a_bad_record(tmp_path: Path, characters: Characters) -> None:
    """Gemma rejects a system message in this way."""
    (tmp_path / "t.jinja").write_text(NO_SYSTEM)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [{"messages": said}, {"messages": [{"role": "system", "content": "Be brief."}, *said]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = config(SourceConfig(path=str(tmp_path / "a.jsonl")), template=str(tmp_path / "t.jinja"))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 .*System role not supported"):
        build_store(settings, characters)
    store, report = build_store(settings.model_copy(update={"on_bad_record": "skip"}), characters)
    assert len(store) == 1
    assert report.sources[0].dropped == {"the template does not support the record": 1}
