"""The wire as text: every message with its fields, types and bounds, made from the types.

`python -m tests.wire_lock` writes `wire.lock`; `test_wire_lock.py` holds the two together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from lumaris_protocol.frames import Kind
from lumaris_protocol.messages.receipt import ReceiptBundle
from lumaris_protocol.protocols import (
    AttachHeader,
    AttachReply,
    BlobHeader,
    BlobReply,
    ContentHeader,
    Resize,
)
from lumaris_protocol.registry import MESSAGES

LOCK = Path(__file__).parents[1] / "wire.lock"
_HEAD = """\
# What is said on the wire. Made by `python -m tests.wire_lock`; never edited by hand.
# A change here changes what other versions understand: say why in the commit, and raise the
# version in the signing domain when an older reader would refuse or misread it.
"""
_BOUNDS = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")


def text() -> str:
    """The whole lock file."""
    parts: dict[str, type[msgspec.Struct]] = {}
    blocks = [f"frame {kind.name} = {int(kind)}" for kind in Kind]
    for name, kind in MESSAGES.items():
        lines = _fields(kind, parts)
        blocks.append("\n".join([f"\nmessage {name} size_max={kind.SIZE_MAX}", *lines]))
    blocks += [
        "\n".join([f"\nrecord {record.__name__}", *_fields(record, parts)])
        for record in (
            ReceiptBundle,
            BlobHeader,
            BlobReply,
            AttachHeader,
            AttachReply,
            Resize,
            ContentHeader,
        )
    ]
    done: set[str] = set()
    while left := sorted(parts.keys() - done):
        done.add(left[0])
        blocks.append("\n".join([f"\npart {left[0]}", *_fields(parts[left[0]], parts)]))
    return _HEAD + "\n" + "\n".join(blocks) + "\n"


def _fields(kind: type[msgspec.Struct], parts: dict[str, type[msgspec.Struct]]) -> list[str]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    assert info.forbid_unknown_fields, f"{kind.__name__} would take unknown fields"
    return [
        f"  {field.encode_name}: {_type(field.type, parts)}{_default(field)}"
        for field in info.fields
    ]


def _default(field: inspect.Field) -> str:
    if field.required:
        return ""
    value = field.default
    if value is msgspec.NODEFAULT:
        value = field.default_factory() if callable(field.default_factory) else None
    return f" = {msgspec.json.encode(value).decode()}"


def _type(kind: inspect.Type, parts: dict[str, type[msgspec.Struct]]) -> str:
    if isinstance(kind, inspect.StructType):
        parts[kind.cls.__name__] = kind.cls
        return kind.cls.__name__
    if isinstance(kind, inspect.LiteralType):
        return " | ".join(f'"{value}"' for value in kind.values)
    if isinstance(kind, inspect.UnionType):
        return " | ".join(_type(member, parts) for member in kind.types)
    name = type(kind).__name__.removesuffix("Type").lower()
    inner = ""
    if isinstance(kind, inspect.VarTupleType):
        name, inner = "list", f" of ({_type(kind.item_type, parts)})"
    elif isinstance(kind, inspect.DictType):
        keys, values = _type(kind.key_type, parts), _type(kind.value_type, parts)
        name, inner = "map", f" of ({keys}) to ({values})"
    return f"{name}{_bounds(kind)}{inner}"


def _bounds(kind: Any) -> str:
    found = [(name, getattr(kind, name, None)) for name in _BOUNDS]
    return "".join(f" {name}={value}" for name, value in found if value is not None)


if __name__ == "__main__":
    LOCK.write_text(text(), encoding="utf-8")
