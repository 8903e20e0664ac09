"""`python -m flacuna_jax.demo`: trains a small Flacuna from scratch and evaluates it, with the project's own verbs.

Generates the corpora, trains a tokenizer and a chat model from scratch (the stand-in for Vicuna), fine-tunes it with
LoRA on instructions, exports the result, and evaluates base and tuned model on held-out items by generation.
"""

import argparse
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

import flacuna_jax
from flacuna_jax.cli import EXIT_USER_ERROR, run_verb
from flacuna_jax.demo import corpus as corpora
from flacuna_jax.demo.scoring import Question, average, read_questions, result_table, score
from flacuna_jax.demo.tokenizer import train_tokenizer
from flacuna_jax.errors import UserError

DEFAULT_OUTPUT = "runs/demo"
"""The directory in configs/demo_base.yaml and configs/demo.yaml."""

MAX_NEW_TOKENS = 40
ROWS_DECODED_TOGETHER = 100
EXAMPLES_SHOWN = 4

console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Paths:
    """The paths of one demo."""

    output: Path

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def tokenizer(self) -> Path:
        return self.output / "tokenizer"

    @property
    def base_run(self) -> Path:
        return self.output / "base"

    @property
    def base_model(self) -> Path:
        return self.base_run / "model"

    @property
    def run(self) -> Path:
        return self.output / "flacuna"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def merged(self) -> Path:
        return self.output / "merged"

    @property
    def results(self) -> Path:
        return self.output / "results.json"

    def overrides(self, config: str) -> list[str]:
        """Overrides for paths that differ from those of the config; empty for the configs' own directory."""
        if self.output == Path(DEFAULT_OUTPUT):
            return []
        if config == "demo_base.yaml":
            where = {
                "output_dir": self.base_run,
                "model.tokenizer": self.tokenizer,
                "data.sources.0.path": self.data / corpora.BASE_FILE,
            }
        else:
            where = {
                "output_dir": self.run,
                "model.path": self.base_model,
                "data.sources.0.path": self.data / corpora.TRAIN_FILE,
            }
        return [f"--{key}={json.dumps(str(path))}" for key, path in where.items()]


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m flacuna_jax.demo",
        description="Trains a small Flacuna from scratch on two CPU cores in a few minutes, and evaluates it.",
    )
    parser.add_argument("--output", default=DEFAULT_OUTPUT, metavar="DIR", help=f"default: {DEFAULT_OUTPUT}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated corpora (default: 0)")
    arguments = parser.parse_args(argv)
    paths = Paths(Path(arguments.output))
    started = time.monotonic()
    console.print(
        f"A Flacuna from scratch, in five steps. All files are written to {paths.output}; an interrupted demo "
        "continues where it stopped."
    )

    with phase(1, "data: instructions in many templates, and conversations with the same vocabulary"):
        _make_data(paths, arguments.seed)
    with phase(2, "base: a tiny LLaMA chat model from scratch, the stand-in for Vicuna"):
        _verb("train", "--config", _config("demo_base.yaml"), *paths.overrides("demo_base.yaml"))
    with phase(3, "Flacuna: LoRA on the instructions"):
        _verb("train", "--config", _config("demo.yaml"), *paths.overrides("demo.yaml"))
    with phase(4, "export: adapter and base merged into one Hugging Face model"):
        shutil.rmtree(paths.merged, ignore_errors=True)
        _verb("export", str(paths.run), str(paths.merged), "--format", "merged")
    with phase(5, "evaluate: base and Flacuna answer the held-out items"):
        questions, base, tuned = _measure(paths)
    _show(paths, questions, base, tuned)
    _farewell(paths, time.monotonic() - started)
    return None


@contextmanager
def phase(number: int, title: str) -> Iterator[None]:
    """Prints a heading before the phase, and the time after it."""
    console.print(Text(f"\n[{number}/5] {title}", style="bold"))
    started = time.monotonic()
    yield
    console.print(Text(f"      {time.monotonic() - started:.0f} s", style="dim"))


def _make_data(paths: Paths, seed: int) -> None:
    corpus = corpora.build_corpus(seed)
    corpora.write_corpus(corpus, paths.data)
    train_tokenizer(corpora.texts(corpus), paths.tokenizer)
    families = len({record["source"] for record in corpus.held_out})
    console.print(f"{len(corpus.conversations):>7,} conversations for the base")
    console.print(f"{len(corpus.train):>7,} instructions of {families} task families to tune on")
    console.print(f"{len(corpus.held_out):>7,} held-out instructions, whose content is not in the instructions above")
    first = corpus.train[0]["conversations"]
    console.print(Text(f"the first instruction: {first[0]['value']!r} -> {first[1]['value']!r}", style="dim"))


def _config(name: str) -> str:
    """Path of a shipped config, relative to the working directory if possible."""
    path = Path(flacuna_jax.__file__).parent.parent / "configs" / name
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the demo from a checkout of the project (pip install -e .)")
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _verb(verb: str, *arguments: str) -> None:
    """Runs a verb in a separate process, as a user would."""
    console.print(Text(f"$ python -m flacuna_jax.{verb} {shlex.join(arguments)}", style="cyan"))
    status = subprocess.run([sys.executable, "-m", f"flacuna_jax.{verb}", *arguments], check=False).returncode
    if status == EXIT_USER_ERROR:
        raise UserError("the command above failed, see its message; to start the demo again, delete its output")
    if status:
        raise RuntimeError(f"the command above ended with status {status}")


def _measure(paths: Paths) -> tuple[list[Question], list[str], list[str]]:
    # jax is imported here, because before it would only have taken memory from the training processes.
    from flacuna_jax.data.conversation import named_template
    from flacuna_jax.generation.chat_model import ChatModel
    from flacuna_jax.generation.settings import Decoding, Placement
    from flacuna_jax.huggingface.tokenizer import load_tokenizer
    from flacuna_jax.inference import ModelAddress, ModelLoader

    questions = read_questions(paths.data / corpora.HELD_OUT_FILE)
    prompts = [question.prompt for question in questions]
    special = load_tokenizer(paths.base_model).special
    template = named_template(corpora.TEMPLATE, special)
    loader = ModelLoader(dtype="float32", placement=Placement(rows=ROWS_DECODED_TOGETHER))
    models = (ModelAddress(paths.base_model), ModelAddress(paths.base_model, paths.adapter))
    decoding = Decoding(max_new_tokens=MAX_NEW_TOKENS)
    base, tuned = (
        [answer.text for answer in ChatModel(loader.load(model), template).generate(prompts, decoding)]
        for model in models
    )
    return questions, base, tuned


def _show(paths: Paths, questions: Sequence[Question], base: Sequence[str], tuned: Sequence[str]) -> None:
    """Prints some replies and the table, and writes all replies and scores."""
    before, after = score(questions, base), score(questions, tuned)
    console.print("\nHow they answer:")
    answers = list(zip(questions, base, tuned, strict=True))
    for question, base_reply, tuned_reply in answers[:EXAMPLES_SHOWN]:
        console.print(Text(f"  user     {question.prompt!r}"))
        console.print(Text(f"  base     {base_reply!r}", style="dim"))
        console.print(Text(f"  Flacuna  {tuned_reply!r}", style="green"), "\n")
    console.print(result_table(before, after))
    console.print(
        "Base and Flacuna get the same prompts in the Vicuna template. Some of the base's errors are only of form: "
        f"its reply has the right answer in its last sentence for {average(before).mentioned:.1f} % of the items "
        f"(Flacuna: {average(after).mentioned:.1f} %)."
    )
    results = {
        "scores": {
            name: [dataclasses.asdict(s) for s in scores] for name, scores in (("base", before), ("flacuna", after))
        },
        "replies": [{**dataclasses.asdict(q), "base": b, "flacuna": t} for q, b, t in answers],
    }
    partial = paths.results.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(paths.results)


def _farewell(paths: Paths, seconds: float) -> None:
    console.print(Text(f"\nDone in {seconds / 60:.1f} minutes. Written:", style="bold"))
    for path, what in (
        (paths.data, "the corpora, as FLAN-mini records"),
        (paths.base_model, "the base, a Hugging Face LLaMA with its tokenizer"),
        (paths.adapter, "the adapter, for PEFT; verified against the run"),
        (paths.merged, "base and adapter in one Hugging Face model"),
        (paths.run / "report.html", "curves, data and settings of the run"),
        (paths.results, "every held-out item with both replies"),
    ):
        console.print(f"  {path!s:<32} {what}", soft_wrap=True)
    console.print(Text("\nTry next:", style="bold"))
    for command, what in (
        (f'flacuna_jax.generate --run {paths.run} "Which word is the opposite of hot?"', "ask it yourself"),
        ("flacuna_jax.train --config configs/demo.yaml --output_dir=runs/rank2 --lora.rank=2", "change a setting"),
        ("flacuna_jax.train --config configs/flacuna_7b.yaml", "the real thing, on a GPU with Vicuna-7B"),
    ):
        console.print(f"  python -m {command}", soft_wrap=True)
        console.print(Text(f"      {what}", style="dim"))


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
