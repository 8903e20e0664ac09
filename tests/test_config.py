"""Settings: every shipped config loads, and every mistake is answered with its place and the nearest valid key."""

from pathlib import Path

import pytest

from flacuna_jax.config import MeshConfig, RunConfig
from flacuna_jax.config_files import load_config
from flacuna_jax.errors import UserError

CONFIGS = sorted(
    path for path in (Path(__file__).parent.parent / "configs").glob("*.yaml") if "flan_mini" not in path.name
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


def message(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_opens_with_its_command(path):
    config = load_config(path)
    assert RunConfig.model_validate(config.model_dump()) == config
    head = path.read_text().split("\n\n")[0]
    assert f"--config configs/{path.name}" in head
    for word in ("Machine", "Run:"):
        assert word in head, f"{path.name} should say what to expect: {word}"


def test_the_papers_config_has_the_papers_values():
    config = load_config(Path(__file__).parent.parent / "configs/flacuna_13b.yaml")
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
    "unknown schedule": (MINIMAL, ("--training.schedule=cosin",), "training.schedule", "did you mean 'cosine'"),
    "unknown template": (MINIMAL, ("--data.template=vicuna",), "data.template", "vicuna_v1.1"),
    "unknown projection": (MINIMAL, ("--lora.targets=[q]",), "lora.targets.0", "q_proj"),
    "projection twice": (MINIMAL, ("--lora.targets=[q_proj,q_proj]",), "lora", "twice"),
    "head of some layers": (MINIMAL, ("--lora={targets: [lm_head], layers_to_transform: [1]}",), "lora", "is in none"),
    "no expression": (MINIMAL, ("--lora.rank_pattern={'(': 4}",), "lora.rank_pattern", "not a regular expression"),
    "DoRA of the head": (MINIMAL, ("--lora={targets: [lm_head], use_dora: true}",), "lora", "take lm_head out"),
    "no targets": (MINIMAL, ("--lora.targets=[]",), "lora.targets", "at least 1"),
    "no sources": (MINIMAL, ("--data.sources=[]",), "data.sources", "at least 1"),
    "unknown key in a source": (MINIMAL, ("--data.sources.0.fmt=x",), "data.sources.0.fmt", "data.sources.0.format"),
    "source that is not there": (MINIMAL, ("--data.sources.3.path=x",), "--data.sources.3.path=x", "list of 1"),
    "mesh of another kind": (MINIMAL, ("--mesh=fast",), "mesh", "'auto'"),
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
}


@pytest.mark.parametrize(("text", "overrides", "where", "hint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_and_placed(tmp_path, text, overrides, where, hint):
    said = message(tmp_path, text, *overrides)
    assert where in said
    assert hint in said
    assert said.count("\n") <= 1, f"one mistake, one message: {said}"


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "flacuna.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"flacuna\.yaml\?"):
        load_config(tmp_path / "flacuna.yml")


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read"):
        load_config(path)
