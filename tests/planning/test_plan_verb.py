"""`flacuna plan` from the command line, without a compiler for the target."""

import json
import re

import jax
import pytest

import flacuna_jax.verbs.plan
from flacuna_jax import plan as verb
from flacuna_jax.cli import run_verb
from flacuna_jax.config.files import load_config
from flacuna_jax.planning import compile as compile_module
from flacuna_jax.planning import compute_dtype, targets

PAPER = "configs/flacuna_13b.yaml"


@pytest.fixture(autouse=True)
def no_plugin(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def refusing_compiler(monkeypatch):
    """A compiler that is installed but fails."""

    def refuse(workload, layout, devices):
        raise RuntimeError("INVALID_ARGUMENT: no such thing\nand a long dump")

    monkeypatch.setattr(flacuna_jax.verbs.plan, "absent_devices", lambda machine: jax.devices()[:4])
    monkeypatch.setattr(compile_module, "lower_step", refuse)


def run(*arguments):
    return run_verb(verb.main, ["--config", PAPER, *arguments])


def test_without_the_compiler_it_names_the_extra_and_estimates(capsys):
    assert run("--target", "4xA6000", "--json", "--price", "0.5") == 0
    printed = capsys.readouterr()
    assert "flacuna-jax[compilers]" in printed.err.replace("\n", "")
    assert "assumed" in printed.err
    document = json.loads(printed.out)
    assert document["source"] == "estimated"
    assert document["fits"]
    assert document["data"]["assumed"]
    assert document["memory"]["peak"] < 22e9
    assert document["cost"] == pytest.approx(document["hours"] * 4 * 0.5)
    assert run("--target", "v5e:4x4", "--json", "--mesh={fsdp: 16}", "--training.micro_batch_size=1") == 0
    assert "flacuna-jax[compilers]" in capsys.readouterr().err.replace("\n", "")


def test_if_the_compiler_fails_the_plan_is_estimated_and_says_so(capsys, refusing_compiler):
    assert run("--target", "4xA6000") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "source ESTIMATED from the sizes, because the compiler failed" in printed
    assert "RuntimeError: INVALID_ARGUMENT: no such thing" in printed
    assert "long dump" not in printed
    assert "FITS" in printed
    assert run("--target", "4xA6000", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["source"] == "estimated"
    assert "no such thing" in document["refused"]


def test_a_search_reports_failed_compilations(capsys, refusing_compiler):
    assert run("--target", "4xA6000", "--search") == 0
    printed = capsys.readouterr()
    assert "because the compiler failed" in " ".join(printed.out.split())
    assert "the compiler failed for data 4, remat" in " ".join(printed.err.split())


def test_a_compiler_that_does_not_know_the_machine(capsys, monkeypatch):
    def fail(*arguments, **options):
        # What jax.experimental.topologies makes of a plugin that answers UNIMPLEMENTED.
        raise NotImplementedError("this release describes no devices")

    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", fail)
    assert run("--target", "4xA6000", "--json") == 0
    printed = capsys.readouterr()
    assert "this release describes no devices; the following is estimated" in " ".join(printed.err.split())
    assert json.loads(printed.out)["source"] == "estimated"


def test_unused_devices_are_reported(capsys):
    assert run("--target", "4xA6000", "--mesh={fsdp: 2}", "--examples", "1000") == 0
    printed = capsys.readouterr()
    assert "mesh uses 2 of 4 devices; mesh: auto uses all" in " ".join(printed.err.split())
    assert "minutes" in printed.out


def test_advice_if_a_plan_does_not_fit(capsys):
    assert run("--target", "4x3090", "--training.remat=none") == 0
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "nearest layout that fits (estimated): fsdp 4, remat dots" in " ".join(printed.split())


def test_search_ranks_and_writes_a_chart(capsys, tmp_path):
    picture = tmp_path / "plan.html"
    assert run("--target", "4xA6000", "--search", "--json", "--html", str(picture)) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert plans[0]["mesh"] == {"replica": 1, "data": 4, "fsdp": 1, "tensor": 1}
    times = [plan["seconds"]["step"] for plan in plans if plan["fits"]]
    assert times == sorted(times)
    assert picture.read_text().count("<rect") > len(plans)
    assert run("--target", "4xA6000", "--search") == 0
    assert "ESTIMATED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "4xB9000"], "kinds:"),
        (["--target", "2xA6000"], "mesh: 4 devices"),
        (["--target", "8xH100", "--mesh={tensor: 3}"], "mesh.tensor"),
        (["--target", "4xA6000", "--model.path=nowhere/llama"], "--sizes"),
        (["--target", "4xA6000", "--estimate", "--html", "nowhere/x.html"], "--html nowhere/x.html: cannot be written"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["7b", "13b", "30b", "65b"])
def test_sizes_equal_those_of_the_releases(sizes, capsys):
    """The numbers of parameters in the LLaMA paper and the files."""
    total = {"7b": 6_738_415_616, "13b": 13_015_864_320, "30b": 32_528_943_616, "65b": 65_285_660_672}[sizes]
    assert run("--target", "v5p:4x4x8", "--json", "--sizes", sizes, "--mesh={fsdp: 128}", "--lora=null") == 0
    arguments = json.loads(capsys.readouterr().out)["memory"]["arguments_by_kind"]
    assert arguments["weights"] * 128 == pytest.approx(4 * total, rel=0.01)


def test_real_data_are_counted(test_data, llama_tokenizer, story_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path))
    records = [{"id": str(i), "conversations": [{"from": "human", "value": "one two " * (1 + i % 7) + str(i)},
               {"from": "gpt", "value": "three"}]} for i in range(64)]  # fmt: skip
    data = tmp_path / "records.json"
    data.write_text(json.dumps(records))
    changes = [f"--model.path={story_llama}", f"--model.tokenizer={llama_tokenizer}", f"--data.sources.0.path={data}"]
    changes += ["--data.sources.0.format=sharegpt", "--training.batch_size=16", "--training.warmup_steps=0"]
    small = ["--data.max_length=128", "--mesh={fsdp: 4}", "--estimate", "--json"]
    config = load_config(PAPER, changes)
    assert config.data.sources[0].path == str(data)
    assert run("--target", "4xA6000", *changes, *small) == 0
    document = json.loads(capsys.readouterr().out)
    assert not document["data"]["assumed"]
    assert document["steps"] == 4  # 64 examples, 16 a step

    assert run("--target", "4xA6000", *changes, *small, "--evaluation={fraction: 0.5}") == 0
    assert json.loads(capsys.readouterr().out)["steps"] in (2, 3)  # held-out records are not trained on

    assert run("--target", "4xA6000", *changes, *small[1:-1], "--data.max_length=512") == 0
    printed = " ".join(capsys.readouterr().out.split())
    fewest, most, mean = re.search(r"rows and (\d+) to (\d+) \(mean (\d+\.\d)\) examples per step", printed).groups()
    assert int(fewest) < float(mean) < int(most)


def test_a_dtype_that_is_not_given_is_that_of_the_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path))
    monkeypatch.setattr(compute_dtype, "relative_speed", lambda: 0.5)
    options = ["--model.dtype=auto", "--mesh=auto", "--estimate", "--json"]
    assert run(*options) == 0
    printed = capsys.readouterr()
    said = "note: dtype float32 (auto: this processor multiplies bfloat16 0.5 × as fast as float32)"
    assert said in printed.err.splitlines()
    assert json.loads(printed.out)["dtype"] == "float32"
    assert run("--target", "4xA6000", *options) == 0
    printed = capsys.readouterr()
    assert "note: dtype" not in printed.err
    assert json.loads(printed.out)["dtype"] == "bfloat16"
