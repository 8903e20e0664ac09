import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource, TaskConfig
from flacuna_jax.flan_mini.items import Item
from flacuna_jax.flan_mini.readers import READERS
from flacuna_jax.flan_mini.readers.code import without_docstring
from flacuna_jax.flan_mini.readers.promptsource import read_templates
from tests.flan_mini import sources


def read(mode: str = "error", **settings: Any) -> tuple[list[Item], SourceReport]:
    source = MixtureSource(**({"name": "s", "examples": 1} | settings))
    report = SourceReport(source.path)
    policy = BadRecordPolicy(report, mode)
    reader = READERS[source.kind]
    return [item for path in reader.find(source).files for _, item in reader.read(source, path, policy)], report


class TestFlanRows:
    def test_every_layout_gives_the_same_items(self, tmp_path: Path) -> None:
        pair = {"inputs": "How many?", "targets": "Two."}
        layouts = {
            "submix.jsonl": {**pair, "task_source": "Flan2021", "task_name": "x:1.0.0", "template_type": "fs_opt"},
            "submix.parquet": {**pair, "task_source": "Flan2021", "task_name": "x:1.0.0", "template_type": "fs_opt"},
            "flan_fs_opt_train.jsonl.gz": {**pair, "task": "x:1.0.0"},
            "dump.jsonl": {
                "source": "How many?", "target": "Two.",
                "task_name": "x:1.0.0", "template_type": "fs_opt", "template_idx": 3,
            },
            "seqio.jsonl": {
                "inputs_pretokenized": "How many?", "targets_pretokenized": "Two.",
                "_task_name": "x:1.0.0", "_template_type": "fs_opt", "_template_idx": 1,
            },
        }  # fmt: skip
        found = set()
        for name, row in layouts.items():
            path = tmp_path / name
            if name.endswith("parquet"):
                sources.parquet(path, [row])
            else:
                sources.jsonl(path, [row])
            items, _ = read(kind="flan_rows", path=str(path))
            found.add(items[0].key())
            assert (items[0].task, items[0].type, items[0].family) == ("x:1.0.0", "fs_opt", "ready")
        assert len(found) == 1

    def test_p3_rows_get_their_task_from_the_directory_and_may_be_grouped(self, tmp_path: Path) -> None:
        row = {"inputs_pretokenized": "Q", "targets_pretokenized": "A", "inputs": [1, 2], "targets": [3]}
        sources.parquet(tmp_path / "quoref_Guess_Answer" / "train-00000-of-00001.parquet", [row])
        sources.parquet(tmp_path / "quoref_Guess_Answer" / "validation-00000-of-00001.parquet", [row])
        items, _ = read(kind="flan_rows", path=str(tmp_path))
        assert [(item.task, item.family, item.type) for item in items] == [("quoref_Guess_Answer", "pair", "")]

    def test_an_unknown_template_type_is_a_bad_record(self, tmp_path: Path) -> None:
        sources.jsonl(tmp_path / "a.jsonl", sources.flan_rows(2, type_="zs_maybe"))
        with pytest.raises(UserError, match=r"a\.jsonl, line 1.*zs_maybe"):
            read(kind="flan_rows", path=str(tmp_path))
        items, report = read("skip", kind="flan_rows", path=str(tmp_path))
        assert not items
        assert report.dropped == {"unknown template type": 2}


class TestNaturalInstructions:
    @pytest.mark.parametrize("final", [True, False])
    def test_both_layouts(self, tmp_path: Path, final: bool) -> None:
        (tmp_path / "task001_next.json").write_text(json.dumps(sources.niv2_task(5, final)))
        items, report = read(kind="natural_instructions", path=str(tmp_path))
        assert report.read == len(items) == 5
        assert {item.task for item in items} == {"task001_next"}
        assert items[0].fields["definition"] == "Say the number that follows."
        assert items[0].fields["answer"] in ("1", "1.")
        assert items[0].fields["exemplars"][0] == ["What follows 1000?", "1001", "1000 + 1"]

    def test_all_samples_are_read(self, test_data: Path) -> None:
        directory = test_data / "natural_instructions_v2"
        items, report = read("skip", kind="natural_instructions", path=str(directory))
        assert report.read == len(items) + sum(report.dropped.values())
        assert len(items) >= 1000
        assert Counter(item.task for item in items)["multilexnorm_task006_en_test"] == 200

    def test_a_bad_instance_is_one_record_and_a_bad_task_too(self, tmp_path: Path) -> None:
        task = sources.niv2_task(4)
        task["Instances"][2] = {"input": "x", "output": 7}
        task["Instances"][3] = {"input": "x", "output": ["  "]}
        (tmp_path / "task002.json").write_text(json.dumps(task))
        (tmp_path / "task003.json").write_text(json.dumps({"Definition": [], "Instances": []}))
        items, report = read("skip", kind="natural_instructions", path=str(tmp_path))
        assert (len(items), report.read) == (2, 5)
        assert report.dropped == {"wrong type": 1, "empty text": 1, "no definition": 1}


class TestChainOfThought:
    def test_every_row_gives_a_direct_item_and_three_inverse_ones(self, tmp_path: Path) -> None:
        sources.cot_tsv(tmp_path / "gsm8k_train.tsv", 2)
        sources.cot_tsv(tmp_path / "aqua_train.tsv", 1)
        items, report = read(kind="chain_of_thought", path=str(tmp_path))
        tasks = Counter((item.task, item.type) for item in items)
        assert tasks == {
            ("cot_gsm8k", "direct"): 2,
            ("cot_gsm8k_ii", "inverse"): 6,
            ("stream_aqua", "direct"): 1,
            ("stream_aqua_ii", "inverse"): 3,
        }
        assert report.read == 3
        assert items[0].fields["question"] == "How much is 0+1?\nSay it."

    def test_samples(self, test_data: Path) -> None:
        items, report = read(kind="chain_of_thought", path=str(test_data / "flan_cot"))
        assert len(items) == 4 * report.read
        assert Counter(item.task for item in items)["cot_strategyqa"] == 2061

    def test_a_row_of_two_columns_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "x_train.tsv").write_text("a\tb\tc\nd\te\n")
        with pytest.raises(UserError, match=r"x_train\.tsv, line 2.*2 columns"):
            read(kind="chain_of_thought", path=str(tmp_path))


class TestCode:
    def test_code_search_takes_training_files_only_and_both_directions(self, tmp_path: Path) -> None:
        for split in ("train", "valid", "test"):
            rows = sources.code_search_rows(3, partition=split)
            sources.jsonl(tmp_path / "python/final/jsonl" / split / f"python_{split}_0.jsonl.gz", rows)
        items, report = read(kind="code_search_net", path=str(tmp_path))
        assert report.read == 3
        assert Counter(item.type for item in items) == {"direct": 3, "inverse": 3}
        assert items[0].fields["code"] == "def add_0(x):\n    return x + 0"

    def test_rows_of_another_partition_are_counted(self, tmp_path: Path) -> None:
        sources.jsonl(tmp_path / "a.jsonl", sources.code_search_rows(2, partition="test"))
        items, report = read(kind="code_search_net", path=str(tmp_path))
        assert not items
        assert report.dropped == {"nothing to use in the record": 2}

    def test_samples_in_six_languages(self, test_data: Path) -> None:
        items, _ = read(kind="code_search_net", path=str(test_data / "code_search_net"))
        assert {item.fields["language"] for item in items} == {"Go", "Java", "JavaScript", "PHP", "Python", "Ruby"}
        for item in items:
            if item.fields["language"] == "Python":
                assert item.fields["docstring"].splitlines()[0] not in item.fields["code"]

    def test_only_docstrings_are_removed(self) -> None:
        code = 'def f():\n    """Say hi."""\n    return "Say hi."'
        assert without_docstring(code, "Say hi.") == 'def f():\n    return "Say hi."'
        assert without_docstring('s = "Say hi."', "Say hi.") == 's = "Say hi."'

    def test_apps_in_both_layouts(self, tmp_path: Path, test_data: Path) -> None:
        problem = tmp_path / "rows"
        row = {
            "problem_id": 1, "question": "Print 1.", "solutions": json.dumps(["print(1)", "print(1)", "print('1')"]),
            "input_output": "{}", "difficulty": "introductory", "url": "u", "starter_code": "",
        }  # fmt: skip
        sources.jsonl(problem / "train.jsonl", [row, row | {"problem_id": 2, "solutions": ""}])
        items, report = read(kind="apps", path=str(problem), max_solutions=10)
        assert Counter(item.type for item in items) == {"direct": 2, "inverse": 2}  # the repeated solution counts once
        assert report.dropped == {"nothing to use in the record": 1}
        items, report = read(kind="apps", path=str(test_data / "apps"), max_solutions=5)
        assert report.read == 5
        assert Counter(item.type for item in items)["direct"] == 5 + 5 + 5 + 1 + 5

    def test_the_choice_of_solutions_does_not_depend_on_their_order(self, tmp_path: Path) -> None:
        programs = [f"print({i})" for i in range(30)]
        keys = []
        for name, order in (("a", programs), ("b", programs[::-1])):
            sources.jsonl(tmp_path / name / "train.jsonl", [{"question": "q", "solutions": json.dumps(order)}])
            items, _ = read(kind="apps", path=str(tmp_path / name), max_solutions=4)
            keys.append({item.key() for item in items})
        assert keys[0] == keys[1]

    def test_code_contests(self, tmp_path: Path) -> None:
        sources.parquet(tmp_path / "train-00000-of-00001.parquet", sources.contest_rows(3))
        items, _ = read(kind="code_contests", path=str(tmp_path), languages=("python",))
        assert {item.fields["language"] for item in items} == {"Python"}
        assert Counter(item.type for item in items) == {"direct": 6, "inverse": 6}
        items, _ = read(kind="code_contests", path=str(tmp_path))
        assert {item.fields["language"] for item in items} == {"Python", "C++"}


class TestPromptsource:
    def test_templates_of_the_samples_on_rows(self, tmp_path: Path, test_data: Path) -> None:
        rows = [
            {"premise": "A cat ||| sleeps.", "hypothesis": "A cat rests.", "label": 0, "idx": 0},
            {"premise": "It rains.", "hypothesis": "It is dry.", "label": -1, "idx": 1},
        ]
        sources.jsonl(tmp_path / "super_glue/rte/train.jsonl", rows)
        templates = str(test_data / "p3_promptsource/templates")
        items, report = read(kind="promptsource", path=str(tmp_path), templates=templates)
        assert len(items) >= 8
        assert all(item.task.startswith("super_glue_rte_") for item in items)
        assert "super_glue_rte_guaranteed_true" in {item.task for item in items}
        assert all("A cat ||| sleeps." in item.fields["inputs"] for item in items)  # bars in a text are text
        assert report.dropped == {"no template gives the record a target": 1}

    def test_every_sample_template_can_be_loaded(self, test_data: Path) -> None:
        root = test_data / "p3_promptsource/templates"
        files = sorted(root.rglob("templates.yaml"))
        names = [t.task for f in files for t in read_templates(f, f.parent.relative_to(root).as_posix())]
        assert len(files) == 42
        assert len(names) == sum(file.read_text().count(": !Template\n") for file in files)
        released = json.loads((test_data / "flan_mini_facts/train_eval_key_list.json").read_text())
        known = set(released["train_key_list"]) | set(released["eval_key_list"])
        assert len(known & set(names)) > 80  # our names for the templates equal those of the released collection

    def test_a_template_cannot_reach_python(self, tmp_path: Path) -> None:
        (tmp_path / "t/x").mkdir(parents=True)
        (tmp_path / "t/x/templates.yaml").write_text(
            "dataset: x\ntemplates:\n  a: !Template\n    answer_choices: null\n    id: a\n"
            "    jinja: '{{ text.__class__.__mro__ }} ||| {{ text }}'\n    name: evil\n"
        )
        sources.jsonl(tmp_path / "rows/x/train.jsonl", [{"text": "hi"}])
        with pytest.raises(UserError, match=r"unsafe|attribute"):
            read(kind="promptsource", path=str(tmp_path / "rows"), templates=str(tmp_path / "t"))

    def test_rows_without_templates_are_an_error_with_their_place(self, tmp_path: Path) -> None:
        sources.jsonl(tmp_path / "rows/y/train.jsonl", [{"text": "hi"}])
        (tmp_path / "t").mkdir()
        with pytest.raises(UserError, match=r"no templates\.yaml"):
            read(kind="promptsource", path=str(tmp_path / "rows"), templates=str(tmp_path / "t"))


class TestTaskRows:
    def test_labels_options_and_columns_in_columns(self, tmp_path: Path) -> None:
        sources.jsonl(tmp_path / "rte.jsonl", [{"premise": "p", "hypothesis": "h", "label": "not_entailment"}])
        sources.jsonl(
            tmp_path / "arc.jsonl", [{"question": {"stem": "s"}, "choices": {"text": ["a", "b"]}, "answerKey": "B"}]
        )
        (tmp_path / "sst.tsv").write_text('sentence\tlabel\na "fine film\t1\n')
        tasks = (
            {
                "name": "glue/rte:2.0.0", "family": "nli", "files": "rte.jsonl",
                "fields": {"premise": "premise", "hypothesis": "hypothesis", "answer": "label"},
                "labels": {"entailment": "yes", "not_entailment": "no"},
            },
            {
                "name": "ai2_arc", "family": "multiple_choice", "files": "arc.jsonl",
                "fields": {"question": "question.stem", "options": "choices.text", "answer": "answerKey"},
            },
            {
                "name": "glue/sst2:2.0.0", "family": "sentiment", "files": "*.tsv",
                "fields": {"text": "sentence", "answer": "label"}, "labels": {"0": "negative", "1": "positive"},
            },
        )  # fmt: skip
        items, _ = read(kind="task_rows", path=str(tmp_path), tasks=tuple(TaskConfig(**task) for task in tasks))
        found = {item.task: item.fields for item in items}
        assert found["glue/rte:2.0.0"]["answer"] == "no"
        assert found["glue/rte:2.0.0"]["options"] == ["yes", "no"]
        assert found["ai2_arc"]["answer"] == "b"
        assert found["glue/sst2:2.0.0"] == {
            "text": 'a "fine film',
            "answer": "positive",
            "options": ["negative", "positive"],
        }


class TestDialogues:
    def test_alpaca(self, tmp_path: Path, test_data: Path) -> None:
        rows = [
            {"instruction": "Go.", "input": "<noinput>", "output": "Yes."},
            {"instruction": "Go.", "input": "there", "output": "Yes."},
            {"instruction": "Go.", "input": "", "output": " "},
        ]
        (tmp_path / "a.json").write_text(json.dumps(rows))
        items, report = read(kind="alpaca", path=str(tmp_path), name="alpaca_gpt4")
        assert [item.family for item in items] == ["instruction", "instruction_with_input"]
        assert {item.task for item in items} == {"alpaca_gpt4"}
        assert report.dropped == {"empty text": 1}
        items, report = read(kind="alpaca", path=str(test_data / "stanford_alpaca/alpaca_5000.json"))
        assert len(items) + sum(report.dropped.values()) == report.read == 5000

    def test_released_collection_as_list_and_as_parquet(self, tmp_path: Path) -> None:
        record = sources.chat("identity_flan_583804", "Q: x\nA:", "Michelle.") | {
            "source": "task061_ropes_answer_generation"
        }
        (tmp_path / "list.json").write_text(json.dumps([record]))
        sources.parquet(tmp_path / "chunk_0.parquet", [record])
        items, _ = read(kind="flan_mini", path=str(tmp_path))
        assert len(items) == 2
        assert items[0].key() == items[1].key()
        assert items[0].task == "task061_ropes_answer_generation"

    def test_sharegpt_samples(self, test_data: Path) -> None:
        items, report = read("skip", kind="sharegpt", path=str(test_data / "sharegpt"))
        assert report.read == len(items) + sum(report.dropped.values())
        assert report.dropped["mentions OpenAI or ChatGPT"] > 0
        assert all(len(item.fields["turns"]) % 2 == 0 for item in items)
