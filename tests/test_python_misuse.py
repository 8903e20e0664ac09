"""Mistakes in programs that use the Python API: each gets a message, and none changes a result silently."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax import (
    Decoding,
    Export,
    Options,
    Request,
    StateHook,
    StepHook,
    Turn,
    UserError,
    evaluate_model,
    export_run,
    load_model,
    plan_run,
    read_data,
)
from flacuna_jax.config.files import load_config
from flacuna_jax.generation.chat_model import ChatModel
from flacuna_jax.run.training_run import open_run
from flacuna_jax.training.objective import PACKED_ROWS, SUPERVISED_TOKENS, Objective, Weighted
from tests.small_run import write_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    directory = tmp_path_factory.mktemp("base")
    config = load_config(write_run(directory), ["--lora=null", "--training.max_steps=1"])
    with open_run(config, say=lambda _: None) as run:
        run.train()
        return load_model(run.deliver(), template="vicuna_v1.1", dtype="float32")


SHORT = Decoding(max_new_tokens=2)
MISTAKES = {
    "prompts must be a list": lambda model: model.generate("red", SHORT),
    "put a single one into a list": lambda model: model.generate([Turn("user", "red")], SHORT),
    "must end with a turn of the user": lambda model: model.generate([[Turn("assistant", "red")]], SHORT),
    "or of a tool": lambda model: model.generate([[]], SHORT),
    "does not support a message of role 'human'": lambda model: model.generate([[Turn("human", "red")]], SHORT),
    "max_new_tokens is -1": lambda model: model.generate(["red"], Decoding(max_new_tokens=-1)),
    "2 prompts and 1 answers": lambda model: model.score(["red", "blue"], ["cat"]),
    "answers must be a list": lambda model: model.score(["red"], "c"),
    "answer 2 is empty": lambda model: model.score(["red", "blue"], ["cat", ""]),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_mistakes_in_questions(says: str, model: ChatModel) -> None:
    with pytest.raises(UserError, match=says):
        MISTAKES[says](model)


def test_a_single_task_is_put_into_a_list(model: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks must be a list: \['mmlu:0'\]"):
        evaluate_model(model, "mmlu:0", tmp_path)


def test_a_limit_is_positive(model: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="limit is 0; it must be 1 or more"):
        evaluate_model(model, ["mmlu:0"], tmp_path, Options(limit=0))


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dtype 'float17' is not one of bfloat16, float32"):
        load_model(tmp_path, dtype="float17")  # type: ignore[arg-type]


def test_an_unknown_export_format() -> None:
    with pytest.raises(UserError, match="format 'onnx' is not one of adapter, merged, gguf"):
        export_run(Export("run", "out", "onnx"))  # type: ignore[arg-type]


def test_mistakes_in_hooks(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), ["--training.max_steps=2"])
    answers: list[object] = [None, Request(), True]
    with open_run(config, say=lambda _: None) as run:
        with pytest.raises(UserError, match="is not a hook; add StepHook"):
            run.add_hook(lambda record, state: None)  # type: ignore[arg-type]
        run.log(0, {"a": 1, "b": np.float32(2), "c": jnp.float32(3), "d": np.nan})
        for numbers, says in (
            ({"a": "text"}, "'a' is 'text', which is not a number"),
            ({"a": np.ones(2)}, "which is not a number"),
            ({"step": 3}, "a number named 'step'"),
        ):
            with pytest.raises(UserError, match=says):
                run.log(0, numbers)  # type: ignore[arg-type]
        run.add_hook(StateHook(every=1, call=lambda state: answers[2 * (state.step - 1)]))  # type: ignore[arg-type]
        with pytest.raises(UserError, match="a StateHook returned True; return None, or a Request"):
            run.train()
        with pytest.raises(UserError, match="an exception ended training"):
            run.train()
    (line, *_) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, "kind": "hook", "a": 1, "b": 2, "c": 3, "d": None}


def test_a_run_that_is_over(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), ["--training.max_steps=2"])
    with open_run(config, say=lambda _: None) as run:
        assert run.train(until=1) == "paused"
        for until in (0, 1.5):
            with pytest.raises(UserError, match=f"until is {until}; it must be a whole number, and .* at step 1"):
                run.train(until)  # type: ignore[arg-type]
        assert run.train() == "finished"
        for call in (run.train, lambda: run.log(2, {"a": 1})):
            with pytest.raises(UserError, match="the run is over"):
                call()
        run.deliver()
    with open_run(config, say=lambda _: None) as run:
        pass
    with pytest.raises(UserError, match="the run is over"):
        run.train()


@pytest.mark.parametrize("function", [plan_run, read_data, lambda config: open_run(config).__enter__()])
def test_a_path_is_not_a_config(function: Callable[[Any], object]) -> None:
    with pytest.raises(UserError, match=r"config is 'run.yaml', not the config of a run; read a file with load_config"):
        function("run.yaml")


def test_an_interval_is_positive() -> None:
    with pytest.raises(UserError, match="every is 0"):
        StepHook(every=0, call=lambda record, state: None)


def test_a_scalar_cannot_replace_a_logged_number(tmp_path: Path) -> None:
    def terms(network, batch):
        found = SUPERVISED_TOKENS.terms(network, batch)
        return found._replace(scalars={"loss": Weighted(jnp.float32(1), jnp.float32(1))})

    config = load_config(write_run(tmp_path), ["--training.max_steps=1"])
    objective = Objective(PACKED_ROWS, terms, SUPERVISED_TOKENS.measures)
    with (
        open_run(config, objective=objective, say=lambda _: None) as run,
        pytest.raises(UserError, match="a scalar 'loss', but every run logs that name"),
    ):
        run.train()
