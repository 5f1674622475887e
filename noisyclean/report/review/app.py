"""The pages and requests of a review. The token in the address is the right to make any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from noisyclean.errors import NoisycleanError
from noisyclean.report.review.labels import VERDICTS
from noisyclean.report.review.session import OutOfDate, Session

HOST: Final = "127.0.0.1"

_STATIC = Path(__file__).parent / "static"
_REPORT_STYLE = Path(__file__).parents[1] / "templates" / "page.css"
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(session: Session, token: str) -> Starlette:
    """The application: all of it lies under ``/token/``, and only requests to this machine's own names are answered.

    The names are asked for since another site may have its own name stand for this machine (DNS rebinding).
    """

    def state(_: Request) -> Response:
        return JSONResponse(session.state(), background=BackgroundTask(session.look_ahead))

    def picture(request: Request) -> Response:
        return Response(session.picture(request.path_params["pair"]), media_type="image/webp")

    def judge(request: Request) -> Response:
        verdict = request.path_params["verdict"]
        if verdict not in VERDICTS:
            raise HTTPException(404)
        session.judge(request.path_params["pair"], verdict)
        return state(request)

    def take_back(request: Request) -> Response:
        session.take_back()
        return state(request)

    def calibration(_: Request) -> Response:
        found = session.calibration()
        return JSONResponse(None if found is None else found.to_dict())

    def redraw(request: Request) -> Response:
        kept = session.redraw(request.path_params["keep"])
        return JSONResponse({"kept": str(kept)})

    def style(_: Request) -> Response:
        return FileResponse(_REPORT_STYLE)

    routes = [
        Route("/state", state),
        Route("/picture/{pair}", picture),
        Route("/judge/{pair}/{verdict}", judge, methods=["POST"]),
        Route("/back", take_back, methods=["POST"]),
        Route("/calibration", calibration),
        Route("/redraw/{keep:float}", redraw, methods=["POST"]),
        Route("/page.css", style),
        Mount("/", StaticFiles(directory=_STATIC, html=True)),
    ]
    return Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        middleware=[Middleware(_Headers), Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
        exception_handlers={NoisycleanError: _say, OSError: _say, HTTPException: _refuse},
    )


class _Headers:
    """Sends ``_HEADERS`` with every response, refusals too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _say(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=409 if isinstance(error, OutOfDate) else 500)


def _refuse(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return PlainTextResponse("Not here. Open the whole address that `noisyclean review` printed.\n", status)
