"""Shared memory as clients make it: what may be registered, and that nothing they do to it hurts the server."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import shared_memory as client

from service.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from service.inference.shared_memory import Regions

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 4096
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def key() -> Iterator[str]:
    """An object of SIZE bytes, made as Triton's client makes it."""
    key = f"tenet-test-{uuid.uuid4().hex}"
    handle = client.create_shared_memory_region("mine", key, SIZE)
    client.set_shared_memory_region(handle, [CONTENT])
    yield key
    client.destroy_shared_memory_region(handle)


@pytest.fixture
def regions() -> Iterator[Regions]:
    regions = Regions(enabled=True)
    yield regions
    regions.close()


def path_of(key: str) -> Path:
    return Path("/dev/shm") / key


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("slash", ["", "/"])
def test_what_a_client_wrote_is_read(slash: str, key: str, regions: Regions) -> None:
    regions.register("mine", key=slash + key, offset=100, byte_size=1000)
    assert bytes(regions.read("mine", 50, 200)) == CONTENT[150:350].tobytes()
    assert bytes(regions.read("mine", 0, 1000)) == CONTENT[100:1100].tobytes()


def test_what_is_written_is_read_by_the_client(key: str, regions: Regions) -> None:
    regions.register("mine", key=key, offset=100, byte_size=1000)
    regions.write("mine", 50, 20, b"answer")
    found = path_of(key).read_bytes()
    expected = CONTENT.tobytes()
    assert found == expected[:150] + b"answer" + expected[156:]


def test_what_was_read_does_not_change_with_the_object(key: str, regions: Regions) -> None:
    regions.register("mine", key=key, offset=0, byte_size=SIZE)
    read = regions.read("mine", 0, SIZE)
    path_of(key).write_bytes(bytes(SIZE))
    assert bytes(read) == CONTENT.tobytes()


def test_regions_are_listed(key: str, regions: Regions) -> None:
    regions.register("one", key=key, offset=0, byte_size=10)
    regions.register("two", key="/" + key, offset=20, byte_size=30)
    listed = [(region.name, region.key, region.offset, region.byte_size) for region in regions.status()]
    assert listed == [("one", key, 0, 10), ("two", "/" + key, 20, 30)]
    assert [region.name for region in regions.status("two")] == ["two"]
    with pytest.raises(NotFound, match=r"'three': expected one that is registered \('one', 'two'\)"):
        regions.status("three")


def test_a_name_is_taken_once(key: str, regions: Regions) -> None:
    regions.register("mine", key=key, offset=0, byte_size=10)
    with pytest.raises(AlreadyExists, match="'mine': is registered already; unregister it first"):
        regions.register("mine", key=key, offset=0, byte_size=10)


def test_an_unknown_region_is_not_found(regions: Regions) -> None:
    with pytest.raises(NotFound, match=r"'mine': expected one that is registered \(none\)"):
        regions.read("mine", 0, 10)
    with pytest.raises(NotFound):
        regions.write("mine", 0, 10, b"")


def test_unregistering_is_never_an_error(key: str, regions: Regions) -> None:
    regions.unregister("mine")
    for name in ("one", "two", "three"):
        regions.register(name, key=key, offset=0, byte_size=10)
    regions.unregister("two")
    assert [region.name for region in regions.status()] == ["one", "three"]
    regions.unregister()
    assert regions.status() == []


def test_a_call_that_uses_a_region_can_finish_when_it_is_unregistered(key: str, regions: Regions) -> None:
    regions.register("mine", key=key, offset=0, byte_size=SIZE)
    part = regions.part("mine", offset=10, size=20)
    before = descriptors()
    regions.unregister("mine")
    regions.register("mine", key=key, offset=2000, byte_size=100)
    assert bytes(part.read()) == CONTENT[10:30].tobytes()
    part.write(b"late")
    assert path_of(key).read_bytes()[10:14] == b"late"
    del part
    regions.unregister()
    assert descriptors() == before - 1


def test_unregistered_objects_are_closed(key: str, regions: Regions) -> None:
    before = descriptors()
    for number in range(20):
        regions.register(str(number), key=key, offset=0, byte_size=10)
    assert descriptors() == before + 20
    regions.unregister()
    assert descriptors() == before


@pytest.mark.parametrize(
    ("offset", "byte_size"),
    [(0, 0), (0, SIZE + 1), (SIZE, 1), (1, SIZE), (2**64 - 1, 1), (2**64 - 1, 2**64 - 1), (0, 2**64 - 1)],
    ids=str,
)
def test_a_region_outside_its_object_is_refused(offset: int, byte_size: int, key: str, regions: Regions) -> None:
    before = descriptors()
    with pytest.raises(InvalidArgument, match=rf"within the {SIZE} bytes of .*, got offset {offset}, byte_size"):
        regions.register("mine", key=key, offset=offset, byte_size=byte_size)
    assert regions.status() == []
    assert descriptors() == before


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (0, 101), (100, 1), (-1, 10), (10, -1), (2**63 - 1, 2**63 - 1)], ids=str
)
def test_a_tensor_outside_its_region_is_refused(offset: int, size: int, key: str, regions: Regions) -> None:
    regions.register("mine", key=key, offset=0, byte_size=100)
    with pytest.raises(InvalidArgument, match="within its 100 bytes, got offset"):
        regions.read("mine", offset, size)
    with pytest.raises(InvalidArgument, match="within its 100 bytes, got offset"):
        regions.write("mine", offset, size, b"x")


def test_an_output_without_room_is_refused_and_nothing_is_written(key: str, regions: Regions) -> None:
    regions.register("mine", key=key, offset=0, byte_size=100)
    with pytest.raises(InvalidArgument, match="expected room for 21 bytes of output, got 20; make it larger"):
        regions.write("mine", 0, 20, bytes(21))
    assert path_of(key).read_bytes() == CONTENT.tobytes()


def test_a_missing_object_is_not_found(regions: Regions) -> None:
    with pytest.raises(NotFound, match="expected a shared memory object '/tenet-none' on the server's machine"):
        regions.register("mine", key="/tenet-none", offset=0, byte_size=10)


@pytest.mark.parametrize(
    "key",
    ["", "/", ".", "..", "/..", "../../etc/passwd", "//etc/passwd", "/a/b", "a/", "a\0b", "x" * 256, "ä" * 200],
    ids=repr,
)
def test_a_key_that_is_no_plain_name_is_refused(key: str, regions: Regions) -> None:
    with pytest.raises(InvalidArgument, match="expected as key the name of a shared memory object"):
        regions.register("mine", key=key, offset=0, byte_size=1)


@given(st.text())
def test_no_key_leads_out_of_the_folder(key: str) -> None:
    with pytest.raises((InvalidArgument, NotFound)):
        Regions(enabled=True).register("mine", key=key, offset=0, byte_size=1 << 62)


@pytest.mark.parametrize("name", ["", "x" * 1025])
def test_a_name_has_some_characters_and_not_too_many(name: str, key: str, regions: Regions) -> None:
    with pytest.raises(InvalidArgument, match="expected a name of 1 to 1024 characters"):
        regions.register(name, key=key, offset=0, byte_size=1)


def test_a_link_is_not_followed(key: str, regions: Regions, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    link = path_of(key + "-link")
    link.symlink_to(secret)
    try:
        with pytest.raises(InvalidArgument, match="to be a shared memory object, got a folder, link or pipe"):
            regions.register("mine", key=link.name, offset=0, byte_size=6)
    finally:
        link.unlink()


def test_neither_folders_nor_pipes_are_objects(key: str, regions: Regions) -> None:
    folder, pipe = path_of(key + "-folder"), path_of(key + "-pipe")
    folder.mkdir()
    os.mkfifo(pipe)
    try:
        for path in (folder, pipe):
            with pytest.raises(InvalidArgument, match="to be a shared memory object, got a folder, link or pipe"):
                regions.register("mine", key=path.name, offset=0, byte_size=1)
    finally:
        folder.rmdir()
        pipe.unlink()


@pytest.mark.parametrize("left", [0, 10, SIZE - 1])
def test_an_object_that_is_shortened_later_is_an_error_and_no_signal(left: int, key: str, regions: Regions) -> None:
    regions.register("mine", key=key, offset=0, byte_size=SIZE)
    os.truncate(path_of(key), left)
    with pytest.raises(InvalidArgument, match="the client has shortened the object; unregister it"):
        regions.read("mine", 0, SIZE)
    with pytest.raises(InvalidArgument, match="the client has shortened the object; unregister it"):
        regions.write("mine", 0, SIZE, bytes(SIZE))
    assert path_of(key).stat().st_size == left


def test_an_object_that_is_deleted_later_is_used_to_the_end(key: str, regions: Regions) -> None:
    """As with every descriptor: the client has it open, too."""
    copy = path_of(key + "-copy")
    copy.write_bytes(CONTENT.tobytes())
    regions.register("mine", key=copy.name, offset=0, byte_size=SIZE)
    copy.unlink()
    assert bytes(regions.read("mine", 0, SIZE)) == CONTENT.tobytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_objects_of_others_are_refused(key: str, regions: Regions) -> None:
    path_of(key).chmod(0o400)
    regions.register("readable", key=key, offset=0, byte_size=SIZE)
    assert bytes(regions.read("readable", 0, SIZE)) == CONTENT.tobytes()
    with pytest.raises(InvalidArgument, match="expected one that the server's user may write"):
        regions.write("readable", 0, 10, b"x")
    path_of(key).chmod(0)
    with pytest.raises(FailedPrecondition, match="the server's user may not open"):
        regions.register("closed", key=key, offset=0, byte_size=SIZE)


def test_there_is_a_most(key: str, regions: Regions) -> None:
    for number in range(512):
        regions.register(str(number), key=key, offset=0, byte_size=1)
    with pytest.raises(ResourceExhausted, match="512 are registered, which is the most; unregister some"):
        regions.register("one more", key=key, offset=0, byte_size=1)


def test_nothing_can_be_registered_where_it_is_off(key: str) -> None:
    regions = Regions(enabled=False)
    with pytest.raises(Unimplemented, match=r"shared memory is off; .* \[shared_memory\]"):
        regions.register("mine", key=key, offset=0, byte_size=10)
    with pytest.raises(Unimplemented):
        regions.read("mine", 0, 10)
    regions.unregister("mine")
    assert regions.status() == []
