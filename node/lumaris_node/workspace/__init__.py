"""A lease's workspace on the seller: verified inputs in, checked outputs out, gone with its key."""

from lumaris_node.workspace.collect import OutputFile, collect_outputs, open_output
from lumaris_node.workspace.volume import Volume
from lumaris_node.workspace.volumes import Encryption, Volumes
from lumaris_node.workspace.workspace import LeaseWorkspace, volume_bounds

__all__ = [
    "Encryption",
    "LeaseWorkspace",
    "OutputFile",
    "Volume",
    "Volumes",
    "collect_outputs",
    "open_output",
    "volume_bounds",
]
