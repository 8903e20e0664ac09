"""Ids and masks against FastChat with the real LLaMA tokenizer, and samples that only FastChat discards."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flacuna_jax.data.conversation import NAMES, Conversation, Turn, render, render_text
from flacuna_jax.data.tokenization import SegmentEncoder, puts_space_in_front, tokenize, tokenize_batch, tokenize_prompt
from tests.data import fastchat
from tests.data.conftest import Characters, Fast, SentencePiece
from tests.vocabularies import llama_template

V1_1 = llama_template("vicuna_v1.1")
V0 = llama_template("vicuna_v0")


def conversation(*texts: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    return Conversation("x", "test", tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)), system)


def as_fastchat(texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(("USER", "ASSISTANT")[i % 2], text) for i, text in enumerate(texts)]


def assert_equal_to_fastchat(llama: SentencePiece, samples: Sequence[Sequence[str]]) -> int:
    """Compares every sample that FastChat does not discard; returns their number."""
    conversations = [conversation(*texts) for texts in samples]
    segments = [render(one, V1_1) for one in conversations]
    examples = tokenize_batch(conversations, segments, SegmentEncoder(llama), "assistant")
    compared = 0
    for texts, example in zip(samples, examples, strict=True):
        oracle = fastchat.preprocess(llama.model, as_fastchat(texts), max_length=10**9)
        if not oracle.lost:
            compared += 1
            assert example.ids.tolist() == oracle.ids
            assert example.loss_mask.tolist() == [label != fastchat.IGNORED for label in oracle.labels]
    return compared


def test_the_published_ids(llama: SentencePiece) -> None:
    system = [319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892]
    system += [13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889]
    first = [3148, 1001, 29901, 15043, 29991, 319, 1799, 9047, 13566, 29901, 6324, 29991, 2]
    second = [3148, 1001, 29901, 1128, 526, 366, 29973, 319, 1799, 9047, 13566, 29901]
    turns = conversation("Hello!", "Hi!", "How are you?").turns
    assert tokenize_prompt(turns, V1_1, llama) == [1, *system, *first, *second]
    # 40 tokens of every single-turn example are the template's.
    assert len(tokenize(conversation("Hello!", "Hi!"), V1_1, llama).ids) == 40 + 4


def alpaca(path: Path) -> list[tuple[str, str]]:
    return [(f"{r['instruction']}\n{r['input']}".strip(), r["output"]) for r in json.loads(path.read_text())]


def test_alpaca_equals_fastchat(llama: SentencePiece, test_data: Path) -> None:
    samples = alpaca(test_data / "stanford_alpaca" / "alpaca_5000.json")
    # FastChat discards only the two without an output.
    assert assert_equal_to_fastchat(llama, samples) == len(samples) - 2


def test_code_equals_fastchat(llama: SentencePiece, test_data: Path) -> None:
    samples = alpaca(test_data / "code_alpaca" / "code_alpaca_2k.json")
    assert assert_equal_to_fastchat(llama, samples) > 2000


def test_conversations_equal_fastchat(llama: SentencePiece, test_data: Path) -> None:
    records = json.loads((test_data / "sharegpt" / "dummy_conversation.json").read_text())
    samples = [[turn["value"] for turn in record["conversations"]] for record in records]
    dialogues = json.loads((test_data / "sharegpt" / "dialogstudio_converted_example.json").read_text())
    real = [
        [text for turn in dialogue["log"] for text in (turn["user utterance"], turn["system response"])]
        for dialogue in dialogues.values()
    ]
    assert {len(texts) for texts in samples} == {2, 4, 6}
    assert max(map(len, real)) >= 8
    assert assert_equal_to_fastchat(llama, samples) == len(samples)
    assert assert_equal_to_fastchat(llama, real) == len(real)


def test_cot_equals_fastchat(llama: SentencePiece, test_data: Path) -> None:
    lines = (test_data / "flan_cot" / "aqua_train.tsv").read_text().splitlines()[:500]
    fields = [line.replace("\\n", "\n").split("\t") for line in lines]
    assert assert_equal_to_fastchat(llama, [(question, f"{why}\n{answer}") for question, answer, why in fields]) == 500


pieces = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\t",
        "▁",
        "\u00a0",
        "a",
        "USER",
        "USER:",
        "ASSISTANT",
        ":",
        "###",
        "é",
        "漢",
        "🦙",
        "<",
        ">",
        "</s",
    ]
)
texts = st.lists(pieces, max_size=8).map("".join)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_text_equals_fastchat(llama: SentencePiece, pairs: list[tuple[str, str]]) -> None:
    said = [text for pair in pairs for text in pair]
    # If a text contains FastChat's separator, FastChat finds the answer in the wrong place.
    assume(all(fastchat.SEPARATOR not in f" {text} " for text in said))
    assert_equal_to_fastchat(llama, [said])


LOST_BY_FASTCHAT = {
    "end of sequence in the text": ("strike <s>this</s> out", "it is </s> then <unk>"),
    "role in the question": ("he said ASSISTANT: no", "yes"),
    "role in the answer": ("hm", "he said ASSISTANT: no"),
    "empty question": ("", "hello"),
    "empty question later": ("a", "b", "", "c"),
    "no final answer": ("a", "b", "c"),
}


def test_an_empty_answer_between_turns_equals_fastchat(llama: SentencePiece) -> None:
    assert assert_equal_to_fastchat(llama, [("a", "", "b", "c")]) == 1


@pytest.mark.parametrize("texts", LOST_BY_FASTCHAT.values(), ids=LOST_BY_FASTCHAT)
def test_samples_that_fastchat_discards_are_kept(llama: SentencePiece, texts: tuple[str, ...]) -> None:
    oracle = fastchat.preprocess(llama.model, as_fastchat(texts))
    assert oracle.lost
    sample = conversation(*texts)
    example = tokenize(sample, V1_1, llama)
    answers = [turn.text for turn in sample.turns if turn.role == "assistant" and turn.text]
    assert example.ids.tolist().count(1) == 1
    assert example.ids.tolist().count(2) == len(answers)
    assert example.ids.tolist().count(0) == 0
    assert supervised_texts(llama, example.ids, example.loss_mask) == [(text, True) for text in answers]
    # Text and ids agree with FastChat's string, with its special tokens only where it meant them.
    assert render_text(render(sample, V1_1)).removeprefix("<s>") in (
        fastchat.prompt(as_fastchat(texts)),
        fastchat.prompt(as_fastchat(texts)) + "ASSISTANT:",
    )


def supervised_texts(
    tokenizer: SentencePiece | Characters, ids: np.ndarray, mask: np.ndarray
) -> list[tuple[str, bool]]:
    """Each supervised span up to an EOS: its text, and whether it ends in EOS."""
    found: list[tuple[str, bool]] = []
    stretch: list[int] = []
    for token, supervised in zip(ids.tolist(), mask.tolist(), strict=True):
        if supervised and token == tokenizer.eos_id:
            found.append((tokenizer.decode(stretch), True))
            stretch = []
        elif supervised:
            stretch.append(token)
        elif stretch:
            found.append((tokenizer.decode(stretch), False))
            stretch = []
    return found


nasty = st.text(max_size=12) | st.sampled_from(["</s>", "<s>", "<unk>", "<0x02>", " ASSISTANT: ", "USER:", "\x00"])


@given(st.lists(st.tuples(nasty, nasty), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_text_never_becomes_a_special_token(llama: SentencePiece, pairs: list[tuple[str, str]]) -> None:
    example = tokenize(conversation(*(text for pair in pairs for text in pair)), V1_1, llama)
    answered = sum(bool(answer) for _, answer in pairs)
    ids = example.ids.tolist()
    assert ids[0] == 1
    assert (ids.count(1), ids.count(2), ids.count(0)) == (1, answered, 0)
    assert example.loss_mask[np.flatnonzero(example.ids == 2)].all()
    assert not example.loss_mask[0]


def test_train_on(llama: SentencePiece) -> None:
    sample = conversation("one", "first", "two", "second", "three", "third")
    masks = {mode: tokenize(sample, V1_1, llama, mode) for mode in ("assistant", "last", "all")}
    texts = {mode: supervised_texts(llama, e.ids, e.loss_mask) for mode, e in masks.items()}
    assert texts["assistant"] == [("first", True), ("second", True), ("third", True)]
    assert texts["last"] == [("third", True)]
    assert masks["all"].loss_mask.tolist() == [False] + [True] * (len(masks["all"].ids) - 1)
    assert len({tuple(e.ids) for e in masks.values()}) == 1


@pytest.mark.parametrize("template", [llama_template(name) for name in NAMES], ids=NAMES)
@given(st.lists(texts, min_size=3, max_size=5).filter(lambda t: len(t) % 2 == 1))
@settings(max_examples=50, deadline=None)
def test_prompts_are_prefixes_of_training(llama: SentencePiece, template: object, said: list[str]) -> None:
    said = [text or "x" for text in said]
    prompt = tokenize_prompt(conversation(*said).turns, template, llama)
    example = tokenize(conversation(*said, "answer"), template, llama)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert not example.loss_mask[len(prompt) - 1]
    assert example.loss_mask[len(prompt) :].all()


def test_v0_layout(llama: SentencePiece) -> None:
    example = tokenize(conversation("Hi", "Hello", "Bye", "See you"), V0, llama)
    text = render_text(render(conversation("Hi", "Hello", "Bye", "See you"), V0))
    assert text == (
        f"<s>{V0.system}\n\n### Human: Hi\n### Assistant: Hello\n### Human: Bye\n### Assistant: See you\n</s>"
    )
    # The ids are those of the whole string: segments meet where nothing merges.
    assert example.ids.tolist() == [1, *llama.encode(text[3:-4]), 2]
    assert supervised_texts(llama, example.ids, example.loss_mask) == [("Hello\n###", False), ("See you\n", True)]


@given(st.lists(texts, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
@settings(max_examples=200, deadline=None)
def test_v0_ids_equal_those_of_the_string(llama: SentencePiece, said: list[str]) -> None:
    sample = conversation(*said)
    assert tokenize(sample, V0, llama).ids.tolist() == [1, *llama.encode(render_text(render(sample, V0))[3:-4]), 2]


@given(texts.filter(bool), texts)
@settings(max_examples=100, deadline=None)
def test_custom_system_text(llama: SentencePiece, system: str, said: str) -> None:
    example = tokenize(conversation(said or "x", "yes", system=system), V1_1, llama)
    assert example.ids.tolist() == [1, *llama.encode(f"{system} USER: {said or 'x'} ASSISTANT: yes"), 2]


def test_a_tokenizer_without_a_prefix(characters: Characters) -> None:
    sample = conversation("What is  it?", " It is a dog.", "Oh", "Yes")
    example = tokenize(sample, V1_1, characters)
    parts = render_text(render(sample, V1_1))[3:].split("</s>")[:-1]
    assert example.ids.tolist() == [1, *(token for part in parts for token in (*characters.encode(part), 2))]
    assert supervised_texts(characters, example.ids, example.loss_mask) == [("  It is a dog.", True), (" Yes", True)]


def test_a_tokenizer_whose_pieces_extend_across_spaces(fast: Fast) -> None:
    """Question and answer are then encoded separately, in training as in generation."""
    example = tokenize(conversation("Tell me", "Once upon a time"), V1_1, fast)
    prompt = tokenize_prompt(conversation("Tell me").turns, V1_1, fast)
    assert example.ids.tolist() == [*prompt, *fast.encode("Once upon a time"), 2]
    assert fast.encode("a b") != fast.encode("a") + fast.encode("b")


def test_dummy_prefix_is_detected(llama: SentencePiece, fast: Fast, characters: Characters) -> None:
    assert [puts_space_in_front(tokenizer) for tokenizer in (llama, fast, characters)] == [True, True, False]


def test_the_loader_of_this_project(llama: SentencePiece, fast: Fast, llama_tokenizer: Path, story_llama: Path) -> None:
    from flacuna_jax.huggingface.tokenizer import load_tokenizer

    sample = conversation("strike <s>this</s> out", "it is </s> then <unk>", "", "ok")
    for directory, tokenizer in ((llama_tokenizer, llama), (story_llama, fast)):
        for template in map(llama_template, NAMES):
            loaded = tokenize(sample, template, load_tokenizer(directory))
            assert loaded.ids.tolist() == tokenize(sample, template, tokenizer).ids.tolist()
