"""`flacuna train --settings` prints all settings with their allowed words, as YAML to start a config from."""

import typing
from collections.abc import Iterator

import pytest
import yaml
from pydantic import BaseModel

from flacuna_jax.config.objectives import PreferenceConfig
from flacuna_jax.config.run import EvaluationConfig, RunConfig
from flacuna_jax.config.settings import describe, sections_of
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.train import main


def test_every_setting_is_printed_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--settings"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    tree = yaml.safe_load(printed)
    assert list(tree) == list(RunConfig.model_fields)
    assert list(tree["training"]) == list(TrainingConfig.model_fields)
    assert list(tree["evaluation"]) == list(EvaluationConfig.model_fields)
    assert tree["lora"]["targets"] == ["q_proj", "v_proj"]
    assert tree["output_dir"] is None
    assert "# required" in printed.split("output_dir:")[1].split("\n")[0]
    assert set(tree["data"]["sources"][0]) == {"path", "format", "split", "weight", "max_examples"}


def test_allowed_words_are_printed() -> None:
    lines = " ".join(line.strip(" #") for line in describe(TrainingConfig))
    for word in typing.get_args(TrainingConfig.model_fields["remat"].annotation):
        assert word in lines
    assert "stop | skip." in lines


def test_alternatives_are_printed() -> None:
    lines = describe(TrainingConfig)
    for objective in typing.get_args(PreferenceConfig):
        (name,) = typing.get_args(objective.model_fields["name"].annotation)
        where = next(index for index, line in enumerate(lines) if line.strip(" #") == f"name: {name}")
        following = [line.strip(" #").split(":")[0] for line in lines[where:]]
        assert set(objective.model_fields) <= set(following)
    assert yaml.safe_load("\n".join(lines))["objective"]["reference"] == "base"
    assert yaml.safe_load("\n".join(describe(RunConfig)))["mesh"] == "auto"
    assert [line for line in describe(RunConfig) if line.strip() == "#   fsdp: 1"]


def test_every_setting_has_a_description() -> None:
    assert not [name for name, description in descriptions(RunConfig) if not (description or "").strip()]


def descriptions(section: type[BaseModel]) -> Iterator[tuple[str, str | None]]:
    """Names and descriptions of the settings of a section, and of the sections in it."""
    for key, field in section.model_fields.items():
        yield f"{section.__name__}.{key}", field.description
        for inner in sections_of(field.annotation)[0]:
            yield from descriptions(inner)


def test_mappings_are_printed_as_mappings() -> None:
    printed = yaml.safe_load("\n".join(describe(RunConfig)))
    assert printed["lora"]["rank_pattern"] == printed["lora"]["alpha_pattern"] == {}
    assert printed["data"]["template_variables"] == {}
    assert printed["data"]["add_tokens"] == []


def test_the_default_of_a_section_that_is_not_printed_is_in_its_comment() -> None:
    comments = " ".join(line.strip(" #") for line in describe(EvaluationConfig))
    assert "an alternative to `fraction`. Default: []. sources:" in comments
    assert "null runs none. Default: null. tasks:" in comments
