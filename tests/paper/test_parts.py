"""The parts of the experiment that need no model: shipped configs, scores of writing, curves."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flacuna_jax.config.files import load_config
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.results import Outcome, TaskResult
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.paper import curves, split
from flacuna_jax.paper.experiment import Training, shares
from flacuna_jax.paper.results import SAME, extra_tables, findings, repeated, with_same_letter
from flacuna_jax.paper.settings import ExperimentSettings

CONFIGS = Path(__file__).parents[2] / "configs" / "paper_135m"
BUDGETS = ("10m", "30m", "3h", "full")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parents[1])


@pytest.mark.parametrize("budget", BUDGETS)
def test_shipped_experiments(budget: str) -> None:
    settings = load_config(CONFIGS / f"{budget}.yaml", schema=ExperimentSettings)
    assert settings.budget == budget
    load_config(settings.tasks, schema=FlanMiniConfig)
    load_config(settings.chat, schema=FlanMiniConfig)
    assert all(load_config(method.config).data.template == "checkpoint" for method in settings.methods.values())


def test_budgets_grow() -> None:
    examples = [load_config(CONFIGS / f"{name}.yaml", schema=ExperimentSettings).examples for name in BUDGETS]
    assert examples == sorted(set(examples))


def test_the_mixture_has_flan_minis_share_of_chat() -> None:
    assert shares(1000, 0.084) == {"tasks": 916, "chat": 84}
    assert Training("chat0", "lora", Path(), 100, 0.0, 1e-3).counts == {"tasks": 100}


def test_repetition_counts_ngrams_that_occurred_before() -> None:
    assert repeated(["a", "b", "c"]) is None
    assert repeated(["a", "b", "c", "d", "e"]) == 0
    assert repeated(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd


def result(model: str, letters: str, task: str = "mmlu", shots: int = 0) -> TaskResult:
    outcomes = tuple(Outcome(str(i), "g", {"letter": float(c)}, {}) for i, c in enumerate(letters))
    return TaskResult(task, shots, model, outcomes, "micro", len(letters))


def test_the_share_of_letters_is_a_table_with_a_paired_difference() -> None:
    base, tuned = [result("base", "0" * 10)], [result("lora", "1" * 9 + "0")]
    (table,) = extra_tables([base, tuned])
    assert [row.cells[0].text().split()[0] for row in table.rows if row.cells[0]] == ["0.0", "90.0", "+90.0*"]
    found, tested = findings(base, [tuned])
    assert tested == 1
    assert (found[0].model, found[0].score) == ("lora", "letter")
    assert found[0].p_value == pytest.approx(2 / 2**9)  # McNemar: nine gained, none lost
    assert findings(base, [base]) == ([], 1)


def test_a_model_that_always_gives_the_same_letter_is_seen() -> None:
    def answers(*predictions: str) -> TaskResult:
        outcomes = tuple(Outcome(str(i), "g", {"letter": 1.0}, {"prediction": p}) for i, p in enumerate(predictions))
        return with_same_letter(TaskResult("mmlu", 0, "m", outcomes, "micro", len(outcomes)))

    assert answers(" B", "B. yes", "(B)", "A").mean(SAME) == 75
    assert answers("The answer", "").mean(SAME) == 0
    assert answers("E", "E", "D").mean(SAME) == pytest.approx(100 / 3)  # E is no option
    titles = [table.title for table in extra_tables([[answers("A", "A")]])]
    assert any("most frequent letter" in title for title in titles)


def test_curves_are_drawn_from_the_first_step_to_the_last() -> None:
    root = ElementTree.fromstring(curves.to_svg("a & b", {"x": [3.0, 2.0, 1.0], "y": [1.0]}, dashed=("y",)))
    lines = [element for element in root if element.tag.endswith("polyline")]
    points = [tuple(map(float, point.split(","))) for point in lines[0].attrib["points"].split()]
    assert [y for _, y in points] == [
        curves.TOP,
        (curves.TOP + curves.HEIGHT - curves.BOTTOM) / 2,
        curves.HEIGHT - curves.BOTTOM,
    ]
    assert points[0][0] == curves.LEFT
    assert "stroke-dasharray" in lines[1].attrib
    with pytest.raises(ValueError, match="nothing to draw"):
        curves.to_svg("empty", {})


def test_items_that_are_held_out_stay_out_of_a_collection_with_other_wordings(tmp_path: Path) -> None:
    def record(item: int, question: str) -> dict[str, object]:
        return {"id": f"item{item}", "source": "s", "conversations": [{"from": "human", "value": question}]}

    first = [record(item, f"long wording {item}") for item in range(4)]
    second = [record(item, f"short {item}") for item in (2, 0, 1, 3)] + [record(9, "long wording 1")]
    for name, records in (("first", first), ("second", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    split.main([str(tmp_path / "first.json"), "--held-out", "2", "--output", str(tmp_path / "first")])
    held_out = tmp_path / "first" / "held_out.jsonl"
    split.main([str(tmp_path / "second.json"), "--held-out-of", str(held_out), "--output", str(tmp_path / "second")])
    train = [json.loads(line)["id"] for line in (tmp_path / "second" / "train.jsonl").read_text().splitlines()]
    assert train == ["item2", "item3"]
    assert (tmp_path / "second" / "held_out.jsonl").read_bytes() == held_out.read_bytes()


def test_names_of_questions_and_variants_are_checked() -> None:
    for override, message in (
        ('--questions={"Rank": ["rank2"]}', "'rank2' is not one of the methods and variants lora, all_linear, full"),
        ('--variants={"lora": {"method": "full"}}', "a variant has the name of a method"),
        ('--variants={"more": {"method": "dora"}}', "'dora' is not one of the methods lora"),
        ('--benchmarks=[{"tasks": ["hhh"]}]', "letters needs the benchmark mmlu:0"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(CONFIGS / "10m.yaml", [override], schema=ExperimentSettings)
