"""What must hold in a tier, row by row, at each level of assurance.

A row names an attack; it holds when the attack did not succeed. Levels are what a tier's probe says
of its mechanism; what a level tolerates is written here, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

# Raise it with any change of the rows, so that tiers are tested anew and adverts say by what.
SUITE_VERSION = 1

# Shown, never decisive: they leak facts of the machine or are hardening beyond the boundary.
INFORMATIVE = frozenset({"capability_bounds", "host_information", "run_from_tmp"})

# With a kernel of its own the guest may do to that kernel what it likes.
_OWN_KERNEL = frozenset({
    "accounting", "add_key", "become_group", "become_root", "bpf", "capabilities", "chroot",
    "clock", "core_pattern", "delete_module", "dmesg", "file_handle", "finit_module",
    "guest_is_root", "groups", "hostname", "init_module", "io_uring", "kcore", "kernel_addresses",
    "kexec", "keyctl", "kmsg", "memory_device", "mknod_block", "mknod_char", "mount",
    "netlink_audit", "nice", "no_filter", "other_devices", "packet_socket", "perf_event",
    "personality", "pivot_root", "proc_sys", "process_vm_readv", "ptrace", "raw_socket",
    "real_time_priority",
    "reboot", "request_key", "setns", "setuid_programs", "spare_from_memory_kill", "swap",
    "sys_write", "sysrq", "umount", "unshare_mount", "unshare_network", "unshare_user",
    "userfaultfd", "vsock",
})  # fmt: skip
# gVisor counts no inodes of a tmpfs, and its memory limit bounds them.
_GVISOR = _OWN_KERNEL | {"files_in_tmp"}
# A guest's own disk is its own: block devices, and files as many as its file system holds.
_VM = _OWN_KERNEL | {
    "block_devices", "cgroup_files", "core_dumps", "files_in_tmp", "fill_root", "host_processes",
    "release_agent", "write_root", "descriptor_flood",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One attack: whether it was held off, and whether that counts at this level.

    One that is not `shown` was neither held off nor seen to succeed: the machine was too slow.
    """

    name: str
    held: bool
    counts: bool = True
    detail: str = ""
    shown: bool = True

    @property
    def failed(self) -> bool:
        """Whether the tier may not be offered because of it."""
        return self.counts and self.shown and not self.held


def tolerated(assurance: str) -> frozenset[str]:
    """Rows that do not count at a level of assurance."""
    if assurance.startswith("vm"):
        return INFORMATIVE | _VM
    if "gvisor" in assurance or "kata" in assurance:
        return INFORMATIVE | (_VM if "kata" in assurance else _GVISOR)
    return INFORMATIVE


def has_own_kernel(assurance: str) -> bool:
    """Whether guests at this level run on a kernel of their own."""
    return tolerated(assurance) >= _OWN_KERNEL


def judge(name: str, *, held: bool, assurance: str, detail: str = "") -> Row:
    """A row as it counts at a level."""
    return Row(name, held, name not in tolerated(assurance), detail[:200])


def unshown(name: str, *, assurance: str, detail: str = "") -> Row:
    """A row of an attack that neither succeeded nor was held off."""
    counts = name not in tolerated(assurance)
    return Row(name, held=False, counts=counts, detail=detail[:200], shown=False)
