"""Encryption by the file system itself (fscrypt, policy version 2), through its ioctls alone.

The key is handed to the kernel and kept nowhere else. Source of the numbers and layouts:
<linux/fscrypt.h>.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Final

_SET_POLICY: Final = 0x800C6613
_ADD_KEY: Final = 0xC0506617
_REMOVE_KEY: Final = 0xC0406618
_KEY_BYTES: Final = 64
_IDENTIFIER: Final = 2  # the specifier of a version 2 key: it is named by a hash of itself
_AES_256_XTS: Final = 1
_AES_256_CTS: Final = 4
_PAD_32: Final = 3  # names are padded to 32 bytes
_STATUS_AT: Final = 40  # removal_status_flags, behind the specifier
_FILES_BUSY: Final = 1
_REMOVE_TRIES, _REMOVE_TRY_S = 20, 0.05
_ADD_HEAD: Final = struct.Struct("=II32sII32s")
_POLICY: Final = struct.Struct("=BBBB4s16s")
_REMOVE: Final = struct.Struct("=II32sI20s")


def encrypt_folder(folder: Path) -> bytes:
    """Encrypt an empty folder under a fresh random key; the name of the key, for `forget_key`.

    Raises OSError where the kernel or the file system cannot.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    request = bytearray(_ADD_HEAD.pack(_IDENTIFIER, 0, b"", _KEY_BYTES, 0, b""))
    request += os.urandom(_KEY_BYTES)
    try:
        fcntl.ioctl(fd, _ADD_KEY, request, True)
        identifier = bytes(request[8:24])
        policy = _POLICY.pack(_IDENTIFIER, _AES_256_XTS, _AES_256_CTS, _PAD_32, b"", identifier)
        fcntl.ioctl(fd, _SET_POLICY, policy)
        return identifier
    finally:
        request[:] = bytes(len(request))
        os.close(fd)


def forget_key(file_system: Path, identifier: bytes) -> None:
    """Have the kernel drop the key: what is not open becomes unreadable at once.

    Files that are open a moment longer are waited for. Raises OSError, also when some stay open.
    """
    fd = os.open(file_system, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        request = _REMOVE.pack(_IDENTIFIER, 0, identifier.ljust(32, b"\0"), 0, b"")
        for attempt in range(_REMOVE_TRIES):
            answer = bytearray(request)
            try:
                fcntl.ioctl(fd, _REMOVE_KEY, answer, True)
            except OSError as error:
                if attempt and error.errno == errno.ENOKEY:  # the last file was closed meanwhile
                    return
                raise
            if not struct.unpack_from("=I", answer, _STATUS_AT)[0] & _FILES_BUSY:
                return
            time.sleep(_REMOVE_TRY_S)
        raise OSError(errno.EBUSY, "files of an encrypted folder are still open")
    finally:
        os.close(fd)
