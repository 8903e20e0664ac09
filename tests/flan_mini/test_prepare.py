import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from flacuna_jax.cli import run_verb
from flacuna_jax.config.files import load_config
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.prepare import main
from tests.flan_mini import sources


@pytest.fixture
def collection(tmp_path: Path, llama_tokenizer: Path) -> Path:
    sources.jsonl(tmp_path / "flan.jsonl", sources.flan_rows(60) + sources.flan_rows(40, "drop:2.0.0"))
    (tmp_path / "alpaca.json").write_text(json.dumps([*sources.alpaca_rows(30), *sources.alpaca_rows(1)]))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": "Tell me, is drop:2.0.0 number 7 right? Yes."}) + "\n")
    tree = {
        "output_dir": str(tmp_path / "out"),
        "tokenizer": str(llama_tokenizer),
        "leakage": {"ngram": 5, "files": {"DROP": str(tmp_path / "eval.jsonl")}},
        "sources": [
            {"name": "flan2021", "kind": "flan_rows", "path": str(tmp_path / "flan.jsonl"), "examples": 100},
            {"name": "alpaca_gpt4", "kind": "alpaca", "path": str(tmp_path / "alpaca.json"), "examples": 30},
        ],
    }
    path = tmp_path / "collection.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class _Wellformed(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "tr", "td", "th", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("tr", "td", "th", "rect", "line"):
            return
        assert self.open.pop() == tag


def test_builds_reports_and_finds_again(collection: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(main, ["--config", str(collection), "--show", "1"]) == 0
    said = capsys.readouterr().out
    out = collection.parent / "out"
    assert "miss: building, nothing has been built yet" in said
    assert "⟦ It is" in said  # tokens with loss are marked
    assert "130 records" in said
    report = (out / "report.md").read_text()
    assert "DROP: drop:2.0.0" in report  # held-in, by name
    assert "| flan2021 | 100 | 0 | 100 | 0 | 100 | 100 | 100 |" in report
    assert "| alpaca_gpt4 | 31 | 0 | 31 | 1 | 30 | 30 | 30 |" in report
    page = _Wellformed()
    page.feed((out / "report.html").read_text())
    assert not page.open
    assert "svg" in page.seen
    assert run_verb(main, ["--config", str(collection)]) == 0
    assert "hit: " in capsys.readouterr().out
    assert run_verb(main, ["--config", str(collection), "--seed=7"]) == 0
    assert "miss: building, changed since: settings.seed" in capsys.readouterr().out
    resolved = load_config(collection, schema=FlanMiniConfig).to_yaml()
    (collection.parent / "again.yaml").write_text(resolved)
    assert load_config(collection.parent / "again.yaml", schema=FlanMiniConfig).to_yaml() == resolved


def test_scale_output_and_leakage_from_the_command_line(collection: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = collection.parent / "elsewhere"
    arguments = ["--scale", "0.1", "--output", str(output), "--leakage", f"mine={collection.parent / 'eval.jsonl'}"]
    assert run_verb(main, ["--config", str(collection), *arguments]) == 0
    assert len(json.loads((output / "flan_mini.json").read_text())) == 13
    assert "leakage: mine:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sources.0.exampels=3"], "did you mean sources.0.examples?"),
        (["--sources.0.examples=101"], "flan2021: 100 of 101 records"),
        (["--sources.0.path=/nowhere"], "/nowhere: no such file or directory (sources.flan2021)"),
        (["--sources.0.path=SirNeural/flan_v2"], "for a dataset of the Hub, write hf:SirNeural/flan_v2"),
        (["--leakage", "x=/nowhere"], "/nowhere: no such file"),
        (["--output_dir=/dev/null/out"], "/dev/null/out: cannot be written to"),
        (["--leakage", "x"], "write NAME=PATH"),
        (["--tokenizer=/nowhere"], "/nowhere is not a directory"),
    ],
)
def test_mistakes_exit_with_status_2(
    collection: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_verb(main, ["--config", str(collection), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (collection.parent / "out/flan_mini.json").exists()


@pytest.mark.parametrize("count", ["-1", "two"])
def test_show_needs_a_number(collection: Path, capsys: pytest.CaptureFixture[str], count: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(collection), f"--show={count}"])
    assert f"{count!r} is not a whole number >= 0" in capsys.readouterr().err


def test_a_training_config_is_tokenised_packed_and_reported(
    tmp_path: Path, llama_tokenizer: Path, story_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alpaca.json").write_text(json.dumps([*sources.alpaca_rows(40), {"instruction": "x", "output": ""}]))
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(story_llama), "tokenizer": str(llama_tokenizer)},
        "data": {"sources": [{"path": str(tmp_path / "alpaca.json"), "weight": 0.5}], "max_length": 256},
        "training": {"batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = ["--config", str(tmp_path / "run.yaml"), "--cache", str(tmp_path / "cache"), "--show", "2"]
    assert run_verb(main, [*command, "--output", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "tokenised data: not in the cache yet" in said
    assert "records: 20\n" in said  # half of forty
    assert "dropped 1: no answer in the record" in said
    assert said.count("with loss") == 2
    assert "no answer in the record" in (tmp_path / "report/report.md").read_text()
    assert run_verb(main, command) == 0
    assert "tokenised data: hit" in capsys.readouterr().out
    assert run_verb(main, [*command, "--data.sources.0.weight=1.0", "--evaluation.fraction=0.2"]) == 0
    said = capsys.readouterr().out
    kept, held_out = (int(re.findall(rf"^{label}: (\d+)", said, re.MULTILINE)[0]) for label in ("records", "held out"))
    assert held_out > 0
    assert kept + held_out == 40
    assert run_verb(main, [*command, "--training.warmup_steps=3000"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("with loss") == 2, "the data are shown anyway"
    assert "training.warmup_steps 3000 is not shorter" in printed.err
    assert run_verb(main, [*command, "--evaluation.fraction=1e-9"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("with loss") == 2
    assert "evaluation.fraction 1e-09 holds out 0 of" in printed.err
    assert run_verb(main, [*command, "--scale", "0.5"]) == 2
    assert run_verb(main, [*command, "--cache", "/dev/null/cache"]) == 2
    assert "/dev/null/cache: cannot be written to" in capsys.readouterr().err
