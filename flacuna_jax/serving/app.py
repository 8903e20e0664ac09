"""The routes of the server."""

import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from flacuna_jax.data.conversation import TemplateRefusal
from flacuna_jax.data.messages import read_messages, read_tools
from flacuna_jax.data.record import BadRecord, Reading
from flacuna_jax.data.tokenization import Tokenizer, tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.generation.language_model import GenerationRequest, encode_prompt
from flacuna_jax.serving.adapters import Models, Served
from flacuna_jax.serving.answers import ChatReply, ChoiceStream, CompletionReply, usage
from flacuna_jax.serving.connection import Answers
from flacuna_jax.serving.guard import Guard, TooLarge, error_response, read_json
from flacuna_jax.serving.jobs import Finished
from flacuna_jax.serving.metrics import Metrics
from flacuna_jax.serving.protocol import (
    Asked,
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    TokenizeRequest,
    UnloadAdapter,
    parsed,
)
from flacuna_jax.serving.scheduler import Refused, Scheduler
from flacuna_jax.serving.tools import CallForm

PAGE = Path(__file__).parent / "page" / "index.html"
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the server allows.

    Attributes:
      body: maximum number of bytes of a request.
      seconds: maximum time of a request, its time in the queue included.
      hosts, key: see `Guard`.
      load: maps a name and a path below the directory for adapters to the change of the models that adds the adapter;
        None if adapters cannot be loaded.
    """

    body: int = 4 << 20
    seconds: float = 600.0
    hosts: Sequence[str] = ()
    key: str | None = None
    load: Callable[[str, str], Callable[[Models], Models]] | None = None


class Unknown(Exception):
    """No model has the name."""


@dataclass(frozen=True)
class Server:
    """Handlers of requests."""

    scheduler: Scheduler
    metrics: Metrics
    settings: Settings

    async def completions(self, request: Request) -> Response:
        asked = parsed(CompletionRequest, await read_json(request, self.settings.body))
        model = self._model(asked.model)
        if asked.stream and asked.echo:
            raise UserError("echo: true cannot be streamed")
        tokenizer, count, scored = model.tokenizer, asked.n or 1, asked.logprobs is not None
        self._check_count(len(asked.prompts) * count)
        prompts = await run_in_threadpool(lambda: [_encoded(tokenizer, one) for one in asked.prompts])
        made = [
            self._request(asked, prompt, asked.max_tokens, asked.own_seed + i, ())
            for prompt in prompts
            for i in range(count)
        ]
        reply = CompletionReply(model.name, model.texts, asked.logprobs, "cmpl", echo=asked.echo)
        answers = Answers(
            self.scheduler,
            self.settings.seconds,
            request,
            model,
            made,
            streams=bool(asked.stream),
            scored=scored,
            scores_prompt=scored and asked.echo,
        )
        prompt_tokens = sum(map(len, prompts))
        if asked.stream:
            return answers.streamed(
                lambda choices, **more: reply.wrapped("text_completion", choices, **more),
                [],
                [ChoiceStream(reply, i) for i in range(len(made))],
                prompt_tokens if asked.reports_usage else None,
            )
        given = [one if isinstance(one, str) else tokenizer.decode(one) for one in asked.prompts]

        def whole(finished: Sequence[Finished]) -> dict[str, Any]:
            choices = [reply.choice(i, made[i].prompt, given[i // count], one) for i, one in enumerate(finished)]
            return reply.wrapped("text_completion", choices, usage=usage(prompt_tokens, finished))

        return await answers.whole(whole)

    async def chat(self, request: Request) -> Response:
        asked = parsed(ChatRequest, await read_json(request, self.settings.body))
        model = self._model(asked.model)
        self._check_count(asked.n or 1)
        tools = () if asked.tool_choice == "none" else asked.tools or ()
        prompt = await run_in_threadpool(self._chat_prompt, model, asked.messages, tools)
        room = self.scheduler.limits.context - len(prompt)
        limit = max(1, room) if asked.limit is None else asked.limit
        stops, count = model.template.stop_strings, asked.n or 1
        made = [
            self._request(asked, prompt, limit, asked.own_seed + i, stops, model.template.ends) for i in range(count)
        ]
        likely = (asked.top_logprobs or 0) if asked.logprobs else None
        calls = CallForm.of(model.template) if tools else None
        reply = ChatReply(model.name, model.texts, likely, "chatcmpl", calls=calls)
        answers = Answers(
            self.scheduler,
            self.settings.seconds,
            request,
            model,
            made,
            streams=bool(asked.stream),
            scored=asked.logprobs,
        )
        if asked.stream:
            return answers.streamed(
                lambda choices, **more: reply.wrapped("chat.completion.chunk", choices, **more),
                [reply.begin(i) for i in range(count)],
                [ChoiceStream(reply, i) for i in range(count)],
                len(prompt) if asked.reports_usage else None,
            )

        def whole(finished: Sequence[Finished]) -> dict[str, Any]:
            choices = [reply.choice(i, one) for i, one in enumerate(finished)]
            return reply.wrapped("chat.completion", choices, usage=usage(len(prompt), finished))

        return await answers.whole(whole)

    def _chat_prompt(
        self, model: Served, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[int, ...]:
        reading = Reading({"messages": list(messages), "tools": list(tools)})
        try:
            system, turns = read_messages(reading, "messages")
            functions = read_tools(reading, "tools") if tools else ()
        except BadRecord as error:
            raise UserError(error.detail) from None
        unknown = [name for name in reading.ignored if not name.endswith((".refusal", ".annotations", ".audio"))]
        if unknown:
            raise UserError(f"{unknown[0]} is not a field that this server knows")
        if not turns or turns[-1].role == "assistant":
            raise UserError("the last message must be of the user or of a tool")
        try:
            return tuple(tokenize_prompt(turns, model.template, model.tokenizer, system, functions))
        except TemplateRefusal as refusal:
            raise UserError(str(refusal)) from None

    def _request(
        self,
        asked: Asked,
        prompt: tuple[int, ...],
        limit: int,
        seed: int,
        stops: tuple[str, ...],
        ends: tuple[int, ...] = (),
    ) -> GenerationRequest:
        context, vocabulary = self.scheduler.limits.context, self.scheduler.models.base.spec.config.vocab_size
        if not prompt:
            raise UserError("the prompt is empty")
        if not all(0 <= token < vocabulary for token in prompt):
            raise UserError(f"the prompt has a token id outside of the vocabulary of {vocabulary}")
        if len(prompt) + limit > context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; with max_tokens {limit} it exceeds the {context} tokens that a "
                "request may have here"
            )
        top_k = asked.top_k if asked.top_k and asked.top_k > 0 else None
        temperature = 1.0 if asked.temperature is None else asked.temperature
        return GenerationRequest(prompt, limit, (*asked.stops, *stops), temperature, top_k, asked.top_p, seed, ends)

    def _check_count(self, answers: int) -> None:
        most = self.scheduler.limits.waiting
        if answers > most:
            raise UserError(f"the request asks for {answers} answers; at most {most} can wait here")

    def _model(self, name: str) -> Served:
        offered = self.scheduler.models.offered
        if name not in offered:
            raise Unknown(f"no model is named {name[:80]!r}; this server has {', '.join(offered)}")
        return offered[name]

    async def models(self, request: Request) -> Response:
        offered = self.scheduler.models.offered
        base, limit = next(iter(offered)), self.scheduler.limits.context
        entries = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "flacuna",
                "parent": base if model.adapter else None,
                "max_model_len": limit,
            }
            for name, model in offered.items()
        ]
        return JSONResponse({"object": "list", "data": entries})

    async def load_adapter(self, request: Request) -> Response:
        asked = parsed(LoadAdapter, await read_json(request, self.settings.body))
        load = self.settings.load
        if load is None:
            return error_response(403, "adapters cannot be loaded: the server was started without --adapters-below")
        change = await run_in_threadpool(load, asked.lora_name, asked.lora_path)
        await run_in_threadpool(self.scheduler.change, change)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        asked = parsed(UnloadAdapter, await read_json(request, self.settings.body))
        if self.settings.load is None:
            return error_response(403, "adapters cannot be unloaded: the server was started without --adapters-below")
        change = functools.partial(Models.without, name=asked.lora_name)
        await run_in_threadpool(self.scheduler.change, change)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    async def tokenize(self, request: Request) -> Response:
        asked = parsed(TokenizeRequest, await read_json(request, self.settings.body))
        text = asked.prompt if asked.prompt is not None else asked.content
        if text is None:
            raise UserError("prompt: is missing")
        tokenizer = (self._model(asked.model) if asked.model else self.scheduler.models.first).tokenizer
        special = asked.add_special_tokens if asked.prompt is not None else asked.add_special
        ids = encode_prompt(tokenizer, text) if special else tokenizer.encode(text)
        return JSONResponse({"tokens": list(ids), "count": len(ids), "max_model_len": self.scheduler.limits.context})

    async def health(self, request: Request) -> Response:
        alive = self.scheduler.is_alive
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    async def numbers(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})


def make_app(scheduler: Scheduler, metrics: Metrics, settings: Settings) -> Guard:
    """The whole application."""
    server = Server(scheduler, metrics, settings)

    def route(path: str, handle: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
        async def answered(request: Request) -> Response:
            response = await _or_error(handle, request)
            metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return Route(path, answered, methods=[method])

    routes = [
        route("/v1/completions", server.completions, "POST"),
        route("/v1/chat/completions", server.chat, "POST"),
        route("/v1/load_lora_adapter", server.load_adapter, "POST"),
        route("/v1/unload_lora_adapter", server.unload_adapter, "POST"),
        route("/tokenize", server.tokenize, "POST"),
        route("/v1/models", server.models),
        route("/health", server.health),
        route("/metrics", server.numbers),
        route("/", server.page),
    ]
    return Guard(Starlette(routes=routes), settings.hosts, settings.key)


def _encoded(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> tuple[int, ...]:
    return encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt)


async def _or_error(handle: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    """The response of a route; a mistake of the client becomes an error that it can read."""
    try:
        return await handle(request)
    except UserError as error:
        return error_response(400, str(error))
    except Unknown as error:
        return error_response(404, str(error))
    except TooLarge:
        return error_response(413, "the body is larger than this server accepts")
    except TimeoutError:
        return error_response(408, "the body did not arrive in time")
    except Refused as error:
        return error_response(error.status, str(error))
    except ClientDisconnect:
        return Response(status_code=499)
    except Exception:
        _logger.exception("a request could not be handled")
        return error_response(500, "the server failed to handle this request; its log says why")
