"""Settings: every shipped config loads, and the message for a mistake names its place and the nearest valid key."""

import re
from pathlib import Path

import pytest

from flacuna_jax.cli import main as flacuna
from flacuna_jax.config.files import load_config, require_settings
from flacuna_jax.config.other_names import OURS, OURS_BY_VALUE, OURS_IN_A_SOURCE
from flacuna_jax.config.run import MeshConfig, RunConfig
from flacuna_jax.errors import UserError

CONFIGS = sorted(
    path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml") if "flan_mini" not in path.name
)
MINIMAL = """\
output_dir: runs/x
model:
  path: base
data:
  sources:
    - path: a.json
training:
  learning_rate: 2e-5
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_starts_with_its_command(path):
    config = load_config(path)
    assert RunConfig.model_validate(config.model_dump()) == config
    head = path.read_text().split("\n\n")[0]
    assert f"--config configs/{path.name}" in head
    for word in ("Machine", "Run:"):
        assert word in head, f"{path.name} should say what to expect: {word}"


def test_the_papers_config_has_the_papers_values():
    config = load_config(Path(__file__).parents[2] / "configs/flacuna_13b.yaml")
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16, ("q_proj", "v_proj"))
    training = config.training
    assert (training.learning_rate, training.warmup_steps, training.epochs) == (2e-5, 3000, 1)
    assert (training.batch_size, training.micro_batch_size, config.data.max_length) == (128, 2, 1280)


def test_resolved_config_is_a_config(tmp_path):
    config = load(tmp_path, MINIMAL, "--mesh.fsdp=2", "--lora=null")
    again = load(tmp_path, config.to_yaml())
    assert again == config
    assert again.mesh == MeshConfig(fsdp=2)


def test_anchors_dates_and_home_directories_are_read_as_people_expect(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    shared = "output_dir: ~/2024-01-31\nlora: &l\n  rank: 4\n" + MINIMAL.partition("\n")[2]
    config = load(tmp_path, shared.replace("learning_rate: 2e-5", "<<: {epochs: 3}\n  learning_rate: 1e-4"))
    assert (config.training.epochs, config.training.learning_rate) == (3, 1e-4)
    assert config.output_dir == "/home/me/2024-01-31"
    assert load(tmp_path, MINIMAL, "--output_dir=2024-13-45").output_dir == "2024-13-45"
    assert load(tmp_path, MINIMAL, '--output_dir="\\ud83e\\udd99"').output_dir == "🦙", "JSON is YAML"


def test_numbers_are_read_as_people_write_them(tmp_path):
    assert load(tmp_path).training.learning_rate == 2e-5
    assert load(tmp_path, MINIMAL, "--training.learning_rate=3E+2").training.learning_rate == 300
    assert load(tmp_path, MINIMAL, "--training.weight_decay=0").training.weight_decay == 0


MISTAKES = {
    "unknown key": (MINIMAL.replace("learning_rate", "learning_rat"), (), "c.yaml:8", "training.learning_rate"),
    "key in the wrong section": (MINIMAL + "learning_rate: 1\n", (), "c.yaml:9", "did you mean training.learning_rate"),
    "unknown override": (MINIMAL, ("--training.batchsize=4",), "--training.batchsize=4", "training.batch_size"),
    "wrong type": (MINIMAL.replace("2e-5", "fast"), (), "c.yaml:8", "number"),
    "boolean for a number": (MINIMAL, ("--training.epochs=true",), "--training.epochs=true", "integer"),
    "text for a number": (MINIMAL, ("--seed='7'",), "seed", "integer"),
    "fraction for a count": (MINIMAL, ("--training.batch_size=1.5",), "training.batch_size", "integer"),
    "out of range": (MINIMAL, ("--lora.dropout=1.0",), "lora.dropout", "less than 1"),
    "zero rank": (MINIMAL, ("--lora.rank=0",), "lora.rank", "greater than 0"),
    "negative rate": (MINIMAL, ("--training.learning_rate=-1",), "training.learning_rate", "greater than 0"),
    "unknown word": (MINIMAL, ("--data.packing=bestfit",), "data.packing", "did you mean 'best_fit'"),
    "tokamax in float32": (
        MINIMAL,
        ("--training.attention=tokamax", "--model.dtype=float32"),
        "attention: tokamax",
        "needs model.dtype: bfloat16",
    ),
    "cudnn with packed rows": (
        MINIMAL,
        ("--training.attention=cudnn",),
        "attention: cudnn",
        "needs data.packing: none",
    ),
    "unknown schedule": (MINIMAL, ("--training.schedule=cosin",), "training.schedule", "did you mean 'cosine'"),
    "unknown template": (MINIMAL, ("--data.template=vicuna",), "data.template", "vicuna_v1.1"),
    "unknown projection": (MINIMAL, ("--lora.targets=[q]",), "lora.targets.0", "q_proj"),
    "projection twice": (MINIMAL, ("--lora.targets=[q_proj,q_proj]",), "lora", "twice"),
    "head with selected layers": (
        MINIMAL,
        ("--lora={targets: [lm_head], layers_to_transform: [1]}",),
        "lora",
        "in no layer",
    ),
    "no mapping": (MINIMAL, ("--lora.rank_pattern=3",), "lora.rank_pattern", "mapping, for example {up_proj: 4}"),
    "no rank": (MINIMAL, ("--lora.rank_pattern={q_proj: many}",), "lora.rank_pattern.q_proj", "integer (got 'many')"),
    "invalid expression": (MINIMAL, ("--lora.rank_pattern={'(': 4}",), "lora.rank_pattern", "not a regular expression"),
    "DoRA on the head": (MINIMAL, ("--lora={targets: [lm_head], use_dora: true}",), "lora", "remove lm_head from"),
    "no targets": (MINIMAL, ("--lora.targets=[]",), "lora.targets", "at least 1"),
    "no sources": (MINIMAL, ("--data.sources=[]",), "data.sources", "at least 1"),
    "unknown key in a source": (MINIMAL, ("--data.sources.0.fmt=x",), "data.sources.0.fmt", "data.sources.0.format"),
    "missing source": (MINIMAL, ("--data.sources.3.path=x",), "--data.sources.3.path=x", "list of 1"),
    "mesh of another kind": (MINIMAL, ("--mesh=fast",), "mesh", "'auto'"),
    "mesh as a number": (MINIMAL, ("--mesh=4",), "mesh", "'auto' or a section of replica, data, fsdp, tensor"),
    "a word for a list": (MINIMAL, ("--lora.targets=q_proj",), "lora.targets", "should be a list"),
    "half an epoch": (MINIMAL, ("--training.epochs=0.5",), "training.epochs", "use 1"),
    "mesh axis": (MINIMAL, ("--mesh.fspd=2",), "mesh.fspd", "mesh.fsdp"),
    "missing model": (MINIMAL.replace("  path: base\n", "  dtype: float32\n"), (), "c.yaml:2", "path is missing"),
    "missing output_dir": (MINIMAL.replace("output_dir: runs/x\n", ""), (), "c.yaml:1", "output_dir is missing"),
    "random without sizes": (MINIMAL, ("--model.init=random",), "model", "architecture"),
    "heads that do not divide": (
        MINIMAL,
        (
            "--model={init: random, tokenizer: t, architecture: "
            "{hidden_size: 10, intermediate_size: 8, num_layers: 1, num_heads: 3}}",
        ),
        "architecture",
        "multiple",
    ),
    "key twice": (MINIMAL + "training: {epochs: 2}\n", (), "c.yaml:9", "twice"),
    "not YAML": (MINIMAL + "data: [\n", (), "c.yaml", "not valid YAML"),
    "tab": ("output_dir:\n\t- x\n", (), "c.yaml:2", "not valid YAML"),
    "a list": ("- 1\n", (), "c.yaml", "mapping"),
    "empty": ("", (), "c.yaml", "mapping"),
    "override without value": (MINIMAL, ("--seed",), "--seed", "--section.key=value"),
    "override of nothing": (MINIMAL, ("seed=3",), "seed=3", "--section.key=value"),
    "override into a value": (MINIMAL, ("--output_dir.a=3",), "--output_dir.a=3", "inside"),
    "override that is not YAML": (MINIMAL, ("--seed=[",), "--seed=[", "not valid YAML"),
    "no epochs": (MINIMAL, ("--training.epochs=0",), "training.epochs", "use 1"),
    "a part of an epoch": (MINIMAL, ("--training.epochs=2.4",), "training.epochs", "use 2"),
    "count in quotes": (MINIMAL, ("--training.max_steps='1,000'",), "training.max_steps", "use 1000"),
    "a decimal comma": (MINIMAL, ("--lora.dropout=0,05",), "lora.dropout", "use 0.05"),
    "rate in quotes": (MINIMAL, ("--training.learning_rate='2e-5'",), "training.learning_rate", "use 2e-05"),
    "infinite rate": (MINIMAL, ("--training.learning_rate=.inf",), "training.learning_rate", "finite"),
    "rate not a number": (MINIMAL, ("--training.learning_rate=.nan",), "training.learning_rate", "finite"),
    "rate that overflows": (MINIMAL, ("--training.learning_rate=1e999",), "training.learning_rate", "finite"),
    "no rate": (MINIMAL, ("--training.learning_rate=0",), "training.learning_rate", "any number above 0"),
    "negative decay": (MINIMAL, ("--training.weight_decay=-0.1",), "training.weight_decay", "use 0"),
    "negative warm-up": (MINIMAL, ("--training.warmup_steps=-1",), "training.warmup_steps", "use 0"),
    "clipping to nothing": (MINIMAL, ("--training.max_grad_norm=0",), "training.max_grad_norm", "above 0"),
    "empty batch": (MINIMAL, ("--training.batch_size=0",), "training.batch_size", "use 1"),
    "empty micro-batch": (MINIMAL, ("--training.micro_batch_size=0",), "micro_batch_size", "use 1"),
    "unknown unit": (MINIMAL, ("--training.batch_unit=row",), "training.batch_unit", "did you mean 'rows'"),
    "unknown remat": (MINIMAL, ("--training.remat=fully",), "training.remat", "did you mean 'full'"),
    "unknown policy": (MINIMAL, ("--training.on_bad_step=skpi",), "training.on_bad_step", "did you mean 'skip'"),
    "spike below the mean": (MINIMAL, ("--training.spike_factor=1",), "training.spike_factor", "above 1"),
    "no bad steps": (MINIMAL, ("--training.max_bad_steps=0",), "training.max_bad_steps", "use 1"),
    "full dropout": (MINIMAL, ("--lora.dropout=1",), "lora.dropout", "any number below 1"),
    "negative dropout": (MINIMAL, ("--lora.dropout=-0.1",), "lora.dropout", "use 0"),
    "no alpha": (MINIMAL, ("--lora.alpha=0",), "lora.alpha", "above 0"),
    "a target that is no list": (MINIMAL, ("--lora.targets=q_proj",), "lora.targets", "use [q_proj]"),
    "a number for a section": (MINIMAL, ("--lora=8",), "lora", "must be a section or null, not 8"),
    "an objective's name": (MINIMAL, ("--training.objective=dpo",), "training.objective", "write {name: dpo}"),
    "another objective's setting": (MINIMAL, ("--training.objective={name: dpo, gamma: 1}",), "gamma", "of dpo"),
    "an unknown reference": (
        MINIMAL,
        ("--training.objective={name: dpo, reference: nothing}",),
        "training.objective",
        "must be 'base', 'cached' or 'none' or a section of adapter, not 'nothing'",
    ),
    "a metric of pairs for single answers": (
        MINIMAL,
        ("--training.objective={name: kto}", "--evaluation={fraction: 0.1, metric: eval/rewards/accuracy}"),
        "evaluation.metric",
        "use eval/loss",
    ),
    "half a token": (MINIMAL, ("--lora.train_tokens=[1.5]",), "lora.train_tokens.0", "string or a valid integer (got"),
    "a negative token": (MINIMAL, ("--lora.train_tokens=[-1]",), "lora.train_tokens.0", "use 0"),
    "a path for sources": (MINIMAL, ("--data.sources=a.json",), "data.sources", "a list"),
    "rows too short": (MINIMAL, ("--data.max_length=4",), "data.max_length", "use 8"),
    "unknown length policy": (MINIMAL, ("--data.over_length=truncate",), "data.over_length", "'truncate_prompt'"),
    "unknown record policy": (MINIMAL, ("--data.on_bad_record=ignore",), "data.on_bad_record", "'skip'"),
    "unknown supervision": (MINIMAL, ("--data.train_on=answers",), "data.train_on", "'assistant', 'last' or 'all'"),
    "unknown format": (MINIMAL, ("--data.sources.0.format=alpca",), "data.sources.0.format", "did you mean 'alpaca'"),
    "no weight": (MINIMAL, ("--data.sources.0.weight=0",), "data.sources.0.weight", "above 0"),
    "no examples": (MINIMAL, ("--data.sources.0.max_examples=0",), "max_examples", "use 1"),
    "unknown dtype": (MINIMAL, ("--model.dtype=bf16",), "model.dtype", "did you mean 'bfloat16'"),
    "no devices": (MINIMAL, ("--mesh.fsdp=0",), "mesh.fsdp", "use 1"),
    "a number for a name": (MINIMAL, ("--output_dir=7",), "output_dir", "use '7' (in quotes)"),
    "a word for a switch": (MINIMAL, ("--logging.tensorboard='off'",), "tensorboard", "use false"),
    "a number for a switch": (MINIMAL, ("--logging.tensorboard=1",), "tensorboard", "use true"),
    "negative seed": (MINIMAL, ("--seed=-1",), "seed", "use 0"),
    "no checkpoints": (MINIMAL, ("--checkpoint.keep=0",), "checkpoint.keep", "use 1"),
    "negative best": (MINIMAL, ("--checkpoint.keep_best=-1",), "checkpoint.keep_best", "use 0"),
    "unknown resume": (MINIMAL, ("--checkpoint.resume=always",), "checkpoint.resume", "'auto' or 'never'"),
    "unknown change": (
        MINIMAL,
        ("--checkpoint.allow_changes=[cod]",),
        "checkpoint.allow_changes",
        "did you mean code?",
    ),
    "nothing to evaluate": (MINIMAL, ("--evaluation={}",), "evaluation", "fraction, sources or tasks is missing"),
    "held-out records set twice": (
        MINIMAL,
        ("--evaluation={fraction: 0.1, sources: [{path: x}]}",),
        "evaluation",
        "set only one of them",
    ),
    "everything held out": (MINIMAL, ("--evaluation.fraction=1",), "evaluation.fraction", "any number below 1"),
    "no patience": (MINIMAL, ("--evaluation={fraction: 0.1, patience: 0}",), "evaluation.patience", "use 1"),
    "unknown delivery": (MINIMAL, ("--evaluation={fraction: 0.1, deliver: bst}",), "deliver", "did you mean 'best'"),
    "no tasks": (MINIMAL, ("--evaluation={fraction: 0.1, tasks: {names: [], data: x}}",), "tasks.names", "at least 1"),
    "a metric without records": (
        MINIMAL,
        ("--evaluation={tasks: {names: [mmlu], data: x}}",),
        "evaluation",
        "eval/loss",
    ),
    "weight of an evaluation source": (
        MINIMAL,
        ("--evaluation={sources: [{path: x, weight: 2.0}]}",),
        "evaluation",
        "weight applies to training only",
    ),
    "unknown optimizer": (MINIMAL, ("--training.optimizer=adam",), "training.optimizer", "did you mean 'adamw'"),
    "rank before the first": (MINIMAL, ("--distributed.process_id=-1",), "process_id", "use 0"),
    "part of a cluster": (MINIMAL, ("--distributed.coordinator=a:1",), "distributed", "num_processes"),
    "a list for a key": (MINIMAL + "? [a, b]\n: 1\n", (), "c.yaml:9", "a key must be a word"),
    "an alias in itself": ("output_dir: x\nmodel: &m\n  path: *m\n", (), "c.yaml", "an alias refers to"),
    "thousands of brackets": ("output_dir: x\nmodel: " + "[" * 3000 + "]" * 3000, (), "c.yaml", "nested too deeply"),
    "thousands of digits": (MINIMAL, ("--seed=" + "9" * 5000,), "--seed=9", "not valid YAML"),
    "half a surrogate pair": (MINIMAL, ('--output_dir="\\ud800"',), "--output_dir", "not valid YAML"),
    "a NUL in a path": (MINIMAL.replace("runs/x", '"runs\\0x"'), (), "c.yaml:1", "must not contain a NUL"),
    "an index in superscript": (MINIMAL, ("--data.sources.²=x",), "--data.sources.²=x", "is not an item"),
    "an expression that overflows": (
        MINIMAL,
        ("--lora.rank_pattern={'a{99999999999}': 4}",),
        "rank_pattern",
        "not a reg",
    ),
    "a rate beyond float32": (
        MINIMAL,
        ("--training.learning_rate=1e300",),
        "learning_rate",
        "any number below 3.4e+38",
    ),
    "seed beyond 32 bits": (MINIMAL, ("--seed=4294967296",), "seed", "use 4294967295"),
    "rows beyond 32 bits": (MINIMAL, ("--training.batch_size=10000000000",), "batch_size", "use 2147483647"),
    "absurdly long rows": (MINIMAL, ("--data.max_length=1000000000000",), "data.max_length", "use 1048576"),
    "no name at all": (MINIMAL, ("--output_dir=''",), "output_dir", "at least 1 character"),
    "an empty question": (MINIMAL, ("--evaluation={fraction: 0.1, prompts: ['']}",), "prompts.0", "at least 1 char"),
    "an empty word in no_decay": (MINIMAL, ("--training.no_decay=['']",), "no_decay.0", "at least 1 character"),
    "odd heads": (
        MINIMAL,
        (
            "--model={init: random, tokenizer: t, architecture: "
            "{hidden_size: 10, intermediate_size: 8, num_layers: 1, num_heads: 2}}",
        ),
        "architecture",
        "head_dim 5 is odd",
    ),
    "llama3 frequencies out of order": (
        MINIMAL,
        ("--model.rope_scaling={type: llama3, low_freq_factor: 4}",),
        "rope_scaling",
        "low_freq_factor 4 is not below high_freq_factor 4",
    ),
}


def test_the_table_is_long_enough():
    assert len(MISTAKES) >= 80


@pytest.mark.parametrize(("text", "overrides", "where", "hint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_exits_with_status_2_and_names_its_place(tmp_path, capsys, monkeypatch, text, overrides, where, hint):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert flacuna(["train", "--config", str(path), *overrides]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert where in said
    assert hint in said
    assert said.strip().count("\n") <= 1, f"one mistake, one message: {said}"
    assert "Traceback" not in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.yaml"], "a mistake leaves nothing behind"


def test_messages_translate_names_of_other_trainers(tmp_path):
    for theirs, ours in OURS.items():
        require_settings([re.split(r"[ ,]", ours)[0]], (), theirs)
    for theirs, by_value in OURS_BY_VALUE.items():
        for value, ours in by_value.items():
            require_settings([re.split(r"[:,]", ours)[0]], (), f"{theirs} {value}")
    for theirs, ours in OURS_IN_A_SOURCE.items():
        name = re.split("[ :,]", ours)[0]
        require_settings([name if "." in name else f"data.sources.{name}"], (), theirs)
    (tmp_path / "c.yaml").write_text(MINIMAL)
    for override, expected in {
        "--training.gradient_checkpointing=true": "here it is training.remat",
        "--lora_r=8": "here it is lora.rank",
        "--training.lr=1e-4": "here it is training.learning_rate",
        "--data.train_on_inputs=false": "here it is data.train_on: assistant",
        "--data.train_on_inputs=true": "here it is data.train_on: all",
        "--data.sources.0.subset=main": "here it is path: hf:NAME:CONFIG",
        "--data.sources.0.spilt=test": r"did you mean data\.sources\.0\.split",
        "--training.max_steps=-1": "use 1, or null for none",
        "--data.sources=my.jsonl": r"write \[\{path: my\.jsonl\}\], on a command line --data\.sources='\[",
        "--data.sources=[my.jsonl]": r"data\.sources\.0 must be a section, not 'my\.jsonl'; write \{path: my\.jsonl\}",
    }.items():
        with pytest.raises(UserError, match=expected):
            load_config(tmp_path / "c.yaml", [override])


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("eval/loss", True),
        ("eval/perplexity/glossary", True),
        ("eval/token_accuracy/glossary", False),
        ("tasks/lambada/perplexity,none", True),
        ("tasks/glossary/acc,none", False),
        ("tasks/mmlu:5/faithful", False),
    ],
)
def test_the_measure_decides_what_is_better_and_names_do_not(tmp_path, metric, lower):
    evaluation = load(tmp_path, MINIMAL, f"--evaluation={{fraction: 0.1, metric: '{metric}'}}").evaluation
    assert evaluation is not None
    assert evaluation.lower_is_better == lower


def test_the_message_names_the_faulty_one_of_several_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    others = ["--output_dir=x", "--training.epochs=2", "--model.dtype=float32"]
    for fault in ("--training.decay_steps=3", "--lora={rank: 4, targets: [q_proj, q_proj]}"):
        with pytest.raises(UserError) as raised:
            load_config(path, [*others, fault])
        assert str(raised.value).startswith(repr(fault))
    with pytest.raises(UserError) as raised:
        load_config(path, [*others, "--lora=null", "--model.quantization=nf4"])
    assert str(raised.value).startswith("'--lora=null'")


def test_message_for_a_missing_file_suggests_a_similar_name(tmp_path):
    (tmp_path / "flacuna.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"flacuna\.yaml\?"):
        load_config(tmp_path / "flacuna.yml")


def test_binary_file_is_rejected(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read"):
        load_config(path)
