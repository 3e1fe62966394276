"""TensorRT engines. Without a GPU they run on a stand-in for NVIDIA's libraries, which checks how they are used."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import requirements
from export.engines import cuda, messages, open_engine, plans, trt
from export.engines.base import CannotRunHere
from export.engines.plans import Profile
from export.engines.trt import TrtEngine
from export.manifest import Build, Requirements
from tests.export import graphs
from tests.export.engines import versions
from tests.export.engines.nvidia import Cuda, Status, TensorRt
from tests.export.engines.versions import MAX_BATCH

if TYPE_CHECKING:
    from export.manifest import Manifest, Runtime
    from tests.export.engines.versions import Input
    from tests.export.graphs import Form

TWO_PROFILES = ((1, 1, 1), (1, MAX_BATCH, MAX_BATCH))


class Machine:
    """A machine with the stand-ins installed, and a version with a plan."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: int = 1) -> None:
        self.folder = folder
        self.cuda = Cuda(gpus=gpus)
        self.modules = {name: TensorRt(name, self.cuda) for name in ("tensorrt", "tensorrt_rtx")}
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def manifest(self, *, runtime: Runtime = "tensorrt", kind: Input = "float32", **build: Any) -> Manifest:
        return versions.manifest(input=kind).model_copy(
            update={
                "file": "model.plan",
                "runtime": runtime,
                "sha256": "0" * 64,
                "requires": Requirements(runtime="==11.4.1.5"),
                "build": Build(command="tenet export --from linear --runtime tensorrt", **build),
            }
        )

    def open(
        self, *, runtime: Runtime = "tensorrt", kind: Input = "float32", plan: dict[str, Any] | None = None, **how: Any
    ) -> TrtEngine:
        manifest = self.manifest(runtime=runtime, kind=kind)
        content = plan_of(manifest) if plan is None else plan_of(manifest) | plan
        (self.folder / manifest.file).write_text(json.dumps(content))
        return TrtEngine(self.folder, manifest, **how)

    def publish(self, *, runtime: Runtime = "tensorrt", content: bytes | None = None) -> None:
        manifest = self.manifest(runtime=runtime)
        plan = json.dumps(plan_of(manifest)).encode() if content is None else content
        (self.folder / manifest.file).write_bytes(plan)
        versions.described(self.folder, manifest)


def plan_of(manifest: Manifest) -> dict[str, Any]:
    image, answer = manifest.inputs[0], manifest.outputs[0]
    names = {"FP32": "FLOAT", "UINT8": "UINT8"}
    return {
        "inputs": {image.name: [names[image.datatype], image.shape]},
        "outputs": {answer.name: [names[answer.datatype], answer.shape]},
        "profiles": TWO_PROFILES,
    }


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def images_of(n: int, *, seed: int = 0) -> Any:
    shape = versions.manifest().image_shape
    return np.random.default_rng(seed).random((n, *shape), dtype=np.float32)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("graphs_on", [True, False])
def test_batches_of_every_size_are_answered_in_any_order(
    machine: Machine, runtime: Runtime, *, graphs_on: bool
) -> None:
    with machine.open(runtime=runtime, graphs=graphs_on) as engine:
        for turn in range(3):
            for size in (3, 1, MAX_BATCH, 2, 1, 5):
                images = images_of(size, seed=turn)
                np.testing.assert_allclose(engine(images), versions.answers(images), rtol=1e-5, atol=1e-5)
    assert (machine.cuda.launches > 0) == (graphs_on and runtime == "tensorrt")


def test_an_answer_stays_as_it_was_when_the_next_one_comes(machine: Machine) -> None:
    with machine.open() as engine:
        first = engine(images_of(2))
        before = first.copy()
        engine(images_of(2, seed=1))
    np.testing.assert_array_equal(first, before)


def test_uint8_images_go_in_as_they_are(machine: Machine) -> None:
    images = images_of(3)
    with machine.open(kind="uint8") as engine:
        expected = versions.answers((np.rint(images * 255) / np.float32(255)).astype(np.float32))
        np.testing.assert_allclose(engine.classify(images), expected, rtol=1e-4, atol=1e-4)


def test_a_batch_runs_in_the_tightest_profile_that_holds_it(machine: Machine) -> None:
    with machine.open(graphs=False) as engine:
        for size in (1, 2, 1, 5):
            engine(images_of(size))
    assert machine.modules["tensorrt"].engines[0].profiles_used == [0, 1]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1), st.integers(1, 12))
def test_the_chosen_profile_holds_the_batch_and_the_uncovered_batch_is_in_none(
    ranges: list[tuple[int, int]], max_batch: int
) -> None:
    pairs = [(smallest, smallest + more) for smallest, more in ranges]
    profiles = [Profile(index, *pair) for index, pair in enumerate(pairs)]
    missing = plans.uncovered(pairs, max_batch=max_batch)
    held = [batch for batch in range(1, max_batch + 1) if any(low <= batch <= high for low, high in pairs)]
    assert missing == next((batch for batch in range(1, max_batch + 1) if batch not in held), None)
    for batch in held:
        chosen = plans.tightest(profiles, batch)
        assert chosen.smallest <= batch <= chosen.largest
        widths = [high - low for low, high in pairs if low <= batch <= high]
        assert chosen.largest - chosen.smallest == min(widths)


def test_graphs_of_the_sizes_used_last_are_kept_and_no_more(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "MAX_GRAPHS", 2)
    with machine.open() as engine:
        for size in (1, 2, 1, 3, 1):
            engine(images_of(size))
        kept = list(machine.cuda.alive.values())
        assert kept.count("graph") == 2
        assert kept.count("recording") == 0
        # 1 was used between 2 and 3, and so was launched twice and recorded once.
        assert machine.cuda.launches == 2


def test_warming_up_records_the_sizes_that_will_come(machine: Machine) -> None:
    with machine.open() as engine:
        engine.warm_up()
        assert list(machine.cuda.alive.values()).count("graph") == 2
        engine.warm_up((3, 4))
        assert list(machine.cuda.alive.values()).count("graph") == 4
        assert machine.cuda.launches == 0


def test_an_engine_whose_work_cannot_be_recorded_answers_without_graphs(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cuda.records = False
    with machine.open() as engine:
        for size in (1, 2, 2, MAX_BATCH):
            images = images_of(size)
            np.testing.assert_allclose(engine(images), versions.answers(images), rtol=1e-5, atol=1e-5)
    assert caplog.text.count("CUDA graphs are off") == 1
    assert not machine.cuda.alive


def test_threads_take_turns_and_each_gets_its_own_answer(machine: Machine) -> None:
    def ask(seed: int) -> bool:
        images = images_of(1 + seed % MAX_BATCH, seed=seed)
        return bool(np.allclose(engine(images), versions.answers(images), rtol=1e-5, atol=1e-5))

    with machine.open() as engine, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(100)))


def test_an_engine_is_closed_on_its_own_gpu_whatever_the_thread_works_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, gpus=2)
    engine = machine.open(runtime="tensorrt_rtx", ordinal=1, cache=tmp_path / "cache")
    cuda.Device(0).use()
    engine.close()
    assert not machine.cuda.alive
    assert next((tmp_path / "cache").iterdir()).read_bytes() == b"kernels"


def test_an_engine_whose_gpu_is_lost_is_closed_all_the_same(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    engine = machine.open()
    engine.warm_up()
    machine.cuda.failing["cudaSetDevice"] = Status.cudaErrorIllegalAddress
    engine.close()
    assert "cudaSetDevice: CUDA says cudaErrorIllegalAddress" in caplog.text
    with pytest.raises(RuntimeError, match="linear@1: the engine is closed"):
        engine(images_of(1))


def test_every_thread_works_on_the_engine_s_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, gpus=2)
    with machine.open(ordinal=1) as engine:
        assert cuda.current_gpu() == cuda.Gpu("Imaginary 1", "8.9")
        thread = threading.Thread(target=engine, args=(images_of(1),))
        thread.start()
        thread.join()
    assert set(machine.cuda.used.values()) == {1}
    assert len(machine.cuda.used) == 2


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_closing_gives_everything_back_and_may_be_done_twice(machine: Machine, runtime: Runtime) -> None:
    engine = machine.open(runtime=runtime)
    engine.warm_up()
    assert machine.cuda.alive
    engine.close()
    engine.close()
    assert not machine.cuda.alive
    with pytest.raises(RuntimeError, match="linear@1: the engine is closed"):
        engine(images_of(1))


def test_what_fails_while_an_engine_is_closed_has_its_name_and_keeps_nothing(machine: Machine, tmp_path: Path) -> None:
    engine = machine.open(runtime="tensorrt_rtx", cache=tmp_path / "cache")
    machine.cuda.failing["serialize"] = Status.cudaErrorMemoryAllocation
    with pytest.raises(RuntimeError, match="linear@1: the cache cannot be serialised"):
        engine.close()
    assert not machine.cuda.alive


def test_nothing_of_the_engine_is_held_after_closing(machine: Machine) -> None:
    engine = machine.open()
    engine.warm_up()
    held = weakref.ref(machine.modules["tensorrt"].engines.pop())
    assert held() is not None
    engine.close()
    assert held() is None


def test_after_an_error_of_cuda_the_engine_says_so_and_still_gives_everything_back(machine: Machine) -> None:
    with machine.open() as engine:
        engine.warm_up()
        machine.cuda.failing["cudaStreamSynchronize"] = Status.cudaErrorIllegalAddress
        complaint = "linear@1: cudaStreamSynchronize: CUDA says cudaErrorIllegalAddress: in words"
        with pytest.raises(RuntimeError, match=complaint):
            engine(images_of(1))
    assert not machine.cuda.alive


def test_one_thing_that_cannot_be_given_back_does_not_keep_the_others(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = machine.open()
    engine.warm_up()
    machine.cuda.failing["cudaFreeHost"] = Status.cudaErrorIllegalAddress
    engine.close()
    assert set(machine.cuda.alive.values()) == {"pinned"}
    assert "cudaFreeHost: CUDA says cudaErrorIllegalAddress" in caplog.text


@pytest.mark.parametrize("function", ["cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags"])
def test_an_engine_for_which_there_is_no_memory_leaves_nothing_behind(machine: Machine, function: str) -> None:
    machine.cuda.failing[function] = Status.cudaErrorMemoryAllocation
    with pytest.raises(RuntimeError, match=rf"linear@1: {function}: CUDA says cudaErrorMemoryAllocation"):
        machine.open()
    assert not machine.cuda.alive


def test_a_refused_batch_has_tensorrt_s_reason(machine: Machine) -> None:
    with machine.open() as engine:
        machine.modules["tensorrt"].engines[0].refusing = True
        with pytest.raises(
            RuntimeError, match="linear@1: TensorRT could not enqueue a batch of 2; TensorRT says: out of tactics"
        ):
            engine(images_of(2))
        machine.modules["tensorrt"].engines[0].refusing = False
        np.testing.assert_allclose(engine(images_of(2)), versions.answers(images_of(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (
            {"inputs": {"pixels": ["FLOAT", [-1, 3, 4, 5]]}},
            r"expected INPUT 'images' FP32 .* its plan has INPUT 'pixels'",
        ),
        ({"inputs": {"images": ["UINT8", [-1, 3, 4, 5]]}}, r"its plan has INPUT 'images' UINT8"),
        ({"inputs": {"images": ["FLOAT", [-1, 3, 8, 8]]}}, r"its plan has INPUT 'images' FP32 \(-1, 3, 8, 8\)"),
        ({"outputs": {"logits": ["HALF", [-1, 6]]}}, r"its plan has .*OUTPUT 'logits' FP16"),
        ({"outputs": {"logits": ["FLOAT", [-1, 7]]}}, r"OUTPUT 'logits' FP32 \(-1, 6\) as in its manifest"),
        ({"profiles": [[1, 4, 4]]}, "expected a plan for batches of 1 to 8 .* none of its profiles takes 5"),
        ({"profiles": [[2, 8, 8]]}, "none of its profiles takes 1"),
    ],
)
def test_a_plan_that_is_not_what_its_manifest_says_is_refused_before_the_first_batch(
    machine: Machine, plan: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=f"linear: .*{complaint}.*build it again with `tenet export"):
        machine.open(plan=plan)
    assert not machine.cuda.alive


def test_a_plan_that_tensorrt_does_not_take_is_refused_with_both_versions_and_the_command(machine: Machine) -> None:
    (machine.folder / "model.plan").write_bytes(b"\x00 no plan")
    expected = (
        r"expected a plan that tensorrt 11\.4\.1\.5 takes here, got one for ==11\.4\.1\.5: Serialization .*`tenet"
    )
    with pytest.raises(CannotRunHere, match=expected):
        TrtEngine(machine.folder, machine.manifest())
    (machine.folder / "model.plan").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.plan: expected a plan, got an empty file"):
        TrtEngine(machine.folder, machine.manifest())


def test_tensorrt_rtx_is_asked_whether_the_plan_fits_before_it_is_deserialised(machine: Machine) -> None:
    machine.modules["tensorrt_rtx"].invalid = 3
    with pytest.raises(CannotRunHere, match="cannot run it here: version mismatch, unsupported cc; build it again"):
        machine.open(runtime="tensorrt_rtx")
    assert not machine.modules["tensorrt_rtx"].engines


@pytest.fixture
def installed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The machine, as one where both runtimes are installed: what is found here is remembered by the process."""
    real = metadata.version
    known = {"tensorrt": TensorRt.__version__, "tensorrt-rtx": TensorRt.__version__}
    monkeypatch.setattr(metadata, "version", lambda name: known.get(name) or real(name))
    remembered = (requirements._here, requirements._without_gpus)
    for memory in remembered:
        memory.cache_clear()
    yield machine
    for memory in remembered:
        memory.cache_clear()


def test_an_engine_that_cannot_be_warmed_up_leaves_nothing_behind(installed: Machine) -> None:
    installed.publish()
    installed.cuda.failing["cudaStreamSynchronize"] = Status.cudaErrorIllegalAddress
    with pytest.raises(RuntimeError, match="linear@1: cudaStreamSynchronize"):
        open_engine(installed.folder, cache=installed.folder / "cache")
    assert not installed.cuda.alive


@pytest.mark.parametrize(
    ("runtime", "content", "invalid", "complaint"),
    [
        ("tensorrt_rtx", None, 2, "cannot run it here: unsupported cc"),
        ("tensorrt_rtx", b"of another version", 0, "expected a plan that tensorrt_rtx .* takes here"),
        ("tensorrt", b"of another version", 0, "expected a plan that tensorrt .* takes here"),
    ],
)
def test_a_plan_that_the_runtime_itself_refuses_is_told_or_built_again(
    installed: Machine, runtime: Runtime, content: bytes | None, invalid: int, complaint: str
) -> None:
    installed.publish(runtime=runtime, content=content)
    installed.modules[runtime].invalid = invalid
    with pytest.raises(CannotRunHere, match=complaint):
        open_engine(installed.folder, cache=installed.folder / "cache")
    # No ONNX file travels with this one: to be asked for it is to be built again.
    with pytest.raises(ValueError, match="expected an ONNX file beside its plan to build it again from, found none"):
        open_engine(installed.folder, rebuild="auto", cache=installed.folder / "cache")
    assert not installed.cuda.alive


def test_compiled_kernels_are_kept_for_the_next_start(machine: Machine, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    machine.open(runtime="tensorrt_rtx", cache=cache).close()
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == b"kernels"
    machine.open(runtime="tensorrt_rtx", cache=cache).close()
    assert kept.read_bytes() == b"kernels+"
    kept.write_bytes(b"damaged")
    machine.open(runtime="tensorrt_rtx", cache=cache).close()
    assert kept.read_bytes() == b"kernels"


def test_kernels_that_cannot_be_kept_are_no_error(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with machine.open(runtime="tensorrt_rtx", cache=tmp_path / "file") as engine:
        engine(images_of(1))
    assert "compiled kernels could not be kept" in caplog.text
    assert not machine.cuda.alive


def test_a_listener_that_leaves_does_not_take_another_s_place(machine: Machine) -> None:
    module = machine.modules["tensorrt"]
    logger = messages.logger(module)
    with messages.heard(module) as outer:
        with messages.heard(module) as inner:
            logger.log(SimpleNamespace(name="ERROR"), "to both")
        logger.log(SimpleNamespace(name="ERROR"), "to one")
    assert (inner.errors, outer.errors) == (["to both"], ["to both", "to one"])


def test_a_gpu_that_is_not_there_is_named(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotRunHere, match="device 'cuda:1': expected 'cuda:0' to 'cuda:0' on this machine"):
        machine.open(ordinal=1)
    without = Machine(tmp_path, monkeypatch, gpus=0)
    with pytest.raises(CannotRunHere, match="need an NVIDIA GPU, and CUDA finds none on this machine"):
        without.open()


def test_missing_libraries_are_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(CannotRunHere, match="pip install cuda-bindings"):
        machine.open()
    assert cuda.gpus() == ()
    assert cuda.current_gpu() is None
    assert cuda.driver_version() is None
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(CannotRunHere, match=r"runtime 'tensorrt' is not installed here.*tenet\[tensorrt\]"):
        machine.open()


def test_gpus_are_described(machine: Machine) -> None:
    assert machine.cuda.cudaGetDeviceCount()[1] == 1
    assert cuda.gpus() == (cuda.Gpu("Imaginary 0", "8.9"),)
    assert cuda.driver_version() == "13.1"


def test_a_real_plan_finds_no_gpu_where_there_is_none_and_imports_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graphs.saved(tmp_path)
    program = (
        "import sys; from pathlib import Path; from export.engines.base import CannotRunHere\n"
        "from export.engines.trt import TrtEngine; from export.tensorrt_plan import plan_from_onnx\n"
        "from tests.export import graphs; from tests.export.engines.test_trt import described\n"
        "folder = Path(sys.argv[1])\n"
        "source, plan = folder / 'source.onnx', folder / 'model.plan'\n"
        "plan_from_onnx(source, plan, runtime='tensorrt_rtx', image=graphs.IMAGES, max_batch=8)\n"
        "try: TrtEngine(folder, described('tensorrt_rtx', 'fp32'))\n"
        "except CannotRunHere as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    # No GPU is visible to the process, even where there is one.
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        env={"CUDA_VISIBLE_DEVICES": "-1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "CUDA finds none on this machine" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def described(runtime: Runtime, form: Form) -> Manifest:
    """Return the manifest of a plan of `graphs.classifier`."""
    return versions.manifest().model_copy(
        update={
            "file": "model.plan",
            "runtime": runtime,
            "precision": "fp32" if form == "uint8" else form,
            "inputs": (graphs.spec_of(form),),
            "outputs": (graphs.LOGITS,),
            "class_names": tuple("abcde"),
            "max_batch": MAX_BATCH,
        }
    )


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def runtime(request: pytest.FixtureRequest) -> Any:
    """A runtime that is installed and builds for the GPU of this machine."""
    from export import tensorrt_plan

    module = pytest.importorskip(request.param)
    (gpu, *_) = requirements.Machine.here().gpus
    if request.param == "tensorrt_rtx" and gpu.compute_capability not in tensorrt_plan.known_compute_capabilities(
        module
    ):
        pytest.skip(f"tensorrt_rtx does not build for compute capability {gpu.compute_capability}")
    return request.param


def opened(folder: Path, runtime: Runtime, form: Form = "fp32", **how: Any) -> TrtEngine:
    from export.tensorrt_plan import plan_from_onnx

    source, manifest = graphs.saved(folder, form), described(runtime, form)
    plan_from_onnx(source, folder / "model.plan", runtime=runtime, image=manifest.inputs[0], max_batch=MAX_BATCH)
    return TrtEngine(folder, manifest, **how)


def inputs_of(n: int, form: Form = "fp32", *, seed: int = 0) -> Any:
    images = np.random.default_rng(seed).random((n, *graphs.spec_of(form).shape[1:]), dtype=np.float32)
    return np.rint(images * 255).astype(np.uint8) if form == "uint8" else images


def expected_of(folder: Path, inputs: Any) -> Any:
    session = onnxruntime.InferenceSession(str(folder / "source.onnx"), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": inputs})[0]


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp32", "uint8", "fp16", "int8"])
def test_a_plan_answers_as_its_onnx_file_for_every_batch_with_graphs_and_without(
    tmp_path: Path, runtime: Runtime, form: Form
) -> None:
    tolerance = 1e-4 if form in {"fp32", "uint8"} else 2e-2
    with (
        opened(tmp_path, runtime, form) as recorded,
        TrtEngine(tmp_path, described(runtime, form), graphs=False) as plain,
    ):
        for turn in range(3):
            for size in (1, 2, 5, MAX_BATCH):
                inputs = inputs_of(size, form, seed=turn)
                expected = expected_of(tmp_path, inputs)
                np.testing.assert_allclose(recorded(inputs), expected, rtol=tolerance, atol=tolerance)
                np.testing.assert_allclose(plain(inputs), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_threads_share_an_engine_on_a_gpu(tmp_path: Path, runtime: Runtime) -> None:
    parts = [inputs_of(1 + seed % MAX_BATCH, seed=seed) for seed in range(40)]
    with opened(tmp_path, runtime) as engine, ThreadPoolExecutor(2) as pool:
        for part, answers in zip(parts, pool.map(engine, parts), strict=True):
            np.testing.assert_allclose(answers, expected_of(tmp_path, part), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_engines_come_and_go_on_a_gpu_and_leave_its_memory_as_it_was(tmp_path: Path, runtime: Runtime) -> None:
    def free() -> int:
        return int(cuda.Device()("cudaMemGetInfo"))

    opened(tmp_path, runtime).close()
    before = free()
    for _ in range(5):
        with TrtEngine(tmp_path, described(runtime, "fp32")) as engine:
            engine.warm_up((1, 2, 3))
        engine.close()
    # What other programs take or give back in the meantime may be some megabytes.
    assert before - free() < 64 << 20


@pytest.mark.gpu
def test_profiles_of_ones_own_are_used_on_a_gpu(tmp_path: Path, runtime: Runtime) -> None:
    from export.tensorrt_plan import Options, plan_from_onnx

    options = Options(profiles=((1, 1, 2), (2, 4, 4), (4, MAX_BATCH, MAX_BATCH)))
    source, manifest = graphs.saved(tmp_path), described(runtime, "fp32")
    plan_from_onnx(
        source, tmp_path / "model.plan", runtime=runtime, image=graphs.IMAGES, max_batch=MAX_BATCH, options=options
    )
    with TrtEngine(tmp_path, manifest) as engine:
        for size in (1, 2, 3, 4, 5, MAX_BATCH):
            inputs = inputs_of(size)
            np.testing.assert_allclose(engine(inputs), expected_of(tmp_path, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_kernels_compiled_on_a_gpu_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with opened(tmp_path, "tensorrt_rtx", cache=tmp_path / "cache") as engine:
        engine.warm_up()
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.stat().st_size > 0
    with TrtEngine(tmp_path, described("tensorrt_rtx", "fp32"), cache=tmp_path / "cache") as engine:
        np.testing.assert_allclose(engine(inputs_of(2)), expected_of(tmp_path, inputs_of(2)), rtol=1e-4, atol=1e-4)
