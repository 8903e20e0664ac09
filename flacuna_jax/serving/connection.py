"""Answers on their way from the scheduler's thread to the connection of a request."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from flacuna_jax.generation.language_model import GenerationRequest
from flacuna_jax.serving.adapters import Served
from flacuna_jax.serving.answers import ChoiceStream, usage
from flacuna_jax.serving.guard import error_body, error_response
from flacuna_jax.serving.jobs import Event, Failed, Finished, Job
from flacuna_jax.serving.scheduler import Scheduler


class Answers:
    """The answers to one request. If its client goes away, or `seconds` have passed, the jobs end."""

    def __init__(
        self,
        scheduler: Scheduler,
        seconds: float,
        request: Request,
        model: Served,
        made: Sequence[GenerationRequest],
        *,
        streams: bool,
        scored: bool,
        scores_prompt: bool = False,
    ) -> None:
        self._request = request
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(index: int) -> Callable[[Event], None]:
            def put(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return put

        deadline = time.monotonic() + seconds
        self._jobs = [
            Job(model, one, tell(index), deadline, streams, scored, scores_prompt) for index, one in enumerate(made)
        ]
        scheduler.submit(self._jobs)

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """All events, until every job has ended. Raises ClientDisconnect."""
        gone = asyncio.ensure_future(_gone(self._request))
        left = len(self._jobs)
        try:
            while left:
                next_event = asyncio.ensure_future(self._events.get())
                await asyncio.wait({gone, next_event}, return_when=asyncio.FIRST_COMPLETED)
                if not next_event.done():
                    next_event.cancel()
                    raise ClientDisconnect
                index, event = next_event.result()
                left -= isinstance(event, Finished | Failed)
                yield index, event
        finally:
            gone.cancel()
            for job in self._jobs:
                job.cancelled = True

    async def whole(self, answer: Callable[[Sequence[Finished]], dict[str, Any]]) -> Response:
        finished: dict[int, Finished] = {}
        async with contextlib.aclosing(self.events()) as events:
            async for index, event in events:
                if isinstance(event, Failed):
                    return error_response(event.status, event.message)
                if isinstance(event, Finished):
                    finished[index] = event
        return JSONResponse(answer([finished[index] for index in sorted(finished)]))

    def streamed(
        self,
        wrapped: Callable[..., dict[str, Any]],
        first: Sequence[dict[str, Any]],
        choices: Sequence[ChoiceStream],
        prompt_tokens: int | None,
    ) -> Response:
        """Server-sent events. `prompt_tokens` is given if usage is to be reported at the end."""

        async def lines() -> AsyncGenerator[dict[str, Any], None]:
            finished = []
            for piece in first:
                yield wrapped([piece])
            async with contextlib.aclosing(self.events()) as events:
                async for index, event in events:
                    if isinstance(event, Failed):
                        yield error_body(event.status, event.message)
                        return
                    for piece in choices[index].pieces(event):
                        yield wrapped([piece])
                    if isinstance(event, Finished):
                        finished.append(event)
            if prompt_tokens is not None:
                yield wrapped([], usage=usage(prompt_tokens, finished))

        return EventStream(lines())


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends objects as server-sent events, and [DONE] at the end."""

    def __init__(self, lines: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with contextlib.suppress(ClientDisconnect, OSError):
            async with contextlib.aclosing(self._lines) as lines:
                async for line in lines:
                    content = f"data: {json.dumps(line, ensure_ascii=False)}\n\n".encode()
                    await send({"type": "http.response.body", "body": content, "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
