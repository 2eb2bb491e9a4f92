"""The attack program of tier `wasm`: everything that WASI lets a guest ask for, in one module.

Its first argument's first letter picks the attack. Exit status 0 says that it was refused, 1 that
it succeeded, 2 that nothing was tried; bombs are judged by how the run ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_OPEN = (
    "(call $open (local.get $fd) (i32.const 1) (local.get $name) (local.get $size)"
    " (local.get $flags) (local.get $rights) (i64.const 0) (i32.const 0) (i32.const 12))"
)
GUEST_TEXT = f"""(module
 (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "environ_sizes_get"
  (func $environ (param i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "path_open"
  (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "path_symlink"
  (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "path_link"
  (func $link (param i32 i32 i32 i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "sock_accept"
  (func $accept (param i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "poll_oneoff"
  (func $poll (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
 (memory (export "memory") 4)
 (data (i32.const 1024) "../x") (data (i32.const 1040) "/etc/passwd")
 (data (i32.const 1060) "l") (data (i32.const 1064) "f") (data (i32.const 1080) "../../../../etc")
 (func $at (param $fd i32) (param $name i32) (param $size i32) (param $flags i32)
  (param $rights i64) (result i32) {_OPEN})
 (func $opened (param $errno i32) (call $exit (i32.eqz (local.get $errno))))
 (func $deep (param i32) (result i32)
  (i32.add (i32.const 1) (call $deep (i32.add (local.get 0) (i32.const 1)))))
 (func $write64k (param $fd i32)
  (i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const 65536))
  (drop (call $write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
 (func $files (local $n i32)
  (loop $more
   (i32.store8 (i32.const 1100) (i32.add (i32.const 65) (i32.and (local.get $n) (i32.const 15))))
   (i32.store8 (i32.const 1101)
    (i32.add (i32.const 65) (i32.and (i32.shr_u (local.get $n) (i32.const 4)) (i32.const 15))))
   (i32.store8 (i32.const 1102)
    (i32.add (i32.const 65) (i32.and (i32.shr_u (local.get $n) (i32.const 8)) (i32.const 15))))
   (drop (call $at (i32.const 4) (i32.const 1100) (i32.const 3) (i32.const 1) (i64.const 64)))
   (drop (call $close (i32.load (i32.const 12))))
   (local.set $n (i32.add (local.get $n) (i32.const 1)))
   (br $more)))
 (func $flood (local $n i32)
  (loop $more
   (if (call $at (i32.const 4) (i32.const 1064) (i32.const 1) (i32.const 1) (i64.const 64))
    (then (call $exit (i32.const 0))))
   (local.set $n (i32.add (local.get $n) (i32.const 1)))
   (br_if $more (i32.lt_u (local.get $n) (i32.const 20000))))
  (call $exit (i32.const 1)))
 (func $sockets (local $fd i32)
  (loop $more
   (if (i32.eqz (call $accept (local.get $fd) (i32.const 0) (i32.const 12)))
    (then (call $exit (i32.const 1))))
   (local.set $fd (i32.add (local.get $fd) (i32.const 1)))
   (br_if $more (i32.lt_u (local.get $fd) (i32.const 64)))))
 (func $is (param $letter i32) (result i32)
  (i32.eq (i32.load8_u (i32.load (i32.const 260))) (local.get $letter)))
 (func (export "_start") (local $file i32)
  (drop (call $args (i32.const 256) (i32.const 512)))
  (if (call $is (i32.const {ord("p")})) (then (call $opened
   (call $at (i32.const 4) (i32.const 1024) (i32.const 4) (i32.const 0) (i64.const 2)))))
  (if (call $is (i32.const {ord("a")})) (then (call $opened
   (call $at (i32.const 4) (i32.const 1040) (i32.const 11) (i32.const 0) (i64.const 2)))))
  (if (call $is (i32.const {ord("s")})) (then
   (drop (call $symlink (i32.const 1080) (i32.const 15) (i32.const 4) (i32.const 1060)
    (i32.const 1)))
   (call $opened
    (call $at (i32.const 4) (i32.const 1060) (i32.const 1) (i32.const 0) (i64.const 2)))))
  (if (call $is (i32.const {ord("h")})) (then (call $opened
   (call $link (i32.const 4) (i32.const 1) (i32.const 1024) (i32.const 4) (i32.const 4)
    (i32.const 1060) (i32.const 1)))))
  (if (call $is (i32.const {ord("i")})) (then (call $opened
   (call $at (i32.const 3) (i32.const 1064) (i32.const 1) (i32.const 1) (i64.const 64)))))
  (if (call $is (i32.const {ord("q")})) (then (call $opened
   (call $prestat (i32.const 5) (i32.const 0)))))
  (if (call $is (i32.const {ord("e")})) (then
   (drop (call $environ (i32.const 0) (i32.const 4)))
   (call $exit (i32.ne (i32.load (i32.const 0)) (i32.const 0)))))
  (if (call $is (i32.const {ord("n")})) (then (call $sockets) (call $exit (i32.const 0))))
  (if (call $is (i32.const {ord("d")})) (then (call $flood)))
  (if (call $is (i32.const {ord("m")})) (then
   (loop (br_if 0 (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable))
  (if (call $is (i32.const {ord("l")})) (then (loop (br 0))))
  (if (call $is (i32.const {ord("r")})) (then (drop (call $deep (i32.const 0)))))
  (if (call $is (i32.const {ord("b")})) (then
   (i32.store (i32.const 80) (i32.const 1)) (i64.store (i32.const 88) (i64.const 600000000000))
   (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 8)))))
  (if (call $is (i32.const {ord("w")})) (then
   (drop (call $at (i32.const 4) (i32.const 1064) (i32.const 1) (i32.const 1) (i64.const 64)))
   (local.set $file (i32.load (i32.const 12)))
   (drop (call $at (i32.const 4) (i32.const 1060) (i32.const 1) (i32.const 1) (i64.const 64)))
   (loop (call $write64k (local.get $file)) (call $write64k (i32.load (i32.const 12))) (br 0))))
  (if (call $is (i32.const {ord("c")})) (then (call $files)))
  (if (call $is (i32.const {ord("g")})) (then (loop (call $write64k (i32.const 1)) (br 0))))
  (call $exit (i32.const 2))))"""


@dataclass(frozen=True)
class WasmAttack:
    """A row: its letter, how the run must end, and what its limits are changed to."""

    row: str
    letter: str
    reasons: frozenset[str] = frozenset({"succeeded"})
    bounds: dict[str, float] = field(default_factory=dict)


def _bomb(row: str, letter: str, reason: str, **bounds: float) -> WasmAttack:
    return WasmAttack(row, letter, frozenset({reason}), bounds)


ATTACKS = (
    WasmAttack("path_above", "p"),
    WasmAttack("path_absolute", "a"),
    WasmAttack("path_through_symlink", "s"),
    WasmAttack("link_from_above", "h"),
    WasmAttack("write_inputs", "i"),
    WasmAttack("further_folders", "q"),
    WasmAttack("environment", "e"),
    WasmAttack("sockets", "n"),
    WasmAttack("descriptor_flood", "d"),
    _bomb("memory_bomb", "m", "killed_memory", memory_bytes=16 << 20),
    _bomb("endless_loop", "l", "killed_fuel", fuel=5_000_000),
    _bomb("deep_recursion", "r", "killed_trap"),
    _bomb("blocking_call", "b", "killed_deadline", wall_s=0.3),
    _bomb("disk_bomb", "w", "killed_disk", disk_bytes=2 << 20),
    _bomb("file_bomb", "c", "killed_inodes", scratch_files=256),
    _bomb("log_bomb", "g", "killed_log", log_bytes=1 << 20),
)
