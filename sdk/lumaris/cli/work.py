"""What `run` and `map` share: options of a job, files in and out, asking first, clean endings."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from lumaris.cli.options import CONTEXT, SECONDS, SIZE, Settings, buyer_options
from lumaris.cli.output import credits_of, note, size_of, time_of
from lumaris_protocol import codes, limits
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris.client import Client
    from lumaris.jobs import JobRequest, JobResult
    from lumaris_protocol.messages.advert import Tier

F = TypeVar("F", bound=Callable[..., Any])

# Everything after the image belongs to the guest, options too.
GUEST_CONTEXT: Final = {
    **CONTEXT,
    "ignore_unknown_options": False,
    "allow_interspersed_args": False,
}
_GUEST_EXIT_MAX: Final = 124  # above, shells and our own codes have meanings of their own
_FAILED: Final = 125
_QUESTIONS_MAX: Final = 3
_ANSWER_BYTES_MAX: Final = 1024


@dataclass(frozen=True)
class Wants:
    """What the options of a job ask for."""

    cpu: float
    memory: int
    disk: int
    timeout: int
    pids: int
    tier: Tier | None
    assurances: tuple[str, ...]
    egress: tuple[str, ...]
    gpus: tuple[str, ...]
    regions: tuple[str, ...]
    environment: tuple[str, ...]
    attempts: int

    def request(
        self, image: str, command: Sequence[str], *, inputs: Mapping[str, Path], max_cost: str
    ) -> JobRequest:
        """The request of one job, its image checked. Raises LumarisError."""
        from lumaris.client import make_request

        return make_request(
            image,
            command,
            inputs=inputs,
            environment=pairs(self.environment),
            max_cost=max_cost,
            timeout_s=self.timeout,
            cpu=self.cpu,
            memory_bytes=self.memory,
            disk_bytes=self.disk,
            pids=self.pids,
            tier=self.tier,
            assurances=self.assurances,
            egress=self.egress,
            gpus=self.gpus,
            regions=self.regions,
            attempts=self.attempts,
        )


def job_options(command: F) -> F:
    """Options that describe one job, in the order that help shows them; they come as `wants`."""
    options = [
        click.option("--cpu", type=float, default=1.0, show_default=True, help="Hardware threads."),
        click.option("--memory", type=SIZE, default="512MiB", show_default=True),
        click.option("--disk", type=SIZE, default="64MiB", show_default=True),
        click.option("--timeout", type=SECONDS, default="10m", show_default=True),
        click.option(
            "--tier",
            type=click.Choice(("process", "container", "vm")),
            help="How a container image is run.  [default: container]",
        ),
        click.option(
            "--assurance",
            "assurances",
            multiple=True,
            metavar="NAME",
            help="Only isolation of this kind, as `lumaris offers` shows it; repeatable.",
        ),
        click.option(
            "--egress",
            multiple=True,
            metavar="HOST:PORT",
            help="The job may connect there, through a proxy; nowhere else. Repeatable.",
        ),
        click.option(
            "--gpu",
            "gpus",
            multiple=True,
            metavar="[MODEL:]COUNT",
            help="Whole GPUs, as `lumaris offers` names them; repeatable.",
        ),
        click.option(
            "--pids",
            type=click.IntRange(1, limits.PIDS_MAX),
            default=limits.PIDS_DEFAULT,
            show_default=True,
            help="Processes and threads together.",
        ),
        click.option("--region", "regions", multiple=True, help="Only there; repeatable."),
        click.option("--env", "environment", multiple=True, metavar="NAME=VALUE"),
        click.option("--attempts", type=click.IntRange(1, 20), default=3, show_default=True),
        click.option("--yes", "-y", is_flag=True, help="Do not ask before spending."),
        click.option("--dry-run", is_flag=True, help="Show the plan; spend nothing."),
        buyer_options,
    ]
    names = [item.name for item in fields(Wants)]

    @functools.wraps(command)
    def collected(*arguments: Any, **given: Any) -> Any:
        wants = Wants(**{name: given.pop(name) for name in names})
        return command(*arguments, wants=wants, **given)

    wrapped: Any = collected
    for option in reversed(options):
        wrapped = option(wrapped)
    return cast("F", wrapped)


def guest_command(
    _context: click.Context, _parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[str, ...]:
    """The guest's command line; a `--` before it, which some write out of habit, is not part."""
    return words[1:] if words[:1] == ("--",) else words


def open_client(settings: Settings) -> Client:
    """The buyer; a context manager. Raises LumarisError."""
    from lumaris.client import Client

    return Client(state=settings.state, coordinator=settings.coordinator)


def check_image(name: str, tier: Tier | None = None) -> None:
    """Refuse an image that cannot be, before anybody is contacted. Raises LumarisError."""
    import trio

    from lumaris import images

    trio.run(functools.partial(images.resolve, name, tier=tier))


def pairs(values: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` arguments. Raises LumarisError `usage`."""
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name or not equals:
            raise LumarisError("usage", f"--env takes NAME=VALUE, not {value!r}.")
        found[name] = text
    return found


def prepare_out(folder: Path | None) -> None:
    """Make the output folder before any money is spent. Raises LumarisError `not_writable`."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LumarisError(
            "not_writable", f"{folder}: {error.strerror}", hint="Choose another with --out."
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LumarisError(
            "not_writable", f"{folder} cannot be written.", hint="Choose another with --out."
        )


def save_artifacts(result: JobResult, folder: Path) -> list[dict[str, Any]]:
    """Copy what was delivered. Raises LumarisError `not_writable`."""
    from lumaris_protocol.paths import safe_parts

    saved = []
    for path, artifact in result.artifacts.items():
        target = folder.joinpath(*safe_parts(path))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.file, target)
        except OSError as error:
            raise LumarisError(
                "not_writable",
                f"{target}: {error.strerror}. The file is kept at {artifact.file}.",
                money_moved=result.cost_nanos > 0,
            ) from None
        saved.append(describe_artifact(path, artifact, target))
    return saved


def describe_artifact(path: str, artifact: Any, file: Path) -> dict[str, Any]:
    """An artifact for JSON."""
    return {
        "path": path,
        "file": str(file),
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
    }


def asks(settings: Settings, *, yes: bool) -> bool:
    """Whether a person is there to be asked."""
    return not yes and not settings.json and sys.stdin.isatty() and sys.stderr.isatty()


def confirm() -> bool:
    """Ask on the terminal, from whichever thread.

    Reads the descriptor itself: a thread left inside `sys.stdin` by Ctrl-C holds its lock, and the
    interpreter aborts on that when it ends.
    """
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):
        return click.confirm("Continue?", default=True, err=True)
    for _ in range(_QUESTIONS_MAX):
        click.echo("Continue? [Y/n]: ", nl=False, err=True)
        line = os.read(descriptor, _ANSWER_BYTES_MAX)
        answer = line.decode(errors="replace").strip().lower()
        if line and answer in ("", "y", "yes"):
            return True
        if not line or answer in ("n", "no"):
            return False
    return False


def say_wanted(request: JobRequest) -> None:
    """The plan's first line: what is asked for."""
    gpus = "".join(f", {gpu.count} GPU {gpu.model}".rstrip() for gpu in request.gpus)
    network = f"network to {', '.join(request.egress)}" if request.egress else "no network"
    note(
        f"plan     {request.cpu_millis / 1000:g} cpu, {size_of(request.memory_bytes)} memory,"
        f" {size_of(request.disk_bytes)} disk, at most {time_of(request.wall_s)}{gpus}, {network}"
    )


def amount(nanos: int, currency: str) -> str:
    """Money for people."""
    return f"{credits_of(nanos)} {currency}"


def exit_code_of(result: JobResult) -> int:
    """The guest's own code where it has one that shells leave free, else that of the reason."""
    if result.ok:
        return 0
    status = result.exit_status
    if result.reason == "exit_nonzero" and status is not None and 1 <= status <= _GUEST_EXIT_MAX:
        return status
    return failure_of(result).exit_code or _FAILED


def failure_of(result: JobResult) -> LumarisError:
    """A failed job as an error; a reason that only the seller knows counts as its failure."""
    known = result.reason in codes.CODES and result.reason not in ("succeeded", "closed")
    code = result.reason if known else "platform_error"
    text = codes.CODES[code].meaning
    if result.reason == "exit_nonzero" and result.exit_status is not None:
        text = f"The command exited with status {result.exit_status}."
    if result.detail:
        text += f" {result.detail}"
    return LumarisError(code, text, money_moved=result.cost_nanos > 0)


@contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: the job is cancelled and sessions are settled before we go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
