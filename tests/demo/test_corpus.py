"""The demo's corpora: format, separation of held-out content, determinism."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from flacuna_jax.config.data import SourceConfig
from flacuna_jax.data.formats import read_source
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.demo import corpus, words
from flacuna_jax.demo.corpus import Corpus, CorpusSizes, build_corpus, is_held_out, write_corpus
from flacuna_jax.demo.families import ANSWER_MARK, FAMILIES

SIZES = CorpusSizes(conversations=2000, instructions=150, held_out=30)


@pytest.fixture(scope="module")
def built() -> Corpus:
    return build_corpus(0, SIZES)


def _prompts(records: tuple[corpus.Record, ...]) -> list[str]:
    return [record["conversations"][0]["value"] for record in records]


def test_every_family_exists_and_none_dominates(built: Corpus) -> None:
    """Facts are limited (few held-out capitals, one template each); composed content is not."""
    for records, wanted in ((built.train, SIZES.instructions), (built.held_out, SIZES.held_out)):
        counts = Counter(record["source"] for record in records)
        for family in FAMILIES:
            assert (wanted // 2 if family.facts else wanted) <= counts[family.name] <= wanted


def test_no_prompt_occurs_twice(built: Corpus) -> None:
    prompts = _prompts(built.train) + _prompts(built.held_out)
    assert len(set(prompts)) == len(prompts)


def test_held_out_facts_are_in_no_instruction(built: Corpus) -> None:
    """Checks the words themselves: no instruction contains a held-out country, including few-shot ones."""
    text = "\n".join(turn["value"] for record in built.train for turn in record["conversations"])
    held_out = [key.split(":", 1)[1] for key in built.keys["held_out"] if key.startswith("capitals:")]
    assert held_out
    assert not [country for country in held_out if country in text]


def test_held_out_passages_are_in_no_training_data(built: Corpus) -> None:
    """Composed content (a review, a passage, a list) is in neither of the training corpora."""
    trained = "\n".join(t["value"] for r in (*built.conversations, *built.train) for t in r["conversations"])
    names = [family.name for family in FAMILIES if not family.facts]
    passages = [key.split(":", 1) for key in built.keys["held_out"]]
    passages = [content for family, content in passages if family in names and family != "reasoning"]
    assert len(passages) > 100
    assert not [content for content in passages if content in trained]


def test_both_words_of_an_opposite_are_on_the_same_side(built: Corpus) -> None:
    def paired(side: str) -> set[str]:
        pairs = [key.split(":")[1].split("/") for key in built.keys[side] if key.startswith("opposites:")]
        return {word for pair in pairs for word in pair}

    assert paired("train")
    assert paired("held_out")
    assert not paired("train") & paired("held_out")


def test_leaks_are_found(built: Corpus) -> None:
    leaked = dataclasses.replace(built, keys={**built.keys, "train": built.keys["train"] | built.keys["held_out"]})
    with pytest.raises(ValueError, match="held-out content is tuned on"):
        corpus.check_separation(leaked)
    heard = dataclasses.replace(built, keys={**built.keys, "conversations": built.keys["held_out"]})
    with pytest.raises(ValueError, match="held-out content is in the base's conversations"):
        corpus.check_separation(heard)
    twice = dataclasses.replace(built, train=(*built.train, built.held_out[0]))
    with pytest.raises(ValueError, match="occurs twice"):
        corpus.check_separation(twice)


def test_a_function_of_the_seed(built: Corpus, tmp_path: Path) -> None:
    assert build_corpus(0, SIZES) == built
    other = build_corpus(1, SIZES)
    assert not set(_prompts(other.held_out)) <= set(_prompts(built.held_out))
    assert {is_held_out("capitals:France", seed) for seed in range(40)} == {True, False}


def test_records_are_flan_mini(built: Corpus, tmp_path: Path) -> None:
    """Our own reader reads every record of every file, and drops none."""
    write_corpus(built, tmp_path)
    for name, records in (
        (corpus.BASE_FILE, built.conversations),
        (corpus.TRAIN_FILE, built.train),
        (corpus.HELD_OUT_FILE, built.held_out),
    ):
        assert json.loads((tmp_path / name).read_text()) == list(records)
        source = SourceConfig(path=str(tmp_path / name), format="flan_mini")
        read = [conversation for _, conversation in read_source(source, BadRecordPolicy(SourceReport(name), "error"))]
        assert [conversation.id for conversation in read] == [record["id"] for record in records]
        assert [len(c.turns) for c in read] == [len(record["conversations"]) for record in records]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [corpus.BASE_FILE, corpus.TRAIN_FILE, corpus.HELD_OUT_FILE]
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_wording_fits_every_item(family: corpus.Family) -> None:
    rng = Random(0)
    for _ in range(50):
        item = family.draw(rng)
        assert item.key.startswith(f"{family.name}:")
        for wording in (*family.chats, *family.terse_chats, *family.instructions):
            prompt, target = (pattern.format(**item.fields) for pattern in wording)
            assert (prompt.strip(), target.strip()) == (prompt, target)
            assert "{" not in prompt
            assert target


def test_targets_with_reasoning_have_a_conclusion(built: Corpus) -> None:
    targets = [r["conversations"][1]["value"] for r in built.train if r["source"] == "reasoning"]
    assert all(target.count(ANSWER_MARK) == 1 for target in targets)


def test_answers_are_right() -> None:
    """Recomputes the answers that follow from the item's own words."""
    rng = Random(1)
    families = {family.name: family for family in FAMILIES}
    for _ in range(200):
        fields = families["sums"].draw(rng).fields
        assert int(fields["left"]) + int(fields["right"]) == int(fields["answer"])
        fields = families["search"].draw(rng).fields
        members = [word for word in fields["list"].split(", ") if word in words.KINDS[fields["kind"]]]
        assert members == [fields["answer"]]
        fields = families["reasoning"].draw(rng).fields
        assert (fields["word"] in words.KINDS[fields["asked"]]) == (fields["answer"] == "yes")
        fields = families["reading"].draw(rng).fields
        assert fields["answer"] in fields["text"]
