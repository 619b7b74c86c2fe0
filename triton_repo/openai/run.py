"""The frontend as a process: run it here, or start one beside a server and end it with that."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ngpt.errors import ServerError, missing_package
from triton_repo.machine import check_port, free_ports, http_ok
from triton_repo.openai.tags import Tags

KEYS_VARIABLE = "NGPT_API_KEY"
"""Keys with commas between them; in the environment, because other users see a process's arguments."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between one failed start and the next, which double."""


@dataclass(frozen=True)
class Settings:
    """What a frontend is started with. url: the server's gRPC endpoint. port: 0 for any free one."""

    repository: Path
    url: str
    host: str = "127.0.0.1"
    port: int = 8080
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    model_name: str | None = None
    chat_template: Path | None = None
    reasoning: Tags | None = None
    tool_calls: Tags | None = None
    max_body_mb: int = 16

    @property
    def base_url(self) -> str:
        """What clients are given; on this machine, where the frontend listens on every address."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}/v1" if ":" in host else f"http://{host}:{self.port}/v1"

    def arguments(self) -> list[str]:
        """Those of `ngpt-deploy openai`, but for the keys."""
        words = [str(self.repository), "--url", self.url, "--host", self.host, "--port", str(self.port)]
        words += ["--max-body-mb", str(self.max_body_mb)]
        words += [] if self.model_name is None else ["--model-name", self.model_name]
        words += [] if self.chat_template is None else ["--chat-template", str(self.chat_template)]
        for name, tags in (("--reasoning-tags", self.reasoning), ("--tool-call-tags", self.tool_calls)):
            words += [] if tags is None else [name, tags.open, tags.close]
        return words + [word for origin in self.origins for word in ("--allow-origin", origin)]


def is_local(host: str) -> bool:
    """Whether an address is this machine's own alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def run(settings: Settings) -> None:
    """Serve until a signal. Raises ServerError, ConfigError; MissingPackageError where the extra `openai` is not installed."""
    try:
        import uvicorn

        from triton_repo.openai.app import Api, Options
        from triton_repo.openai.chat import Style
        from triton_repo.openai.models import open_models
    except ImportError as error:
        raise missing_package("OpenAI's interface needs further libraries", "openai", found=str(error)) from error
    models = open_models(settings.repository, chat_template=settings.chat_template, name=settings.model_name)
    style = Style(settings.reasoning, settings.tool_calls)
    options = Options(settings.keys, settings.origins, settings.max_body_mb << 20, style)
    app = Api(settings.url, models, options).app
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=30,
        server_header=False,
    )
    uvicorn.Server(config).run()


@dataclass
class Frontend:
    """A frontend in a process of its own, as a context manager: started again when it dies, ended on leaving.

    say: told when it has died. Raises ServerError on entering when it does not answer within `start_timeout` seconds.
    """

    settings: Settings
    say: Callable[[str], object] = lambda said: None
    start_timeout: float = 60.0
    _process: subprocess.Popen[bytes] | None = None
    _leaving: threading.Event = field(default_factory=threading.Event)
    _watcher: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """What clients are given."""
        return self.settings.base_url

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Frontend:
        if not self.settings.port:
            object.__setattr__(self.settings, "port", free_ports()[0])
        check_port(self.settings.port)
        self._start()
        self._watcher = threading.Thread(target=self._watch, name="frontend-watch", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leaving.set()
        if self._watcher is not None:
            self._watcher.join()  # it may be starting one again
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(35.0)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _start(self) -> None:
        environment = dict(os.environ)
        environment.pop(KEYS_VARIABLE, None)
        if self.settings.keys:
            environment[KEYS_VARIABLE] = ",".join(self.settings.keys)
        code = "import sys; from scripts.cli import main; sys.exit(main(['openai', *sys.argv[1:]]))"
        command = [sys.executable, "-c", code, *self.settings.arguments()]
        # In a group of its own: Ctrl-C reaches this process first, which lets requests end.
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            deadline = time.monotonic() + self.start_timeout
            while not http_ok(self.base_url.removesuffix("/v1") + "/metrics"):
                if self._process.poll() is not None or time.monotonic() > deadline or self._leaving.is_set():
                    raise ServerError("OpenAI's frontend did not start", remedy="see what it says above")
                time.sleep(0.05)
        except BaseException:  # Ctrl-C, too
            self._process.kill()
            self._process.wait()
            raise

    def _watch(self) -> None:
        pause = FIRST_PAUSE
        while not self._leaving.wait(0.2):
            process = self._process
            if process is None or process.poll() is None:
                continue
            self.say("OpenAI's frontend has died: starting again")
            try:
                self._start()
                pause = FIRST_PAUSE
            except ServerError:  # its port may be taken for a while
                self._leaving.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
