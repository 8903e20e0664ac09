"""Which settings may change when a run is resumed."""

import pytest

from flacuna_jax.config.files import parse_config
from flacuna_jax.errors import UserError
from flacuna_jax.run.code_version import PARTS, code_fingerprints, compiler_settings, library_versions
from flacuna_jax.run.resume import (
    allowed_changes,
    base_change,
    compare_meta,
    require_same_run,
    rounding_changes,
)


def meta(*overrides, **values):
    model = {"path": "base", "dtype": "bfloat16"}  # resolved, as in every checkpoint
    tree = {"output_dir": "runs/a", "model": model, "data": {"sources": [{"path": "a.json"}]}}
    return {
        "config": parse_config(tree, overrides).model_dump(mode="json"),
        "fingerprints": {"data": "d1", "tokenizer": "t1", "base": "b1", "code": {"model": "m1", "kernels": "k1"}},
        "libraries": {"jax": "0.10.2"},
        "rows_per_step": 12,
        "total_steps": 100,
        "cursor": {"epoch": 0, "step": 4},
        "counters": {"tokens": 1000},
        **values,
    }


@pytest.mark.parametrize(
    "override",
    [
        "--output_dir=elsewhere",
        "--logging.every_steps=1",
        "--logging.wandb=project",
        "--checkpoint.keep=9",
        "--checkpoint.every_steps=5",
        "--mesh={fsdp: 4}",
        "--training.remat=full",
        "--training.micro_batch_size=1",
        "--model.path=/moved/base",
        "--model.tokenizer=/moved/tokenizer",
        "--data.sources.0.path=/moved/a.json",
        "--training.on_bad_step=skip",
        "--training.spike_factor=5.0",
        "--checkpoint.keep_best=3",
        "--checkpoint.allow_changes=[code]",
        "--evaluation={sources: [{path: e.json}], patience: 2}",
    ],
)
def test_harmless_changes_are_accepted(override):
    assert compare_meta(meta(), meta(override)) == []


def test_a_setting_that_an_earlier_version_did_not_have_is_compared_as_its_default():
    earlier = meta()
    for section, key in (("data", "tools_as_text"), ("lora", "use_dora"), ("training", "spike_factor")):
        del earlier["config"][section][key]
    assert compare_meta(earlier, meta()) == []
    assert compare_meta(earlier, meta("--lora.use_dora=true")) == ["lora.use_dora: False in the checkpoint, True now"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--seed=1", "seed: 42 in the checkpoint, 1 now"),
        ("--lora.rank=4", "lora.rank: 8 in the checkpoint, 4 now"),
        ("--lora.targets=[q_proj]", "lora.targets: ['q_proj', 'v_proj'] in the checkpoint, ['q_proj'] now"),
        ("--training.learning_rate=1e-3", "training.learning_rate: 2e-05 in the checkpoint, 0.001 now"),
        ("--training.epochs=2", "training.epochs: 1 in the checkpoint, 2 now"),
        ("--training.batch_size=64", "training.batch_size: 128 in the checkpoint, 64 now"),
        ("--data.max_length=512", "data.max_length: 1280 in the checkpoint, 512 now"),
        ("--data.template=vicuna_v0", "data.template: auto in the checkpoint, vicuna_v0 now"),
        ("--data.sources.0.weight=0.5", "data.sources.0.weight: 1.0 in the checkpoint, 0.5 now"),
        ("--model.dtype=float32", "model.dtype: bfloat16 in the checkpoint, float32 now"),
    ],
)
def test_changes_that_alter_the_results_are_reported_with_both_values(override, line):
    assert compare_meta(meta(), meta(override)) == [line]


def test_fingerprints_and_row_counts_are_compared_but_not_cursor_and_counters():
    moved = meta(cursor={"epoch": 1, "step": 9}, counters={"tokens": 5})
    assert compare_meta(meta(), moved) == []
    changed = meta(fingerprints={**meta()["fingerprints"], "data": "d2"}, rows_per_step=13)
    assert compare_meta(meta(), changed) == [
        "rows_per_step: 12 in the checkpoint, 13 now",
        "fingerprints.data: d1 in the checkpoint, d2 now",
    ]


def test_lora_to_full_fine_tuning_and_another_number_of_sources_are_reported():
    lines = compare_meta(meta(), meta("--lora=null"))
    assert "lora: absent in the checkpoint, None now" in lines
    more = meta()
    more["config"]["data"]["sources"].append({**more["config"]["data"]["sources"][0], "path": "b.json"})
    assert "data.sources.1.weight: absent in the checkpoint, 1.0 now" in compare_meta(meta(), more)


def test_a_constant_schedule_may_be_extended():
    constant = "--training.schedule=constant"
    longer = meta(constant, "--training.epochs=3", "--training.max_steps=300", total_steps=300)
    assert compare_meta(meta(constant), longer) == []
    assert len(compare_meta(meta(), meta("--training.epochs=3", total_steps=300))) == 2


def test_another_memory_setting_is_noted():
    assert rounding_changes(meta(), meta()) == []
    assert rounding_changes(meta(), meta("--training.remat=full", "--seed=1")) == [
        "training.remat: auto in the checkpoint, full now"
    ]


def test_the_error_lists_every_difference(tmp_path):
    require_same_run(meta(), meta(), tmp_path)
    with pytest.raises(UserError) as refusal:
        require_same_run(meta(), meta("--seed=1", "--lora.rank=4"), tmp_path)
    text = str(refusal.value)
    assert str(tmp_path) in text
    assert "seed: 42 in the checkpoint, 1 now" in text
    assert "lora.rank: 8 in the checkpoint, 4 now" in text


def changed(**fingerprints):
    return meta(fingerprints={**meta()["fingerprints"], **fingerprints})


CHANGES = {
    "data": (changed(data="d2"), "fingerprints.data: d1 in the checkpoint, d2 now"),
    "tokenizer": (changed(tokenizer="t2"), "fingerprints.tokenizer: t1 in the checkpoint, t2 now"),
    "base": (changed(base="b2"), "fingerprints.base: b1 in the checkpoint, b2 now"),
    "code": (
        changed(code={"model": "m2", "kernels": "k1"}),
        "fingerprints.code.model: m1 in the checkpoint, m2 now",
    ),
    "training.learning_rate": (
        meta("--training.learning_rate=1e-3"),
        "training.learning_rate: 2e-05 in the checkpoint, 0.001 now",
    ),
    "lora.dropout": (meta("--lora.dropout=0.0"), "lora.dropout: 0.05 in the checkpoint, 0.0 now"),
}


@pytest.mark.parametrize(("name", "now", "line"), [(n, *c) for n, c in CHANGES.items()], ids=CHANGES.keys())
def test_every_kind_of_change_is_an_error_and_may_be_allowed_by_name(tmp_path, name, now, line):
    with pytest.raises(UserError) as refusal:
        require_same_run(meta(), now, tmp_path)
    assert line in str(refusal.value)
    assert f"--checkpoint.allow_changes=[{name}]" in str(refusal.value), "the message says how to continue"
    require_same_run(meta(), now, tmp_path, allowed=[name])
    assert allowed_changes(meta(), now, [name]) == [line]
    for other in CHANGES.keys() - {name}:
        assert compare_meta(meta(), now, [other]) == [line]
        with pytest.raises(UserError) as refusal:
            require_same_run(meta(), now, tmp_path, allowed=[other])
        assert f"--checkpoint.allow_changes=[{other}, {name}]" in str(refusal.value), "what is allowed stays so"


def test_a_section_may_be_allowed_together_with_its_derived_numbers(tmp_path):
    longer = meta("--training.epochs=3", "--training.batch_size=64", rows_per_step=24, total_steps=300)
    assert len(compare_meta(meta(), longer)) == 4
    assert compare_meta(meta(), longer, ["training"]) == []
    assert compare_meta(meta(), longer, ["training.epochs"]) != [], "the batch size is not allowed"
    assert "rows_per_step" not in refusal_names(longer, tmp_path)


def refusal_names(now, tmp_path):
    with pytest.raises(UserError) as refusal:
        require_same_run(meta(), now, tmp_path)
    return str(refusal.value).rpartition("allow_changes=")[2]


def test_another_held_out_fraction_counts_as_a_change_of_data():
    now = meta("--evaluation.fraction=0.1")
    assert compare_meta(meta(), now) == ["held_out_fraction: None in the checkpoint, 0.1 now"]
    assert compare_meta(meta(), now, ["data"]) == []


def test_other_libraries_are_noted():
    assert compare_meta(meta(), meta(libraries={"jax": "0.11.2"})) == []
    assert rounding_changes(meta(), meta(libraries={"jax": "0.11.2"})) == [
        "libraries.jax: 0.10.2 in the checkpoint, 0.11.2 now"
    ]


def test_the_checksum_of_the_base_shows_any_changed_byte():
    before, now = meta(base_checksum="c1"), meta(base_checksum="c2")
    assert base_change(before, now) == "base_checksum: c1 in the checkpoint, c2 now"
    assert compare_meta(before, meta()) == [], "it is not known before the weights are read"
    assert base_change(before, before) is None
    assert base_change(meta(), now) is None, "a checkpoint without a checksum"


@pytest.mark.parametrize("elsewhere", [{"device": "B"}, {"libraries": {"jax": "0.11.2"}}])
def test_a_quantized_base_may_differ_on_another_device_or_library(elsewhere):
    quantized = "--model.quantization=nf4"
    before = meta(quantized, base_checksum="c1")
    assert base_change(before, meta(quantized, base_checksum="c2")) is not None
    assert base_change(before, meta(quantized, base_checksum="c2", **elsewhere)) is None
    assert base_change(meta(base_checksum="c1"), meta(base_checksum="c2", **elsewhere)) is not None, "only read"


def test_changed_compiler_settings_of_the_environment_are_noted():
    name = "JAX_DEFAULT_MATMUL_PRECISION"
    before, now = (compiler_settings({name: precision}) for precision in ("highest", "bfloat16"))
    assert compare_meta(meta(compiler=before), meta(compiler=now)) == []
    assert rounding_changes(meta(compiler=before), meta(compiler=now)) == [
        f"compiler.{name}: highest in the checkpoint, bfloat16 now"
    ]


def test_another_kind_of_device_is_noted():
    assert compare_meta(meta(device="NVIDIA A100"), meta(device="TPU v5e")) == []
    assert rounding_changes(meta(device="NVIDIA A100"), meta(device="TPU v5e")) == [
        "device: NVIDIA A100 in the checkpoint, TPU v5e now"
    ]


def test_fingerprints_of_code_parts_and_versions_of_libraries():
    found = code_fingerprints()
    assert found.keys() == PARTS.keys()
    assert len(set(found.values())) == len(found)
    assert found == code_fingerprints()
    assert {"jax", "jaxlib"} <= library_versions().keys()
