"""The coordinator's own keys: a root that only signs the key list, and keys that sign the rest.

In the state: `coordinator.key` is the first signing key, `keys/<peer id>.key` are later ones,
`keys/list` is the list in force and `keys/network` the network that it is signed for, which nothing
in a signature tells. `keys/root.key` is made with the first list and belongs offline: the
coordinator itself never reads it again. Agreements name a key; what is signed for them is
signed with that key for as long as it is valid, and new registrations are given the newest.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from lumaris_coordinator.bounds import KEY_ENDS_SOON_S, KEY_STARTS_AFTER_S, SIGNING_KEY_LIFETIME_S
from lumaris_overlay.private_files import (
    load_or_create_key,
    make_private_folder,
    read_key,
    write_key,
    write_private_file,
)
from lumaris_protocol import codec, key_list
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import NOTICE_BYTES_MAX, SIGNING_KEYS_MAX
from lumaris_protocol.messages.notice import KeyList, SigningKey

log = logging.getLogger(__name__)

FIRST_KEY: Final = "coordinator.key"
FOLDER: Final = "keys"
ROOT_KEY: Final = "root.key"
LIST: Final = "list"
NETWORK: Final = "network"
_NETWORK_BYTES_MAX: Final = 256


@dataclass(frozen=True)
class _Held:
    """One reading of the files; replaced as a whole, so every thread sees a whole one. `own` is the
    list without the keys whose files are elsewhere."""

    keys: dict[str, KeyPair]
    list: Signed[KeyList]
    own: KeyList


class KeyRing:
    """The keys in a state directory. Makes the first key, a root and a list where there is none,
    unless `create` is false: a folder that was used before must have had them.

    Raises LumarisError `not_writable`, `unsafe_key_file` or `config_invalid`.
    """

    def __init__(
        self,
        state: Path,
        *,
        network: str,
        clock: Callable[[], float] = time.time,
        create: bool = True,
    ) -> None:
        if not create and not is_whole(state):
            raise LumarisError(
                "config_invalid",
                f"{state} was used before, and its keys are gone.",
                hint="Bring back coordinator.key and the folder keys.",
            )
        self._state, self._network, self._clock = state, network, clock
        self.first: Final = load_or_create_key(state / FIRST_KEY)
        self._held = self._read()

    @property
    def list(self) -> Signed[KeyList]:
        """The list in force."""
        return self._held.list

    @property
    def current(self) -> KeyPair:
        """The key that signs what names no other: the newest whose file is here, since what any
        valid key signs counts. Raises LumarisError `config_invalid` when there is none."""
        held = self._held
        peer = key_list.newest(held.own, now=self._clock())
        if peer is None:
            raise LumarisError(
                "config_invalid",
                "No signing key of the coordinator is valid, or its file is missing.",
                hint="Run `lumaris coordinator keys rotate --now`.",
            )
        return held.keys[peer]

    def peers(self) -> frozenset[str]:
        """The peer ids of every key that counts now."""
        return key_list.valid(self._held.list.message, now=self._clock())

    def names(self) -> frozenset[str]:
        """Every key that was ever the coordinator's: money held under one is paid out even when
        the key has ended or was revoked."""
        held = self._held
        return frozenset(held.keys) | {key.peer for key in held.list.message.keys}

    def check(self, peer: str) -> None:
        """What a document must name as its coordinator to be taken.

        Raises LumarisError: `wrong_domain` for a key that is not ours, `revoked` for one that no
        longer counts.
        """
        if peer in self.peers():
            return
        if peer in self._held.keys:
            raise LumarisError("revoked", "The coordinator's key in the document counts no more.")
        raise LumarisError("wrong_domain", "The document names another coordinator.")

    def signer(self, peer: str) -> KeyPair:
        """What to sign with for an agreement that names `peer`: that key while it is valid, and
        then the current one, since money must come to rest whatever happened to a key.

        Raises LumarisError `busy` for a valid key whose file only other replicas have.
        """
        held = self._held
        if peer not in self.peers():
            return self.current
        if peer not in held.keys:
            raise LumarisError("busy", "This replica was not given the key that the session names.")
        return held.keys[peer]

    def found(self) -> Signed[KeyList]:
        """The list to go on with by the files, not in force yet. One that cannot be read or goes
        back is logged: the one in force stays."""
        held = self._held.list
        try:
            data = read_list(self._state / FOLDER / LIST, self._network).data
            return key_list.check(data, network=self._network, now=self._clock(), held=held)
        except LumarisError as error:
            log.error("the key list in %s is not used: %s", self._state / FOLDER, error)
            return held

    def take(self, data: bytes) -> bool:
        """Go on with a list of the same root, and with the key files that are here now; whether it
        is another one. The folder keeps it, so that no older one is gone back to.

        Raises LumarisError as `key_list.check`, or `not_writable`.
        """
        before = self._held.list
        found = key_list.check(data, network=self._network, now=self._clock(), held=before)
        path = self._state / FOLDER / LIST
        if found is not before and read_list(path, self._network).message.seq < found.message.seq:
            with _changing(self._state):
                _replace(path, found.data)
        self._held = self._hold(found)
        return found is not before

    def reload(self) -> bool:
        """Take up what the files say; whether the list is another one now."""
        return self.take(self.found().data)

    def warn(self) -> None:
        """Log when the current key ends soon, or the file of a newer one is missing."""
        current = self.current.peer_id
        newest = key_list.newest(self.list.message, now=self._clock())
        if newest != current:
            log.error(
                "the signing key %s has no file here: copy %s.key from the replica that made it to"
                " %s; %s signs meanwhile",
                newest,
                newest,
                self._state / FOLDER,
                current,
            )
        ends = next(key.not_after for key in self.list.message.keys if key.peer == current)
        if ends - self._clock() < KEY_ENDS_SOON_S:
            log.warning("the signing key ends soon: run `lumaris coordinator keys rotate`")

    def _read(self) -> _Held:
        folder = self._state / FOLDER
        path = folder / LIST
        require_network(self._state, self._network)
        if not path.exists():
            make_private_folder(folder)
            _create(path, self._first_list(folder).data)
        held = self._hold(read_list(path, self._network))
        if not network_of(self._state):
            _create(folder / NETWORK, f"{self._network}\n".encode())
        return held

    def _hold(self, found: Signed[KeyList]) -> _Held:
        files = [self._state / FOLDER / f"{key.peer}.key" for key in found.message.keys]
        pairs = [self.first, *(read_key(file) for file in files if file.exists())]
        keys = {str(pair.peer_id): pair for pair in pairs}
        listed = tuple(key for key in found.message.keys if key.peer in keys)
        return _Held(keys, found, replace(found.message, keys=listed))

    def _first_list(self, folder: Path) -> Signed[KeyList]:
        root, now = load_or_create_key(folder / ROOT_KEY), int(self._clock())
        # The first key may be older than its list: what it signed before must stay valid.
        only = SigningKey(
            peer=self.first.peer_id, not_before=0, not_after=now + SIGNING_KEY_LIFETIME_S
        )
        message = KeyList(root=root.peer_id, seq=1, keys=(only,), issued_at=now)
        return codec.sign(message, root, self._network)


def is_whole(state: Path) -> bool:
    """Whether a folder holds the keys of a coordinator."""
    return (state / FIRST_KEY).exists() and (state / FOLDER / LIST).exists()


def network_of(state: Path) -> str:
    """The network that the keys of a folder sign for, fixed by the first start; "" before that.

    Raises LumarisError `config_invalid`.
    """
    path = state / FOLDER / NETWORK
    try:
        with path.open("rb") as file:
            return file.read(_NETWORK_BYTES_MAX).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise LumarisError("config_invalid", f"{path}: {error.strerror}") from None


def require_network(state: Path, network: str) -> None:
    """Whether the folder may be used for this network. Raises LumarisError `config_invalid`."""
    known = network_of(state)
    if known and known != network:
        raise LumarisError(
            "config_invalid",
            f"{state} is of the network {known}, and {network} was named.",
            hint="A network keeps its name: leave `network` out, or choose another folder.",
        )


def read_list(path: Path, network: str) -> Signed[KeyList]:
    """The key list in a file. Raises LumarisError `config_invalid`."""
    try:
        with path.open("rb") as file:
            data = file.read(NOTICE_BYTES_MAX + 1)
        return key_list.open_list(data, network=network)
    except (OSError, EnvelopeError) as error:
        raise LumarisError(
            "config_invalid",
            f"{path} is no key list of the network {network}: {error}",
            hint="Is `network` as it was? It stands in coordinator.toml.",
        ) from None


def rotate(
    state: Path, root: KeyPair, *, network: str, now: int, after_s: int = KEY_STARTS_AFTER_S
) -> KeyPair:
    """Add a signing key that takes over after a while; the old ones stay valid to their ends.

    The wait is for the others: programs that fetch the list when they renew know the new key before
    it signs. A running coordinator takes the list up within a minute.
    Raises LumarisError: `root_changed`, `limit_reached`, `config_invalid`, `not_writable`, `busy`,
    or `usage` while another key waits and this one would wait too.
    """
    with _changing(state):
        return _rotate(state, root, network, now, after_s)


def _rotate(state: Path, root: KeyPair, network: str, now: int, after_s: int) -> KeyPair:
    held = _list_of(state, root, network)
    keys = tuple(key for key in held.keys if key.not_after > now)
    if len(keys) >= SIGNING_KEYS_MAX:
        raise LumarisError("limit_reached", f"{SIGNING_KEYS_MAX} keys have not ended yet.")
    if after_s and (waiting := waiting_in(held, now=now)):
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(waiting[0].not_before))
        raise LumarisError(
            "usage",
            f"{waiting[0].peer} waits already, and signs from {at}.",
            hint="One rotation is enough. If that key shall not come, revoke it first; --now"
            " adds a key that signs at once.",
        )
    seed = os.urandom(32)
    peer = KeyPair(seed).peer_id
    start = now + after_s
    fresh = SigningKey(peer=peer, not_before=start, not_after=start + SIGNING_KEY_LIFETIME_S)
    # The key's file first: a list must never name a key that a crash kept from the disk.
    try:
        key = write_key(state / FOLDER / f"{peer}.key", seed)
    except OSError as error:
        raise LumarisError("not_writable", f"{state / FOLDER}: {error.strerror}") from None
    _write(state, held, (*keys, fresh), root, network, now)
    return key


def waiting_in(message: KeyList, *, now: float) -> list[SigningKey]:
    """The keys that will sign and do not yet, the next one first."""
    found = [key for key in message.keys if now < key.not_before and not key.revoked_at]
    return sorted(found, key=lambda key: key.not_before)


def revoke(state: Path, root: KeyPair, peer: str, *, network: str, now: int) -> None:
    """Take a signing key back: nothing that it signed counts from now on.

    Raises LumarisError: `root_changed`, `not_found`, `busy`, or `usage` for the last key that is
    valid.
    """
    with _changing(state):
        _revoke(state, root, peer, network, now)


def _revoke(state: Path, root: KeyPair, peer: str, network: str, now: int) -> None:
    held = _list_of(state, root, network)
    if all(key.peer != peer for key in held.keys):
        raise LumarisError(
            "not_found",
            "The key list does not name that key.",
            hint="`lumaris coordinator keys list` shows the keys that it names.",
        )
    keys = tuple(
        replace(key, revoked_at=now) if key.peer == peer and not key.revoked_at else key
        for key in held.keys
    )
    if key_list.newest(replace(held, keys=keys), now=now) is None:
        raise LumarisError(
            "usage", "No valid key would be left.", hint="Run `keys rotate --now` first."
        )
    _write(state, held, keys, root, network, now)


def _list_of(state: Path, root: KeyPair, network: str) -> KeyList:
    held = read_list(state / FOLDER / LIST, network).message
    if held.root != root.peer_id:
        raise LumarisError(
            "root_changed",
            "The file does not hold the root key of this list.",
            hint=f"Name the file of the root key {held.root}.",
        )
    return held


def _write(
    state: Path,
    held: KeyList,
    keys: tuple[SigningKey, ...],
    root: KeyPair,
    network: str,
    now: int,
) -> None:
    message = KeyList(root=root.peer_id, seq=held.seq + 1, keys=keys, issued_at=now)
    _replace(state / FOLDER / LIST, codec.sign(message, root, network).data)


def _replace(path: Path, data: bytes) -> None:
    try:
        write_private_file(path, data)
    except OSError as error:
        raise LumarisError("not_writable", f"{path}: {error.strerror}") from None


@contextmanager
def _changing(state: Path) -> Iterator[None]:
    """Be the only one who changes the list: of two changes at once one would be lost, and its key
    with it. Raises LumarisError: `busy`, `config_invalid`."""
    folder = state / FOLDER
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LumarisError("config_invalid", f"{folder}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise LumarisError("busy", f"Another command changes the keys in {folder}.") from None
    finally:
        os.close(descriptor)


def _create(path: Path, data: bytes) -> None:
    """Write a file unless another program was quicker: of two first lists only one may be seen."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        write_private_file(draft, data)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    except OSError as error:
        raise LumarisError("not_writable", f"{path}: {error.strerror}") from None
