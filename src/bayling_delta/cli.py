"""The command line: options in, one core function called, its result shown. The only module that prints."""

import errno
import gc
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import click

from bayling_delta import __version__, report
from bayling_delta.errors import (
    KINDS,
    BaylingDeltaError,
    CheckpointError,
    IntegrityError,
    InterruptedRunError,
    MismatchError,
    OutputError,
    Problem,
    UsageError,
)
from bayling_delta.recipes import RECIPES
from bayling_delta.tensors import FLOATS, TORCH_NAMES

__all__ = ["main"]

EXIT_CODES: Final[dict[type[BaylingDeltaError], int]] = {
    UsageError: 2,
    CheckpointError: 3,
    MismatchError: 4,
    IntegrityError: 5,
    OutputError: 6,
}
_DTYPES: Final = {TORCH_NAMES[dtype]: dtype for dtype in FLOATS}
_OF_THE_SCRIPTS: Final = {
    "--base-model-path": "--base",
    "--delta-path": "--delta",
    "--target-model-path": "--out",
    "--target": "--out",
}
"""Options of the published apply_delta.py, and what they are called here."""
_NO_MEMORY: Final = "this process cannot have the memory that it needs, by the machine or by a limit on it ({})"
_LOG_SECONDS: Final = 15
"""Between two lines of progress where there is no terminal."""


# option types


class Size(click.ParamType[int]):
    """A number of bytes: 5GB is 5,000,000,000, 64MiB is 67,108,864."""

    name = "size"
    _UNITS: Final = {
        "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
        "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn text into bytes; refuse what is not a size."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)", value.strip())
        if not found or found[2].upper() not in self._UNITS:
            self.fail(f"{value!r} is not a size such as 5GB or 64MiB", param, ctx)
        size = int(float(found[1]) * self._UNITS[found[2].upper()])
        if size <= 0:
            self.fail(f"{value!r} is not a size above 0", param, ctx)
        return size


class Digest(click.ParamType[str]):
    """A SHA-256 in hexadecimal, with or without ``sha256:`` before it."""

    name = "digest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Normalise a digest; refuse what is not one."""
        from bayling_delta.manifest import parse_digest

        try:
            return parse_digest(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Device(click.ParamType[str]):
    """``cpu``, ``cuda`` or ``cuda:N``."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what is not the name of a device; whether it is here is seen later."""
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", value):
            self.fail(f"{value!r} is not cpu, cuda or cuda:N", param, ctx)
        return str(value)


_PATH: Final = click.Path(path_type=Path)
_ALLOWABLE: Final = click.Choice(sorted(kind for kind, meaning in KINDS.items() if meaning.allow))


# the commands


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="bayling-delta")
def commands() -> None:
    """Rebuild a language model from a published weight delta, and prove that what came out is right.

    BayLing, and other models of 2023, were published as the difference between their weights and LLaMA's.
    To get the model, add that delta to the base you have:

    \b
      bayling-delta apply --base llama-7b --delta bayling-7b-diff --out bayling-7b

    \b
    Exit codes: 0 done; 1 a fault of this program; 2 wrong options; 3 a checkpoint cannot be read;
    4 base and delta do not belong together; 5 a digest does not match; 6 the output cannot be written;
    130, 143, 129 interrupted by SIGINT, SIGTERM, SIGHUP.
    """  # noqa: D301  # click looks for the character


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every command has."""
    for option in (
        click.option(
            "--debug", is_flag=True, expose_value=False, help="Show the traceback of a fault of this program."
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no summary; errors only."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else there."),
    ):
        command = option(command)
    return command


_recipe = click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    help="How the delta is added, by a release's rule. [default: that of the release recognised, or of the delta's "
    "manifest, else plain]",
)


_registry = click.option(
    "--registry", multiple=True, type=_PATH, metavar="FILE", help="Know a release of your own too. Repeatable."
)


def _working(command: Callable[..., None]) -> Callable[..., None]:
    """The options of the commands that pass all weights through memory."""
    threads = click.IntRange(1, 256)
    for option in (
        click.option("--threads", type=threads, default=8, show_default=True, help="Threads to share the work."),
        click.option("--memory-limit", type=Size(), default="64MiB", show_default=True, help="Bytes of buffers."),
    ):
        command = option(command)
    return command


@commands.command()
@click.option("--base", type=_PATH, required=True, help="The model that the delta was made against.")
@click.option("--delta", type=_PATH, required=True, help="The published delta.")
@click.option("--out", type=_PATH, required=True, help="The directory to make; it must not exist yet.")
@_recipe
@click.option("--dtype", type=click.Choice(sorted(_DTYPES)), help="Cast the result, once. [default: the delta's]")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Bytes of tensors in a file.")
@click.option("--device", type=Device(), default="cpu", show_default=True, help="Where to add: cpu, cuda, cuda:N.")
@click.option("--expect", type=Digest(), metavar="DIGEST", help="Fail unless the result has this weights digest.")
@_registry
@click.option(
    "--check-inputs", is_flag=True, help="Digest base and delta, and look them up, before anything is written."
)
@click.option("--require-recorded", is_flag=True, help="Fail unless every weight file of base and delta is on record.")
@click.option("--allow", multiple=True, type=_ALLOWABLE, help="Overrule a refusal of this kind. Repeatable.")
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on with what a run that was ended had finished."
)
@click.option(
    "--dry-run", is_flag=True, help="Check all that needs no digest and no sum, show the plan, write nothing."
)
@_working
@_common
def apply(
    base: Path,
    delta: Path,
    out: Path,
    recipe: str | None,
    dtype: str | None,
    max_shard_size: int,
    device: str,
    expect: str | None,
    registry: tuple[Path, ...],
    check_inputs: bool,
    require_recorded: bool,
    allow: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    memory_limit: int,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Rebuild a model: add a delta to its base, as a HuggingFace directory.

    BASE and DELTA are directories with weights in safetensors or PyTorch's .bin files, one such file, a shard
    index, folders in Meta's own format (consolidated.*.pth), or ids of the HuggingFace Hub, OWNER/NAME[@REVISION],
    which are fetched into its cache. Everything that can be refused is refused before the first byte is written; the
    output appears under its name only when it is complete. What is computed is, bit for bit, what the published
    script computes.

    \b
    Examples:
      bayling-delta apply --base llama-7b --delta bayling-7b-diff --out bayling-7b
      bayling-delta apply --base llama-7b --delta bayling-7b-diff --out bayling-7b --dry-run
      bayling-delta apply --base llama-7b --delta ICTNLP/bayling-7b-diff --out bayling-7b
    """  # noqa: D301  # click looks for the character
    from bayling_delta import applying, describing, preparing

    started = time.monotonic()
    options: dict[str, Any] = {
        "recipe": recipe,
        "dtype": _DTYPES[dtype] if dtype else None,
        "max_shard_size": max_shard_size,
        "memory_limit": memory_limit,
        "registry": registry,
        "check_inputs": check_inputs,
        "require_recorded": require_recorded,
        "allow": allow,
        "threads": threads,
    }
    if dry_run:
        applying.additions_on(device)
        unchecked = [("--expect", expect), ("--require-recorded", require_recorded and not check_inputs)]
        if (tell := _note(quiet)) and (names := [name for name, given in unchecked if given]):
            tell(f"{' and '.join(names)}: needs digests, and is not checked by --dry-run")
        with _progress("check", quiet) as progress:
            plan = preparing.plan_apply(base, delta, out, **options, resume=resume, progress=progress)
        document = describing.plan_document(plan)
        _show(document, report.plan_text(document, out), as_json=as_json, quiet=quiet)
        return
    with _progress("apply", quiet) as progress:
        options |= {"device": device, "expect": expect, "resume": resume, "tell": _note(quiet), "progress": progress}
        manifest = applying.apply(base, delta, out, **options)
    _show(manifest, report.applied_text(manifest, out, time.monotonic() - started), as_json=as_json, quiet=quiet)


@commands.command()
@click.argument("model", type=_PATH)
@click.option("--against", metavar="X", help="A weights digest, a manifest, a directory with one, a release.")
@click.option("--base", type=_PATH, help="With --delta: make the sum anew, and compare every element.")
@click.option("--delta", type=_PATH, help="With --base.")
@_recipe
@click.option(
    "--dtype",
    type=click.Choice(sorted(_DTYPES)),
    help="What the sum was cast to. [default: what the manifest beside MODEL says]",
)
@click.option("--load", is_flag=True, help="Also load it with transformers, and have it say a few words.")
@click.option("--load-in-8bit", "eight_bit", is_flag=True, help="The same in 8 bit, where bitsandbytes is installed.")
@click.option("--device", type=Device(), default="cpu", show_default=True, help="Where to add and load: cpu, cuda.")
@_registry
@_working
@_common
def verify(
    model: Path,
    against: str | None,
    base: Path | None,
    delta: Path | None,
    recipe: str | None,
    dtype: str | None,
    load: bool,
    eight_bit: bool,
    device: str,
    registry: tuple[Path, ...],
    memory_limit: int,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a model against what is recorded of it.

    Without options, MODEL is compared with the manifest and the SHA256SUMS beside its weights: every tensor and
    every file. Whatever is damaged or missing is named, and so are weights that do not belong there. Exits 0 only
    if something was compared and matched. What the HuggingFace Hub said of files that came from there is compared
    too; MODEL may be an id of it, OWNER/NAME[@REVISION]. With --against, weights alone are compared, not
    configuration and tokenizer.

    \b
    Examples:
      bayling-delta verify bayling-7b
      bayling-delta verify bayling-7b --against sha256:9a22cb04…
      bayling-delta verify bayling-7b --against their-manifest.json
      bayling-delta verify llama-7b --against llama-7b
      bayling-delta verify bayling-7b --base llama-7b --delta bayling-7b-diff
    """  # noqa: D301  # click looks for the character
    from bayling_delta import verifying

    if (base is None) != (delta is None):
        raise click.UsageError("--base and --delta go together")
    for option, value in (("--dtype", dtype), ("--recipe", recipe)):
        if value is not None and base is None:
            raise click.UsageError(f"{option} is of the sum that --base and --delta make anew")
    with _progress("verify", quiet) as progress:
        document = verifying.verify(
            model,
            against=against,
            base=base,
            delta=delta,
            recipe=recipe,
            dtype=_DTYPES[dtype] if dtype else None,
            memory_limit=memory_limit,
            threads=threads,
            device=device,
            load=load or eight_bit,
            eight_bit=eight_bit,
            registry=registry,
            tell=_note(quiet),
            progress=progress,
        )
    _show(document, report.verified_text(document, model), as_json=as_json, quiet=quiet)


@commands.command()
@click.argument("model", type=_PATH)
@click.option("--base", type=_PATH, required=True, help="The base that it was made of.")
@click.option("--delta", type=_PATH, required=True, help="The delta that it was made of.")
@click.option("--device", type=Device(), default="cpu", show_default=True, help="Where to add: cpu, cuda, cuda:N.")
@_registry
@_working
@_common
def repair(
    model: Path,
    base: Path,
    delta: Path,
    device: str,
    registry: tuple[Path, ...],
    memory_limit: int,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the damaged files of a rebuilt model anew, and no others.

    What is damaged or missing is seen by the manifest beside MODEL. Only what those files are made of is read of BASE
    and DELTA. A file is replaced only by one that has the manifest's digest; if one of them does not come out so,
    nothing is touched. A damaged manifest or SHA256SUMS is written anew where the other vouches for every other
    file. In the end the whole model is verified.

    \b
    Examples:
      bayling-delta repair bayling-7b --base llama-7b --delta bayling-7b-diff
    """  # noqa: D301  # click looks for the character
    from bayling_delta import repairing

    with _progress("repair", quiet) as progress:
        document = repairing.repair(
            model,
            base=base,
            delta=delta,
            memory_limit=memory_limit,
            threads=threads,
            device=device,
            registry=registry,
            tell=_note(quiet),
            progress=progress,
        )
    _show(document, report.repaired_text(document, model), as_json=as_json, quiet=quiet)


@commands.command()
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="The file to write the manifest to; it must not exist yet.")
@_working
@_common
def record(model: Path, output: Path | None, memory_limit: int, threads: int, as_json: bool, quiet: bool) -> None:
    """Digest a checkpoint, and write down what it is.

    The manifest has the digest of every tensor and file, and the weights digest, which is the same for everyone who
    has these weights, in whatever container and sharding. It goes to stdout, or to the file that -o names.
    MODEL may also be an id of the HuggingFace Hub, OWNER/NAME[@REVISION]. With -o, --json prints the manifest too.

    \b
    Examples:
      bayling-delta record llama-7b -o llama-7b.json
      bayling-delta record llama-7b/pytorch_model.bin.index.json
    """  # noqa: D301  # click looks for the character
    from bayling_delta import recording

    if output == Path("-"):
        output = None
    with _progress("record", quiet) as progress:
        manifest = recording.record(
            model, output=output, memory_limit=memory_limit, threads=threads, tell=_note(quiet), progress=progress
        )
    _show(manifest, report.recorded_text(manifest, output), as_json=as_json or output is None, quiet=quiet)


@commands.command()
@click.argument("path", type=_PATH)
@_registry
@_common
def inspect(path: Path, registry: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Say what a checkpoint is: its tensors, its architecture, delta or full model, and what is odd about it.

    PATH is a directory, one weights file, a shard index, or an id of the HuggingFace Hub whose weights are in its
    cache. Only headers, small tensors and rows of some large ones are read. What cannot be read is listed as odd, as
    long as something can.

    \b
    Examples:
      bayling-delta inspect llama-7b
      bayling-delta inspect bayling-7b-diff --json
    """  # noqa: D301  # click looks for the character
    from bayling_delta import inspecting

    document = inspecting.inspect_checkpoint(path, registry=registry)
    _show(document, report.inspected_text(document, path), as_json=as_json, quiet=quiet)


@commands.command()
@click.argument("name", required=False)
@click.option(
    "--registry", "extra", multiple=True, type=_PATH, metavar="FILE", help="Add an entry of your own. Repeatable."
)
@click.option(
    "--from-manifest", type=_PATH, metavar="FILE", help="Print the entry that a manifest makes, for --registry."
)
@click.option(
    "--name", "entry_name", metavar="NAME", help="With --from-manifest: the entry's name. [default: the file's]"
)
@click.option("--equals", metavar="NAME", help="With --from-manifest: the release whose weights these are.")
@_common
def releases(
    name: str | None,
    extra: tuple[Path, ...],
    from_manifest: Path | None,
    entry_name: str | None,
    equals: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Tell which releases are known, what is on record of them, and from where.

    Without NAME all are listed. NAME is a release, another name of it, or its id on the Hub: its files and their
    digests, its recipe, licence and prompt are told, the source of each, and what nobody has published.

    \b
    Examples:
      bayling-delta releases
      bayling-delta releases bayling-7b-diff
      bayling-delta releases --from-manifest my-llama.json --equals llama-7b > entry.json
      bayling-delta releases my-llama --registry entry.json
    """  # noqa: D301  # click looks for the character
    from bayling_delta import registering
    from bayling_delta.releases import load_releases

    if from_manifest is None and (entry_name or equals):
        raise click.UsageError("--name and --equals go with --from-manifest")
    if from_manifest is not None and name:
        raise click.UsageError("NAME and --from-manifest do not go together; --name names the new entry")
    registry = load_releases(extra)
    if from_manifest is not None:
        document = registering.entry_from_manifest(from_manifest, registry, name=entry_name, equals=equals)
        _show(document, "", as_json=True, quiet=quiet)
    elif name:
        document = registering.release_document(registry, registry.get(name))
        _show(document, report.release_text(document), as_json=as_json, quiet=quiet)
    else:
        document = registering.releases_document(registry)
        _show(document, report.releases_text(document), as_json=as_json, quiet=quiet)


# showing


def _show(document: dict[str, Any], text: str, *, as_json: bool, quiet: bool) -> None:
    _leave_signals_alone()
    if as_json or not quiet:
        if sys.stdout is None:  # it was closed before the program began, and click would say nothing
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        click.echo(report.to_json(document) if as_json else text, nl=not as_json)


def _note(quiet: bool) -> Callable[[str], None] | None:
    def note(text: str) -> None:
        with suppress(OSError):  # what cannot be told is no reason to end a run
            click.echo(report.readable(f"note: {text}"), err=True)

    return None if quiet else note


@contextmanager
def _progress(command: str, quiet: bool) -> Iterator[Any]:
    """A bar on a terminal, a line now and then in a log, nothing where quiet is asked."""
    if quiet:
        yield None
    elif sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        with ExitStack() as open_bar:
            bar: tqdm[NoReturn] | None = None  # not before the work begins: a download has bars of its own

            def move(done: int, total: int) -> None:
                nonlocal bar
                if bar is None:
                    bar = open_bar.enter_context(
                        tqdm(unit="B", unit_scale=True, desc=command, dynamic_ncols=True, leave=False, total=total)
                    )
                bar.update(done - bar.n)

            yield move
    else:
        yield _Log(command).line


class _Log:
    """Progress for a log: a line every so many seconds, with speed and time left."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._started = self._last = time.monotonic()

    def line(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not done:
            self._started = self._last = now  # what was before, a download perhaps, is none of this
        if now - self._last < _LOG_SECONDS:
            return
        self._last = now
        speed = done / (now - self._started)
        text = (
            f"{self._command}: {report.size_text(done)} of {report.size_text(total)}, "
            f"{report.size_text(int(speed))}/s, {(total - done) / speed:.0f} s left"
        )
        with suppress(OSError):  # what cannot be told is no reason to end a run
            click.echo(text, err=True)


# the process


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in words if word in commands.commands), "bayling-delta")
    try:
        _raise_on_signals()
        code = _carry_out(words, command)
        _leave_signals_alone()
    except InterruptedRunError as error:
        code = 128 + error.signal_number
        _fail(report.failure_document(command, error), report.failure_text(error), as_json="--json" in words)
    _give_up_what_is_unwritten()
    sys.exit(code)


def _carry_out(words: list[str], command: str) -> int:
    """Run a command and tell what went wrong, unless a signal ends it; return the exit code."""
    as_json = "--json" in words
    _take_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for
    gc.set_threshold(2_000_000, 50, 1000)  # headers become many small objects, none of them in cycles
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy begins threads as it is imported; nothing here uses them
    try:
        commands.main(words, prog_name="bayling-delta", standalone_mode=False)
    except BaylingDeltaError as error:
        _fail(report.failure_document(command, error), report.failure_text(error), as_json=as_json)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        message = error.format_message()
        if isinstance(error, click.NoSuchOption) and error.option_name in _OF_THE_SCRIPTS:
            message += f" The published script's {error.option_name} is {_OF_THE_SCRIPTS[error.option_name]} here."
        hint = f"\nTry '{' '.join(['bayling-delta', command][: 1 + (command in commands.commands)])} --help'."
        text = report.readable(f"error: {message}") + hint
        _fail(report.usage_document(command, "usage", message), text, as_json=as_json)
        return 2
    except (BrokenPipeError, SystemExit):  # whoever read our output has gone; click exits by itself then
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # click has put something else there
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 6
    except OSError as error:  # what happens to files is reported as such by now
        if error.errno == errno.ENOMEM:
            return _give_up(command, "internal", _NO_MEMORY.format(error.strerror), as_json=as_json)
        what = "standard output cannot be written" if error.filename is None else f"{error.filename}: is refused"
        return _give_up(command, "output", f"{what} ({error.strerror})", as_json=as_json)
    except Exception as error:  # the one place where a fault of ours becomes an exit code
        if "--debug" in words:
            raise
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "start new thread" in str(error):
            return _give_up(command, "internal", _NO_MEMORY.format(what), as_json=as_json)
        message = f"a fault in bayling-delta ({what}); run again with --debug and report what it prints"
        return _give_up(command, "internal", message, as_json=as_json)
    return 0


def _give_up_what_is_unwritten() -> None:
    """Have the interpreter not fail, with a code of its own, over what a stream has not taken and will not."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _take_closed_streams() -> None:
    """Have something at the places of the standard streams: a file opened there gets what libraries print, else."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the first place that is free


def _give_up(command: str, category: str, message: str, *, as_json: bool) -> int:
    """Tell of a fault that is not about checkpoints, ``internal`` or of the ``output``; return the exit code."""
    _fail(report.usage_document(command, category, message), report.readable(f"error: {message}"), as_json=as_json)
    return 6 if category == "output" else 1


def _fail(document: dict[str, Any], text: str, *, as_json: bool) -> None:
    _leave_signals_alone()
    with suppress(OSError):  # where not even the failure can be told, the exit code must do
        if as_json:
            click.echo(report.to_json(document), nl=False)
        click.echo(text, err=True)


_SIGNALS: Final = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _leave_signals_alone() -> None:
    """Let a signal end the program as it ends any other: it has nothing left to clean up, and tells what came of it."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _raise_on_signals() -> None:
    """Turn the first SIGINT, SIGTERM or SIGHUP into an exception; what comes after does not disturb the cleaning up."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        name = signal.Signals(number).name
        raise InterruptedRunError(Problem("signal", "", f"interrupted by {name}"), number)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks to be left alone
            signal.signal(number, interrupt)
