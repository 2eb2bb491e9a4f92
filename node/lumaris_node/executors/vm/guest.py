"""What boots inside a virtual machine: an initial file system of ours, and its first program.

The init mounts the image, prepares everything, says `ready` and waits for orders from its control
port. It reports facts of the guest's kernel; judging them is the host's part. All of this is the
guest's side of the wall: a job that broke its kernel could lie here, about its own end only.
"""

from __future__ import annotations

import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from lumaris_node.executors.port import JobSpec
from lumaris_node.sandbox import users
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

GUEST_UID = users.GUEST
# In loading order; what a kernel has built in is not among its module files, and is left out.
MODULES = (
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
    "virtio_blk", "virtio_console",
    "crc16", "mbcache", "jbd2", "libcrc32c", "ext4", "overlay",
)  # fmt: skip
APPLETS = (
    "cat", "chmod", "chown", "chroot", "env", "grep", "insmod", "ln", "mkdir", "mkfifo", "mknod",
    "mount", "nsenter", "reboot", "rm", "setpriv", "sh", "sleep", "stat", "tar",
)  # fmt: skip
FOLDERS = (
    "bin", "cg", "dev", "lower", "modules", "order", "port", "proc", "root", "run", "scratch",
    "sys", "writable",
)  # fmt: skip
# The guest's ports in the order in which they appear; the last one there means all are.
PORTS = ("control", "status", "stdin", "stdout", "stderr", "output")
# What a job may write beside /out: its overlay and its /tmp, both charged to its memory.
WRITABLE_BYTES_MAX = 64 * limits.MIB
WRITABLE_FILES_MAX = 4096
# The guest's kernel and our init need this on top of what the job may use.
KERNEL_BYTES = 128 * limits.MIB
PATH_DEFAULT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

INIT = r"""#!/bin/sh
export PATH=/bin
exec </dev/null >/dev/null 2>&1
# The first process reaps what a job orphans: the dead count against its limit of processes.
if [ $$ = 1 ]; then
  sh /init main &
  wait $!
  reboot -f
fi

disk() {
  for found in /sys/block/vd*; do
    read -r serial <"$found/serial"
    [ "$serial" = "$1" ] && disk=/dev/${found##*/} && return
  done
  return 1
}

find_ports() {
  tries=0
  until [ -e /port/output ] || [ $tries = 200 ]; do
    for port in /sys/class/virtio-ports/*; do
      [ -e "$port/name" ] || continue
      read -r name <"$port/name"
      [ -e "/port/$name" ] || ln -s "/dev/${port##*/}" "/port/$name"
    done
    [ -e /port/output ] || sleep 0.05
    tries=$((tries + 1))
  done
}

make_root() {
  disk root || return 1
  mount -t ext4 -o ro,noload,nosuid,nodev "$disk" /lower || return 1
  mount -t tmpfs -o "size=$WRITABLE_BYTES,nr_inodes=$WRITABLE_FILES" writable /writable
  mkdir /writable/upper /writable/work
  mount -t overlay -o nosuid,nodev,lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work \
    root /root || return 1
  mkdir -p /root/in /root/out /root/tmp /root/proc /root/dev
  mount -t tmpfs -o "size=$WRITABLE_BYTES,nr_inodes=$WRITABLE_FILES,mode=1777,nosuid,nodev" \
    tmp /root/tmp
  mount -t proc -o nosuid,nodev,noexec,hidepid=2 proc /root/proc
  disk in && mount -t ext4 -o ro,noload,nosuid,nodev "$disk" /root/in || return 1
  disk out && mount -t ext4 -o nosuid,nodev,noinit_itable "$disk" /scratch || return 1
  mkdir -p /scratch/out
  chown "$GUEST_UID:$GUEST_UID" /scratch/out
  mount -o bind /scratch/out /root/out
  while read -r serial target; do
    mkdir -p "/root$target"
    disk "$serial" && mount -t ext4 -o ro,noload,nosuid,nodev "$disk" "/root$target" || return 1
  done </order/mounts
}

make_devices() {
  mount -t tmpfs -o size=64k,mode=755,nosuid,noexec dev /root/dev
  mkdir /root/dev/shm
  mount -t tmpfs -o "size=16m,nr_inodes=$WRITABLE_FILES,mode=1777,nosuid,nodev" shm /root/dev/shm
  mknod -m 666 /root/dev/null c 1 3
  mknod -m 666 /root/dev/zero c 1 5
  mknod -m 666 /root/dev/full c 1 7
  mknod -m 666 /root/dev/random c 1 8
  mknod -m 666 /root/dev/urandom c 1 9
  ln -s /proc/self/fd /root/dev/fd
  ln -s fd/0 /root/dev/stdin
  ln -s fd/1 /root/dev/stdout
  ln -s fd/2 /root/dev/stderr
}

bound() {
  echo "+memory +pids +cpu" >/cg/cgroup.subtree_control
  mkdir /cg/job
  echo "$MEMORY_BYTES" >/cg/job/memory.max
  echo 1 >/cg/job/memory.oom.group
  echo "$PIDS" >/cg/job/pids.max
  echo "$CPU_MAX" >/cg/job/cpu.max
}

# The command is looked for where the job will look: in its own root, on its own path.
find_command() {
  there=0
  program=busybox-$TOKEN # the name tells busybox what it is, and meets none of the image's
  cat /bin/busybox >"/root/$program" && chmod 700 "/root/$program" &&
    chroot /root "/$program" sh -c "$(cat /order/there)" && there=1
  rm -f "/root/$program"
}

usage() {
  while read -r key value; do [ "$key" = oom_kill ] && oom=$value; done </cg/job/memory.events
  while read -r key value; do [ "$key" = max ] && pids=$value; done </cg/job/pids.events
  read -r peak </cg/job/memory.peak
  set -- $(stat -f -c '%S %b %f %c %d' /scratch)
  bytes=$((($2 - $3) * $1 - base_bytes))
  files=$(($4 - $5 - base_files))
}

watch() {
  while sleep 0.2; do
    usage
    [ "$oom" = 0 ] && [ "$pids" = 0 ] && [ $bytes -le "$DISK_BYTES" ] &&
      [ $files -le "$DISK_FILES" ] || echo 1 >/cg/job/cgroup.kill
  done
}

run() {
  oom=0 pids=0 peak=0 base_bytes=0 base_files=0
  usage
  base_bytes=$bytes base_files=$files
  mkfifo /run/stdout /run/stderr
  { cat /run/stdout; printf %s "$TOKEN"; } >/port/stdout &
  out=$!
  { cat /run/stderr; printf %s "$TOKEN"; } >/port/stderr &
  err=$!
  sh /order/run >/run/stdout 2>/run/stderr <"$STDIN" &
  job=$!
  echo $job >/run/pid
  watch &
  watch=$!
  wait $job
  status=$?
  rm /run/pid
  while grep -q 'populated 1' /cg/job/cgroup.events; do
    echo 1 >/cg/job/cgroup.kill
    sleep 0.02
  done
  kill $watch
  usage
  echo "end $status $oom $pids $bytes $files $peak" >&3
}

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup /cg
echo -1000 >/proc/self/oom_score_adj
# A job that asks for more than it may have is killed for it, as in a machine with more memory.
echo 1 >/proc/sys/vm/overcommit_memory
while read -r module; do insmod "/modules/$module"; done </modules/order
find_ports
exec 3>/port/status 4</port/control
. /order/order
if [ -n "$ECHO" ]; then
  echo "echo $ECHO" >&3
elif make_root; then
  make_devices
  bound
  find_command
  echo "ready $there" >&3
else
  echo failed >&3
fi
while read -r word <&4; do
  case $word in
    go) run & ;;
    term) read -r pid </run/pid && kill -TERM "$pid" ;;
    collect) tar -C /scratch/out -c -f /port/output . ;;
  esac
done
"""

THERE = """PATH={path}
cd /out
case {program} in
  */*) [ -f {program} ] && [ -x {program} ]; exit ;;
esac
IFS=:
for folder in $PATH; do
  [ -f "$folder"/{program} ] && [ -x "$folder"/{program} ] && exit 0
done
exit 1
"""


def base_archive(busybox: Path, modules: Path) -> bytes:
    """The part of the initial file system that all machines share. Blocks.

    `modules` is the folder of the kernel's modules (`/lib/modules/<release>`).
    Raises OSError when busybox is not readable.
    """
    found = {path.stem: path for path in sorted(modules.rglob("*.ko"))}
    names = [name for name in MODULES if name in found]
    files = {"init": INIT.encode(), "bin/busybox": busybox.read_bytes()}
    files |= {f"modules/{name}.ko": found[name].read_bytes() for name in names}
    files["modules/order"] = "".join(f"{name}.ko\n" for name in names).encode()
    made = [_entry(name, stat.S_IFDIR | 0o755) for name in FOLDERS]
    made.append(_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    made.append(_entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)))
    made += [_entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in APPLETS]
    made += [_entry(name, stat.S_IFREG | 0o700, data) for name, data in files.items()]
    return _archive(made)


def order_archive(files: Mapping[str, str]) -> bytes:
    """What one machine is told, as a second part of the initial file system."""
    return _archive(
        _entry(f"order/{name}", stat.S_IFREG | 0o600, text.encode("utf-8", "surrogateescape"))
        for name, text in files.items()
    )


def echo_order(word: str) -> dict[str, str]:
    """An order that only says a word back."""
    return {"order": f"ECHO={shlex.quote(word)}\n"}


def job_order(spec: JobSpec, environment: Mapping[str, str], token: str) -> dict[str, str]:
    """The order for a job. `token` ends its output streams: no job can know it.

    Raises LumarisError `bad_command`.
    """
    given = {"PATH": PATH_DEFAULT, **environment, **spec.environment}
    texts = (*spec.command, *given, *given.values())
    if not spec.command or not spec.command[0] or any("\0" in text for text in texts):
        raise LumarisError("bad_command", "The command is empty or holds a zero byte.")
    bounds = spec.limits
    told = {
        "TOKEN": token,
        "STDIN": "/port/stdin" if spec.stdin else "/dev/null",
        "GUEST_UID": GUEST_UID,
        "MEMORY_BYTES": bounds.memory_bytes,
        "PIDS": bounds.pids,
        "CPU_MAX": f"{bounds.cpu_millis * 100} 100000",
        "DISK_BYTES": bounds.disk_bytes,
        "DISK_FILES": min(bounds.scratch_files, limits.SCRATCH_FILES_MAX),
        "WRITABLE_BYTES": min(bounds.disk_bytes, WRITABLE_BYTES_MAX),
        "WRITABLE_FILES": WRITABLE_FILES_MAX,
    }
    return {
        "order": "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in told.items()),
        "there": THERE.format(
            path=shlex.quote(given["PATH"]), program=shlex.quote(spec.command[0])
        ),
        "run": "".join(_run_lines(spec, given)),
        "mounts": "".join(f"more{n} {target}\n" for n, (_, target) in enumerate(spec.mounts)),
    }


def _run_lines(spec: JobSpec, environment: Mapping[str, str]) -> Iterator[str]:
    """The script that becomes the job: into its bounds, then its root, then its user."""
    bounds = spec.limits
    yield "echo 0 >/cg/job/cgroup.procs || exit 126\n"
    yield "echo 0 >/proc/self/oom_score_adj\n"
    yield f"ulimit -c 0\nulimit -n {min(bounds.open_files, limits.OPEN_FILES_MAX)}\n"
    yield f"ulimit -f {max(1, min(bounds.disk_bytes, bounds.file_bytes) // 512)}\n"
    yield "exec 3>&- 4<&- setpriv --nnp env -i"
    for name, value in sorted(environment.items()):
        yield " " + shlex.quote(f"{name}={value}")
    yield f" /bin/nsenter -r/root -w/root/out -S {GUEST_UID} -G {GUEST_UID} --"
    for text in spec.command:
        yield " " + shlex.quote(text)
    yield "\n"


def _entry(
    name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> tuple[str, int, bytes, tuple[int, int]]:
    return name, mode, data, device


def _archive(entries: object) -> bytes:
    """A cpio archive in the kernel's `newc` format (its buffer-format document)."""
    assert isinstance(entries, list | Iterator)
    made = bytearray()
    trailer = _entry("TRAILER!!!", 0)
    for number, (name, mode, data, device) in enumerate([*entries, trailer], start=1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        made += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        made += bytes(-len(made) % 4) + data
        made += bytes(-len(made) % 4)
    return bytes(made)
