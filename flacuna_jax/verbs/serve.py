"""A server with OpenAI's API: one base and any number of its adapters in one batch."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.generation.decoder import Network
from flacuna_jax.huggingface.answer_ends import answer_ends
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer
from flacuna_jax.inference import (
    ModelAddress,
    ModelLoader,
    dtype_of,
    find_adapter,
    find_model,
    template_of,
    tokenizer_directory,
    trained_with,
)
from flacuna_jax.model.sharding import check_mesh, make_mesh, row_shards
from flacuna_jax.say import say_on_stderr
from flacuna_jax.serving import LONGEST

if TYPE_CHECKING:
    from flacuna_jax.serving.adapters import Models
    from flacuna_jax.serving.guard import Guard
    from flacuna_jax.serving.scheduler import Scheduler

KEY_VARIABLE = "FLACUNA_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


def run(arguments: argparse.Namespace) -> None:
    try:
        import prometheus_client  # noqa: F401
        import uvicorn

        from flacuna_jax.serving.http_server import HttpServer
    except ImportError as error:
        raise UserError(f"the server needs {error.name}; pip install 'flacuna-jax[serve]'") from None
    if jax.process_count() > 1:
        raise UserError("a server runs in one process; use a machine that holds the model, or export it to vLLM")
    scheduler, app = prepare(arguments)
    say_on_stderr("compiling what first requests need; the programs are kept in the user's cache for the next start")
    scheduler.warm_up()
    scheduler.begin()
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=int(arguments.grace) + 5,
    )
    HttpServer(config, scheduler, arguments.grace, say_on_stderr).run()


def prepare(arguments: argparse.Namespace) -> "tuple[Scheduler, Guard]":
    """The scheduler, which has not begun, and the application. Raises UserError as loading models does."""
    from flacuna_jax.serving.app import Settings, make_app
    from flacuna_jax.serving.metrics import Metrics
    from flacuna_jax.serving.scheduler import Limits, Scheduler

    offer = Offer(arguments)
    models = offer.models()
    own = models.base.spec.config.context_length
    context = arguments.context or min(own, LONGEST)
    if context > own:
        raise UserError(f"--context is {context}; the model's is {own}")
    metrics = Metrics()
    shards = row_shards(models.base.mesh)
    limits = Limits(-(-arguments.rows // shards) * shards, context, arguments.waiting)
    settings = Settings(
        body=arguments.body_mib << 20,
        seconds=arguments.seconds,
        hosts=LOOPBACK if arguments.host in LOOPBACK else (),
        key=_key(arguments.host),
        load=offer.load if arguments.adapters_below else None,
    )
    scheduler = Scheduler(models, limits, metrics)
    return scheduler, make_app(scheduler, metrics, settings)


def _key(host: str) -> str | None:
    """The key in the environment, where other users of the machine cannot see it."""
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and host not in LOOPBACK:
        say_on_stderr(f"note: anyone who reaches {host} can use this server; set {KEY_VARIABLE} to require a key")
    return key


class Offer:
    """What the options offer: a base, and adapters of it by name."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._template = arguments.template
        self._loader = ModelLoader(dtype_of(arguments), stored_base=arguments.stored_base)
        named = [_named(text) for text in arguments.adapter]
        if arguments.run is not None:
            address, trained = find_model(arguments.model, None, arguments.run)
            name = Path(arguments.run).absolute().name
            adapters = {} if address.adapter is None else {name: address}
        else:
            address, trained = find_model(arguments.model, named[0][1] if named else None, None)
            adapters = {}
        self._base, self._trained = address.base, trained
        for name, directory in named:
            if name in adapters:
                raise UserError(f"--adapter {name} is given twice")
            adapters[name] = ModelAddress.of(str(address.base), directory)
        self._adapters = adapters
        self._name = arguments.name or ModelAddress(address.base).name
        self._below = Path(arguments.adapters_below).resolve() if arguments.adapters_below else None
        first = next(iter(adapters.values()), ModelAddress(address.base))
        self._opened = self._loader.open(first)
        self._spec = self._opened.base
        self._tokenizers: dict[Path, tuple[Tokenizer, tuple[int, ...]]] = {}

    def models(self) -> "Models":
        from flacuna_jax.serving.adapters import Models, Served

        additions = [self._read(name, found) for name, found in self._adapters.items()]
        address = ModelAddress(self._base)
        template = template_of(address, self._template, self._trained, say_on_stderr)
        mesh = make_mesh("auto")
        config = self._spec.config
        check_mesh(mesh, config.num_heads, config.num_kv_heads, config.intermediate_size)
        network = Network(self._spec, self._loader.base_params(self._opened, mesh), mesh)
        tokenizer, ends = self._tokens(address)
        models = Models.of(network, Served(self._name, tokenizer, template, ends))
        for add in additions:
            models = add(models)
        return models

    def load(self, name: str, path: str) -> "Callable[[Models], Models]":
        """Reads an adapter at a path below --adapters-below. Raises UserError if it is missing or does not fit."""
        assert self._below is not None
        try:
            directory = (self._below / path).resolve()
            found = directory.is_relative_to(self._below) and directory.is_dir()
        except (OSError, ValueError):  # a name that no file can have
            found = False
        if not found:
            raise UserError(f"{path[:80]!r} is not a directory below that of --adapters-below")
        return self._read(name, ModelAddress(self._base, directory))

    def _read(self, name: str, address: ModelAddress) -> "Callable[[Models], Models]":
        from flacuna_jax.serving.adapters import Served, require_factors

        opened = self._loader.open(address)
        adapter = opened.adapter
        assert adapter is not None
        require_factors(name, adapter)
        if opened.base != self._spec:
            raise UserError(
                f"adapter {name!r} was trained on a base with other settings (model.quantization, rope scaling) than "
                "the one that is served; serve it alone, or give --stored-base"
            )
        template = template_of(address, self._template, trained_with(find_adapter(address.adapter)), lambda _: None)
        tokenizer, ends = self._tokens(address)
        model = Served(name, tokenizer, template, ends, adapter)
        return lambda models: models.with_adapter(model)

    def _tokens(self, address: ModelAddress) -> tuple[Tokenizer, tuple[int, ...]]:
        """The tokenizer of a model, and the tokens that end its answers. Most adapters have that of the base."""
        directory = tokenizer_directory(address)
        if directory not in self._tokenizers:
            tokenizer = load_tokenizer(directory)
            check_vocabulary(tokenizer, self._spec.config.vocab_size, directory)
            self._tokenizers[directory] = tokenizer, answer_ends(None, tokenizer, self._base)
        return self._tokenizers[directory]


def _named(text: str) -> tuple[str, str]:
    name, equals, directory = text.partition("=")
    if not equals or not name or not directory:
        raise UserError(f"--adapter {text!r}: write NAME=DIR")
    return name, directory
