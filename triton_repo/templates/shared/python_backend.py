"""What the decoupled models share: reading requests, answering errors, noticing cancelled requests, metrics."""

from __future__ import annotations

import collections
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from triton_repo.serving_inputs import InputError

if TYPE_CHECKING:  # a repository of TensorRT-LLM's PyTorch runtime has no runtime of ours
    from engines.runtime.request import RequestHandle
    from engines.runtime.stats import Stats

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
WATCH_SECONDS = 0.01
FIRST_TOKEN = ("ngpt_first_token_seconds", "Seconds from arrival to first token")
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


T = TypeVar("T")


class Sender(Protocol):
    """Takes the responses to one request."""

    def send(self, response: Any = None, flags: int = 0) -> None:
        """Send a response, or with FINAL alone end the request."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone."""


def inputs_of(request: Any) -> dict[str, NDArray[Any]]:
    """The tensors that were sent, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def bad_request(error: Exception) -> Any:
    """INVALID_ARGUMENT with the error's own words."""
    return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)


def error_response(error: Any) -> Any:
    """A response that carries a TritonError."""
    return pb_utils.InferenceResponse(output_tensors=[], error=error)


def unavailable(error: Exception) -> Any:
    """UNAVAILABLE with the error's own words."""
    return pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE)


def cut() -> Any:
    """The error of an answer that ended though nobody asked for it."""
    text = "the engine was stopped before the answer was complete. Send the request again."
    return pb_utils.TritonError(text, pb_utils.TritonError.UNAVAILABLE)


def failed(error: Exception) -> Any:
    """An error that is nobody's request: INTERNAL. Its words go to the log; they may name files of this machine."""
    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
    return pb_utils.TritonError(f"the model failed ({type(error).__name__}). The server's log says more.")


def tensor(name: str, values: Any, dtype: type[np.generic]) -> Any:
    """A pb_utils.Tensor of exactly this dtype: the server does not check it."""
    return pb_utils.Tensor(name, np.ascontiguousarray(np.asarray(values, dtype=dtype)))


def strings(name: str, values: list[str]) -> Any:
    """A STRING tensor [1, n] of UTF-8."""
    return pb_utils.Tensor(name, np.asarray([[value.encode("utf-8", "replace") for value in values]], dtype=np.object_))


def parameter(config: Mapping[str, Any], name: str, default: str = "") -> str:
    """A string from the parameters of config.pbtxt; empty counts as absent."""
    value: str = config.get("parameters", {}).get(name, {}).get("string_value", "")
    return value or default


class InFlight(Generic[T]):
    """What is being answered, by the id that its client gave the request: a later request may ask for its end."""

    def __init__(self) -> None:
        self._by_id: dict[str, list[T]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, item: T) -> None:
        """Several may have one id, or none."""
        with self._lock:
            self._by_id.setdefault(name, []).append(item)

    def remove(self, name: str, item: T) -> None:
        """It has been answered."""
        with self._lock:
            rest = [other for other in self._by_id.get(name, ()) if other is not item]
            self._by_id[name] = rest
            if not rest:
                del self._by_id[name]

    def named(self, name: str) -> list[T]:
        """Those that a request to stop means. Raises InputError for one without an id."""
        if not name:
            raise InputError("stop: expected the id of the request to stop, found a request without an id.")
        with self._lock:
            return list(self._by_id.get(name, ()))


class Watcher:
    """Looks at the requests in flight a hundred times a second and calls back when their client has gone.

    The callback is repeated until the request is forgotten: a cancellation that arrives before the work was started
    must not be lost.
    """

    def __init__(self, also: Callable[[], None] | None = None) -> None:
        self._live: dict[object, tuple[Sender, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._also = also
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cancellation-watcher", daemon=True)
        self._thread.start()

    def watch(self, sender: Sender, on_cancel: Callable[[], None]) -> object:
        """Returns a key for ``forget``."""
        key = object()
        with self._lock:
            self._live[key] = (sender, on_cancel)
        return key

    def forget(self, key: object) -> None:
        """Must be called before the final response is sent: asking a finished sender is an error."""
        with self._lock:
            self._live.pop(key, None)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stopped.wait(WATCH_SECONDS):
            with self._lock:
                gone = [on_cancel for sender, on_cancel in self._live.values() if sender.is_cancelled()]
            for on_cancel in gone:
                self._guarded(on_cancel)
            if self._also is not None:
                self._guarded(self._also)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # the watcher must outlive whatever one callback does
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")


class Metrics:
    """Prometheus metrics of the scheduler; silent where the server was built without them."""

    def __init__(self, labels: Mapping[str, str], names: Mapping[str, tuple[str, str, str]]) -> None:
        """``labels``: those of this instance. ``names``: metric name -> (attribute of Scheduler.stats(), "gauge" or "counter",
        help)."""
        self._metrics: list[tuple[str, str, Any, Any]] = []
        self._due = 0.0
        self._latency: Any = None
        self._waiting: collections.deque[float] = collections.deque(maxlen=10_000)
        try:
            for name, (key, kind, text) in names.items():
                family_kind = pb_utils.MetricFamily.COUNTER if kind == "counter" else pb_utils.MetricFamily.GAUGE
                family = pb_utils.MetricFamily(name=name, description=text, kind=family_kind)
                metric = family.Metric(labels=dict(labels))
                # The family must stay referenced: the server drops it with its Python object.
                self._metrics.append((key, kind, metric, family))
            if hasattr(pb_utils.MetricFamily, "HISTOGRAM"):  # older servers have none
                self._latency_family = pb_utils.MetricFamily(
                    name=FIRST_TOKEN[0],
                    description=FIRST_TOKEN[1],
                    kind=pb_utils.MetricFamily.HISTOGRAM,
                )
                self._latency = self._latency_family.Metric(labels=dict(labels), buckets=list(LATENCY_BUCKETS))
        except Exception as error:
            pb_utils.Logger.log_warn(f"no custom metrics: {error}")
            self._metrics = []

    def first_token(self, handle: RequestHandle) -> None:
        """Note the first-token latency of a finished request, to be published by the next ``update``."""
        times = handle.times
        if times.first_token_ns:
            self._waiting.append((times.first_token_ns - times.arrival_ns) / 1e9)

    def update(self, stats: Callable[[], Stats]) -> None:
        """Publish at most ten times a second. One thread only: server 2.51 crashes when metrics are touched from several."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + 0.1
        while self._latency is not None and self._waiting:
            self._latency.observe(self._waiting.popleft())
        values = stats()
        for key, kind, metric, _family in self._metrics:
            value = float(getattr(values, key))
            if kind == "gauge":
                metric.set(value)
            elif (more := value - metric.value()) > 0:
                metric.increment(more)
