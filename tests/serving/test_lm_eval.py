"""lm-evaluation-harness through the server, against its own backend for transformers, on a task of multiple choice."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # lm_eval[api]

from tests.serving.models import prepared
from tests.serving.serving import running

pytestmark = pytest.mark.slow

# Tokens of the small model cross spaces, so the choices begin with punctuation: lm-eval cuts between tokens.
QUESTIONS = (
    ("The dog was hungry", [", so he ate some food.", ", so moon.", "! Table."], 0),
    ("Tom fell and hurt his knee", [", yellow.", ". He started to cry.", ". Of of of."], 1),
    ("Lily saw a big cat", [", if red.", ". She was happy.", "?"], 1),
    ("It was raining", [". They went back inside.", ", under a.", ". Because because."], 0),
    ("Once upon a time", [", there was a little girl.", ". Table.", "!"], 0),
    ("Mom said yes", [", quickly dog.", "?", ". Tom was very happy."], 2),
)
TASK = """
task: small_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def scored(model: Any, tasks: Path) -> tuple[Mapping[str, float], list[list[float]], list[list[bool]]]:
    """Metrics; log-likelihoods and whether they are those of greedy answers, by question and choice."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=["small_choices"], task_manager=manager, bootstrap_iters=0)
    samples = sorted(results["samples"]["small_choices"], key=lambda sample: sample["doc_id"])
    answers = [[answer for (answer,) in sample["resps"]] for sample in samples]
    metrics = {name: value for name, value in results["results"]["small_choices"].items() if name.startswith("acc")}
    likely = [[float(value) for value, _ in choices] for choices in answers]
    return metrics, likely, [[bool(greedy) for _, greedy in choices] for choices in answers]


def compare(model: Path, tmp_path: Path, **options: Any) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    data = tmp_path / "questions.jsonl"
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    expected = scored(HFLM(str(model), dtype="float32", batch_size=4, device="cpu"), tmp_path)
    with running(*prepared(model, {}, "--rows", "4", "--context", "256")) as server:
        url = f"{server.url}v1/completions"
        settings = {"tokenizer": str(model), "tokenizer_backend": "huggingface", "batch_size": 4, **options}
        found = scored(LocalCompletionsAPI(base_url=url, model="base", **settings), tmp_path)
    assert expected[0].keys() >= {"acc,none", "acc_norm,none"}
    assert found[0] == expected[0]
    # float32 on both sides; sums of a few tokens.
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert found[2] == expected[2]
    assert all(math.isfinite(value) for choices in found[1] for value in choices)


def test_tokens_are_scored_as_by_the_hf_backend(story_llama: Path, tmp_path: Path) -> None:
    """The backend for transformers adds BOS if the tokenizer does; the other one has to be told."""
    compare(story_llama, tmp_path, add_bos_token=True)


@pytest.mark.parametrize("tokenized", [True, False])
def test_texts_and_tokens_of_a_tokenizer_without_bos(tmp_path: Path, tokenized: bool) -> None:
    """lm-eval counts tokens of texts without BOS, so texts need a tokenizer that adds none."""
    model = os.environ.get("FLACUNA_SMOLLM2", "")
    if not Path(model, "config.json").is_file():
        pytest.skip("FLACUNA_SMOLLM2 does not name the directory of SmolLM2-135M-Instruct")
    compare(Path(model), tmp_path, tokenized_requests=tokenized)
