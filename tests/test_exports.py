"""The public names of each package: adding or losing one is a decision, seen in a review."""

from __future__ import annotations

import importlib

import pytest

FACADES: dict[str, set[str]] = {
    "lumaris_protocol": set(),
    "lumaris_overlay": set(),
    "lumaris_node": set(),
    "lumaris_coordinator": {"Coordinator", "Settings", "create_app"},
}
# What a package's own modules and interpreter leave behind.
_ALWAYS = {"annotations"}


@pytest.mark.parametrize(("package", "names"), FACADES.items(), ids=FACADES)
def test_a_facade_exports_exactly_these(package: str, names: set[str]) -> None:
    module = importlib.import_module(package)
    submodules = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__name__", "") == f"{package}.{name}"
    }
    public = {name for name in vars(module) if not name.startswith("_")}
    assert public - submodules - _ALWAYS == names
    assert module.__doc__


def test_the_buyers_facade_exports_exactly_these_and_each_resolves() -> None:
    lumaris = importlib.import_module("lumaris")
    assert set(lumaris.__all__) == {
        "Artifact",
        "AsyncClient",
        "Client",
        "JobRequest",
        "JobResult",
        "JobUpdate",
        "LogLine",
        "LumarisError",
        "Plan",
        "make_request",
    }
    for name in lumaris.__all__:
        assert getattr(lumaris, name).__name__ == name


def test_the_version_is_a_release_number() -> None:
    protocol = importlib.import_module("lumaris_protocol")
    assert all(part.isdigit() for part in protocol.__version__.split("."))
