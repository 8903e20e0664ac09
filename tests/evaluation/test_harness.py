"""lm-evaluation-harness: every request against its Hugging Face backend, on the same trained small model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flacuna_jax.errors import UserError
from tests.evaluation.models import Scripted, story_model

lm_eval = pytest.importorskip("lm_eval", reason="needs the eval extra")
torch = pytest.importorskip("torch")

from flacuna_jax.evaluation.harness import HarnessModel, check_tasks, metrics, run_tasks  # noqa: E402
from tests.data.chat_templates import write_tokenizer  # noqa: E402
from tests.vocabularies import llama_template  # noqa: E402

# float32 models on both sides; a request sums up to 500 log-probabilities. By default the harness adds them up in
# float32: a sum of 1600 is then a multiple of 1.2e-4, which would hide differences. Both use float64 here.
TOLERANCE = 1e-4

STORIES = [
    "Once upon a time, there was a little girl named Lily. She liked to play in the park with her dog.",
    "One day, Tom saw a big red ball. He wanted to play with it, but it was too high.",
    "The sun was hot. A small bird sat in a tree and sang a song for all the animals.",
    "Sara and Ben went to the beach with mom and dad. They made a big castle with sand.",
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks of every kind of request, with worked examples."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": text.split(".")[0] + ".",
            "rest": text.split(".", 1)[1].strip(),
            "text": " ".join([text] * (1 + 24 * (i % 2))),
            "choices": ["played", "ate a cake with the dog", "slept", "flew over the sea"],
            "answer": i % 4,
        }
        for i, text in enumerate(STORIES * 2)
    ]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
"""
    (directory / "choice.yaml").write_text(
        common
        + """
task: story_choice
output_type: multiple_choice
num_fewshot: 3
doc_to_text: "{{q}} Then they"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
    )
    (directory / "generate.yaml").write_text(
        common
        + """
task: story_generate
output_type: generate_until
num_fewshot: 0
doc_to_text: "{{q}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["dog", "!"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
    )
    (directory / "rolling.yaml").write_text(
        common
        + """
task: story_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
    )
    return directory


NAMES = ["story_choice", "story_generate", "story_rolling"]


@pytest.fixture(scope="module")
def both(story_llama: Path, tasks: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    ours = run_tasks(story_model(story_llama), NAMES, include=tasks)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(story_llama),
            "dtype": "float32",
            "softmax_dtype": "float64",
            "device": "cpu",
            "add_bos_token": True,
        },
        tasks=NAMES,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    return ours, theirs


def _samples(results: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def test_prompts_equal_the_harness_own(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for task in NAMES:
        pairs = zip(*(_samples(results, task) for results in both), strict=True)
        assert all(a["prompt_hash"] == b["prompt_hash"] and a["doc_hash"] == b["doc_hash"] for a, b in pairs)


def test_multiple_choice_request_by_request(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for ours, theirs in zip(*(_samples(results, "story_choice") for results in both), strict=True):
        for ((log_p, greedy),), ((expected, greedy_expected),) in zip(ours["resps"], theirs["resps"], strict=True):
            assert float(log_p) == pytest.approx(float(expected), abs=TOLERANCE, rel=0)
            assert greedy == greedy_expected


def test_generations_are_identical(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = (_samples(results, "story_generate") for results in both)
    assert [sample["resps"] for sample in ours] == [sample["resps"] for sample in theirs]
    assert any(sample["resps"][0][0].strip() for sample in ours)


def test_rolling_log_probabilities(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Half of the texts are longer than the context, so that there are several windows."""
    for ours, theirs in zip(*(_samples(results, "story_rolling") for results in both), strict=True):
        assert float(ours["resps"][0][0]) == pytest.approx(float(theirs["resps"][0][0]), abs=TOLERANCE, rel=0)


def test_metrics_agree(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = (metrics(results) for results in both)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5), name


def test_bos_occurs_once() -> None:
    model = HarnessModel(Scripted())  # type: ignore[arg-type]
    assert model.tok_encode("ab")[:2] == [1, 3 + ord("a")]
    assert model.tok_encode("<s>ab")[:2] == [1, 3 + ord("a")]
    assert model.tok_encode("ab", add_special_tokens=False)[0] == 3 + ord("a")
    assert model.tok_encode("<s>a</s>b") == [1, 3 + ord("a"), 2, 3 + ord("b")]


def test_sampling_settings_are_ignored_without_sampling() -> None:
    model = HarnessModel(Scripted())  # type: ignore[arg-type]
    asked = {"until": ["x"], "max_gen_toks": 4, "top_k": 0, "top_p": 0.0}
    greedy = model._generation_request("a", {**asked, "do_sample": False, "temperature": 0.7})
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0.0, None, None)
    sampled = model._generation_request("a", {**asked, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.7, None, 0.9)


def test_chat_template_is_the_training_template() -> None:
    model = HarnessModel(Scripted(), llama_template("vicuna_v1.1"))  # type: ignore[arg-type]
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = model.apply_chat_template(history)
    assert text.startswith("<s>A chat between")
    assert text.endswith("USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:")
    ids = model.tok_encode(text)
    assert (ids.count(1), ids.count(2)) == (1, 1)
    open_answer = model.apply_chat_template([*history, {"role": "assistant", "content": "The answer is"}], False)
    assert open_answer.endswith("ASSISTANT: The answer is")
    assert "You are terse. USER: Hi" in model.apply_chat_template(
        [{"role": "system", "content": "You are terse."}, *history]
    )
    assert model.chat_template(True) == llama_template("vicuna_v1.1").jinja


def test_a_missing_directory_of_task_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such directory"):
        check_tasks(["story"], tmp_path / "nowhere")


@pytest.mark.slow
def test_unknown_tasks_are_an_error(tasks: Path) -> None:
    with pytest.raises(UserError, match="unknown lm_eval task story_cooking"):
        run_tasks(Scripted(), ["story_cooking"], include=tasks)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bos", "puts_bos", "add_bos"), [
    ("<|BOS|>", True, None),
    ("<|BOS|>", False, None),
    (None, False, None),
    ("<|BOS|>", False, True),
    ("<|BOS|>", True, False),
], ids=["put-in-front", "not-put-in-front", "no-bos", "add_bos_token", "no-add_bos_token"])  # fmt: skip
def test_bos_is_added_as_by_the_tokenizer(
    story_llama: Path, tmp_path: Path, bos: str | None, puts_bos: bool, add_bos: bool | None
) -> None:
    """Log-probabilities equal those of the hf backend, with tokenizers that add BOS and that do not."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    directory = tmp_path / "model"
    shutil.copytree(story_llama, directory)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    write_tokenizer(directory, ["<|im_start|>", "<|im_end|>"], bos=bos, puts_bos=puts_bos)
    theirs = HFLM(
        str(directory), dtype="float32", softmax_dtype="float64", device="cpu", batch_size=2, add_bos_token=add_bos
    )
    ours = HarnessModel(story_model(directory), add_bos=add_bos)
    pairs = [("Once upon a time", " there was"), ("The sun was", " hot and the answer is Paris"), ("", "hello world")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(STORIES)]
    for found, expected in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=2e-4)
        assert found[1] == expected[1]
    for found, expected in zip(ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling), strict=True):
        assert found == pytest.approx(expected, abs=2e-4)
    for text in ("hello", "<|BOS|>hello"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
