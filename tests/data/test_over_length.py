"""Shortening: answers stay whole, the result fits, and the longest questions are shortened first."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.over_length import GAP, SHORTEST_QUESTION, Shortened, Shortener, common_limit
from flacuna_jax.data.tokenization import SegmentEncoder, TrainOn, tokenize
from tests.data.conftest import SentencePiece
from tests.vocabularies import llama_template

V1_1 = llama_template("vicuna_v1.1")


def shorten(
    tokenizer: SentencePiece, texts: list[str], max_length: int, train_on: TrainOn = "assistant"
) -> Shortened | None:
    roles = ("user", "assistant")
    sample = Conversation("x", "y", tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)))
    length = len(tokenize(sample, V1_1, tokenizer).ids)
    assert length > max_length
    shortener = Shortener(V1_1, tokenizer, SegmentEncoder(tokenizer), train_on, max_length)
    return shortener.shorten(sample, length)


def words(count: int, word: str = "dog") -> str:
    return " ".join(f"{word}{i}" for i in range(count))


def test_the_middle_of_the_question_is_removed(llama: SentencePiece) -> None:
    shortened = shorten(llama, [f"First {words(300)} last?", "The answer."], 200)
    assert shortened is not None
    example, removed = shortened
    assert removed == 0
    assert 190 <= len(example.ids) <= 200
    text = llama.decode(example.ids.tolist())
    assert "USER: First dog0 dog1" in text
    assert GAP in text
    assert text.endswith("dog299 last? ASSISTANT: The answer.")
    assert llama.decode(example.ids[example.loss_mask].tolist()) == "The answer."


def test_the_longest_question_is_shortened_first(llama: SentencePiece) -> None:
    shortened = shorten(llama, [words(20), "a", words(300, "cat"), "b"], 250)
    assert shortened is not None
    assert shortened.turns_removed == 0
    text = llama.decode(shortened.example.ids.tolist())
    assert words(20) in text
    assert GAP in text.split(words(20))[1]


def test_pairs_are_removed_if_shortening_questions_is_not_enough(llama: SentencePiece) -> None:
    texts = ["q1", words(30, "one"), "q2", words(30, "two"), "q3", words(30, "three")]
    first = shorten(llama, texts, 200)
    assert first is not None
    assert first.turns_removed == 4
    assert llama.decode(first.example.ids[first.example.loss_mask].tolist()) == texts[1]
    last = shorten(llama, texts, 200, "last")
    assert last is not None
    assert last.turns_removed == 4
    assert llama.decode(last.example.ids[last.example.loss_mask].tolist()) == texts[5]


def test_an_answer_that_does_not_fit_is_not_cut(llama: SentencePiece) -> None:
    assert shorten(llama, ["q", words(300)], 200) is None
    assert shorten(llama, [words(300), words(300)], 200) is None
    assert shorten(llama, [words(300), words(300)], 200, "last") is None


def test_a_remaining_pair_with_an_empty_answer_is_removed_too(llama: SentencePiece) -> None:
    assert shorten(llama, ["q", "", "q2", words(300)], 200) is None


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), min_size=1, max_size=4),
    st.sampled_from(["dog", "漢字🦙", "\n\t ", "x" * 40]),
    st.integers(60, 400),
    st.sampled_from(["assistant", "last", "all"]),
)
@settings(max_examples=150, deadline=None)
def test_kept_conversations_fit_and_have_whole_answers(
    llama: SentencePiece, sizes: list[tuple[int, int]], word: str, max_length: int, train_on: TrainOn
) -> None:
    texts = [
        words(count, word if i == 0 else f"answer{k}x") for k, pair in enumerate(sizes) for i, count in enumerate(pair)
    ]
    roles = ("user", "assistant")
    sample = Conversation("x", "y", tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)))
    whole = tokenize(sample, V1_1, llama, "assistant" if train_on == "all" else train_on)
    if len(whole.ids) <= max_length or not texts[-1]:
        return
    shortened = shorten(llama, texts, max_length, train_on)
    if shortened is None:
        return
    example = shortened.example
    assert len(example.ids) <= max_length
    assert example.loss_mask.any()
    # Every remaining answer is complete: the text before each EOS is an answer of the whole conversation.
    answers = [text for text in texts[1::2] if text]
    kept = [llama.decode(part) for part in split_answers(example.ids.tolist(), llama)]
    assert all(any(part.endswith(answer) for answer in answers) for part in kept)
    if train_on == "last":
        assert kept[-1].endswith(answers[-1])
    elif kept:
        assert kept[0].endswith(answers[0])


def split_answers(ids: list[int], tokenizer: SentencePiece) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids[1:]:
        if token == tokenizer.eos_id:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts[:-1]


@given(st.lists(st.integers(1, 500), max_size=6), st.integers(-50, 2000))
def test_common_limit(lengths: list[int], budget: int) -> None:
    gap = 5
    limit = common_limit(lengths, budget, gap)

    def total(limit: int) -> int:
        return sum(min(length, limit) for length in lengths)

    if limit:
        assert total(limit) <= budget
        assert limit == max(lengths) or (total(limit + 1) > budget and limit >= SHORTEST_QUESTION + gap)
    else:
        assert not lengths or (total(max(lengths)) > budget and total(SHORTEST_QUESTION + gap) > budget)


def test_nothing_to_cut(llama: SentencePiece) -> None:
    assert shorten(llama, ["", words(300)], 200) is None
