"""`ngpt-deploy`: plan, build, verify, package, serve, openai, chat, generate, inspect, convert, bench, store, doctor."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from engines.target import load_targets
from ngpt import __version__
from scripts.commands import building, chatting, doctoring, inspecting, planning, serving, storing, talking, verifying
from scripts.commands.options import Help, Parser, Run
from scripts.signals import stopping
from scripts.terminal import NAME, fail, finish_output, prepared, stopped

EPILOG = """examples:
  ngpt-deploy build --checkpoint examples/ngpt-tiny --target cpu-int8 --output build/engine
  ngpt-deploy verify build/engine --checkpoint examples/ngpt-tiny
  ngpt-deploy package build/engine --output build/models
  ngpt-deploy serve build/models
  ngpt-deploy generate "def main():" --url 127.0.0.1:8001

Errors name the thing, what was expected, what was found and what to do, in one line. Exit codes: 0; 2 for an error; 3 where
parity failed; 4 where an engine is worse than its baseline;
130 after Ctrl-C, 143 after SIGTERM, with nothing half written left behind (`serve` ends with 0 after either)."""
DEBUG = "show the traceback of an error"


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog=NAME,
        description="From an nGPT checkpoint to a verified engine in a Triton model repository.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    top.add_argument("--debug", action="store_true", help=DEBUG)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=Help)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG)
        sub.set_defaults(run=run)
        return sub

    targets = load_targets()
    building.add_build(command, targets)
    planning.add_plan(command, targets)
    verifying.add_verify(command)
    serving.add_package(command)
    serving.add_serve(command)
    talking.add_openai(command)
    chatting.add_chat(command)
    serving.add_generate(command)
    inspecting.add_inspect(command)
    building.add_convert(command)
    building.add_bench(command)
    storing.add_store(command)
    doctoring.add_doctor(command, targets)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error, 3 for a failed parity, 4 for one that got worse, 128 + its
    number after a signal."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args = argparse.Namespace(command="", debug=False)
    with prepared(), stopping() as asked:
        try:
            try:
                args = parser().parse_args(argv)
            except SystemExit:  # --help, --version, or a wrong argument
                finish_output()
                raise
            code = int(args.run(args))
            finish_output()
            return code
        except (Exception, KeyboardInterrupt) as error:
            if args.debug and isinstance(error, Exception):
                raise
            # A signal that a library turned into an error of its own is still a signal.
            number = asked.number or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
            code = fail(args.command, error) if number is None else stopped(args.command, number)
            with contextlib.suppress(OSError):
                finish_output()
            return code


if __name__ == "__main__":
    sys.exit(main())
