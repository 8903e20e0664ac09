"""`flacuna serve --run RUN` or `--model M --adapter NAME=DIR ...`: a server with OpenAI's API, and a page for people.

One base and any number of its adapters answer in one batch; `model: NAME` in a request picks the adapter. See
docs/guides/serving.md.
"""

from collections.abc import Sequence

from flacuna_jax.arguments import Parser, add_base_option, add_dtype_option, add_template_option, amount, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.serving import LONGEST


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    from flacuna_jax.verbs import serve

    serve.run(arguments)
    return None


def parser() -> Parser:
    options = Parser("serve", __doc__)
    add = options.add_argument
    add("--run", metavar="DIR", help="a training run; offers its base and its adapter, named like the directory")
    add(
        "--model",
        metavar="DIR",
        help="a Hugging Face LLaMA directory, a converted one, a GGUF file, or hf:NAME[@REVISION][:FILE], instead of "
        "--run",
    )
    add("--adapter", action="append", default=[], metavar="NAME=DIR", help="a PEFT adapter or a run; repeatable")
    add("--name", metavar="NAME", help="name of the base; default: that of its directory")
    add("--adapters-below", metavar="DIR", help="let clients load and unload adapters in this directory")
    add_template_option(add)
    add("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    add("--port", type=whole(0), default=8000, metavar="N", help="port to listen at")
    add("--rows", type=whole(1), default=16, metavar="N", help="answers that are made together")
    add(
        "--context",
        type=whole(2),
        metavar="N",
        help=f"tokens of prompt and answer; default: the model's, at most {LONGEST}",
    )
    add("--waiting", type=whole(1), default=256, metavar="N", help="answers that may wait; others get HTTP 429")
    add("--seconds", type=amount, default=600.0, metavar="S", help="maximum time of a request")
    add("--grace", type=amount, default=30.0, metavar="S", help="seconds that running answers have after SIGTERM")
    add("--body-mib", type=whole(1), default=4, metavar="N", help="maximum size of a request in MiB")
    add_dtype_option(add)
    add_base_option(options)
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
