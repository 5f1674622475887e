"""The command line: one module a command, which parses, calls the library and renders. Only here are rich and typer."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import noisyclean
from noisyclean.cli import bench
from noisyclean.cli.calibrate import calibrate
from noisyclean.cli.convert import convert
from noisyclean.cli.corrupt import corrupt
from noisyclean.cli.demo import demo
from noisyclean.cli.evaluate import evaluate
from noisyclean.cli.export import export
from noisyclean.cli.fit import fit
from noisyclean.cli.inspect import inspect
from noisyclean.cli.report import report
from noisyclean.cli.review import review
from noisyclean.cli.score import score
from noisyclean.cli.show import show
from noisyclean.cli.split import split
from noisyclean.errors import NoisycleanError


class Interrupted(NoisycleanError):
    """The user pressed Ctrl-C. Exit code 130, as shells have it."""

    exit_code = 130


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    # Inside the command, because typer swallows what it sees of Ctrl-C without a word.
    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; repeat the same command to go on") from error

    return run


app = typer.Typer(
    name="noisyclean",
    help="Find and remove the mismatched pairs of a web-scraped image–text corpus, and say how many there are.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (demo, fit, score, split, report, review, show, export, evaluate, calibrate, inspect, corrupt, convert):
    app.command()(_interruptible(command))

benches = typer.Typer(
    help="Compare methods on known noise, and measure retrieval and throughput.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for measure in (bench.detection, bench.embeddings, bench.retrieval, bench.throughput):
    benches.command()(_interruptible(measure))
app.add_typer(benches, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"noisyclean {noisyclean.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code."""
    # Threads that wait for one another must soon sleep: beside decoding processes, or another job on the machine,
    # spinning threads of torch take the cores from those they wait for (measured: half the pairs scored a second).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    debug = "--debug" in sys.argv
    # --debug is understood wherever it stands: it is wanted most when a whole line is recalled and it is added last.
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        app()
    except NoisycleanError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", NoisycleanError.exit_code)
    except Exception as error:
        if debug:
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", NoisycleanError.exit_code)


def _fail(message: str, code: int) -> None:
    # What a message quotes may be of a hostile corpus: a terminal obeys some of the characters that do not print.
    words = "".join(one if one.isprintable() else "�" for one in " ".join(message.split()))
    print(f"noisyclean: {words}", file=sys.stderr)
    sys.exit(code)
