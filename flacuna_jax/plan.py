"""`flacuna plan --config C [--target 4xA6000]`: predicts what a run needs on hardware that may be absent.

Compiles the trainer's own step for the target, without weights or devices, and reports its memory and time, and
whether it fits. `--calibrate` measures steps of small networks on the devices of this machine, in a few minutes; the
seconds of later plans for them are based on that.
"""

from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.arguments import Parser, amount, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.planning.llama import LLAMA
from flacuna_jax.say import say_at_once


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parser()
    arguments, overrides = options.parse_with_overrides(argv)
    if arguments.calibrate and overrides:
        options.error(f"--calibrate has no settings: {' '.join(overrides)}")
    if arguments.calibrate:
        from flacuna_jax.verbs import plan

        plan.calibrate(say_at_once)
        return None
    from flacuna_jax.config.files import load_config

    config = load_config(arguments.config, overrides)
    from flacuna_jax.verbs import plan

    plan.run(arguments, config)
    return None


def parser() -> Parser:
    options = Parser(
        "plan",
        "Predicts memory, time, communication and cost of a run on a machine, and whether it fits.",
        epilog="Any setting of the config can be overridden: --mesh='{data: 4}' --training.remat=full --lora=null",
    )
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="YAML", help="see configs/")
    what.add_argument(
        "--calibrate", action="store_true", help="measure the devices of this machine, for the seconds of later plans"
    )
    options.add_argument(
        "--target", metavar="M", help="4xA6000, 16x8xH100, v5p:4x4x8, ...; default: the devices of this machine"
    )
    options.add_argument("--search", action="store_true", help="rank combinations of mesh, remat and micro-batch size")
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--html", metavar="FILE", type=Path, help="also write a chart of the memory by kind")
    options.add_argument("--price", type=amount, metavar="X", help="price per device and hour, in any currency")
    options.add_argument(
        "--sizes", choices=LLAMA, help="plan for a LLaMA of this size instead of the model at model.path"
    )
    options.add_argument(
        "--examples", type=whole(1), metavar="N", help="examples per epoch, for data that are not on this machine"
    )
    options.add_argument("--estimate", action="store_true", help="estimate from the sizes, without compiling")
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
