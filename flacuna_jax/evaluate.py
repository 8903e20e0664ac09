"""`flacuna evaluate --run RUN --compare base --tasks mmlu,bbh --data DIR`: benchmark tables.

Results, tables and the cache of answers are written to --output. A killed evaluation continues where it stopped, and a
repeated one uses the cached answers.
"""

import argparse
from collections.abc import Sequence

from flacuna_jax.arguments import Parser, add_base_option, add_model_options, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.evaluation.settings import EXECUTING_CODE, IN_TEMPLATE, SETTINGS


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    from flacuna_jax.verbs import evaluate

    evaluate.run(arguments)
    return None


def parser() -> Parser:
    options = Parser("evaluate", __doc__)
    add = options.add_argument
    add_model_options(options)
    add("--name", help="name of the model in tables; default: that of its run, adapter or directory")
    add("--compare", action="append", default=[], metavar="MODEL", help="DIR, DIR+ADAPTER or base; may be repeated")
    add("--tasks", required=True, help="e.g. mmlu,bbh:0,hhh, or few_shot, zero_shot, paper; with lm_eval, its tasks")
    add("--data", required=True, help="directory of benchmark files (mmlu/, bbh/, ...); with lm_eval, of task files")
    add("--output", default="evaluation", help="directory for results and the cache")
    add("--protocol", choices=("instructeval", "lm_eval"), default="instructeval", help="prompts and scores")
    add(
        "--limit",
        type=whole(1),
        metavar="N",
        help="only the first N problems of each subject or task; tables mark scores as incomplete; default: all",
    )
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the computation")
    add_base_option(options)
    add("--rows", type=whole(1), default=16, metavar="N", help="prompts decoded at once")
    add("--no-published", action="store_true", help="omit published rows from tables")
    add(
        "--allow-code-execution",
        action="store_true",
        help=f"{', '.join(EXECUTING_CODE)}: run code that the model wrote, isolated",
    )
    for setting in SETTINGS:
        add(
            setting.flag,
            type=setting.parse,
            default=setting.default,
            choices=setting.choices,
            help=f"{', '.join(setting.readers)}: {setting.help}",
        )
    add(
        "--template",
        metavar="NAME",
        default="none",
        help=f"{', '.join(IN_TEMPLATE)}, lm_eval: chat template for prompts; auto: the checkpoint's own",
    )
    add("--judge-url", help="base URL of an OpenAI-compatible server, as in http://localhost:8000/v1")
    add("--judge-model", help="name of the judge on the server; without --judge-url, a model directory")
    add("--judge-key-variable", default="OPENAI_API_KEY", help="environment variable with the server's key")
    add("--shots", type=whole(0), metavar="N", help="lm_eval: worked examples per prompt; default: those of each task")
    add(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="lm_eval: whether texts start with BOS; default: as the tokenizer does",
    )
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
