"""Plans built again. What needs no GPU is tested in parts: the build, the verdict, and the cache with its locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from export import manifest as manifests
from export import rebuild, rebuild_cache, requirements, tensorrt_plan
from export.engines import open_engine
from export.engines.base import CannotRunHere
from export.engines.cuda import Gpu
from export.manifest import Build, Parity, Requirements
from export.requirements import Machine
from export.tensorrt_plan import Options
from tests.export import graphs
from tests.export.engines import versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.manifest import Manifest
    from tests.export.graphs import Form

ROOT = Path(__file__).parents[2]
ADA = Gpu("Imaginary 4090", "8.9")
HERE = Machine("linux-x86_64", {"tensorrt_rtx": "1.7.1.116"}, (ADA,), "13.0")

# What a plan of another machine might say.
RECORD = Options(profiles=((1, 1, 1), (1, 8, 8)), compute_capabilities=("12.0",)).as_record()


def published(folder: Path, *, form: Form = "fp32", **changes: Any) -> Manifest:
    """Write a version with a plan that nobody can run, and the ONNX file that travels with it."""
    graphs.saved(folder, form)
    (folder / "model.plan").write_bytes(b"of another machine")
    manifest = versions.manifest().model_copy(
        update={
            "file": "model.plan",
            "runtime": "tensorrt_rtx",
            "precision": "fp32" if form == "uint8" else form,
            "inputs": (graphs.spec_of(form),),
            "outputs": (graphs.LOGITS,),
            "class_names": tuple("abcde"),
            "requires": Requirements(runtime="==0.1"),
            "build": Build(command="tenet export --from a", options=RECORD, onnx="source.onnx", versions={"onnx": "1"}),
            "files": {"source.onnx": manifests.sha256_of(folder / "source.onnx")},
            **changes,
        }
    )
    versions.described(folder, manifest)
    return manifests.read(folder)


@pytest.fixture
def version(tmp_path: Path) -> Path:
    (tmp_path / "version").mkdir()
    published(tmp_path / "version")
    return tmp_path / "version"


@pytest.mark.parametrize("form", ["fp32", "uint8", "fp16", "int8"])
def test_a_plan_is_built_again_for_the_gpu_at_hand_and_its_record_says_so(tmp_path: Path, form: Form) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "version").mkdir()
    (tmp_path / "place").mkdir()
    old = published(tmp_path / "version", form=form)
    options = rebuild.options_for(old, ADA)
    new = rebuild.build_into(tmp_path / "place", tmp_path / "version" / "source.onnx", old, options=options)
    assert manifests.verify_all(tmp_path / "place") == new
    assert new.requires.compute_capabilities == ("8.9",)
    assert new.requires.runtime != old.requires.runtime
    assert new.sha256 != old.sha256
    assert (new.model, new.version, new.inputs, new.max_batch) == (old.model, old.version, old.inputs, old.max_batch)
    assert set(new.files) == {tensorrt_plan.LOG}
    assert old.sha256 in new.build.notes[-1]
    assert not new.servable


def test_a_gpu_that_the_runtime_does_not_build_for_is_named(version: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    expected = r"builds for GPUs of compute capability 7\.5, .* got 9\.0 \(Imaginary H100\); take runtime tensorrt"
    with pytest.raises(CannotRunHere, match=expected):
        rebuild.options_for(manifests.read(version), Gpu("Imaginary H100", "9.0"))


def test_tensorrt_keeps_the_options_of_the_first_build(version: Path) -> None:
    manifest = manifests.read(version)
    options = Options(workspace_mib=64, hardware_compatibility="ampere_plus")
    build = manifest.build.model_copy(update={"options": options.as_record()})
    manifest = manifest.model_copy(update={"runtime": "tensorrt", "build": build})
    assert rebuild.options_for(manifest, ADA) == options


def test_whatever_would_make_another_plan_makes_another_key(version: Path) -> None:
    manifest, options = manifests.read(version), Options.from_record(RECORD)
    first = rebuild.key(manifest, HERE, ADA, options)
    others = [
        rebuild.key(manifest.model_copy(update={"files": {"source.onnx": "0" * 64}}), HERE, ADA, options),
        rebuild.key(manifest.model_copy(update={"max_batch": 3}), HERE, ADA, options),
        rebuild.key(manifest.model_copy(update={"version": 2}), HERE, ADA, options),
        rebuild.key(manifest, replace(HERE, runtimes={"tensorrt_rtx": "1.8"}), ADA, options),
        rebuild.key(manifest, replace(HERE, platform="linux-aarch64"), ADA, options),
        rebuild.key(manifest, replace(HERE, driver="13.1"), ADA, options),
        rebuild.key(manifest, HERE, Gpu(ADA.name, "8.6"), options),
        rebuild.key(manifest, HERE, Gpu("Imaginary 4080", "8.9"), options),
        rebuild.key(manifest, HERE, ADA, replace(options, workspace_mib=1)),
    ]
    assert len({first, *others}) == len(others) + 1
    assert rebuild.key(manifest, HERE, ADA, options) == first


@pytest.mark.parametrize(
    ("spoil", "error", "complaint"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "expected the ONNX file of the plan here, found none"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), ValueError, "its sha256 is not that of its manifest"),
    ],
)
def test_an_onnx_file_that_is_gone_or_damaged_is_not_built_from(
    version: Path, tmp_path: Path, spoil: Callable[[Path], Any], error: type[Exception], complaint: str
) -> None:
    spoil(version / "source.onnx")
    with pytest.raises(error, match=rf"source\.onnx: .*{complaint}"):
        rebuild.rebuilt(version, manifests.read(version), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_plan_without_its_onnx_file_cannot_be_built_again(version: Path, tmp_path: Path) -> None:
    manifest = manifests.read(version)
    alone = manifest.model_copy(update={"build": manifest.build.model_copy(update={"onnx": None})})
    with pytest.raises(ValueError, match=r"expected an ONNX file beside its plan .* by `tenet export --from a`"):
        rebuild.rebuilt(version, alone, cache=tmp_path / "cache")


def test_without_a_gpu_nothing_is_built_and_no_torch_imported(version: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from export import manifest, rebuild\n"
        "folder, cache = map(Path, sys.argv[1:])\n"
        "try: rebuild.rebuilt(folder, manifest.read(folder), cache=cache)\n"
        "except rebuild.CannotRunHere as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(version), str(tmp_path / "cache")],
        cwd=ROOT,
        # No GPU is visible to the process, even where there is one.
        env={"CUDA_VISIBLE_DEVICES": "-1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "needs an NVIDIA GPU to be built and to run" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert not (tmp_path / "cache").exists()


def judge(answers: Any, expected: Any, manifest: Manifest) -> Parity:
    return rebuild.judged(
        answers, expected, inputs=rebuild.noise(manifest), source=Path("source.onnx"), manifest=manifest
    )


def test_a_plan_that_agrees_with_its_onnx_file_is_recorded_with_what_was_compared() -> None:
    manifest = versions.manifest()
    inputs = rebuild.noise(manifest)
    expected = versions.answers(inputs)
    record = judge(expected + np.float32(0.25), expected, manifest)
    assert (record.status, record.agreement) == ("passed", 1.0)
    assert record.max_abs_difference == pytest.approx(0.25, abs=1e-4)
    assert record.images is not None
    assert (record.images.n, record.images.seed) == (len(inputs), 0)


def test_a_plan_that_disagrees_or_answers_with_no_number_is_refused() -> None:
    manifest = versions.manifest()
    expected = versions.answers(rebuild.noise(manifest))
    with pytest.raises(ValueError, match=r"does not agree with source\.onnx: top-1 differs on 100\.00% of 64 images"):
        judge(-expected, expected, manifest)
    broken = expected.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="some answers are not finite"):
        judge(broken, expected, manifest)


@pytest.mark.parametrize(("kind", "dtype"), [("float32", np.float32), ("uint8", np.uint8)])
def test_noise_is_what_the_engine_takes_and_the_same_each_time(kind: versions.Input, dtype: type) -> None:
    manifest = versions.manifest(input=kind)
    inputs = rebuild.noise(manifest)
    assert inputs.dtype == dtype
    assert inputs.shape[1:] == manifest.inputs[0].shape[1:]
    np.testing.assert_array_equal(inputs, rebuild.noise(manifest))
    # Images alike would all be of one class, and two engines would agree on them for nothing.
    assert len(np.unique(versions.answers(inputs.reshape(len(inputs), 3, 4, 5).astype(np.float32)).argmax(axis=1))) > 1


def make(place: Path) -> None:
    """Fill a folder with a version."""
    versions.version(place)


def test_what_was_made_is_kept_whole_and_made_once(tmp_path: Path) -> None:
    made = []

    def slowly(place: Path) -> None:
        made.append(place)
        time.sleep(0.05)
        make(place)

    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda _: rebuild_cache.kept(tmp_path / "cache", "a", slowly), range(4)))
    assert places == {tmp_path / "cache" / "a"}
    assert len(made) == 1
    assert manifests.verify_all(tmp_path / "cache" / "a").model == "linear"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["a", "a.lock"]


def test_two_names_do_not_wait_for_each_other(tmp_path: Path) -> None:
    started = threading.Event()

    def waits(place: Path) -> None:
        assert started.wait(10)
        make(place)

    def goes(place: Path) -> None:
        started.set()
        make(place)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(rebuild_cache.kept, tmp_path, "a", waits)
        second = pool.submit(rebuild_cache.kept, tmp_path, "b", goes)
        assert {first.result(20).name, second.result(20).name} == {"a", "b"}


@pytest.mark.parametrize("name", ["model.onnx", manifests.FILE_NAME])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, name: str, spoil: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    place = rebuild_cache.kept(tmp_path, "a", make)
    spoil(place / name)
    assert rebuild_cache.kept(tmp_path, "a", make) == place
    manifests.verify_all(place)
    assert "damaged and will be built again" in caplog.text


def test_what_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fails(place: Path) -> None:
        make(place)
        raise ValueError("does not agree")

    with pytest.raises(ValueError, match="does not agree"):
        rebuild_cache.kept(tmp_path, "a", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    assert rebuild_cache.kept(tmp_path, "a", make).is_dir()


def test_what_is_not_whole_is_never_kept(tmp_path: Path) -> None:
    def half(place: Path) -> None:
        make(place)
        (place / "model.onnx").write_bytes(b"half of it")

    with pytest.raises(ValueError, match="expected sha256"):
        rebuild_cache.kept(tmp_path, "a", half)
    assert not (tmp_path / "a").exists()


def test_a_process_killed_at_work_keeps_nobody_waiting_and_its_rest_is_removed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from export import rebuild_cache\n"
        "def make(place):\n"
        "    (place / 'model.plan').write_bytes(b'half'); print('working', flush=True); time.sleep(60)\n"
        "rebuild_cache.kept(Path(sys.argv[1]), 'a', make)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as working:
        assert working.stdout is not None
        assert working.stdout.readline() == "working\n"
        os.kill(working.pid, signal.SIGKILL)
        working.wait()
    assert any(path.name.startswith(".unfinished") for path in tmp_path.iterdir())
    manifests.verify_all(rebuild_cache.kept(tmp_path, "a", make))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.lock"]


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def elsewhere(request: pytest.FixtureRequest, version: Path) -> Path:
    """A version whose plan was built elsewhere, for a runtime that is installed and builds for this GPU."""
    pytest.importorskip(request.param)
    manifest = manifests.read(version)
    if request.param == "tensorrt":
        options: dict[str, Any] = {**RECORD, "compute_capabilities": []}
        build = manifest.build.model_copy(update={"options": options})
        manifest = manifest.model_copy(update={"runtime": "tensorrt", "build": build})
        (version / manifests.FILE_NAME).write_bytes(manifest.as_json())
    try:
        rebuild.options_for(manifest, requirements.Machine.here().gpus[0])
    except CannotRunHere as error:
        pytest.skip(str(error))
    return version


@pytest.mark.gpu
def test_a_plan_of_elsewhere_is_refused_or_built_again_and_then_found(elsewhere: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match=r"expected tensorrt\w* ==0\.1, got"):
        open_engine(elsewhere, cache=tmp_path / "cache")
    manifest = manifests.read(elsewhere)
    place = rebuild.rebuilt(elsewhere, manifest, cache=tmp_path / "cache")
    before = (place / "model.plan").stat().st_mtime_ns
    with open_engine(elsewhere, rebuild="auto", cache=tmp_path / "cache") as engine:
        assert engine.manifest.parity.status == "passed"
        assert engine.manifest.sha256 == manifests.sha256_of(place / "model.plan")
    assert (place / "model.plan").stat().st_mtime_ns == before
    assert json.loads((place / manifests.FILE_NAME).read_text())["parity"]["images"]["seed"] == 0


@pytest.mark.gpu
def test_a_plan_that_the_runtime_refuses_though_its_manifest_fits_is_built_again(
    elsewhere: Path, tmp_path: Path
) -> None:
    manifest = manifests.read(elsewhere)
    requires = Requirements(runtime=f"=={requirements.Machine.here().runtimes[manifest.runtime]}")
    (elsewhere / manifests.FILE_NAME).write_bytes(manifest.model_copy(update={"requires": requires}).as_json())
    with pytest.raises(CannotRunHere, match="expected a plan that tensorrt"):
        open_engine(elsewhere, cache=tmp_path / "cache")
    with open_engine(elsewhere, rebuild="auto", cache=tmp_path / "cache") as engine:
        assert engine.manifest.parity.status == "passed"


@pytest.mark.gpu
def test_what_was_not_proved_is_not_proved_by_noise(elsewhere: Path, tmp_path: Path) -> None:
    manifest = manifests.read(elsewhere).model_copy(update={"parity": Parity(status="failed", reference="a@1")})
    place = rebuild.rebuilt(elsewhere, manifest, cache=tmp_path / "cache")
    assert manifests.read(place).parity.status == "failed"
