"""The HTTP server, which ends gracefully."""

import socket
from types import FrameType

import uvicorn

from flacuna_jax.serving.scheduler import Scheduler


class HttpServer(uvicorn.Server):
    """Runs until SIGTERM or SIGINT; running answers then have `grace` seconds. A second signal ends them at once."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float) -> None:
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._scheduler.end(self._grace)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self._scheduler.stop()
