"""Serving a review to this machine alone, until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from noisyclean.errors import UsageError
from noisyclean.report.review.app import HOST, create_app
from noisyclean.report.review.session import Session


def serve(session: Session, *, port: int = 0, ready: Callable[[str], None]) -> None:
    """Serve the page of a review, and return when Ctrl-C is pressed.

    Args:
        session: the review.
        port: where to listen; 0: at any that is free.
        ready: is told the address, which nobody can guess, when it can be opened.

    Raises:
        UsageError: the port cannot be had.
    """
    token = secrets.token_urlsafe(24)
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; leave it away to take a free one") from error
    config = uvicorn.Config(
        create_app(session, token), lifespan="off", ws="none", log_level="warning", timeout_graceful_shutdown=2
    )
    with listener, suppress(KeyboardInterrupt):
        ready(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        uvicorn.Server(config).run(sockets=[listener])
