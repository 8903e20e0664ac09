"""Every snippet of docs/reference/python.md, in order, in a directory that has what the page speaks of."""

import re
from pathlib import Path

import pytest
import yaml

import flacuna_jax
from flacuna_jax import load_config, open_run
from tests.small_run import write_run

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "python.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"docs/reference/python.md, snippet {number + 1}", "exec"), names)
    said = capsys.readouterr().out
    assert said.index("3 of 6") < said.index("6 of 6 steps done")
    assert "\nblue red\n" in said
    assert len(names["losses"]) == 6
    assert names["adapter"] == Path("runs/mine/adapter")
    assert names["end"] == "finished"
    assert names["right"].log_probability != names["wrong"].log_probability
    curve = [line for line in Path("runs/other/metrics.jsonl").read_text().splitlines() if "adapter_norm" in line]
    assert len(curve) == 4
    assert "adapter_norm" in Path("runs/other/report.html").read_text()
    assert {path.name for path in Path("converted").iterdir()} >= {"flacuna.json", "config.json"}


def test_the_package_names_what_it_documents():
    used = set(re.findall(r"^from flacuna_jax import (.*)$", "".join(SNIPPETS), re.MULTILINE))
    used = {name.strip() for line in used for name in line.split(",")}
    for name in flacuna_jax.__all__:
        assert getattr(flacuna_jax, name) is not None
    assert used <= set(flacuna_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        flacuna_jax.load_modell  # noqa: B018


def prepare(directory: Path) -> None:
    """config.yaml and the base it trains on, and two problems of MMLU."""
    path = write_run(directory)
    with open_run(load_config(path, ["--lora=null", "--training.max_steps=1"]), say=lambda _: None) as run:
        run.train()
        run.deliver().rename(directory / "base")
    config = yaml.safe_load(path.read_text())
    config["model"] = {"path": str(directory / "base"), "dtype": "float32"}
    path.write_text(yaml.safe_dump(config))
    for split in ("dev", "test"):
        file = directory / "benchmarks" / "mmlu" / split / f"anatomy_{split}.csv"
        file.parent.mkdir(parents=True)
        file.write_text("red?,red,blue,green,cat,A\n" * 5)
