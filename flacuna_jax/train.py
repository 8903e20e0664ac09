"""`flacuna train --config C [--a.b=value ...]`: trains an adapter or a model from a checkpoint and data.

`run/training_run.py` defines the run: model, data, plan, starting state, loop, delivery.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flacuna_jax.arguments import Parser, ShowText
from flacuna_jax.cli import EXIT_STOPPED, leave, run_verb

if TYPE_CHECKING:
    from flacuna_jax.training.loop import StateHook, StepHook


def main(argv: Sequence[str] | None = None, *, hooks: "Sequence[StepHook | StateHook]" = ()) -> int | None:
    """The command. `hooks` are added to the run, for programs that call this function."""
    arguments, overrides = parser().parse_with_overrides(argv)
    from flacuna_jax.config.files import load_config

    config = load_config(arguments.config, overrides)
    from flacuna_jax.verbs import train

    return train.run(arguments, config, hooks)


def parser() -> Parser:
    options = Parser(
        "train",
        "Fine-tunes a LLaMA model: LoRA adapters, or all weights with lora: null.",
        epilog="Any setting of the config can be overridden: --training.epochs=2 --data.sources.0.path=my.jsonl. "
        f"Exit status: 0 done; 2 the input is invalid; {EXIT_STOPPED} a signal ended the run (SIGTERM, SIGINT, "
        "SIGHUP, SIGUSR1, SIGUSR2), its state is saved, and the same command continues it; 1 any other error.",
    )
    options.add_argument("--config", required=True, metavar="YAML", help="see configs/")
    options.add_argument(
        "--settings", action=ShowText, text=_settings, help="print every setting with its description and default"
    )
    options.add_argument("--profile", action="store_true", help="trace a few steps into output_dir/profile")
    options.add_argument(
        "--check_determinism", action="store_true", help="only check, on 3 steps, that a seed gives the same bytes"
    )
    options.add_argument(
        "--inspect_step", type=int, metavar="N", help="only print, as JSON, the examples of step N and their losses"
    )
    return options


def _settings() -> str:
    from flacuna_jax.config.settings import run_settings

    return run_settings()


if __name__ == "__main__":
    leave(run_verb(main))
