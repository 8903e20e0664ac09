"""A running server in this process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from flacuna_jax.serving.guard import Guard
from flacuna_jax.serving.scheduler import Scheduler


@dataclass(frozen=True)
class Running:
    url: str
    scheduler: Scheduler


@contextlib.contextmanager
def running(scheduler: Scheduler, app: Guard) -> Iterator[Running]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    scheduler.begin()
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Running(f"http://127.0.0.1:{port}/", scheduler)
    scheduler.end(0)
    server.should_exit = True
    thread.join()
    scheduler.stop()
