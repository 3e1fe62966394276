"""Repositories in object stores: a real server that speaks S3, on this machine, and fsspec's memory."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from export.manifest import Images, Manifest, Parity, Requirements, Source, TensorSpec, Twin, sha256_of
from export.repository import Draft, Repository, Version, open_repository
from export.store import remote
from export.store.cache import OFFLINE, cache_of
from export.store.model_state import ModelState
from export.store.storage import Storage
from tests.export.disks import read_only, small_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_WEIGHTS = b"weights"

# What the S3 server of these tests was asked.
_REQUESTS: list[str] = []


def _fill(draft: Draft, *, status: str = "passed", source: Version | None = None) -> None:
    path = draft.folder / "model.onnx"
    path.write_bytes(f"engine {draft.version}".encode())
    (draft.folder / "checkpoint").mkdir()
    weights = draft.folder / "checkpoint" / "weights"
    weights.write_bytes(_WEIGHTS)
    images = Images(description="noise", n=8, sha256="0" * 64, seed=0)
    made_from = None
    if source is not None:
        made_from = Source(model=source.manifest.model, version=source.manifest.version, sha256=source.manifest.sha256)
    draft.describe(
        Manifest(
            model=draft.model,
            version=draft.version,
            file="model.onnx",
            sha256=sha256_of(path),
            runtime="onnxruntime",
            precision="fp32",
            inputs=(TensorSpec(name="images", datatype="FP32", shape=(-1, 3, 8, 8)),),
            outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
            class_names=("cat", "dog"),
            max_batch=4,
            source=made_from,
            twin=None if source else Twin(folder="checkpoint", file="weights", sha256=sha256_of(weights)),
            requires=Requirements(runtime=">=1.27"),
            parity=Parity.model_validate({"status": status, "reference": "none", "images": images}),
        )
    )


def _publish(
    repository: Repository, model: str = "pets", *, status: str = "passed", source: Version | None = None
) -> Version:
    with repository.draft(model) as draft:
        _fill(draft, status=status, source=source)
    return repository.find(model, draft.version)


def _publish_often(url: str, times: int) -> None:
    for _ in range(times):
        _publish(open_repository(url))


class _Store:
    """What a test needs to see of a store, and to do to it, without the repository."""

    def __init__(self, url: str, filesystem: Any) -> None:
        self.url = url
        self.fs = filesystem

    def names(self) -> list[str]:
        root = self.fs._strip_protocol(self.url)
        return sorted(name[len(root) + 1 :] for name in self.fs.find(root))

    def read(self, path: str) -> bytes:
        return bytes(self.fs.cat_file(f"{self.url}/{path}"))

    def write(self, path: str, content: bytes) -> None:
        self.fs.pipe_file(f"{self.url}/{path}", content)

    def remove(self, path: str) -> None:
        self.fs.rm_file(f"{self.url}/{path}")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server on this machine that answers one request after the other, as its conditions need."""
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    application = moto_server.DomainDispatcherApplication(moto_server.create_backend_app)

    def counting(environ: Any, start_response: Any) -> Any:
        _REQUESTS.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, counting)
    thread = threading.Thread(target=server.serve_forever, name="s3")
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> _Store:
    fsspec = importlib.import_module("fsspec")

    for key, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    filesystem = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = f"models-{uuid.uuid4().hex}"
    filesystem.mkdir(bucket)
    return _Store(f"s3://{bucket}/all", filesystem)


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> _Store:
    fsspec = importlib.import_module("fsspec")
    if request.param == "s3":
        found: _Store = request.getfixturevalue("s3")
        return found
    return _Store(f"memory://models-{uuid.uuid4().hex}/all", fsspec.filesystem("memory"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tenet" / "models"


@pytest.fixture
def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go on as a machine that has fetched nothing yet."""
    return lambda name: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


def test_a_version_is_published_and_read_by_another_machine(
    store: _Store, another_machine: Callable[[str], None]
) -> None:
    published = _publish(open_repository(store.url))
    assert str(published) == "pets@1"
    another_machine("other")
    repository = open_repository(f"{store.url}/")
    assert (repository.models(), repository.versions("pets")) == (["pets"], [1])
    version = repository.parse("pets@1")
    assert version.manifest == published.manifest
    assert (version.folder / "model.onnx").read_bytes() == b"engine 1"
    twin = repository.twin_of(version)
    assert twin is not None
    assert (twin.folder / twin.file).read_bytes() == _WEIGHTS
    assert repository.check(version) == published.manifest


def test_the_manifest_comes_last_and_triton_is_told_after_it(store: _Store) -> None:
    repository = open_repository(store.url)
    with repository.draft("pets") as draft:
        _fill(draft)
        assert [name for name in store.names() if name.startswith("pets/1/")] == []
        assert b"versions: []" in store.read("pets/config.pbtxt")
    assert "pets/1/manifest.json" in store.names()
    assert b"versions: [1]" in store.read("pets/config.pbtxt")
    assert store.read("pets/labels.txt") == b"cat\ndog\n"


def test_files_without_a_manifest_are_seen_by_nobody(store: _Store) -> None:
    repository = open_repository(store.url)
    _publish(repository)
    store.write("pets/7/model.onnx", b"half")
    assert repository.versions("pets") == [1]
    assert str(_publish(repository)) == "pets@8"


def test_a_failed_draft_leaves_no_files_and_its_number_is_not_given_again(store: _Store) -> None:
    repository = open_repository(store.url)
    _publish(repository)

    def fail() -> None:
        with repository.draft("pets") as draft:
            _fill(draft)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [name for name in store.names() if name.startswith("pets/2/")] == []
    assert str(_publish(repository)) == "pets@3"


def test_publishers_in_threads_get_numbers_of_their_own(store: _Store) -> None:
    writers = [threading.Thread(target=_publish_often, args=(store.url, 2)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    repository = open_repository(store.url)
    assert repository.versions("pets") == [1, 2, 3, 4, 5, 6]
    repository.check(repository.find("pets"))


def test_publishers_on_two_machines_get_numbers_of_their_own(s3: _Store, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = []
    for name in ("one", "two"):
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / name)  # put back by the fixture; nothing of the two is shared
        writers.append(context.Process(target=_publish_often, args=(s3.url, 2)))
        writers[-1].start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    repository = open_repository(s3.url)
    assert repository.versions("pets") == [1, 2, 3, 4]
    for number in repository.versions("pets"):
        assert repository.check(repository.find("pets", number)).version == number


def test_aliases_move_and_guard_what_they_point_at(store: _Store, another_machine: Callable[[str], None]) -> None:
    repository = open_repository(store.url)
    first, second = _publish(repository), _publish(repository)
    assert repository.promote(first) is None
    assert repository.promote(second) == 1
    another_machine("other")
    repository = open_repository(store.url)
    assert str(repository.parse("pets@stable")) == "pets@2"
    with pytest.raises(ValueError, match="its alias points at it: stable"):
        repository.remove(second.manifest.model, second.manifest.version)
    repository.remove(second.manifest.model, second.manifest.version, force=True)
    assert (repository.versions("pets"), repository.aliases("pets")) == ([1], {})
    assert [name for name in store.names() if name.startswith("pets/2/")] == []
    assert b"versions: [1]" in store.read("pets/config.pbtxt")
    assert str(_publish(repository)) == "pets@3"


def test_a_promotion_between_reading_and_writing_is_not_lost(s3: _Store) -> None:
    repository = open_repository(s3.url)
    version = _publish(repository)
    repository.promote(version, "zero")
    met: list[ModelState] = []

    def change(state: ModelState) -> ModelState:
        met.append(state)
        if len(met) == 1:  # another machine is quicker
            repository.promote(version, "one")
        return state.model_copy(update={"aliases": {**state.aliases, "two": 1}})

    repository._storage.update("pets", change)
    assert repository.aliases("pets") == {"zero": 1, "one": 1, "two": 1}
    assert [set(state.aliases) for state in met] == [{"zero"}, {"zero", "one"}]


def test_a_proof_is_recorded_and_triton_is_told(store: _Store) -> None:
    repository = open_repository(store.url)
    version = _publish(repository, status="not run")
    assert b"versions: []" in store.read("pets/config.pbtxt")
    repository.record_proof(version, version.manifest.parity.model_copy(update={"status": "passed"}))
    assert b"versions: [1]" in store.read("pets/config.pbtxt")
    found = repository.find("pets")
    assert found.manifest.servable
    # What was fetched before follows.
    assert (found.folder / "manifest.json").read_bytes() == found.manifest.as_json()


def test_prune_follows_the_policy_and_sweeps_what_is_a_day_old(store: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = open_repository(store.url)
    source = _publish(repository)
    _publish(repository)
    _publish(repository)
    _publish(repository, "pets-int8", source=source)
    store.write("pets/9/model.onnx", b"half")
    store.write("pets/.numbers/9", b"")
    store.write("pets/20260101/photo.png", b"somebody else's")
    pruned = repository.prune(keep=1)
    assert [str(version) for version in pruned.versions] == ["pets@2"]
    assert pruned.remains == ()  # somebody may still be at it
    assert repository.versions("pets") == [1, 3]
    monkeypatch.setattr(remote, "_ABANDONED", timedelta(0))
    assert repository.prune().remains == ("pets/9",)
    assert [name for name in store.names() if name.startswith("pets/9/")] == []
    assert store.read("pets/20260101/photo.png") == b"somebody else's"
    assert repository.prune(older_than=timedelta(days=1)).versions == ()


class TestCache:
    def test_a_damaged_file_is_fetched_again(self, store: _Store) -> None:
        repository = open_repository(store.url)
        engine = _publish(repository).folder / "model.onnx"
        engine.write_bytes(b"engine X")
        assert (repository.find("pets").folder / "model.onnx").read_bytes() == b"engine 1"

    def test_what_is_there_is_not_fetched_again(self, store: _Store, another_machine: Callable[[str], None]) -> None:
        _publish(open_repository(store.url))
        another_machine("other")
        first = open_repository(store.url).find("pets").folder / "model.onnx"
        inode = first.stat().st_ino
        assert (open_repository(store.url).find("pets").folder / "model.onnx").stat().st_ino == inode

    def test_a_file_that_was_changed_in_the_store_is_refused(
        self, store: _Store, another_machine: Callable[[str], None]
    ) -> None:
        repository = open_repository(store.url)
        version = _publish(repository)
        store.write("pets/1/model.onnx", b"engine X")
        with pytest.raises(ValueError, match=r"pets/1/model\.onnx: expected sha256 .* as in its manifest, got"):
            repository.check(version)
        another_machine("other")
        with pytest.raises(ValueError, match="the file was changed or damaged in the store"):
            open_repository(store.url).find("pets").folder  # noqa: B018 - this is what fetches
        assert list(cache_of(store.url).rglob("model.onnx")) == []

    def test_a_missing_file_is_named(self, store: _Store, another_machine: Callable[[str], None]) -> None:
        _publish(open_repository(store.url))
        store.remove("pets/1/checkpoint/weights")
        another_machine("other")
        version = open_repository(store.url).find("pets")
        with pytest.raises(
            FileNotFoundError, match="pets/1/checkpoint/weights: expected a file of the repository here"
        ):
            version.folder  # noqa: B018

    def test_a_manifest_cannot_reach_out_of_its_folder(
        self, store: _Store, another_machine: Callable[[str], None], tmp_path: Path
    ) -> None:
        manifest = _publish(open_repository(store.url)).manifest
        evil = manifest.model_copy(update={"files": {"../../../outside": "0" * 64}})
        store.write("pets/1/manifest.json", evil.as_json())
        another_machine("other")
        with pytest.raises(ValueError, match=r"files\..*: .*expected a path below the version's folder, got '\.\./"):
            open_repository(store.url).find("pets")
        assert list(tmp_path.rglob("outside")) == []

    def test_what_killed_fetches_left_and_what_is_gone_from_the_store_goes(
        self, store: _Store, another_machine: Callable[[str], None]
    ) -> None:
        repository = open_repository(store.url)
        versions = [_publish(repository) for _ in range(2)]
        another_machine("other")
        here = open_repository(store.url)
        place = here.find("pets", 1).folder
        (place.parent / ".writing-dead").write_bytes(bytes(100))
        assert here.find("pets", 2).folder.is_dir()
        assert not (place.parent / ".writing-dead").exists()
        another_machine("third")
        open_repository(store.url).remove("pets", versions[0].manifest.version)
        another_machine("other")
        open_repository(store.url).prune()
        assert (place.is_dir(), place.with_name("2").is_dir()) == (False, True)

    def test_a_cache_that_cannot_be_written_to(self, store: _Store, cache: Path) -> None:
        repository = open_repository(store.url)
        _publish(repository)
        repository.promote(_publish(repository))
        first = repository.find("pets", 1).folder
        shutil.rmtree(first.with_name("2"))
        with read_only(cache):
            # What is there is enough, for who may only read.
            assert repository.find("pets", 1).folder == first
            with pytest.raises(
                OSError, match=r"expected a cache that can be written to, got: .*XDG_CACHE_HOME"
            ) as error:
                repository.find("pets", 2).folder  # noqa: B018 - this is what fetches
        _assert_one_line(error.value)
        assert "[Errno" not in str(error.value)

    def test_a_full_cache(self, store: _Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _publish(open_repository(store.url))
        with small_disk(tmp_path / "disk") as disk:
            monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
            version = open_repository(store.url).find("pets")
            with pytest.raises(OSError, match="No space left"):
                (disk / "ballast").write_bytes(bytes(1 << 20))
            with pytest.raises(OSError, match="expected a cache that can be written to, got: No space left") as error:
                version.folder  # noqa: B018
            _assert_one_line(error.value)
            (disk / "ballast").unlink()
            assert (version.folder / "model.onnx").read_bytes() == b"engine 1"

    def test_threads_that_fetch_at_once_get_whole_files(
        self, store: _Store, another_machine: Callable[[str], None]
    ) -> None:
        _publish(open_repository(store.url))
        another_machine("other")
        seen: list[bytes] = []

        def fetch() -> None:
            folder = open_repository(store.url).find("pets").folder
            seen.append((folder / "model.onnx").read_bytes())

        readers = [threading.Thread(target=fetch) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert seen == [b"engine 1"] * 4

    def test_without_network_what_was_fetched_is_read_and_nothing_is_changed(
        self, s3: _Store, another_machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repository = open_repository(s3.url)
        repository.promote(_publish(repository))
        _publish(repository)
        another_machine("other")
        folder = open_repository(s3.url).parse("pets@stable").folder
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv(OFFLINE, "1")
        offline = open_repository(s3.url)
        assert offline.versions("pets") == [1]
        assert offline.parse("pets@stable").folder == folder
        # A fetch that was killed has left a version without its manifest, which comes last.
        (folder.parent / "2").mkdir()
        (folder.parent / "2" / "model.onnx").touch()
        assert offline.versions("pets") == [1]
        assert str(offline.parse("pets")) == "pets@1"
        with pytest.raises(PermissionError, match="cannot be changed without network; unset TENET_OFFLINE"):
            _publish(offline)
        with pytest.raises(FileNotFoundError, match="nothing of it was fetched to this machine before"):
            open_repository(f"{s3.url}-other").models()


class TestRequests:
    """A request takes some 50 ms, and a repository has hundreds of versions."""

    def test_a_look_at_all_asks_for_each_manifest_once(self, s3: _Store) -> None:
        repository = open_repository(s3.url)
        for _ in range(8):
            _publish(repository)
        repository = open_repository(s3.url)
        for least in (8, 0):  # what has not changed is not read again
            _REQUESTS.clear()
            (seen,) = repository.snapshots()
            assert list(seen.manifests) == list(range(1, 9))
            assert len(_REQUESTS) - least <= 6

    def test_publishing_and_pruning_read_no_manifest_twice(self, s3: _Store) -> None:
        repository = open_repository(s3.url)
        for _ in range(8):
            _publish(repository)
        repository = open_repository(s3.url)
        _REQUESTS.clear()
        _publish(repository)
        assert len(_REQUESTS) <= 8 + 26
        repository = open_repository(s3.url)
        _REQUESTS.clear()
        repository.prune()
        assert len(_REQUESTS) <= 9 + 10

    def test_one_version_needs_no_list_and_its_files_are_asked_for_once(self, s3: _Store) -> None:
        _publish(open_repository(s3.url))
        _REQUESTS.clear()
        version = open_repository(s3.url).find("pets", 1)
        assert len(_REQUESTS) == 1
        folders = {version.folder for _ in range(8)}
        assert len(folders) == 1
        assert len(_REQUESTS) <= 3


class _Losing:
    """fsspec's memory, but the answer to one write is lost on its way."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    def pipe_file(self, path: str, content: bytes, **conditions: str) -> None:
        self._filesystem.pipe_file(path, content, **conditions)
        if path.endswith(self._path):  # the client asks again
            self._filesystem.pipe_file(path, content, **conditions)


class _Quicker(_Losing):
    """A store in which another machine does something just before an object is written."""

    def __init__(self, filesystem: Any, path: str, act: Callable[[], None]) -> None:
        super().__init__(filesystem, path)
        self._act = act

    def pipe_file(self, path: str, content: bytes, **conditions: str) -> None:
        if path.endswith(self._path):
            self._act()
        self._filesystem.pipe_file(path, content, **conditions)


def test_a_version_whose_answer_was_lost_is_published(tmp_path: Path) -> None:
    memory, url = importlib.import_module("fsspec").filesystem("memory"), f"memory://{uuid.uuid4().hex}/all"
    repository = Repository(remote.ObjectStorage(url, _Losing(memory, "1/manifest.json"), tmp_path / "cache"))
    assert str(_publish(repository)) == "pets@1"


def test_a_proof_does_not_bring_back_a_version_that_was_removed_meanwhile(s3: _Store) -> None:
    repository = open_repository(s3.url)
    version = _publish(repository)
    _publish(repository)
    path = "pets/1/manifest.json"
    quicker = _Quicker(s3.fs, path, lambda: s3.remove(path))
    late = Repository(remote.ObjectStorage(s3.url, quicker, cache_of(s3.url)))
    with pytest.raises(FileNotFoundError, match="has been removed meanwhile; nothing was written"):
        late.record_proof(version, version.manifest.parity.model_copy(update={"status": "failed"}))
    assert path not in s3.names()
    assert repository.versions("pets") == [2]


def test_what_is_somebody_else_s_is_left_alone(store: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = open_repository(store.url)
    _publish(repository)
    theirs = {
        "photos/20260101/cat.png": b"x",
        "app/1/manifest.json": b"{}",
        "resnet/config.pbtxt": b'name: "resnet"',
        "resnet/1/model.onnx": b"x",
    }
    for path, content in theirs.items():
        store.write(path, content)
    monkeypatch.setattr(remote, "_ABANDONED", timedelta(0))
    assert repository.prune(keep=1).remains == ()
    assert repository.models() == ["pets"]
    for name in ("photos", "app", "resnet"):
        with pytest.raises(FileExistsError, match=f"{name}: is there already, and is no model of this repository"):
            _publish(repository, name)
    assert {path: store.read(path) for path in theirs} == theirs


class TestErrors:
    def test_no_repository_and_no_bucket(self, store: _Store) -> None:
        for url in (store.url, f"{store.url.partition('://')[0]}://nobody-{uuid.uuid4().hex}/models"):
            with pytest.raises(
                FileNotFoundError, match="expected a model repository here, found none; check the address"
            ):
                open_repository(url).models()

    def test_a_publisher_without_a_bucket(self, s3: _Store) -> None:
        del s3
        with pytest.raises(OSError, match="nobody") as error:
            _publish(open_repository(f"s3://nobody-{uuid.uuid4().hex}/models"))
        _assert_one_line(error.value)

    def test_no_network(self, s3: _Store, monkeypatch: pytest.MonkeyPatch) -> None:
        s3fs = importlib.import_module("s3fs")

        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(OSError, match=r"the store refused, or cannot be reached: .*127\.0\.0\.1:1") as error:
            open_repository(s3.url).models()
        _assert_one_line(error.value)
        s3fs.S3FileSystem.clear_instance_cache()

    def test_no_credentials(self, s3: _Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        s3fs = importlib.import_module("s3fs")

        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(key)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(OSError, match=r"[Cc]redentials") as error:
            open_repository(s3.url).models()
        _assert_one_line(error.value)
        s3fs.S3FileSystem.clear_instance_cache()

    @pytest.mark.parametrize(
        ("url", "package", "extra"),
        [("s3://b/m", "s3fs", "s3"), ("gs://b/m", "gcsfs", "gs"), ("s3://b/m", "fsspec", "s3")],
    )
    def test_a_package_that_is_not_installed(self, url: str, package: str, extra: str) -> None:
        program = (
            f"import sys; sys.modules[{package!r}] = None\n"
            "from export.repository import open_repository\n"
            f"try: open_repository({url!r})\n"
            "except RuntimeError as error: print(error)"
        )
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        needed = "s3fs" if extra == "s3" else "gcsfs"
        assert said == f"{url}: this needs {needed}, which is not installed; pip install 'tenet[{extra}]'\n"

    @pytest.mark.parametrize("url", ["s3://", "s3:///models", "http://host/models", "memory://"])
    def test_another_kind_of_address(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"expected a folder, s3://bucket/prefix, .*, got"):
            open_repository(url)


def _assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error)


def test_both_kinds_of_storage_are_one_to_the_repository(store: _Store, tmp_path: Path) -> None:
    """A repository that was copied from a folder to a store is read, and goes on with its numbers and aliases."""
    local = Repository(tmp_path / "models")
    _publish(local)
    local.promote(_publish(local))
    for path in sorted(local.folder.rglob("*")):
        if path.is_file():
            store.write(path.relative_to(local.folder).as_posix(), path.read_bytes())
    repository = open_repository(store.url)
    assert isinstance(repository._storage, Storage)
    assert repository.aliases("pets") == {"stable": 2}
    repository.check(repository.parse("pets@stable"))
    assert str(_publish(repository)) == "pets@3"


def test_age_is_that_of_the_engine(store: _Store) -> None:
    repository = open_repository(store.url)
    version = _publish(repository)
    made = repository._storage.made("pets", {1: version.manifest.file, 2: version.manifest.file})
    assert made.keys() == {1}
    assert abs(datetime.now(UTC) - made[1]) < timedelta(minutes=5)
