"""The HTTP server, which ends gracefully."""

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from flacuna_jax.serving.scheduler import Scheduler


class HttpServer(uvicorn.Server):
    """Runs until SIGTERM or SIGINT; running answers then have `grace` seconds. A second signal ends them at once.

    Says where it listens as soon as it does.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._scheduler, self._grace, self._say = scheduler, grace, say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            self._say(f"ready: {', '.join(self._scheduler.models.offered)} at http://{name}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._scheduler.end(self._grace)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self._scheduler.stop()
