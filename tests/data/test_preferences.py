"""Pairs and labelled answers: the forms of records, what is counted and what is refused, and their examples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.config.types import Examples
from flacuna_jax.data.build import ALONE, NO_LOSS, OVER_LENGTH, build_store
from flacuna_jax.data.conversation import Conversation
from flacuna_jax.data.formats import EMPTY, IDENTICAL, NO_ANSWER, read_source
from flacuna_jax.data.pipeline import StepSource, plan_epochs, plan_steps
from flacuna_jax.data.preferences import LABELS
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.store_cache import cached_store
from flacuna_jax.errors import UserError
from tests.vocabularies import Characters


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


Q, A, B = message("user", "q"), message("assistant", "a"), message("assistant", "b")
EARLIER = [message("user", "q0"), message("assistant", "a0")]
HH = "\n\nHuman: q0\n\nAssistant: a0\n\nHuman: q\n\nAssistant:"

PAIR = "user: q | assistant: a + / user: q | assistant: b +"
LONGER = "user: q0 | assistant: a0 | user: q | assistant: a + / user: q0 | assistant: a0 | user: q | assistant: b +"
PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, PAIR),
    "a prompt with an earlier answer": ({"prompt": [*EARLIER, Q], "chosen": [A], "rejected": [B]}, LONGER),
    "text answers to messages": ({"prompt": [Q], "chosen": "a", "rejected": "b"}, PAIR),
    "implicit prompts": ({"chosen": [*EARLIER, Q, A], "rejected": [*EARLIER, Q, B]}, LONGER),
    "UltraFeedback binarized": (
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "score_chosen": 8.0},
        PAIR,
    ),
    "HH-RLHF": ({"chosen": f"{HH} a", "rejected": f"{HH} b"}, LONGER),
    "an HH prompt": ({"prompt": HH, "chosen": "a", "rejected": "b"}, LONGER),
    "Orca, with a system text": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        f"system = s | {PAIR}",
    ),
    "LLaMA-Factory's ranking of alpaca": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        PAIR,
    ),
    "LLaMA-Factory's ranking of sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        PAIR,
    ),
    "OpenAI": (
        {
            "input": {"messages": [Q], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [A],
            "non_preferred_output": [B],
        },
        PAIR,
    ),
    "Argilla": (
        {"instruction": "q", "chosen_response": "a", "rejected_response": "b", "chosen_avg_rating": 5.0},
        PAIR,
    ),
    "Argilla's Capybara": (
        {
            "conversation": [{"input": "q0", "output": "a0"}, {"input": "q", "output": "a"}],
            "chosen": [*EARLIER, Q, A],
            "rejected": [*EARLIER, Q, B],
        },
        LONGER,
    ),
    "ms-swift": ({"messages": [*EARLIER, Q, A], "rejected_response": "b"}, LONGER),
    "ms-swift, whole conversations": ({"messages": [*EARLIER, Q, A], "rejected_messages": [*EARLIER, Q, B]}, LONGER),
}


def read(
    directory: Path, record: object, kind: Examples, mode: str = "error"
) -> tuple[list[Conversation], SourceReport]:
    path = directory / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    report = SourceReport(str(path))
    found = read_source(SourceConfig(path=str(path)), BadRecordPolicy(report, mode), kind)
    return [conversation for _, conversation in found], report


def written(conversation: Conversation) -> str:
    documents = [
        " | ".join(
            f"{turn.role}: {turn.text}{' +' if turn.role == 'assistant' and turn.trained else ''}"
            for turn in document.turns
        )
        for document in conversation.documents
    ]
    system = f"system = {conversation.system} | " if conversation.system else ""
    return system + " / ".join(documents)


@pytest.mark.parametrize(("record", "expected"), PAIRS.values(), ids=PAIRS)
def test_pairs(tmp_path, record, expected):
    (conversation,), report = read(tmp_path, record, "pairs")
    assert written(conversation) == expected
    assert set(report.ignored) <= {"score_chosen", "chosen_avg_rating", "conversation"}


@pytest.mark.parametrize("label", [True, False, "true", "False", 1, 0])
def test_labelled_answers(tmp_path, label):
    good = str(label).lower() in ("true", "1")
    for record in (
        {"prompt": "q", "completion": "a", "label": label},
        {"prompt": [Q], "completion": [A], "kto_tag": label},
        {"messages": [Q, A], "kto_tag": label},
        {"messages": [Q, A], "label": label},
        {"instruction": "q", "input": "", "output": "a", "kto_tag": label},
        {"instruction": "q", "completion": "a", "label": label},
        {"question": "q", "completion": "a", "label": label},
        {"question": "q", "answer": "a", "label": label},
    ):
        (conversation,), _ = read(tmp_path, record, "labelled")
        assert written(conversation) == "user: q | assistant: a +"
        assert conversation.good is good


def test_a_label_is_that_of_the_last_answer(tmp_path):
    for record in ({"messages": [*EARLIER, Q, A]}, {"instruction": "q", "output": "a", "history": [["q0", "a0"]]}):
        (conversation,), _ = read(tmp_path, {**record, "label": True}, "labelled")
        assert written(conversation) == "user: q0 | assistant: a0 | user: q | assistant: a +"


def test_tools_of_openais_pairs_are_read(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    record = {"input": {"messages": [Q], "tools": [tool]}, "preferred_output": [A], "non_preferred_output": [B]}
    (conversation,), _ = read(tmp_path, record, "pairs")
    assert conversation.tools == (tool,)


def test_llama_factorys_descriptions(tmp_path):
    entries = {
        "a": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "ask", "query": "more", "chosen": "good", "rejected": "bad"},
        },
        "b": {
            "file_name": "tags.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "kto_tag": "fine"},
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "pairs.json").write_text(json.dumps([{"ask": "q", "more": "x", "good": "a", "bad": "b", "id": "1"}]))
    (tmp_path / "tags.json").write_text(json.dumps([{"talk": [Q, A], "fine": False}]))
    found = {}
    for name, kind in (("pairs", "pairs"), ("tags", "labelled")):
        policy = BadRecordPolicy(SourceReport(name), "error")
        ((_, found[name]),) = read_source(SourceConfig(path=str(tmp_path / f"{name}.json")), policy, kind)
        assert not policy.report.ignored
    assert written(found["pairs"]) == "user: q\nx | assistant: a + / user: q\nx | assistant: b +"
    assert found["tags"].good is False


DROPPED = {
    "the same answer": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "pairs", IDENTICAL),
    "an empty answer": ({"prompt": "q", "chosen": "a", "rejected": " "}, "pairs", EMPTY),
    "an empty answer of HH-RLHF": ({"chosen": f"{HH} a", "rejected": HH}, "pairs", EMPTY),
    "no messages in an answer": ({"prompt": [Q], "chosen": [A], "rejected": []}, "pairs", EMPTY),
    "an empty labelled answer": ({"prompt": "q", "completion": "", "label": True}, "labelled", NO_ANSWER),
}


@pytest.mark.parametrize(("record", "kind", "reason"), DROPPED.values(), ids=DROPPED)
def test_records_without_a_difference_or_an_answer_are_counted(tmp_path, record, kind, reason):
    found, report = read(tmp_path, record, kind)
    assert (found, dict(report.dropped)) == ([], {reason: 1})


REFUSED = {
    "different questions": (
        {"chosen": [Q, A], "rejected": [message("user", "x"), B]},
        "differ from turn 1 on, where 'chosen' has a turn of the user",
    ),
    "different systems": (
        {"chosen": [message("system", "s"), Q, A], "rejected": [Q, B]},
        "different system texts",
    ),
    "another prompt": (
        {"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]},
        "'chosen' does not begin with the prompt",
    ),
    "one goes on": ({"chosen": [Q, A], "rejected": [Q, A, Q, B]}, "where 'chosen' has nothing"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "'chosen' is a text, but the record has no prompt"),
    "no question": ({"chosen": [A], "rejected": [B]}, "have no prompt in common"),
    "no rejected answer": ({"prompt": "q", "chosen": "a"}, "'rejected' must be text or messages, and is missing"),
    "a number": ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' must be text or messages, not a number"),
    "only a text": ({"text": "a"}, "this run needs `prompt`, `chosen` and `rejected`"),
    "ranked answers": ({"prompt": "q", "responses": ["a", "b"]}, r"\(the record's fields: prompt, responses\)"),
    "no label": (
        {"prompt": "q", "completion": "a", "label": None},
        r"'label' is missing or null; it must be true \S+ \S+ \S+ or",
    ),
    "a label of 0.5": ({"prompt": "q", "completion": "a", "kto_tag": 0.5}, "'kto_tag' is 0.5; it must be true"),
    "a label of 2": ({"prompt": "q", "completion": "a", "label": 2}, "'label' is 2; it must be true"),
    "a label in words": ({"prompt": "q", "completion": "a", "kto_tag": "good"}, "'kto_tag' is 'good'; it must be true"),
}


@pytest.mark.parametrize(("record", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_records_are_refused_by_line_or_counted(tmp_path, record, message):
    kind = "pairs" if record.keys().isdisjoint(LABELS) else "labelled"
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1 \(record 1\): .*{message}"):
        read(tmp_path, record, kind)
    _, report = read(tmp_path, record, kind, "skip")
    assert report.dropped.total() == 1


def build(directory: Path, records: list[dict[str, Any]], kind: Examples, **settings):
    path = directory / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    config = DataConfig(sources=(SourceConfig(path=str(path)),), template="plain", **{"max_length": 64, **settings})
    built = build_store(config, Characters(), examples=kind)
    cached, report, *_ = cached_store(config, Characters(), "t", directory / "cache", lambda _: None, examples=kind)
    assert cached.fingerprint == built[0].fingerprint
    assert report == built[1]
    return built


def text_of(store, index: int) -> list[str]:
    return [Characters().decode(document.ids.tolist()) for document in store.example(index).documents]


def test_a_pair_is_one_example_of_two_documents_next_to_each_other(tmp_path):
    records = [{"prompt": f"q{i}", "chosen": "a" * (i + 1), "rejected": "b"} for i in range(6)]
    store, report = build(tmp_path, records, "pairs")
    assert (store.examples, store.documents, report.kept) == ("pairs", 2, 6)
    for document in store.example(2).documents:
        answer = Characters().decode(document.ids[document.loss_mask].tolist())
        assert answer.strip() in ("aaa", "b")
    plan = plan_epochs(store, max_length=64, packing="best_fit", weights=(1.0,), seed=0, epochs=1,
                       rows_per_step=lambda rows, _: rows, micro_rows=1)  # fmt: skip
    source = StepSource(store, plan)
    batch, label = source[0], source.labelled(0, np.arange(6))["labels"]
    for number, examples in enumerate(source.rows(0)):
        row = {name: leaf[number, 0] for name, leaf in batch.items()}
        for place, example in enumerate(examples):
            for document, span in enumerate(store.spans(int(example))):
                at = row["segment_ids"] == 2 * place + document + 1
                assert row["tokens"][at].tolist() == store.tokens[span].tolist()
                assert row["positions"][at].tolist() == list(range(int(at.sum())))
                assert set(label[number, 0][at]) == {example}
    assert plan.examples == 6


def test_pairs_that_do_not_fit_are_dropped_whole(tmp_path):
    records = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a" * 30, "rejected": "b" * 30},
    ]
    store, report = build(tmp_path, records, "pairs")
    assert len(store) == 1
    assert report.sources[0].dropped == {OVER_LENGTH: 1}
    assert NO_LOSS not in report.sources[0].dropped


def test_a_labelled_answer_is_followed_by_its_prompt_with_the_answer_before_it(tmp_path):
    records = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(4)]
    store, _ = build(tmp_path, records, "labelled")
    assert store.good.tolist() == [True, False, True, False]
    for index in range(4):
        own, other = text_of(store, index)
        assert f"q{index}" in own
        assert f"a{index}" in own
        assert f"q{index}" in other
        assert f"a{(index - 1) % 4}" in other
    with pytest.raises(UserError, match=ALONE):
        build(tmp_path, records[:1], "labelled")


def test_kto_needs_both_labels_and_recommends_weights(tmp_path):
    def warnings(labels: list[bool], **objective) -> tuple[str, ...]:
        records = [{"prompt": f"q{i}", "completion": f"a{i}", "label": label} for i, label in enumerate(labels)]
        store, _ = build(tmp_path, records, "labelled")
        training = TrainingConfig(objective={"name": "kto", **objective}, batch_size=2)
        data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "data.jsonl")),), max_length=64)
        return plan_steps(store, data, training, seed=0, shards=1).warnings

    assert warnings([True, False] * 3) == ()
    (found,) = warnings([True] * 6 + [False] * 2)
    assert "6 good and 2 bad answers, with their weights in a ratio of 3" in found
    assert "training.objective.undesirable_weight: 3" in found
    assert warnings([True] * 6 + [False] * 2, undesirable_weight=3.0) == ()
    (found,) = warnings([True] * 2 + [False] * 4)
    assert "training.objective.desirable_weight: 2" in found
    with pytest.raises(UserError, match="all 3 labels are false; KTO needs good and bad answers"):
        warnings([False] * 3)
