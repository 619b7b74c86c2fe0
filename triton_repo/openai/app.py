"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse

from triton_repo.async_client import AsyncClient
from triton_repo.openai import requests
from triton_repo.openai.chat import Chat, Style
from triton_repo.openai.completions import Completion
from triton_repo.openai.errors import ApiError
from triton_repo.openai.models import Model
from triton_repo.openai.streams import Event

_LOG = logging.getLogger("ngpt")
_OPEN = ("/health", "/metrics", "/version")  # without a key: probes and scrapers have none


@dataclass(frozen=True)
class Options:
    """keys: without any, nobody is asked for one. origins: of pages in browsers that may ask; none unless named."""

    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_body_bytes: int = 16 << 20
    style: Style = Style()


class _Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ngpt_openai_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self.registry
        )
        self.open = Gauge("ngpt_openai_requests_open", "Requests that are being answered", registry=self.registry)
        self.first = Histogram(
            "ngpt_openai_first_piece_seconds", "Seconds from a streamed request to its first piece", registry=self.registry
        )
        self.took = Histogram(
            "ngpt_openai_request_seconds", "Seconds from a request to the end of its answer", registry=self.registry
        )


class Api:
    """What the endpoints share. `app` is the ASGI application."""

    def __init__(self, url: str, models: Mapping[str, Model], options: Options) -> None:
        self._url, self._models, self._options = url, models, options
        self._client: AsyncClient | None = None
        self._metrics = _Metrics()
        self.app = FastAPI(title="ngpt-deploy", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        if options.origins:
            self.app.add_middleware(CORSMiddleware, allow_origins=list(options.origins), allow_methods=["*"], allow_headers=["*"])
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        self.app.add_api_route("/v1/completions", self._completions, methods=["POST"])
        self.app.add_api_route("/v1/embeddings", self._embeddings, methods=["POST"])
        self.app.add_api_route("/v1/models", self._list, methods=["GET"])
        self.app.add_api_route("/v1/models/{name:path}", self._one, methods=["GET"])
        self.app.add_api_route("/health", self._health, methods=["GET"])
        self.app.add_api_route("/metrics", self._scrape, methods=["GET"])
        self.app.add_exception_handler(HTTPException, _no_such)
        self.app.add_exception_handler(Exception, _broken)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._client = AsyncClient(self._url)
        yield
        await self._client.close()

    # The endpoints.

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, "chat", requests.ChatRequest)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, "completions", requests.CompletionRequest)

    async def _embeddings(self, request: Request) -> Response:
        return _error(ApiError("Embeddings are not offered: the model gives text.", status=404, code="unsupported"))

    async def _list(self, request: Request) -> Response:
        if refused := self._unknown(request):
            return _error(refused)
        return JSONResponse({"object": "list", "data": [_card(model) for model in self._models.values()]})

    async def _one(self, request: Request, name: str) -> Response:
        if refused := self._unknown(request):
            return _error(refused)
        model = self._models.get(name)
        return _error(_no_model(name)) if model is None else JSONResponse(_card(model))

    async def _health(self) -> Response:
        live = self._client is not None and await self._client.live()
        return JSONResponse({"status": "ok" if live else "the model's server does not answer"}, status_code=200 if live else 503)

    async def _scrape(self) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, endpoint: str, kind: type[requests.Request]) -> Response:
        start = time.monotonic()
        self._metrics.open.inc()
        done = _Once(lambda status: self._done(endpoint, start, status))
        try:
            if refused := self._unknown(request):
                raise refused
            body = requests.read(kind, await self._body(request))
            model = self._models.get(body.model)
            if model is None:
                raise _no_model(body.model)
            assert self._client is not None  # the application has started
            if isinstance(body, requests.ChatRequest):
                work: Chat | Completion = Chat(self._client, model, body, self._options.style)
            else:
                work = Completion(self._client, model, body)
            if body.stream:
                return await self._stream(work, start, done)
            answer = await _unless_gone(request, work.answer())
            done(200)
            return JSONResponse(answer)
        except ApiError as error:
            done(error.status)
            return _error(error)
        except BaseException:
            done(499)
            raise

    async def _stream(self, work: Chat | Completion, start: float, done: _Once) -> Response:
        """The first chunk is waited for, so that a request that is refused has the status of an error."""
        events = work.events()
        first = await anext(events)
        self._metrics.first.observe(time.monotonic() - start)

        async def lines() -> AsyncIterator[bytes]:
            status = 499  # the client left
            try:
                yield _line(first)
                async for event in events:
                    yield _line(event)
                yield b"data: [DONE]\n\n"
                status = 200
            except ApiError as error:
                status = error.status
                yield _line(error.body())
            finally:
                await events.aclose()
                done(status)

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    def _done(self, endpoint: str, start: float, status: int) -> None:
        self._metrics.open.dec()
        self._metrics.took.observe(time.monotonic() - start)
        self._metrics.requests.labels(endpoint, str(status)).inc()

    # Who asks, and with how much.

    def _unknown(self, request: Request) -> ApiError | None:
        """The error of a client without a good key."""
        if not self._options.keys:
            return None
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
        # Every key is compared, so that the time says nothing of which.
        good = [hmac.compare_digest(given, key.encode("utf-8")) for key in self._options.keys]
        if any(good):
            return None
        return ApiError("Expected a good API key: Authorization: Bearer KEY.", status=401, code="invalid_api_key")

    async def _body(self, request: Request) -> Any:
        most = self._options.max_body_bytes
        data = bytearray()
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(most)
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise _too_large(most)
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise ApiError(f"The body: expected JSON ({error})."[:200]) from None


class _Once:
    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, status: int) -> None:
        call, self._call = self._call, lambda _: None
        call(status)


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result, or the end of the work when its client leaves."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError("The client left.", status=499)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _line(event: Event) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "ngpt-deploy",
        "max_model_len": model.max_length,
    }


def _no_model(name: str) -> ApiError:
    return ApiError(f"The model {name[:100]!r} does not exist.", status=404, param="model", code="model_not_found")


def _too_large(most: int) -> ApiError:
    return ApiError(f"The body: expected at most {most} bytes.", status=413)


def _error(error: ApiError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _no_such(request: Request, error: Any) -> Response:
    return _error(ApiError(f"There is no {request.method} {request.url.path[:100]}.", status=error.status_code, code="not_found"))


async def _broken(request: Request, error: Exception) -> Response:
    """Its words go to the log alone."""
    _LOG.error("%s: %s", request.url.path, error, exc_info=error)
    return _error(ApiError("The frontend failed. Its log says more.", status=500, kind="server_error"))
