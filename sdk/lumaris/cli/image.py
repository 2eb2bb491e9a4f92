"""`lumaris node image`: the images on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lumaris.cli.options import CONTEXT, Settings, load, plain_options
from lumaris.cli.output import emit, note, size_of, table

_PART = "lumaris_node.images.manage"
_DIGEST_CHARS = 19  # as many as tell images apart
_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The node's folder: its key, node.toml and records.",
)


@click.group("image", context_settings=CONTEXT)
def image() -> None:
    """See and change the images on this machine.

    A running node need not be stopped for it.
    """


@image.command("ls")
@_state
@plain_options
@click.pass_obj
def ls(settings: Settings, state: Path | None) -> None:
    """List the images kept, the one used last first."""
    found: list[dict[str, Any]] = _load("list_images")(_folder(settings, state))
    if settings.json:
        emit({"items": found})
        return
    rows = [
        (
            item["image"][:_DIGEST_CHARS],
            size_of(item["size_bytes"]),
            item["layers"],
            "yes" if item["share"] else "no",
            item["source"].partition("@")[0] or ("imported" if item["imported"] else "a peer"),
        )
        for item in found
    ]
    if rows:
        table(("image", "size", "layers", "shared", "from"), rows)
    else:
        note("no container images; `lumaris node image import FILE` takes one in")


@image.command("import")
@_state
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--share", is_flag=True, help="Other sellers may copy it from this machine.")
@plain_options
@click.pass_obj
def import_file(settings: Settings, state: Path | None, file: Path, share: bool) -> None:
    """Take in an image from a file.

    FILE is what `docker save` writes, a tar of an OCI image layout, or the tar of a root folder.
    Prints the digest that buyers name it by.
    """
    found: dict[str, Any] = _load("import_image")(_folder(settings, state), file, share=share)
    if settings.json:
        emit(found)
    else:
        click.echo(found["image"])


@image.command("rm")
@_state
@click.argument("digest")
@plain_options
@click.pass_obj
def rm(settings: Settings, state: Path | None, digest: str) -> None:
    """Forget an image; the first characters of its digest will do."""
    found: dict[str, Any] = _load("remove_image")(_folder(settings, state), digest)
    if settings.json:
        emit(found)
    else:
        click.echo(f"removed {found['removed']}")


def _load(name: str) -> Any:
    return load(f"{_PART}:{name}", extra="node")


def _folder(settings: Settings, state: Path | None) -> Path:
    from lumaris.cli.node import folder_of  # which registers this group

    return folder_of(settings, state)
