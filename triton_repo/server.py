"""Start and stop the Triton server that the ``nvidia-pytriton`` wheel carries, on this machine only.

The binary is run standalone (PyTriton's own Python layer is not used): the model repository under test is the one that
would be copied to any other Triton.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from ngpt.errors import ServerError, missing_package, os_trouble
from triton_repo.machine import HOST, check_port, dead_model, free_ports, http_ok
from triton_repo.probe import Asked, Probe, default_probe

_LOG_TAIL_LINES = 25
_LOOK_SECONDS = 0.2
_ALL_ANSWERED, _UNLOAD_SECONDS = b"All models are stopped, unloading models", 5.0
_DEATHS_SECONDS = 600.0


def check_numpy() -> None:
    """Refuse NumPy 2: with this server it corrupts tensors silently (empty outputs, wrong inputs).

    Raises:
        ServerError: NumPy 2 or newer is installed where the models would run.
    """
    version = importlib.metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            "NumPy is too new for the pip-installable Triton server",
            expected="numpy<2",
            found=f"numpy {version}",
            remedy='Run: pip install "numpy<2" (newer versions corrupt tensors without an error).',
        )


def triton_home() -> Path:
    """The folder of the wheel that holds ``bin``, ``backends``, ``caches`` and ``python_backend_stubs``.

    Raises:
        MissingPackageError: nvidia-pytriton is not installed.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise missing_package("the Triton server is not installed", "serve")
    return Path(next(iter(spec.submodule_search_locations))) / "tritonserver"


class TritonServer:
    """A Triton server on 127.0.0.1 with free ports, as a context manager.

    Entering starts it and waits for a real inference: a crashed model process still reports ready, so readiness alone
    says nothing. Leaving stops it by pid: SIGTERM, then SIGKILL for it and its model processes.

    Args:
        repository: the model repository to serve.
        log_path: where the server's output goes; a temporary file when None, deleted on a clean stop.
        http_port, grpc_port, metrics_port: 0 for any free one.
        probe: the inference that proves it works; ``default_probe`` when None.
        start_timeout: seconds from start to the first good inference.
        stop_timeout: seconds that requests in flight get to be answered after SIGTERM; new ones are refused meanwhile.
        arguments: further ones of tritonserver, such as "--model-control-mode=explicit".

    Raises:
        ServerError: a port that cannot be had; the server did not start, or no inference succeeded in time: the log's tail
            is then a note of the error.
        MissingPackageError: nvidia-pytriton is not installed.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        log_path: str | os.PathLike[str] | None = None,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        probe: Probe | None = None,
        start_timeout: float = 60.0,
        stop_timeout: float = 5.0,
        arguments: Sequence[str] = (),
    ) -> None:
        self.repository = Path(repository)
        try:
            self.repository = self.repository.resolve()
            there = self.repository.is_dir()
        except (OSError, ValueError, RuntimeError):  # a name that none can have, links that loop
            there = False
        if not there:
            raise ServerError(
                "no model repository", expected="a folder", found=str(repository), remedy="make one with `ngpt-deploy package`"
            )
        ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
        for name, wanted in ports.items():
            if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted <= 65535:
                raise ServerError(name, expected="a port from 0 (any free one) to 65535", found=repr(wanted)[:40])
        chosen = [wanted for wanted in ports.values() if wanted]
        if len(set(chosen)) < len(chosen):
            raise ServerError(
                "the server's ports",
                expected="three that differ",
                found=", ".join(map(str, ports.values())),
                remedy="choose others, or 0 for any that is free",
            )
        self._work = Path()
        self._log_wanted = Path(log_path).absolute() if log_path is not None else None
        self.log_path = self._log_wanted or Path()
        self._probe = probe
        self._arguments = tuple(arguments)
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._shm_prefix = ""
        self._log_start = 0  # where this start's part of the log begins
        self._wanted_ports: tuple[int, ...] = (http_port, grpc_port, metrics_port)
        self._ports: tuple[int, ...] = self._wanted_ports

    @property
    def http_port(self) -> int:
        """Port of the HTTP endpoint."""
        return self._ports[0]

    @property
    def grpc_port(self) -> int:
        """Port of the gRPC endpoint."""
        return self._ports[1]

    @property
    def metrics_port(self) -> int:
        """Port of the Prometheus endpoint."""
        return self._ports[2]

    @property
    def http_url(self) -> str:
        """``host:port`` of the HTTP endpoint."""
        return f"{HOST}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return f"{HOST}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """``host:port`` of the Prometheus endpoint."""
        return f"{HOST}:{self.metrics_port}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None else None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until an inference has succeeded."""
        if self._process is not None:
            raise ServerError("the server is already running", found=f"pid {self._process.pid}")
        self._stopped = False
        try:
            self._start()
        except BaseException:  # Ctrl-C and SIGTERM too
            self._clean_up()
            raise

    def _start(self) -> None:
        check_numpy()
        home = triton_home()
        for port in filter(None, self._wanted_ports):
            check_port(port)
        try:
            if self._work == Path():
                self._work = Path(tempfile.mkdtemp(prefix="ngpt-triton-"))
                self.log_path = self._log_wanted or self._work / "server.txt"
                self.log_path.parent.mkdir(parents=True, exist_ok=True)
                self.log_path.write_bytes(b"")
            backends = self._prepare_backends(home)
            # A port that was free when asked for may be taken by the time the server binds it.
            for attempt in range(3):
                self._launch(home, backends)
                try:
                    self._wait_until_it_answers()
                    return
                except ServerError:
                    port_taken = self._process is not None and "already in use" in self._log_text().lower()
                    self._terminate(patience=0.0)  # it has nothing to answer
                    if attempt == 2 or not port_taken:
                        raise
        except OSError as error:  # of the log, of the scratch folder, of starting the program
            found, remedy = os_trouble(error)
            raise ServerError("the Triton server cannot be started", found=found, remedy=remedy) from error

    def wait(self) -> None:
        """Block until the server ends by itself. Raises ServerError when it does, for nobody asked it to."""
        process = self._process
        if process is not None:
            process.wait()
            if self._process is not None:
                raise self._failure("the Triton server stopped")

    def watch(self, say: Callable[[str], object], *, most_deaths: int = 5) -> None:
        """Block, and start the server again, on the same ports, when it or the process of one of its models has died.

        A dead model's requests would hang, and its server call itself ready: both are ended at once, so that clients see
        their connections close. ``say`` is told what died, and when it answers again. Raises ServerError when something dies
        more often than ``most_deaths`` times within ten minutes, a start that fails included.
        """
        deaths: collections.deque[float] = collections.deque()
        while not self._stopped:
            process = self._process
            died = "the Triton server" if process is None or process.poll() is not None else dead_model(process.pid)
            if not died:
                time.sleep(_LOOK_SECONDS)
                continue
            now = time.monotonic()
            deaths.append(now)
            while deaths[0] < now - _DEATHS_SECONDS:
                deaths.popleft()
            if len(deaths) > most_deaths:
                raise self._failure(f"{died} has died {len(deaths)} times within {_DEATHS_SECONDS / 60:g} minutes")
            say(f"{died} has died: starting again")
            self._wanted_ports = self._ports
            self._terminate(patience=0.0)
            try:
                self._start()
                say(f"answers again, {time.monotonic() - now:.1f} s later")
            except ServerError as error:
                if not self._stopped:  # it may come up the next time, and that is counted
                    say(f"{error}")
                    time.sleep(_LOOK_SECONDS)

    def stop(self) -> None:
        """Stop the server; does nothing when it is not running."""
        self._stopped = True
        self._clean_up()

    def _clean_up(self) -> None:
        self._terminate()
        if self._work != Path():
            shutil.rmtree(self._work, ignore_errors=True)
            self._work = Path()

    def _prepare_backends(self, home: Path) -> Path:
        """The backend directory of the wheel with the stub for this interpreter (the wheel has one per version)."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            have = ", ".join(sorted(entry.name for entry in (home / "python_backend_stubs").iterdir()))
            raise ServerError(
                "the Triton wheel has no stub for this Python", expected=have, found=version, remedy="Use one of these."
            )
        backends = self._work / "backends"
        folder = backends / "python"
        folder.mkdir(parents=True, exist_ok=True)
        sources = [home / "backends" / "python" / "libtriton_python.so"]
        sources += [home / "backends" / "python" / "triton_python_backend_utils.py", stub]
        for source in sources:
            link = folder / source.name
            if not link.exists():
                link.symlink_to(source)
        return backends

    def _environment(self, home: Path) -> dict[str, str]:
        """PATH and LD_LIBRARY_PATH such that the stub finds this environment and its own libpython."""
        environment = dict(os.environ)
        environment["PATH"] = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{environment.get('PATH', os.defpath)}"
        libraries = [str(home.parent.parent / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        if environment.get("LD_LIBRARY_PATH"):
            libraries.append(environment["LD_LIBRARY_PATH"])
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        # A served repository must not lean on the caller's checkout.
        environment.pop("PYTHONPATH", None)
        return environment

    def _launch(self, home: Path, backends: Path) -> None:
        free = free_ports()
        self._ports = tuple(wanted or any_free for wanted, any_free in zip(self._wanted_ports, free, strict=True))
        self._shm_prefix = f"ngpt-{os.getpid()}-{secrets.token_hex(4)}"
        command = [
            str(home / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--cache-directory={home / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            f"--exit-timeout-secs={max(1, int(self._stop_timeout))}",
        ]
        command += self._arguments
        for name, port in zip(("http", "grpc", "metrics"), self._ports, strict=True):
            command += [f"--{name}-address={HOST}", f"--{name}-port={port}"]
        self._log_start = self.log_path.stat().st_size
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(home),
                cwd=self._work,
                start_new_session=True,
            )
        atexit.register(self._terminate)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        probe = self._probe if self._probe is not None else default_probe(self.repository)
        ready = False
        last = "not ready"
        asked: Asked | None = None
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise self._failure("the Triton server stopped while starting")
            if not ready:
                ready = http_ok(f"http://{self.http_url}/v2/health/ready")
            if ready and asked is None:
                asked = Asked(probe, self.grpc_url)
            if asked is not None and asked.ended:
                if asked.error is None:
                    return
                last, asked = f"{type(asked.error).__name__}: {asked.error}", None
            # What is asked of a model that has died is never answered.
            if died := dead_model(self._process.pid):
                raise self._failure(f"{died} has died while the server was starting")
            time.sleep(0.1)
        raise self._failure(f"no inference succeeded within {self._start_timeout:g} s ({last})")

    def _failure(self, what: str) -> ServerError:
        lines = self._log_text().splitlines()
        # A failing model is reported early, and followed by pages of tables.
        errors = [line for line in lines[:-_LOG_TAIL_LINES] if line.startswith("E") or "Error" in line]
        tail = "\n".join([*errors[:_LOG_TAIL_LINES], *lines[-_LOG_TAIL_LINES:]])
        error = ServerError(what, remedy="see the server's log")
        error.add_note(f"From the server's log:\n{tail}")
        return error

    def _log_text(self) -> str:
        if not self.log_path.is_file():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", "replace")

    def _let_end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a server that was told to stop has ended, or has nothing left to answer.

        A request that its client cancels just as it ends is counted on by server 2.51 for ever: the model is then never
        unloaded, and the server waits out its whole limit. Its log says when all are answered.
        """
        start = time.monotonic()
        limit = self._stop_timeout + 5.0
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            said = b""
            while process.poll() is None and time.monotonic() < start + limit:
                said = said[-len(_ALL_ANSWERED) :] + log.read()
                if _ALL_ANSWERED in said:
                    limit = min(limit, time.monotonic() - start + _UNLOAD_SECONDS)
                    said = b""
                time.sleep(0.02)

    def _terminate(self, patience: float | None = None) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self._terminate)
        if process.poll() is None and patience is None:
            process.send_signal(signal.SIGTERM)
            self._let_end(process)
        if process.poll() is None:
            process.kill()
            process.wait()
        # The server leads a session of its own: whatever is left in it are its orphaned model processes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for leftover in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            leftover.unlink(missing_ok=True)
