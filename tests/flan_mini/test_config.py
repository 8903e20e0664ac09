from pathlib import Path

import pytest

from flacuna_jax.config.files import load_config
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.hub import is_hub_name

SHIPPED = Path(__file__).parents[2] / "configs/flan_mini.yaml"
ON_HUB = SHIPPED.with_name("flan_mini_hub.yaml")

PAPER = {
    "flan2021": 388, "p3": 320, "niv2": 200, "cot": 100, "code_search": 100,
    "code_contest": 50, "apps": 50, "alpaca_gpt4": 52, "code_alpaca": 20, "sharegpt": 60,
}  # fmt: skip


@pytest.mark.parametrize("path", [SHIPPED, ON_HUB], ids=["copies", "hub"])
def test_the_shipped_configs_are_the_papers_mixture(path: Path) -> None:
    config = load_config(path, schema=FlanMiniConfig)
    assert {source.name: round(source.examples / 1000) for source in config.sources} == PAPER
    assert sum(source.examples for source in config.sources) == pytest.approx(1_340_153, rel=1e-3)
    assert config.max_length == 1280
    assert f"flacuna prepare --config configs/{path.name}" in path.read_text()
    assert {is_hub_name(source.path) for source in config.sources} == {path == ON_HUB}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--sede=1", "sede is not a setting; did you mean seed?"),
        ("--sources.0.exmples=1", "did you mean sources.0.examples?"),
        ("--sources.0.kind=flanrows", "did you mean 'flan_rows'?"),
        (
            "--sources.3.max_solutions=3",
            "max_solutions does not apply to kind chain_of_thought, only to apps, code_contests",
        ),
        ("--sources.3.shares={zs_opt: 1.0}", "'zs_opt' is not one of direct, inverse"),
        ("--sources.1.name=flan2021", "two sources have the name 'flan2021'"),
        ("--sources.0.few_shot=2.0", "less than or equal to 1"),
        ("--scale=0", "greater than 0"),
        ("--template=vicuna", "did you mean 'vicuna_v"),
    ],
)
def test_mistakes_name_the_setting(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(SHIPPED, [override], schema=FlanMiniConfig)
    assert message in str(caught.value)
