"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ngpt import __version__
from triton_repo.async_client import AsyncClient
from triton_repo.openai import requests
from triton_repo.openai.chat import Chat, Style, prompt_of
from triton_repo.openai.completions import Completion
from triton_repo.openai.errors import ApiError
from triton_repo.openai.metrics import LEFT, Counted, Metrics
from triton_repo.openai.models import Model
from triton_repo.openai.rendering import Renderer
from triton_repo.openai.streams import Event

T = TypeVar("T")
_LOG = logging.getLogger("ngpt")
MAX_SECONDS_OF_BODY = 60.0
"""In which a request must have been sent whole."""


@dataclass(frozen=True)
class Options:
    """keys: without any, nobody is asked for one. origins: of pages in browsers that may ask; none unless named."""

    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_body_bytes: int = 16 << 20
    style: Style = Style()


class Api:
    """What the endpoints share. `app` is the ASGI application."""

    def __init__(self, url: str, models: Mapping[str, Model], options: Options) -> None:
        self._url, self._models, self._options = url, models, options
        self._client: AsyncClient | None = None
        self._metrics = Metrics()
        self._renderer = Renderer({name: model.template for name, model in models.items() if model.template is not None})
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
        self.app.add_api_route("/version", self._version, methods=["GET"])
        self.app.add_exception_handler(HTTPException, _no_such)
        self.app.add_exception_handler(Exception, _broken)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._client = AsyncClient(self._url)
        await self._renderer.start()
        yield
        await self._renderer.close()
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
        """Whether every model is ready, by its server's word."""
        ready = self._client is not None and all(
            await asyncio.gather(*(self._client.ready(model.served) for model in self._models.values()))
        )
        return JSONResponse({"status": "ok" if ready else "the model's server is not ready"}, status_code=200 if ready else 503)

    async def _scrape(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _version(self) -> Response:
        return JSONResponse({"version": __version__})

    async def _answer(self, request: Request, endpoint: str, kind: type[requests.Request]) -> Response:
        counted = self._metrics.begin(endpoint)
        try:
            if refused := self._unknown(request):
                raise refused
            body = requests.read(kind, await self._body(request))
            work = await _unless_gone(request, self._work(body))
            counted.usage = work.usage
            if body.stream:
                # The first chunk is waited for, so that a request that is refused has the status of an error.
                events = work.events()
                first = await _unless_gone(request, _next(events))
                counted.first()
                return _Stream(first, events, counted)
            answer = await _unless_gone(request, work.answer())
            counted.end(200)
            return JSONResponse(answer)
        except ApiError as error:
            counted.end(error.status)
            return _error(error)
        except ClientDisconnect:
            counted.end(LEFT)
            return Response(status_code=LEFT)
        except BaseException:
            counted.end(500)
            raise

    async def _work(self, body: requests.Request) -> Chat | Completion:
        model = self._models.get(body.model)
        if model is None:
            raise _no_model(body.model)
        assert self._client is not None  # the application has started
        if isinstance(body, requests.ChatRequest):
            prompt = await prompt_of(body, model, self._renderer)
            return Chat(self._client, model, body, self._options.style, prompt)
        assert isinstance(body, requests.CompletionRequest)
        return Completion(self._client, model, body)

    # Who asks, and with how much.

    def _unknown(self, request: Request) -> ApiError | None:
        """The error of a client without a good key."""
        if not self._options.keys:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Every key is compared, so that the time says nothing of which.
        sent = given.strip().encode("latin-1", "replace")  # as the header has it, byte by byte
        good = [hmac.compare_digest(sent, key.encode("utf-8")) for key in self._options.keys]
        if any(good) and scheme.lower() == "bearer":
            return None
        return ApiError("Expected a good API key: Authorization: Bearer KEY.", status=401, code="invalid_api_key")

    async def _body(self, request: Request) -> Any:
        most = self._options.max_body_bytes
        data = bytearray()
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(MAX_SECONDS_OF_BODY):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise _too_large(most)
        except TimeoutError:
            raise ApiError(f"The body: expected all of it within {MAX_SECONDS_OF_BODY:g} seconds.", status=408) from None
        return requests.parse(bytes(data))


class _Stream(StreamingResponse):
    """The chunks of an answer as server-sent events. However it is left, its requests are cancelled and it is counted."""

    def __init__(self, first: Event, events: AsyncGenerator[Event, None], counted: Counted) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(first, events), media_type="text/event-stream", headers=headers)
        self._events, self._counted = events, counted

    async def _lines(self, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        try:
            yield _line(first)
            async for event in events:
                yield _line(event)
        except ApiError as error:
            self._counted.end(error.status)
            yield _line(error.body())
        except Exception as error:
            self._counted.end(500)
            yield _line(_failed("a stream", error).body())
        else:
            self._counted.end(200)
            yield b"data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._counted.end(LEFT)
            await self._events.aclose()


async def _next(events: AsyncGenerator[Event, None]) -> Event:
    return await anext(events)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result. Raises ClientDisconnect, and ends the work, when the client leaves."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
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
    return _error(_failed(request.url.path, error))


def _failed(where: str, error: Exception) -> ApiError:
    """For a fault of ours; its words go to the log alone."""
    _LOG.error("%s: %s", where, error, exc_info=error)
    return ApiError("The frontend failed. Its log says more.", status=500, kind="server_error")
