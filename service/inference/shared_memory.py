"""Tensors in system shared memory: a client on this machine writes and reads them there instead of sending them.

    client --shm_open, write--> /dev/shm/KEY    register(name, key) --open, check size--> Regions
    inference: name, offset, size --part--> read: pread, a copy | write: pwrite

Objects are read and written through their descriptor and never mapped. A client may shorten its object at any time,
and a process that then touches the mapped memory is killed by SIGBUS; `pread` just returns less. The copy costs 36 us
for 600 KB, where copying out of mapped memory costs 13 us, and its bytes cannot change while the engine reads them.

For the thread of the event loop alone.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from errno import EISDIR, ELOOP, EMFILE, ENFILE, ENOENT, ENOSPC
from weakref import finalize

from service.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)

# Where Linux keeps the objects of shm_open(3).
_FOLDER = b"/dev/shm/"

# Bytes of a file's name there.
_LONGEST_KEY = 255

# Characters of a region's name, all that is ever kept of it.
_LONGEST_NAME = 1024

# Regions at once: each costs a descriptor, of which a process has 1,024 unless it is given more.
_MOST_REGIONS = 512

# Names of regions that an error lists.
_NAMES = 5


class _Object:
    """An open shared memory object; closed when neither the table nor a call holds it any more."""

    __slots__ = ("__weakref__", "descriptor", "writable")

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        self.descriptor = descriptor
        self.writable = writable
        finalize(self, os.close, descriptor)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a shared memory object that a client has registered.

    Attributes:
        name: what inferences call it.
        key: the object's name, as the client gave it.
        offset: where it begins in the object, in bytes.
        byte_size: how long it is, in bytes.
    """

    name: str
    key: str
    offset: int
    byte_size: int
    _object: _Object = field(repr=False, compare=False)

    def part(self, *, offset: int, size: int) -> Part:
        """Return `size` bytes of it from `offset`; it can be used even if the region is unregistered meanwhile.

        Raises:
            InvalidArgument: they are not inside the region.
        """
        if offset < 0 or size < 1 or offset + size > self.byte_size:
            raise InvalidArgument(
                f"shared memory region {self.name!r}: expected an offset from 0 and a size from 1 within its "
                f"{self.byte_size} bytes, got offset {offset}, size {size}"
            )
        return Part(self.name, self.offset + offset, size, self._object)


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor lies in shared memory; `offset` counts from the beginning of the object."""

    region: str
    offset: int
    size: int
    _object: _Object = field(repr=False, compare=False)

    def read(self) -> memoryview:
        """Return a copy of its bytes.

        Raises:
            InvalidArgument: the object has become shorter since it was registered.
        """
        data = os.pread(self._object.descriptor, self.size, self.offset)
        if len(data) != self.size:
            data = self._rest(data)
        return memoryview(data)

    def write(self, data: bytes | memoryview) -> None:
        """Write data to its beginning.

        Raises:
            InvalidArgument: the data are longer, the object may not be written, or it has become shorter.
            ResourceExhausted: there is no memory left for the object.
        """
        view = memoryview(data).cast("B")
        if len(view) > self.size:
            raise InvalidArgument(
                f"shared memory region {self.region!r}: expected room for {len(view)} bytes of output, got "
                f"{self.size}; make it larger"
            )
        if not self._object.writable:
            raise InvalidArgument(
                f"shared memory region {self.region!r}: expected one that the server's user may write, got one that "
                "it may only read; change the object's mode"
            )
        # A write would make a shortened object longer again, where nobody looks for it.
        if os.fstat(self._object.descriptor).st_size < self.offset + len(view):
            raise self._shortened()
        try:
            self._write(view)
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            raise ResourceExhausted(
                f"shared memory region {self.region!r}: no memory is left in /dev/shm; free some, or make it larger"
            ) from None

    def _write(self, view: memoryview) -> None:
        offset = self.offset
        while view:
            written = os.pwrite(self._object.descriptor, view, offset)
            view, offset = view[written:], offset + written

    def _rest(self, data: bytes) -> bytes:
        """Return all of it: the kernel reads at most 2 GiB at once."""
        pieces = [data]
        missing = self.size - len(data)
        while missing:
            piece = os.pread(self._object.descriptor, missing, self.offset + self.size - missing)
            if not piece:
                raise self._shortened()
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _shortened(self) -> InvalidArgument:
        return InvalidArgument(
            f"shared memory region {self.region!r}: expected the size that it was registered with, got less: the "
            "client has shortened the object; unregister it"
        )


class Regions:
    """The regions that clients have registered.

    Args:
        enabled: whether any may be; otherwise there are none, and `register` and `part` say so.
    """

    def __init__(self, enabled: bool) -> None:  # noqa: FBT001 - the one thing to say of it
        self._enabled = enabled
        self._regions: dict[str, Region] = {}

    def register(self, name: str, *, key: str, offset: int, byte_size: int) -> None:
        """Make a part of a shared memory object known.

        Args:
            name: what inferences will call it.
            key: the object's name, with or without the slash of shm_open(3) before it.
            offset: where the part begins, in bytes.
            byte_size: how long it is, in bytes.

        Raises:
            AlreadyExists: there is a region of this name.
            FailedPrecondition: the server's user may not open the object.
            InvalidArgument: the name is empty, the key is none, or the part is not inside the object.
            NotFound: there is no such object.
            ResourceExhausted: there are too many regions.
            Unimplemented: shared memory is off.
        """
        self._check_enabled()
        if not 1 <= len(name) <= _LONGEST_NAME:
            raise InvalidArgument(
                f"shared memory region: expected a name of 1 to {_LONGEST_NAME} characters, got {len(name)}"
            )
        if name in self._regions:
            raise AlreadyExists(f"shared memory region {name!r}: is registered already; unregister it first")
        if len(self._regions) >= _MOST_REGIONS:
            raise ResourceExhausted(
                f"shared memory region {name!r}: {_MOST_REGIONS} are registered, which is the most; unregister some"
            )
        opened = _opened(name, key)
        _check_size(name, key, opened, offset=offset, byte_size=byte_size)
        self._regions[name] = Region(name, key, offset, byte_size, opened)

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all without a name; one that is not there is fine. Calls that use it can finish."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def close(self) -> None:
        """Forget all regions."""
        self._regions.clear()

    def status(self, name: str = "") -> list[Region]:
        """Return one region, or all without a name.

        Raises:
            NotFound: there is no such region.
        """
        return [self._find(name)] if name else list(self._regions.values())

    def part(self, name: str, *, offset: int, size: int) -> Part:
        """Return where a tensor lies, for the length of one call.

        Raises:
            InvalidArgument: it is not inside the region.
            NotFound: there is no such region.
            Unimplemented: shared memory is off.
        """
        self._check_enabled()
        return self._find(name).part(offset=offset, size=size)

    def read(self, name: str, offset: int, size: int) -> memoryview:
        """Return a copy of `size` bytes of a region; raises as `part` and `Part.read`."""
        return self.part(name, offset=offset, size=size).read()

    def write(self, name: str, offset: int, size: int, data: bytes | memoryview) -> None:
        """Write data into the `size` bytes of a region from `offset`; raises as `part` and `Part.write`."""
        self.part(name, offset=offset, size=size).write(data)

    def _find(self, name: str) -> Region:
        if (region := self._regions.get(name)) is None:
            known = ", ".join(map(repr, list(self._regions)[:_NAMES])) or "none"
            more = ", ..." if len(self._regions) > _NAMES else ""
            raise NotFound(
                f"shared memory region {name!r}: expected one that is registered ({known}{more}); register it first"
            )
        return region

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise Unimplemented("shared memory is off; send tensors, or set enabled = true in [shared_memory]")


def _opened(name: str, key: str) -> _Object:
    path = _FOLDER + _plain(name, key)
    try:
        try:
            opened = _Object(_descriptor(path, os.O_RDWR), writable=True)
        except PermissionError:
            opened = _Object(_descriptor(path, os.O_RDONLY), writable=False)
    except OSError as error:
        raise _refusal(name, key, error) from None
    if not stat.S_ISREG(os.fstat(opened.descriptor).st_mode):
        raise _no_object(name, key)
    return opened


def _descriptor(path: bytes, access: int) -> int:
    """Open an object: no link to somewhere else, and no pipe that would wait for its other end."""
    return os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _plain(name: str, key: str) -> bytes:
    """Return the file's name of a key, which never leads out of the folder."""
    plain = key.removeprefix("/")
    encoded = plain.encode()
    if plain in {"", ".", ".."} or "/" in plain or "\0" in plain or len(encoded) > _LONGEST_KEY:
        shown = repr(key if len(key) <= _LONGEST_KEY else key[:_LONGEST_KEY] + "…")
        raise InvalidArgument(
            f"shared memory region {name!r}: expected as key the name of a shared memory object, 1 to {_LONGEST_KEY} "
            f"bytes, '/' in front of it at most, got {shown}"
        )
    return encoded


def _check_size(name: str, key: str, opened: _Object, *, offset: int, byte_size: int) -> None:
    size = os.fstat(opened.descriptor).st_size
    if offset < 0 or byte_size < 1 or offset + byte_size > size:
        raise InvalidArgument(
            f"shared memory region {name!r}: expected an offset from 0 and a byte_size from 1 within the {size} bytes "
            f"of {key!r}, got offset {offset}, byte_size {byte_size}"
        )


def _refusal(name: str, key: str, error: OSError) -> Exception:
    if error.errno == ENOENT:
        return NotFound(
            f"shared memory region {name!r}: expected a shared memory object {key!r} on the server's machine, found "
            "none; create it first, and share /dev/shm if client and server run in containers"
        )
    if error.errno in {ELOOP, EISDIR}:
        return _no_object(name, key)
    if error.errno in {EMFILE, ENFILE}:
        return ResourceExhausted(f"shared memory region {name!r}: the server has no descriptor left; unregister some")
    if isinstance(error, PermissionError):
        return FailedPrecondition(
            f"shared memory region {name!r}: the server's user may not open {key!r}; change its mode, or run both as "
            "one user"
        )
    return error


def _no_object(name: str, key: str) -> InvalidArgument:
    return InvalidArgument(
        f"shared memory region {name!r}: expected {key!r} to be a shared memory object, got a folder, link or pipe"
    )
