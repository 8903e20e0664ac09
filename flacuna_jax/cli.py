"""`flacuna VERB ...`: finds the verb's module and runs it; `run_verb` gives every verb the same exit statuses."""

import errno
import importlib
import io
import os
import select
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from flacuna_jax.compiler import prepare_process
from flacuna_jax.errors import UserError
from flacuna_jax.version import __version__

VERBS = {
    "convert": "convert a LLaMA checkpoint into the native sharded format",
    "prepare": "build the FLAN-mini collection, or report the data of a training config",
    "plan": "predict memory and time of a run on any hardware, present or not, and whether it fits",
    "train": "fine-tune LoRA adapters or all weights, on one device or many",
    "export": "write a run as a PEFT adapter, a merged Hugging Face model or a GGUF file, and verify it",
    "check": "compare an exported or converted model, or a server of it, with recorded results",
    "evaluate": "compare models on the benchmarks of InstructEval or lm-evaluation-harness",
    "generate": "complete prompts with exactly the template of training",
    "serve": "offer models to OpenAI clients and in a page, several adapters in one batch",
    "chat": "talk to a model in the terminal, optionally beside its base",
}

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR = 0, 1, 2
EXIT_STOPPED = 75
"""A signal ended a training run and its state is saved; the same command continues it. EX_TEMPFAIL of sysexits.h."""


def run_verb(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a verb's `main(argv)` and returns the exit status: 0 done, 2 the user's input is wrong, 1 anything else.

    A `UserError` becomes one readable message on stderr; other exceptions keep their traceback.
    """
    prepare_process()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal cannot show
    try:
        return main(sys.argv[1:] if argv is None else argv) or EXIT_OK
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return EXIT_FAILURE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {str(error.filename)[:80]}...: the file name is too long", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        what = str(error).partition("\n")[0] or "of this machine"
        print(f"error: out of memory ({what}); `flacuna plan` reports what fits", file=sys.stderr)
        return EXIT_FAILURE


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the host or, in XLA's words, a device is out of memory."""
    what = str(error).partition("\n")[0]
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what or "Out of memory" in what


def _stdout_is_closed() -> bool:
    """Whether the reader of standard output has closed it (`flacuna ... | head`); if so, discards further output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def usage() -> str:
    lines = [
        f"flacuna_jax {__version__}",
        "",
        "usage: flacuna VERB [options]        (flacuna VERB --help for one verb)",
        "",
    ]
    return "\n".join(lines + [f"  {verb:<10} {summary}" for verb, summary in VERBS.items()])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return EXIT_OK
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}\n\n{usage()}", file=sys.stderr)
        return EXIT_USER_ERROR
    return run_verb(importlib.import_module(f"flacuna_jax.{verb}").main, rest)


def leave(status: int) -> NoReturn:
    """Ends the process at once; Orbax's threads would otherwise keep it alive for minutes after a failed save."""
    if any(type(thread).__module__.startswith("orbax.") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def script() -> NoReturn:
    leave(main())


if __name__ == "__main__":
    script()
