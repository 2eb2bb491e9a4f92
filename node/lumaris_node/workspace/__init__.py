"""A job's folder on the seller: verified inputs in, checked outputs out, everything wiped after."""

from lumaris_node.workspace.collect import OutputFile, collect_outputs, open_output
from lumaris_node.workspace.workspace import Workspace, reap, wipe

__all__ = [
    "OutputFile",
    "Workspace",
    "collect_outputs",
    "open_output",
    "reap",
    "wipe",
]
