"""`python -m flacuna_jax.paper --config configs/paper_135m/30m.yaml`: the paper's experiment on a small chat model.

Builds the data, chooses learning rates, trains, evaluates and writes a page with the results. Every stage keeps a
record; a stopped experiment continues with the same command.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.arguments import Parser
from flacuna_jax.cli import EXIT_STOPPED, run_verb
from flacuna_jax.config.files import load_config
from flacuna_jax.errors import UserError
from flacuna_jax.paper.experiment import BASE, Experiment, Training
from flacuna_jax.paper.page import publish, write_page
from flacuna_jax.paper.settings import ExperimentSettings
from flacuna_jax.paper.stages import Stages, Stopped, Unfinished


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser("paper", __doc__, epilog="Any setting can be overridden: --examples=100 --output_dir=/tmp/paper")
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="configs/paper_135m/30m.yaml, 3h.yaml, full.yaml"
    )
    parser.add_argument(
        "--peft-python",
        metavar="PATH",
        help="interpreter with the extras parity and eval, for PEFT and lm-evaluation-harness",
    )
    parser.add_argument("--publish", metavar="DIR", help="also copy the page and its pictures to this directory")
    parser.add_argument(
        "--so-far", action="store_true", help="run nothing; write the page with the runs that are finished"
    )
    arguments, overrides = parser.parse_with_overrides(argv)
    settings = load_config(arguments.config, overrides, schema=ExperimentSettings)
    stages = Stages(Path(settings.output_dir) / "stages", only_read=arguments.so_far)
    try:
        page = run(Experiment(settings, stages, arguments.peft_python))
    except Stopped as reason:
        print(f"stopped: {reason}", file=sys.stderr)
        return EXIT_STOPPED
    except Unfinished as stage:
        raise UserError(f"{settings.output_dir}: stage {stage} is not finished, and the page needs it") from None
    print(f"page: {page}")
    if arguments.publish:
        publish(page, Path(arguments.publish))
    return None


def run(experiment: Experiment) -> Path:
    """Runs all stages that have not run yet, and returns the page."""
    experiment.prepare()
    losses = experiment.choose_rates()
    finished: list[Training] = []
    with contextlib.suppress(Unfinished):
        experiment.evaluate(BASE, None)
        for training in experiment.trainings(losses):
            experiment.train(training)
            experiment.evaluate(training.name, training)
            finished.append(training)
            with contextlib.suppress(Unfinished):
                experiment.compare_with_peft(training)
    return write_page(experiment, losses, finished)


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
