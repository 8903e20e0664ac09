"""A conversation in the terminal."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator

from flacuna_jax.data.conversation import Turn
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.impact import writing_prompt
from flacuna_jax.generation.chat_model import ChatModel
from flacuna_jax.generation.settings import GREEDY, Decoding, Sampling
from flacuna_jax.inference import (
    ModelAddress,
    ModelLoader,
    addressed_model,
    dtype_of,
    find_adapter,
    template_of,
    trained_with,
)
from flacuna_jax.say import say_on_stderr

COMMANDS = "/reset  /system TEXT  /load ADAPTER  /base  /task TEXT  /help  /quit"


@dataclasses.dataclass(frozen=True)
class Settings:
    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    seed: int = 0


@dataclasses.dataclass
class Chat:
    """One conversation with a model; if `beside_base`, the model without its adapter answers each question too."""

    address: ModelAddress
    load: Callable[[ModelAddress, bool], ChatModel]
    """Returns a loaded model. If the second argument is true, reads it from its files again."""
    settings: Settings
    beside_base: bool = False
    system: str | None = None
    task: str | None = None
    turns: list[Turn] = dataclasses.field(default_factory=list)

    def answer(self, text: str) -> Iterator[str]:
        """Yields the text to print for a line of the user, in pieces: an answer, or the result of a command."""
        if text.startswith("/"):
            yield self.command(text)
            return
        before = list(self.turns)
        try:
            yield from self._converse(text)
        except BaseException:
            self.turns[:] = before  # drop a question that was not answered
            raise

    def _converse(self, text: str) -> Iterator[str]:
        self.turns.append(Turn("user", text if self.task is None else writing_prompt(self.task, text)))
        if self.beside_base and self.address.adapter is not None:
            base = ModelAddress(self.address.base)
            self.load(base, False)  # its notes come before the line
            yield "[base]  "
            yield from self._ask(base)
            yield "\n[tuned] "
        said = ""
        for piece in self._ask(self.address):
            said += piece
            yield piece
        self.turns.append(Turn("assistant", said.strip()))

    def _ask(self, address: ModelAddress) -> Iterator[str]:
        settings, model = self.settings, self.load(address, False)
        room = model.context_length - settings.max_new_tokens
        while True:
            prompt = model.encode(self.turns, self.system)
            if len(prompt) <= room:
                break
            if len(self.turns) < 3:
                raise UserError(
                    f"the question has {len(prompt)} tokens; {room} fit before {settings.max_new_tokens} new ones"
                )
            del self.turns[:2]
            yield "(the context is full: forgot the oldest question)\n"
        seed = settings.seed + len(self.turns)
        yield from model.stream(self.turns, Decoding(settings.max_new_tokens, (), settings.sampling, seed, self.system))

    def command(self, text: str) -> str:
        """Runs a command and returns the line to print. Raises UserError for an unknown command."""
        name, _, argument = text.partition(" ")
        argument = argument.strip()
        match name:
            case "/reset":
                self.turns.clear()
                return "forgotten"
            case "/system":
                self.system = argument or None
                return f"system text: {argument or 'the one of the template'}"
            case "/load":
                address = ModelAddress.of(str(self.address.base), argument or None)
                self.load(address, True)  # training may have changed it in the meantime
                self.address = address
                return f"answering: {address.name}"
            case "/base":
                self.beside_base = not self.beside_base
                return "answers of base and tuned model" if self.beside_base else "answers of the tuned model only"
            case "/task":
                self.task = argument or None
                return f"prompt: {writing_prompt(argument, '...')!r}" if argument else "plain questions"
            case "/help":
                return COMMANDS
        raise UserError(f"unknown command {name}; the commands are {COMMANDS}")


def run(arguments: argparse.Namespace) -> None:
    first, trained = addressed_model(arguments)
    loader = ModelLoader(dtype_of(arguments), stored_base=arguments.stored_base)
    models: dict[ModelAddress, ChatModel] = {}

    def load(address: ModelAddress, again: bool = False) -> ChatModel:
        if again or address not in models:
            data = trained_with(find_adapter(address.adapter)) or trained
            template = template_of(address, arguments.template, data, say_on_stderr)
            models[address] = ChatModel(loader.load(address), template)
        return models[address]

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    settings = Settings(new_tokens(arguments.max_new_tokens, load(first)), sampling, arguments.seed)
    chat = Chat(first, load, settings, arguments.beside_base, arguments.system, arguments.task)
    print(f"{first.name}   {COMMANDS}", file=sys.stderr)
    while (line := _read()) is not None:
        if line == "/quit":
            break
        if line:
            _tell(chat, line)


def new_tokens(wanted: int | None, model: ChatModel) -> int:
    context = model.context_length
    if wanted is None:
        return min(Settings.max_new_tokens, context // 2)
    if not 1 <= wanted < context:
        raise UserError(
            f"--max-new-tokens is {wanted}; it must be at least 1 and below the model's context of {context} tokens, "
            "which also has to hold the question"
        )
    return wanted


def _read() -> str | None:
    """Reads a line; None at the end of input. Raises UserError if it is not UTF-8 text."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error}") from None


def _tell(chat: Chat, line: str) -> None:
    """Prints the answer as it is generated. Neither a mistake in the line nor Ctrl-C ends the conversation."""
    try:
        for piece in chat.answer(line):
            print(piece, end="", flush=True)
        print()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n(stopped; the question is forgotten)")
