"""`flacuna check DIR [--server URL]`: compares an exported directory, or a server of it, with its recorded results.

For a merged model, the golden prompts are answered again from its files or, with --server, by an OpenAI-compatible
server (vLLM, llama.cpp, TGI). The server's token ids of the prompts are compared too if it has an endpoint for them. An
adapter is checked against vLLM's rules, a converted checkpoint against the digests that were recorded when it was
written. The exit status is 1 if anything differs.
"""

from collections.abc import Sequence

from flacuna_jax.arguments import Parser
from flacuna_jax.cli import run_verb


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    from flacuna_jax.verbs import check

    return check.run(arguments)


def parser() -> Parser:
    options = Parser(
        "check",
        "Compares an exported or converted model, or a server of it, with the results recorded at export.",
    )
    options.add_argument(
        "directory",
        metavar="DIR",
        help="output of `flacuna export` or `flacuna convert`, or an export on the Hub, as hf:NAME[@REVISION][:FILE]",
    )
    options.add_argument(
        "--server", metavar="URL", help="an OpenAI-compatible server to check, for example http://localhost:8000"
    )
    options.add_argument(
        "--served-name", metavar="NAME", help="name of the model on the server; default: the first one it lists"
    )
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
