"""The split: by question, stable, and held-out records are never trained on."""

import json

import numpy as np
import pytest

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.data.build import build_store
from flacuna_jax.data.held_out import keys, question, select, split
from flacuna_jax.data.pipeline import StepSource, plan_steps
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from tests.small_run import records, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def store_of(tmp_path, tokenizer, *files, **settings):
    sources = []
    for number, content in enumerate(files):
        path = tmp_path / f"data{number}.json"
        path.write_text(json.dumps(content))
        sources.append(SourceConfig(path=str(path)))
    data = DataConfig(sources=tuple(sources), max_length=400, **settings)
    return build_store(data, tokenizer)[0], data


def held_ids(store):
    return {store.id_of(index) for index in range(len(store))}


def answered(record, answer, id):
    turns = [record["conversations"][0], {"from": "gpt", "value": answer}]
    return {**record, "id": id, "conversations": turns}


def test_the_fraction_is_about_the_requested_one(tmp_path, tokenizer):
    store, _ = store_of(tmp_path, tokenizer, records(600))
    for fraction in (0.1, 0.5):
        assert abs(len(split(store, fraction).held_out) / len(store) - fraction) < 0.05


def test_the_split_of_a_record_does_not_depend_on_other_records(tmp_path, tokenizer):
    made = records(200)
    store, _ = store_of(tmp_path, tokenizer, made)
    chosen = held_ids(split(store, 0.2).held_out)
    backwards, _ = store_of(tmp_path, tokenizer, made[::-1])
    assert held_ids(split(backwards, 0.2).held_out) == chosen
    in_two_files, _ = store_of(tmp_path, tokenizer, made[150:], made[:150])
    assert held_ids(split(in_two_files, 0.2).held_out) == chosen
    fewer, _ = store_of(tmp_path, tokenizer, made[::2])
    assert held_ids(split(fewer, 0.2).held_out) == chosen & {record["id"] for record in made[::2]}


def test_a_larger_fraction_contains_the_smaller(tmp_path, tokenizer):
    store, _ = store_of(tmp_path, tokenizer, records(200))
    assert held_ids(split(store, 0.1).held_out) < held_ids(split(store, 0.3).held_out)


def test_records_with_the_same_question_are_on_the_same_side(tmp_path, tokenizer):
    made = records(100)
    copies = [{**record, "id": f"copy {record['id']}"} for record in made]
    others = [answered(record, "no idea", f"other {record['id']}") for record in made]
    store, data = store_of(tmp_path, tokenizer, made + others, copies)
    parts = split(store, 0.3)
    held = held_ids(parts.held_out)
    assert held
    for record in made:
        side = {record["id"] in held, f"copy {record['id']}" in held, f"other {record['id']}" in held}
        assert len(side) == 1
    trained = keys(store)[parts.training.source_index >= 0]
    assert not np.isin(keys(parts.held_out), trained).any()
    training = TrainingConfig(epochs=2, batch_size=8, micro_batch_size=1)
    source = StepSource(parts.training, plan_steps(parts.training, data, training, seed=0, shards=1))
    seen = {int(e) for step in range(len(source)) for e in source.info(step).example_indices}
    assert {store.id_of(example) for example in seen} == held_ids(store) - held


def test_plain_text_is_split_by_its_whole_text(tmp_path, tokenizer):
    store, _ = store_of(tmp_path, tokenizer, records(100), train_on="all")
    assert len(np.unique(keys(store))) > 90
    assert 10 < len(split(store, 0.3).held_out) < 50


def test_the_split_ignores_the_seed_and_changes_the_fingerprint(tmp_path, tokenizer):
    store, _ = store_of(tmp_path, tokenizer, records(100))
    assert split(store, 0.3).training.fingerprint == split(store, 0.3).training.fingerprint
    assert split(store, 0.3).training.fingerprint != store.fingerprint
    assert split(store, 0.3).training.fingerprint != split(store, 0.5).training.fingerprint


def test_a_limit_keeps_the_lowest_keys_and_trains_on_no_held_out_record(tmp_path, tokenizer):
    store, _ = store_of(tmp_path, tokenizer, records(100))
    whole, limited = split(store, 0.3), split(store, 0.3, max_examples=5)
    assert held_ids(limited.held_out) < held_ids(whole.held_out)
    assert len(limited.held_out) == 5
    np.testing.assert_array_equal(limited.training.source_index, whole.training.source_index)
    assert keys(limited.held_out).max() == np.sort(keys(whole.held_out))[4]


def test_selected_examples_are_unchanged(tmp_path, tokenizer):
    store, _ = store_of(tmp_path, tokenizer, records(20))
    chosen = select(store, np.array([7, 3, 11]))
    for index, original in enumerate((7, 3, 11)):
        one, other = chosen.example(index), store.example(original)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
        assert (one.id, one.source) == (other.id, other.source)
        assert tokenizer.decode(question(store, original).tolist()[1:]).endswith("ASSISTANT:")
    assert len(select(store, np.array([], np.int64))) == 0


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_holding_out_no_or_every_example_is_an_error(tmp_path, tokenizer, fraction):
    store, _ = store_of(tmp_path, tokenizer, records(20))
    with pytest.raises(UserError, match=r"evaluation\.fraction"):
        split(store, fraction)
