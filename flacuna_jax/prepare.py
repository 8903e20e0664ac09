"""`flacuna prepare --config C`: builds the FLAN-mini collection, or reports a training config's data.

A config with `sources` describes a collection, which is built in its output_dir with a manifest and a report. A config
with `data` describes a training run, whose sources are tokenised, packed and reported exactly as training sees them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.arguments import Parser, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.user_cache import user_cache


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments, overrides = parser().parse_with_overrides(argv)
    from flacuna_jax.config.files import load_config, top_level_keys
    from flacuna_jax.flan_mini.config import FlanMiniConfig

    keys, benchmarks = top_level_keys(arguments.config), _benchmarks(arguments.leakage)
    if "data" in keys or "model" in keys:
        if arguments.scale is not None:
            raise UserError(
                "--scale applies to collections only; for this training config, set data.sources.N.max_examples"
            )
        config = load_config(arguments.config, overrides)
        from flacuna_jax.verbs.prepare import prepare_run

        prepare_run(config, Path(arguments.cache), arguments.output, arguments.show, benchmarks)
        return None
    if arguments.scale is not None:
        overrides.append(f"--scale={arguments.scale}")
    if arguments.output is not None:
        overrides.append(f"--output_dir={json.dumps(arguments.output)}")
    collection = load_config(arguments.config, overrides, schema=FlanMiniConfig)
    from flacuna_jax.verbs.prepare import prepare_collection

    prepare_collection(collection.with_benchmarks(benchmarks), show=arguments.show, rebuild=arguments.rebuild)
    return None


def _benchmarks(pairs: Sequence[str]) -> dict[str, str]:
    benchmarks = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise UserError(f"--leakage {pair}: write NAME=PATH, for example --leakage mmlu=data/mmlu/test")
        benchmarks[name] = path
    return benchmarks


def parser() -> Parser:
    options = Parser(
        "prepare",
        "Builds the FLAN-mini collection from its sources, or reports the data of a training config.",
        epilog="Any setting of the config can be overridden: --seed=7 --sources.0.examples=1000",
    )
    options.add_argument("--config", required=True, metavar="YAML", help="configs/flan_mini.yaml, or a training config")
    options.add_argument(
        "--show", type=whole(0), default=0, metavar="N", help="print N examples per source, with loss tokens in green"
    )
    options.add_argument("--output", metavar="DIR", help="directory for the collection and the report")
    options.add_argument("--scale", type=float, metavar="S", help="build a proportional sample; 0.01 is one per cent")
    options.add_argument("--rebuild", action="store_true", help="build again even if nothing has changed")
    options.add_argument(
        "--leakage",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an evaluation file to search the records for; repeatable",
    )
    options.add_argument(
        "--cache",
        default=str(user_cache()),
        metavar="DIR",
        help="cache of the tokenised data of training configs; default: $FLACUNA_CACHE, else ~/.cache/flacuna_jax",
    )
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
