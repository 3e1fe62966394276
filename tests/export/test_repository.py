from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import pytest

from export.manifest import FILE_NAME, Images, Manifest, Parity, Requirements, Source, TensorSpec, Twin, sha256_of
from export.repository import Draft, Repository, TwinFiles, Version, open_repository
from export.store.folder import FolderStorage
from export.store.model_state import ModelState
from tests.export.disks import read_only, small_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_WHY = "a class was lost"


def fill(
    draft: Draft,
    *,
    content: bytes = b"engine",
    parity: Literal["passed", "failed", "not run"] = "passed",
    source: Version | None = None,
    class_names: tuple[str, ...] = ("cat", "dog"),
) -> None:
    path = draft.folder / "model.onnx"
    path.write_bytes(content)
    (draft.folder / "checkpoint").mkdir()
    (draft.folder / "checkpoint" / "weights.safetensors").write_bytes(b"weights")
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
            class_names=class_names,
            max_batch=4,
            requires=Requirements(runtime=">=1.27"),
            source=made_from,
            parity=_parity(parity),
        )
    )


def _parity(status: Literal["passed", "failed", "not run"]) -> Parity:
    images = Images(description="noise", n=8, sha256="0" * 64, seed=0)
    return Parity(status=status, reference="pets@1", images=images, explanation="" if status == "passed" else _WHY)


def publish(
    repository: Repository,
    model: str = "pets",
    *,
    parity: Literal["passed", "failed", "not run"] = "passed",
    source: Version | None = None,
    class_names: tuple[str, ...] = ("cat", "dog"),
) -> Version:
    with repository.draft(model) as draft:
        fill(draft, parity=parity, source=source, class_names=class_names)
    return repository.find(model, draft.version)


def _publish_often(folder: Path, times: int) -> None:
    for _ in range(times):
        publish(Repository(folder))


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models")


def test_versions_count_up_and_the_latest_is_found(repository: Repository) -> None:
    publish(repository)
    publish(repository)
    assert repository.models() == ["pets"]
    assert repository.versions("pets") == [1, 2]
    assert repository.find("pets").manifest.version == 2
    assert str(repository.parse("pets@1")) == "pets@1"
    assert repository.find("pets", 1).folder == repository.folder / "pets" / "1"


def test_a_manifest_names_the_sha256_of_every_other_file(repository: Repository) -> None:
    version = publish(repository)
    weights = version.folder / "checkpoint" / "weights.safetensors"
    assert version.manifest.files == {"checkpoint/weights.safetensors": sha256_of(weights)}


def test_a_failed_draft_leaves_nothing_and_its_number_is_not_given_again(repository: Repository) -> None:
    def fail() -> None:
        with repository.draft("pets") as draft:
            (draft.folder / "model.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in repository.folder.iterdir()] == [".lock"]
    publish(repository)
    with pytest.raises(KeyboardInterrupt):
        fail()
    names = sorted(path.name for path in (repository.folder / "pets").iterdir())
    assert names == ["1", "config.pbtxt", "labels.txt", "model.json"]
    publish(repository)
    assert repository.versions("pets") == [1, 3]


def test_writers_in_several_processes_never_share_a_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_publish_often, args=(tmp_path, 5)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert Repository(tmp_path).versions("pets") == list(range(1, 16))


def test_writers_in_several_threads_never_share_a_number(repository: Repository) -> None:
    writers = [threading.Thread(target=_publish_often, args=(repository.folder, 5)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert repository.versions("pets") == list(range(1, 21))
    assert repository.check(repository.find("pets")).version == 20


def test_what_is_not_there_is_named_with_what_is(repository: Repository, tmp_path: Path) -> None:
    publish(repository)
    with pytest.raises(FileNotFoundError, match=r"'dogs': not in .*; its models are: pets"):
        repository.find("dogs")
    with pytest.raises(FileNotFoundError, match="no version 7; its versions are: 1"):
        repository.find("pets", 7)
    with pytest.raises(FileNotFoundError, match=r"no alias 'latest'; its aliases are: none; .*promote"):
        repository.parse("pets@latest")
    for reference in ("pets@", "pets@٣", "pets@0", "pets@a/b", "pets@1@2"):
        with pytest.raises(ValueError, match="expected NAME, NAME@VERSION with a whole number, or NAME@ALIAS"):
            repository.parse(reference)
    with pytest.raises(ValueError, match="expected letters"):
        repository.find("../pets")
    with pytest.raises(FileNotFoundError, match="expected a model repository here, found no folder"):
        Repository(tmp_path / "elsewhere").models()
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="expected a model repository here, found a file"):
        Repository(tmp_path / "file").models()


def test_a_location_is_a_folder_or_an_address(tmp_path: Path) -> None:
    assert open_repository(tmp_path).folder == tmp_path
    assert open_repository(str(tmp_path)).folder == tmp_path
    assert open_repository(f"file://{tmp_path}").folder == tmp_path
    with pytest.raises(ValueError, match=r"expected a folder, s3://.*, got 'ftp://host/models'"):
        open_repository("ftp://host/models")


class TestAliases:
    def test_an_alias_points_at_one_version_and_moves(self, repository: Repository) -> None:
        first, second = publish(repository), publish(repository)
        assert repository.promote(first) is None
        assert repository.promote(first, "canary") is None
        assert repository.promote(second) == 1
        assert repository.aliases("pets") == {"canary": 1, "stable": 2}
        assert str(repository.parse("pets@stable")) == "pets@2"
        assert str(repository.parse("pets@canary")) == "pets@1"
        with pytest.raises(FileNotFoundError, match="no alias 'beta'; its aliases are: canary, stable"):
            repository.parse("pets@beta")

    @pytest.mark.parametrize("alias", ["3", "", "a b", "../x", "-x"])
    def test_an_alias_is_a_plain_name_and_no_number(self, repository: Repository, alias: str) -> None:
        with pytest.raises(ValueError, match="expected a plain name that is not a number"):
            repository.promote(publish(repository), alias)

    def test_what_is_not_servable_is_not_promoted(self, repository: Repository) -> None:
        blocked = publish(repository, parity="failed")
        with pytest.raises(
            ValueError, match=rf"pets@1: not promoted, because it is blocked: .*{_WHY}.*export it again"
        ):
            repository.promote(blocked)
        unproven = publish(repository, parity="not run")
        with pytest.raises(ValueError, match=rf"not run: {_WHY}; complete it with `tenet models verify pets@2`"):
            repository.promote(unproven)
        assert repository.aliases("pets") == {}

    def test_aliases_survive_the_next_version(self, repository: Repository) -> None:
        repository.promote(publish(repository))
        publish(repository)
        assert repository.aliases("pets") == {"stable": 1}

    def test_many_promotions_at_once_all_hold(self, repository: Repository) -> None:
        version = publish(repository)
        promotions = [threading.Thread(target=repository.promote, args=(version, f"a{i}")) for i in range(8)]
        for promotion in promotions:
            promotion.start()
        for promotion in promotions:
            promotion.join()
        assert repository.aliases("pets") == {f"a{i}": 1 for i in range(8)}


class TestRemove:
    def test_a_number_is_not_given_again_after_the_newest_or_all_are_removed(self, repository: Repository) -> None:
        publish(repository)
        repository.remove("pets", publish(repository).manifest.version)
        assert repository.versions("pets") == [1]
        repository.remove("pets", 1)
        assert repository.models() == []
        assert (repository.folder / "pets" / "model.json").is_file()
        assert str(publish(repository)) == "pets@3"

    def test_what_an_alias_points_at_is_not_removed(self, repository: Repository) -> None:
        version = publish(repository)
        repository.promote(version, "canary")
        repository.promote(version)
        with pytest.raises(ValueError, match="pets@1: not removed, because its alias points at it: canary, stable"):
            repository.remove(version.manifest.model, version.manifest.version)
        repository.remove(version.manifest.model, version.manifest.version, force=True)
        assert repository.versions("pets") == []
        publish(repository)
        assert repository.aliases("pets") == {}

    def test_what_others_were_made_from_is_not_removed(self, repository: Repository) -> None:
        source = publish(repository)
        variant = publish(repository, "pets-int8", source=source)
        with pytest.raises(ValueError, match=r"not removed, because others were made from it.*: pets-int8@1"):
            repository.remove(source.manifest.model, source.manifest.version)
        repository.remove(variant.manifest.model, variant.manifest.version)
        repository.remove(source.manifest.model, source.manifest.version)
        assert repository.models() == []

    def test_what_is_gone_already_is_said(self, repository: Repository) -> None:
        version = publish(repository)
        publish(repository)
        repository.remove(version.manifest.model, version.manifest.version)
        with pytest.raises(FileNotFoundError, match="no version 1; its versions are: 2"):
            repository.remove(version.manifest.model, version.manifest.version)


class TestPrune:
    def test_the_newest_the_aliased_the_sources_and_the_servable_stay(self, repository: Repository) -> None:
        versions = [publish(repository) for _ in range(5)]
        blocked = publish(repository, parity="failed")
        repository.promote(versions[1])
        publish(repository, "pets-int8", source=versions[2])
        planned = repository.prune(keep=1, dry_run=True)
        assert [str(version) for version in planned.versions] == ["pets@1", "pets@4"]
        assert repository.versions("pets") == [1, 2, 3, 4, 5, 6]
        assert repository.prune(keep=1).versions == planned.versions
        assert repository.versions("pets") == [2, 3, 5, blocked.manifest.version]
        assert repository.versions("pets-int8") == [1]

    def test_a_source_goes_with_the_last_of_its_variants(self, repository: Repository) -> None:
        source = publish(repository)
        publish(repository)
        publish(repository, "pets-int8", source=source)
        publish(repository, "pets-int8")
        gone = [str(version) for version in repository.prune(keep=1).versions]
        assert gone == ["pets-int8@1", "pets@1"]

    def test_age_is_that_of_the_engine_and_adds_to_keep(self, repository: Repository) -> None:
        old, *_ = [publish(repository) for _ in range(3)]
        os.utime(old.folder / "model.onnx", (0, 0))
        assert repository.prune(keep=3, older_than=timedelta(days=30)).versions == ()
        assert [str(version) for version in repository.prune(older_than=timedelta(days=30)).versions] == ["pets@1"]
        assert repository.prune(older_than=timedelta(days=30)).versions == ()

    def test_without_a_policy_no_version_goes(self, repository: Repository) -> None:
        publish(repository)
        publish(repository)
        assert repository.prune().versions == ()

    def test_one_model_alone(self, repository: Repository) -> None:
        for model in ("cats", "dogs"):
            publish(repository, model)
            publish(repository, model)
        assert [str(version) for version in repository.prune("dogs", keep=1).versions] == ["dogs@1"]
        with pytest.raises(FileNotFoundError, match="'birds': not in"):
            repository.prune("birds", keep=1)
        with pytest.raises(ValueError, match="keep: expected 1 or more of the newest versions, got 0"):
            repository.prune(keep=0)

    def test_what_killed_processes_left_goes_and_what_is_being_written_stays(self, repository: Repository) -> None:
        publish(repository)
        folder = repository.folder / "pets"
        with repository.draft("pets") as draft:
            for name in (".draft-7-dead", ".removed-1-dead"):
                (folder / name).mkdir()
            (folder / ".writing-dead").touch()
            (folder / ".draft-7-dead.lock").touch()
            remains = repository.prune().remains
            assert draft.folder.is_dir()
            fill(draft)
        assert sorted(remains) == ["pets/.draft-7-dead", "pets/.removed-1-dead", "pets/.writing-dead"]
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "config.pbtxt", "labels.txt", "model.json"]

    def test_a_model_that_never_had_a_version_leaves_nothing(self, repository: Repository) -> None:
        publish(repository)
        folder = repository.folder / "dogs"
        folder.mkdir()
        (folder / ".draft-1-dead").mkdir()
        (folder / "model.json").write_bytes(ModelState(last_version=1).as_json())
        assert repository.prune().remains == ("dogs/.draft-1-dead",)
        assert not folder.exists()


class TestForeign:
    """What lies in a repository's folder, and is no model of it, is neither read, nor written, nor removed."""

    @pytest.fixture
    def home(self, repository: Repository) -> Path:
        """A home folder in which somebody has published a model."""
        for path, content in {
            "Documents/thesis/chapter.tex": "x",
            "src/main.py": "x",
            "keras/model.json": "{}",
            "notes/1/page.txt": "x",
            "scans/.writing-desk/scan.png": "x",
            "resnet/config.pbtxt": 'name: "resnet"',
            "resnet/1/model.onnx": "x",
            "app/1/manifest.json": "{}",
        }.items():
            place = repository.folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content)
        (repository.folder / "empty").mkdir()
        for _ in range(2):
            publish(repository)
        return repository.folder

    def test_prune_leaves_it_alone(self, home: Path) -> None:
        before = _tree(home)
        pruned = Repository(home).prune(keep=1)
        assert [str(version) for version in pruned.versions] == ["pets@1"]
        assert (pruned.remains, pruned.damaged) == ((), ())
        after = _tree(home)
        assert {path for path in before if before[path] != after.get(path)} == {
            "pets/config.pbtxt", *(path for path in before if path.startswith("pets/1/"))
        }  # fmt: skip
        assert (home / "empty").is_dir()

    def test_nobody_takes_it_for_a_model(self, home: Path) -> None:
        repository = Repository(home)
        assert repository.models() == ["pets"]
        assert [str(version) for version in repository.readable()] == ["pets@1", "pets@2"]
        assert repository.versions("resnet") == []
        with pytest.raises(FileNotFoundError, match="'resnet': not in"):
            repository.find("resnet")
        for name in ("resnet", "keras", "app"):
            with pytest.raises(FileExistsError, match="is there already, and is no model of this repository"):
                publish(repository, name)

    def test_a_copied_model_is_none_and_the_original_stays(self, repository: Repository) -> None:
        repository.promote(publish(repository))
        publish(repository)
        shutil.copytree(repository.folder / "pets", repository.folder / "pets-copy")
        with pytest.raises(ValueError, match=r"pets-copy/1: its manifest is that of pets@1; a copied folder"):
            repository.find("pets-copy", 1)
        pruned = repository.prune(keep=1)
        assert pruned.versions == ()
        assert [why.partition(":")[0] for why in pruned.damaged] == ["pets-copy@1", "pets-copy@2"]
        repository.remove("pets-copy", 1, force=True)
        assert (repository.versions("pets"), repository.versions("pets-copy")) == ([1, 2], [2])
        assert repository.aliases("pets") == {"stable": 1}
        repository.check(repository.find("pets", 1))

    def test_what_somebody_puts_into_a_draft_s_folder_outlives_it(self, repository: Repository) -> None:
        def fail() -> None:
            with repository.draft("pets"):
                (repository.folder / "pets" / "notes.txt").touch()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert [path.name for path in (repository.folder / "pets").iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize("location", ["", " ", "file://"])
    def test_an_empty_location_is_not_the_working_folder(self, location: str) -> None:
        with pytest.raises(ValueError, match=r"repository: expected a folder, s3://.*, got"):
            open_repository(location)


class _Watched(FolderStorage):
    """A folder in which something happens, once, just before a manifest is read."""

    def __init__(self, root: Path, happens: Callable[[], object]) -> None:
        super().__init__(root)
        self._happens = [happens]

    def read(self, path: str) -> bytes:
        if path.endswith(FILE_NAME) and self._happens:
            self._happens.pop()()
        return super().read(path)


class TestDamage:
    def test_a_damaged_version_is_listed_kept_and_removed(self, repository: Repository) -> None:
        first, second, _ = [publish(repository) for _ in range(3)]
        (first.folder / FILE_NAME).write_text("{")
        (second.folder / FILE_NAME).unlink()
        (seen,) = repository.snapshots()
        assert (list(seen.manifests), list(seen.damaged)) == ([3], [1, 2])
        with pytest.raises(FileNotFoundError, match="pets/2: expected a manifest here, found none: it is damaged"):
            repository.find("pets", 2)
        pruned = repository.prune(keep=1)
        assert pruned.versions == ()
        assert [why.partition(":")[0] for why in pruned.damaged] == ["pets@1", "pets@2"]
        for number in (1, 2):
            repository.remove("pets", number)
        assert repository.versions("pets") == [3]

    def test_an_alias_guards_a_damaged_version_as_well(self, repository: Repository) -> None:
        version = publish(repository)
        repository.promote(version)
        (version.folder / FILE_NAME).write_text("{")
        with pytest.raises(ValueError, match="its alias points at it: stable"):
            repository.remove("pets", 1)
        repository.remove("pets", 1, force=True)
        assert repository.models() == []

    def test_where_aliases_are_damaged_nothing_goes_but_by_force(self, repository: Repository) -> None:
        for model in ("cats", "pets"):
            publish(repository, model)
            publish(repository, model)
        (repository.folder / "pets" / "model.json").write_text("{}")
        pruned = repository.prune(keep=1)
        assert [str(version) for version in pruned.versions] == ["cats@1"]
        assert [why.partition(":")[0] for why in pruned.damaged] == ["pets"]
        with pytest.raises(ValueError, match=r"model\.json: expected the aliases .* or remove pets@1 with --force"):
            repository.remove("pets", 1)
        repository.remove("pets", 1, force=True)
        assert repository.versions("pets") == [2]

    def test_a_version_without_its_engine_is_named_and_stays(self, repository: Repository) -> None:
        old, *_ = [publish(repository) for _ in range(2)]
        (old.folder / "model.onnx").unlink()
        pruned = repository.prune(older_than=timedelta(0))
        assert pruned.versions == ()
        assert pruned.damaged == ("pets@1: its engine file is missing",)

    @pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b" " * (9 << 20)])
    def test_a_file_that_no_reader_can_hold_keeps_nobody_from_publishing(
        self, content: bytes, repository: Repository
    ) -> None:
        (publish(repository).folder / FILE_NAME).write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json: expected (JSON|at most 8 MiB)"):
            repository.find("pets", 1)
        assert str(publish(repository)) == "pets@2"
        (repository.folder / "pets" / "model.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.json: expected the aliases"):
            publish(repository)

    def test_what_vanishes_while_it_is_read_is_asked_for_again(self, repository: Repository) -> None:
        first, _, third = [publish(repository) for _ in range(3)]
        repository.promote(third)

        def move() -> None:
            repository.promote(first)
            repository.remove("pets", 3)

        assert str(Repository(_Watched(repository.folder, move)).parse("pets@stable")) == "pets@1"
        latest = Repository(_Watched(repository.folder, lambda: repository.remove("pets", 2)))
        assert str(latest.parse("pets")) == "pets@1"
        publish(repository)
        vanishing = Repository(_Watched(repository.folder, lambda: repository.remove("pets", 4)))
        (seen,) = vanishing.snapshots()
        assert (seen.versions, seen.damaged) == ([1], {})


class TestLinks:
    """A version may lie on another disk, with a link in its place."""

    def test_the_link_is_removed_and_what_it_points_at_is_not(self, repository: Repository, tmp_path: Path) -> None:
        version = publish(repository)
        shutil.move(version.folder, tmp_path / "elsewhere")
        version.folder.symlink_to(tmp_path / "elsewhere")
        assert repository.check(repository.find("pets")) == version.manifest
        repository.remove("pets", 1)
        assert repository.models() == []
        assert (tmp_path / "elsewhere" / "model.onnx").is_file()
        assert [path.name for path in (repository.folder / "pets").glob(".*")] == []

    def test_a_link_to_a_folder_is_one_file_too_many(self, repository: Repository, tmp_path: Path) -> None:
        version = publish(repository)
        (version.folder / "more").symlink_to(tmp_path)
        with pytest.raises(ValueError, match="1/more: expected the files of the manifest alone, got one more"):
            repository.check(version)


@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o077, 0o700, 0o600), (0o022, 0o755, 0o644), (0o002, 0o775, 0o664)]
)
def test_who_may_read_a_version_is_up_to_the_umask(umask: int, folder: int, file: int, repository: Repository) -> None:
    before = os.umask(umask)
    try:
        publish(repository)
    finally:
        os.umask(before)
    below = [path for path in repository.folder.rglob("*") if path.name != ".lock"]
    assert {path.stat().st_mode & 0o777 for path in below if path.is_dir()} == {folder}
    assert {path.stat().st_mode & 0o777 for path in below if path.is_file()} == {file}


class TestCheck:
    def test_a_flipped_bit_in_any_file_is_noticed(self, repository: Repository) -> None:
        version = publish(repository)
        repository.promote(version)
        repository.check(version)
        files = [path for path in (repository.folder / "pets").rglob("*") if path.is_file()]
        assert len(files) == 6
        for path in files:
            content = path.read_bytes()
            for place in range(0, len(content), 7):
                flipped = bytearray(content)
                flipped[place] ^= 1 << place % 8
                path.write_bytes(flipped)
                with pytest.raises(ValueError, match=path.name):
                    repository.check(version)
            path.write_bytes(content)
        repository.check(version)

    def test_a_missing_and_a_foreign_file_are_noticed(self, repository: Repository) -> None:
        version = publish(repository)
        (version.folder / "checkpoint" / "more").touch()
        with pytest.raises(ValueError, match="checkpoint/more: expected the files of the manifest alone, got one more"):
            repository.check(version)
        shutil.rmtree(version.folder / "checkpoint")
        with pytest.raises(FileNotFoundError, match=r"weights\.safetensors: expected a file of the repository here"):
            repository.check(version)

    def test_a_version_copied_to_another_number_is_noticed(self, repository: Repository) -> None:
        version = publish(repository)
        shutil.copytree(version.folder, version.folder.parent / "2")
        with pytest.raises(ValueError, match="its manifest is that of pets@1"):
            repository.check(Version(version.manifest.model_copy(update={"version": 2}), version.place))

    def test_prune_writes_again_what_triton_reads(self, repository: Repository) -> None:
        version = publish(repository)
        (repository.folder / "pets" / "config.pbtxt").write_text("")
        with pytest.raises(ValueError, match=r"config.pbtxt: .*`tenet models prune` writes it anew"):
            repository.check(version)
        repository.prune()
        repository.check(version)

    def test_a_damaged_state_keeps_publishers_out_and_readers_not(self, repository: Repository) -> None:
        publish(repository)
        state = repository.folder / "pets" / "model.json"
        state.write_text("{}")
        before = _tree(repository.folder)
        with pytest.raises(ValueError, match=r"model.json: expected the aliases .* or delete it"):
            publish(repository)
        assert _tree(repository.folder) == before
        assert repository.find("pets").manifest.version == 1
        state.unlink()
        assert str(publish(repository)) == "pets@2"

    def test_a_damaged_version_keeps_no_other_from_being_published(self, repository: Repository) -> None:
        first = publish(repository)
        (first.folder / "manifest.json").write_text("{")
        second = publish(repository)
        assert "versions: [2]" in (repository.folder / "pets" / "config.pbtxt").read_text()
        repository.check(second)


class TestBadPlaces:
    def test_a_file_in_the_repository_s_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for place in (tmp_path / "file", tmp_path / "file" / "models"):
            with pytest.raises(
                NotADirectoryError, match="expected a folder for the repository, got a file on its path"
            ):
                publish(Repository(place))

    def test_a_file_or_a_foreign_folder_in_the_model_s_place(self, repository: Repository) -> None:
        repository.folder.mkdir()
        (repository.folder / "file").touch()
        with pytest.raises(FileExistsError, match="file: expected a model's folder, got a file; choose another name"):
            publish(repository, "file")
        (repository.folder / "photos").mkdir()
        (repository.folder / "photos" / "cat.png").touch()
        with pytest.raises(FileExistsError, match="photos: is there already, and is no model of this repository"):
            publish(repository, "photos")
        assert [path.name for path in (repository.folder / "photos").iterdir()] == ["cat.png"]

    def test_a_folder_of_the_next_number_is_not_overwritten(self, repository: Repository) -> None:
        def collide() -> None:
            with repository.draft("pets") as draft:
                fill(draft)
                (repository.folder / "pets" / "1").mkdir()
                (repository.folder / "pets" / "1" / "notes").touch()

        with pytest.raises(FileExistsError, match="1: appeared while it was being written"):
            collide()
        assert [path.name for path in (repository.folder / "pets" / "1").iterdir()] == ["notes"]

    def test_a_folder_that_cannot_be_written_to(self, repository: Repository) -> None:
        publish(repository)
        before = _tree(repository.folder)
        with read_only(repository.folder):
            with pytest.raises(PermissionError, match=r"expected a repository that can be written to, got: .*; choose"):
                publish(repository)
            with pytest.raises(PermissionError, match="expected a repository that can be written to"):
                repository.promote(repository.find("pets"))
            with pytest.raises(PermissionError, match="expected a repository that can be written to"):
                repository.check_writable("pets")
            assert repository.find("pets").manifest.version == 1
        assert _tree(repository.folder) == before
        repository.check_writable("pets")
        assert _tree(repository.folder) == before

    def test_a_full_disk(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk") as disk:
            repository = Repository(disk / "models")
            version = publish(repository)
            repository.promote(version)
            before = _tree(repository.folder)
            with pytest.raises(OSError, match="No space left"):
                (disk / "ballast").write_bytes(bytes(1 << 20))
            for step in (publish, lambda repository: repository.promote(version, "canary")):
                with pytest.raises(OSError, match="No space left on device") as error:
                    step(repository)
                assert "\n" not in str(error.value)
                assert _tree(repository.folder) == before
            repository.check(version)
            with pytest.raises(OSError, match=r"nothing was published; make room and publish again"):
                publish(repository, "dogs")
            # Room is made by a removal, for which there is none.
            repository.remove(version.manifest.model, version.manifest.version, force=True)
            assert repository.models() == []
            (disk / "ballast").unlink()
            assert str(publish(repository)) == "pets@2"

    def test_a_file_that_may_not_grow(self, repository: Repository) -> None:
        publish(repository)
        before = _tree(repository.folder)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(OSError, match=r"File too large; nothing was published; make room and publish again"):
                publish(repository)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert _tree(repository.folder) == before
        assert str(publish(repository)) == "pets@2"


def test_a_removed_version_takes_no_proof(repository: Repository) -> None:
    version = publish(repository)
    publish(repository)
    repository.remove(version.manifest.model, version.manifest.version)
    with pytest.raises(FileNotFoundError, match="no version 1"):
        repository.record_proof(version, version.manifest.parity)


def test_a_proof_makes_a_version_servable_and_another_one_blocks_it(repository: Repository) -> None:
    version = publish(repository, parity="not run")
    config = repository.folder / "pets" / "config.pbtxt"
    assert "versions: []" in config.read_text()
    repository.record_proof(version, _parity("passed"))
    assert repository.find("pets").manifest.servable
    assert "versions: [1]" in config.read_text()
    repository.record_proof(version, _parity("failed"))
    assert "versions: []" in config.read_text()
    assert repository.find("pets").manifest.parity.explanation == _WHY
    repository.check(version)


def test_a_draft_whose_publisher_lives_is_not_swept_by_another_publisher(repository: Repository) -> None:
    with repository.draft("pets") as slow:
        publish(repository)
        fill(slow)
    assert repository.versions("pets") == [1, 2]


def test_a_checkpoint_that_was_exchanged_is_not_taken_for_the_twin(own_models: Repository) -> None:
    version = own_models.find("digits-int8")
    twin = own_models.twin_of(version)
    assert isinstance(twin, TwinFiles)
    weights = twin.folder / twin.file
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"expected sha256 .* as in digits@1's manifest, got .*another checkpoint"):
        own_models.twin_of(version)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected digits@1's checkpoint here, found none"):
        own_models.twin_of(version)


@pytest.mark.parametrize("name", ["run.json", "more.json"])
def test_a_twin_s_other_files_are_checked_as_well(name: str, own_models: Repository) -> None:
    """They say which code is imported."""
    version = own_models.find("digits")
    twin = own_models.twin_of(version)
    assert twin is not None
    (twin.folder / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}: expected"):
        own_models.twin_of(version)


def test_versions_that_were_made_from_each_other_have_no_twin(repository: Repository) -> None:
    first, second = publish(repository), publish(repository)
    for version, source in ((first, second), (second, first)):
        made_from = Source(model="pets", version=source.manifest.version, sha256=source.manifest.sha256)
        changed = version.manifest.model_copy(update={"source": made_from})
        (version.folder / FILE_NAME).write_bytes(changed.as_json())
    with pytest.raises(ValueError, match="pets@1: expected a source that was made before it, got a circle"):
        repository.twin_of(repository.find("pets", 1))


def test_a_twin_outside_of_the_repository_is_not_followed(repository: Repository, tmp_path: Path) -> None:
    version = publish(repository)
    (tmp_path / "weights").touch()
    for folder in (str(tmp_path), "../../.."):
        twin = Twin.model_construct(folder=folder, file="weights", sha256=sha256_of(tmp_path / "weights"))
        (version.folder / FILE_NAME).write_bytes(version.manifest.model_copy(update={"twin": twin}).as_json())
        with pytest.raises(ValueError, match=r"twin\.folder: .*expected a path below the version's folder"):
            repository.twin_of(repository.find("pets"))


def test_the_files_of_a_version_are_asked_for_once(repository: Repository) -> None:
    version, asked = publish(repository), []

    def place(manifest: Manifest) -> Path:
        asked.append(manifest)
        return repository.folder

    found = Version(version.manifest, place)
    assert [found.folder, found.folder] == [repository.folder] * 2
    assert len(asked) == 1
    assert found == version
