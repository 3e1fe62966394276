"""ONNX Runtime engines: right answers, on the provider that was asked for or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import engines
from export import manifest as manifests
from export.engines import open_engine, ort, providers, threads
from export.engines.base import CannotRunHere
from export.engines.places import NAMES, Place, placed
from export.engines.providers import Hardware, Profile
from export.manifest import Requirements, TensorSpec
from tests.export.engines import versions
from tests.export.engines.versions import CHANNELS, CLASSES, HEIGHT, MAX_BATCH, WIDTH

if TYPE_CHECKING:
    from onnx import NodeProto

    from export.engines.base import Images
    from tests.export.engines.versions import Input, Output

SHAPE = (CHANNELS, HEIGHT, WIDTH)


@pytest.fixture
def images() -> Images:
    """More images than a batch holds, in steps of 1/255, so that nothing is lost on the way to uint8."""
    stored = np.random.default_rng(0).integers(0, 256, (3 * MAX_BATCH + 1, *SHAPE))
    return stored.astype(np.float32) / np.float32(255)


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_an_engine_answers_as_its_file_does(tmp_path: Path, images: Images, kind: Input, output: Output) -> None:
    expected = versions.answers(images)
    with open_engine(versions.version(tmp_path, input=kind, output=output)) as engine:
        answers = engine.classify(images)
    expected = expected if output == "logits" else softmax(expected)
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-4)


def test_an_answer_does_not_depend_on_the_batch(tmp_path: Path, images: Images) -> None:
    with open_engine(versions.version(tmp_path)) as engine:
        together = engine(images[:MAX_BATCH])
        for index in range(MAX_BATCH):
            np.testing.assert_allclose(engine(images[index : index + 1])[0], together[index], atol=1e-4)


def test_images_that_lie_otherwise_in_memory_are_taken_as_they_look(tmp_path: Path, images: Images) -> None:
    flipped = images[:4, :, :, ::-1]
    with open_engine(versions.version(tmp_path)) as engine:
        np.testing.assert_array_equal(engine(flipped), engine(np.ascontiguousarray(flipped)))


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    versions.described(tmp_path, versions.manifest())
    with pytest.raises(
        ValueError, match=r"model\.onnx: ONNX Runtime cannot load it: .*; export the model again"
    ) as told:
        open_engine(tmp_path)
    assert "\n" not in str(told.value)


def test_a_changed_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = versions.version(tmp_path)
    contents = bytearray((folder / "model.onnx").read_bytes())
    contents[len(contents) // 2] ^= 1
    (folder / "model.onnx").write_bytes(contents)
    with pytest.raises(ValueError, match="expected sha256"):
        open_engine(folder)


def test_another_version_of_the_runtime_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"what no version could load")
    requires = Requirements(runtime=">=99.5")
    versions.described(tmp_path, versions.manifest().model_copy(update={"requires": requires}))
    with pytest.raises(CannotRunHere, match=rf">=99\.5.*{onnxruntime.__version__}"):
        open_engine(tmp_path)


@pytest.mark.parametrize(
    ("device", "provider", "place"),
    [
        (None, None, Place("cpu")),
        ("cpu", None, Place("cpu")),
        ("cpu", "cpu", Place("cpu")),
        ("cuda", None, Place("cuda", 0)),
        ("cuda:3", None, Place("cuda", 3)),
        ("cuda:1", "tensorrt", Place("tensorrt", 1)),
        (None, "nv_tensorrt_rtx", Place("nv_tensorrt_rtx", 0)),
    ],
)
def test_device_and_provider_are_each_others_default(device: str | None, provider: str | None, place: Place) -> None:
    assert placed(device=device, provider=provider) == place


@pytest.mark.parametrize(
    ("device", "provider", "message"),
    [
        ("tpu", None, "device 'tpu': expected one of cpu, cuda, cuda:N"),
        ("cuda:", None, "device 'cuda:'"),
        ("cuda:-1", None, "device 'cuda:-1'"),
        ("cuda:01", None, "device 'cuda:01'"),
        ("cpu:0", None, "device 'cpu:0'"),
        (None, "openvino", "provider 'openvino': expected one of cpu, cuda, tensorrt, nv_tensorrt_rtx"),
        ("cpu", "tensorrt", "provider 'tensorrt': expected device 'cuda', got 'cpu'; change one of them"),
        ("cuda", "cpu", "provider 'cpu': expected device 'cpu', got 'cuda'; change one of them"),
    ],
)
def test_a_place_that_there_is_not_is_named(
    tmp_path: Path, device: str | None, provider: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_engine(versions.version(tmp_path), device=device, provider=provider)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nv_tensorrt_rtx"])
def test_without_a_gpu_every_provider_on_gpus_says_so_in_one_line_and_nothing_else(
    tmp_path: Path, provider: str
) -> None:
    code = (
        "import sys; from pathlib import Path; from export.engines import open_engine\n"
        "from export.engines.base import CannotRunHere\n"
        "try: open_engine(Path(sys.argv[1]), provider=sys.argv[2])\n"
        "except CannotRunHere as error: print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(versions.version(tmp_path)), provider],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(engines.__file__).parents[2],
        # Where there is a GPU, CUDA is told to hide it.
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
    )
    (line,) = ran.stdout.splitlines()
    assert line.startswith(
        f"provider '{provider}': expected an NVIDIA GPU, and CUDA finds none on this machine; choose"
    )
    assert ran.stderr == ""


def test_threads_are_those_asked_for_or_the_process_s_share(tmp_path: Path) -> None:
    path = versions.version(tmp_path) / "model.onnx"
    for asked, expected in ((3, 3), (None, threads.budget())):
        session = ort.open_session(path, threads=asked)
        assert session.get_session_options().intra_op_num_threads == expected


def test_a_file_that_is_not_published_yet_can_be_opened(tmp_path: Path, images: Images) -> None:
    versions.save(versions.graph(), tmp_path / "draft.onnx")
    session = ort.open_session(tmp_path / "draft.onnx")
    (logits,) = session.run(["logits"], {"images": images})
    np.testing.assert_allclose(logits, versions.answers(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="provider 'tpu': expected one of cpu"):
        ort.open_session(tmp_path / "draft.onnx", provider="tpu")


def opened(folder: Path, *nodes: NodeProto) -> ort.OrtEngine:
    """Open the engine of the linear classifier with nodes between its images and `taken`, which it classifies."""
    graph = versions.graph()
    graph.node[0].input[0] = "taken"
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    graph.initializer.append(numpy_helper.from_array(np.array([1, *SHAPE]), "one_image"))
    versions.save(graph, folder / "model.onnx")
    versions.described(folder, versions.manifest())
    return ort.OrtEngine(folder, manifests.verify(folder))


def test_a_run_that_fails_is_told_in_one_line_with_the_model(tmp_path: Path, images: Images) -> None:
    engine = opened(tmp_path, helper.make_node("Reshape", ["images", "one_image"], ["taken"], name="the_reshape"))
    np.testing.assert_allclose(engine(images[:1]), versions.answers(images[:1]), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"^linear: the runtime failed: .*the_reshape.*; take a smaller") as told:
        engine(images[:2])
    assert str(told.value).isprintable()
    # It is none the worse for it.
    np.testing.assert_allclose(engine(images[:1]), versions.answers(images[:1]), rtol=1e-4, atol=1e-4)


def test_an_engine_is_closed_once_and_says_so_afterwards(tmp_path: Path, images: Images) -> None:
    engine = open_engine(versions.version(tmp_path))
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed; open it again"):
        engine(images[:1])
    with pytest.raises(RuntimeError, match="the engine is closed; open it again"), engine:
        engine.classify(images)


def test_a_file_runs_as_it_stands_where_that_is_asked_for(tmp_path: Path) -> None:
    # Fused, the sum of the three would be one node.
    nodes = [
        helper.make_node("Add", ["images", "first"], ["moved"], name="move"),
        helper.make_node("Sub", ["moved", "first"], ["logits"], name="back"),
    ]
    constants = [numpy_helper.from_array(np.array(3e7, np.float32), "first")]
    taken, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *SHAPE]) for name in ("images", "logits")
    )
    versions.save(helper.make_graph(nodes, "rounding", [taken], [given], constants), tmp_path / "model.onnx")
    session = ort.open_session(tmp_path / "model.onnx", optimise=False)
    assert session.get_session_options().graph_optimization_level.name == "ORT_DISABLE_ALL"
    (answers,) = session.run(None, {"images": np.full((1, *SHAPE), 1.2, np.float32)})
    assert (answers == 2).all()


def recorded(path: Path) -> onnxruntime.InferenceSession:
    """Open a file on the CPU, with a record of which provider runs which node."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=[NAMES["cpu"]])


def test_a_session_of_another_provider_is_refused(tmp_path: Path) -> None:
    path = versions.version(tmp_path) / "model.onnx"
    message = r"model\.onnx: expected CUDAExecutionProvider to run it, ONNX Runtime fell back to CPUExecutionProvider"
    with pytest.raises(RuntimeError, match=message):
        ort.check_provider(recorded(path), NAMES["cuda"], path=path)
    ort.check_provider(recorded(path), NAMES["cpu"], path=path)


def test_layers_that_another_provider_runs_are_named(tmp_path: Path) -> None:
    path = versions.version(tmp_path, input="uint8", output="probabilities") / "model.onnx"
    message = (
        r"expected CUDAExecutionProvider to run every layer, ONNX Runtime left .*head \(Gemm\), softmax \(Softmax\)"
    )
    with pytest.raises(RuntimeError, match=message):
        ort.check_layers(recorded(path), NAMES["cuda"], path=path)
    ort.check_layers(recorded(path), NAMES["cpu"], path=path)


def test_arithmetic_on_shapes_may_stay_on_the_cpu(tmp_path: Path) -> None:
    # Flattened as PyTorch writes it: the batch is taken from the shape, and put together with the rest.
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "first"], ["size"], name="gather"),
        helper.make_node("Concat", ["size", "rest"], ["target"], name="concat", axis=0),
        helper.make_node("Reshape", ["images", "target"], ["flat"], name="reshape"),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"], name="head"),
    ]
    constants = [
        numpy_helper.from_array(np.array([0]), "first"),
        numpy_helper.from_array(np.array([-1]), "rest"),
        numpy_helper.from_array(versions.weights_of(0), "weights"),
    ]
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    path = tmp_path / "model.onnx"
    versions.save(helper.make_graph(nodes, "shapes", [taken], [given], constants), path)
    assert ort.layers_elsewhere(recorded(path), NAMES["cuda"]) == ["head (MatMul)"]


HARDWARE = Hardware("NVIDIA L4, compute capability 8.9", "101600")
PROFILE = Profile(TensorSpec(name="images", datatype="FP32", shape=(-1, *SHAPE)), max_batch=16)


def folder_of(path: Path, cache: Path, **changes: Any) -> str:
    arguments = {"place": Place("tensorrt", 1), "profile": PROFILE, "hardware": HARDWARE, **changes}
    return providers.device_options(path, arguments.pop("place"), cache=cache, **arguments)["trt_engine_cache_path"]


def test_tensorrt_is_told_the_shapes_that_will_come(tmp_path: Path) -> None:
    path = versions.version(tmp_path) / "model.onnx"
    options = providers.device_options(path, Place("tensorrt", 1), cache=None, profile=PROFILE, hardware=HARDWARE)
    assert options == {
        "device_id": "1",
        "trt_profile_min_shapes": "images:1x3x4x5",
        "trt_profile_opt_shapes": "images:16x3x4x5",
        "trt_profile_max_shapes": "images:16x3x4x5",
    }
    rtx = providers.device_options(path, Place("nv_tensorrt_rtx"), cache=tmp_path, profile=PROFILE, hardware=HARDWARE)
    assert rtx["nv_profile_max_shapes"] == "images:16x3x4x5"
    assert Path(rtx["nv_runtime_cache_path"]).is_dir()
    assert providers.device_options(path, Place("cuda", 2), cache=tmp_path, profile=PROFILE, hardware=HARDWARE) == {
        "device_id": "2",
        "use_tf32": "0",
    }


def test_a_cached_engine_is_found_again(tmp_path: Path) -> None:
    path = versions.version(tmp_path) / "model.onnx"
    first = folder_of(path, tmp_path / "cache")
    assert folder_of(path, tmp_path / "cache") == first
    # Two GPUs of one kind share it.
    assert folder_of(path, tmp_path / "cache", place=Place("tensorrt", 0)) == first
    assert "101600" in (Path(first) / "key.json").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"hardware": Hardware("NVIDIA L4, compute capability 8.9", "101700")},
        {"hardware": Hardware("NVIDIA A10, compute capability 8.6", "101600")},
        {"profile": Profile(PROFILE.image, max_batch=32)},
    ],
)
def test_an_engine_for_something_else_is_never_served(tmp_path: Path, change: dict[str, Any]) -> None:
    path = versions.version(tmp_path) / "model.onnx"
    assert folder_of(path, tmp_path / "cache", **change) != folder_of(path, tmp_path / "cache")


def test_a_model_that_was_trained_again_does_not_get_its_predecessors_engine(tmp_path: Path) -> None:
    # The same graph with the same names: only the weights differ.
    versions.save(versions.graph(seed=0), tmp_path / "first.onnx")
    versions.save(versions.graph(seed=1), tmp_path / "second.onnx")
    assert folder_of(tmp_path / "first.onnx", tmp_path) != folder_of(tmp_path / "second.onnx", tmp_path)


def test_another_version_of_onnx_runtime_builds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = versions.version(tmp_path) / "model.onnx"
    here = folder_of(path, tmp_path)
    monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    assert folder_of(path, tmp_path) != here


def test_the_cache_lies_where_caches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert engines.default_cache() == Path("/somewhere/tenet/engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert engines.default_cache() == Path.home() / ".cache/tenet/engines"


def plan(folder: Path) -> Path:
    """Write a version with a plan that no machine can run."""
    (folder / "model.plan").write_bytes(b"what nobody should deserialise")
    update = {"file": "model.plan", "runtime": "tensorrt_rtx", "requires": Requirements(runtime="==0.0.1")}
    return versions.described(folder, versions.manifest().model_copy(update=update))


def test_a_plan_for_another_machine_is_refused_before_it_is_deserialised(tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match=r"linear@1 cannot run here: .*tensorrt_rtx ==0\.0\.1"):
        open_engine(plan(tmp_path))


def test_a_plan_without_its_onnx_file_cannot_be_rebuilt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected an ONNX file beside its plan to build it again from, found none"):
        open_engine(plan(tmp_path), rebuild="auto", cache=tmp_path / "cache")


def test_a_plan_does_not_run_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected device 'cuda' for a plan of tensorrt_rtx, got 'cpu'; choose a GPU"):
        open_engine(plan(tmp_path), device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "nv_tensorrt_rtx"])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_a_gpu_answers_as_the_cpu_does(tmp_path: Path, images: Images, provider: str, kind: Input) -> None:
    folder = versions.version(tmp_path, input=kind)
    try:
        engine = open_engine(folder, provider=provider, cache=tmp_path / "cache")
    except CannotRunHere as error:
        pytest.skip(str(error))
    with engine:
        # More sizes than buffers are kept for, and each of them twice.
        for size in [*range(1, MAX_BATCH + 1), 1, 5, MAX_BATCH, len(images)] * 2:
            # TensorFloat-32 would be off by a hundred times as much.
            expected = versions.answers(images[:size])
            np.testing.assert_allclose(engine.classify(images[:size]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match=r"device 'cuda:99': expected 'cuda:0' to 'cuda:\d+' on this machine"):
        open_engine(versions.version(tmp_path), device="cuda:99")


@pytest.mark.gpu
def test_threads_on_one_gpu_get_their_own_answers(tmp_path: Path, images: Images) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with open_engine(versions.version(tmp_path), device="cuda") as engine, ThreadPoolExecutor(8) as pool:
        parts = [images[start : start + 3] for start in range(len(images) - 3)] * 8
        for part, answer in zip(parts, pool.map(engine, parts), strict=True):
            np.testing.assert_allclose(answer, versions.answers(part), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_file_whose_layers_the_gpu_cannot_take_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["images", "squares"], ["square"], name="reshape"),
        # ONNX Runtime has it for CPUs alone.
        helper.make_node("Det", ["square"], ["determinants"], name="determinant"),
    ]
    constants = [numpy_helper.from_array(np.array([-1, 15, 2, 2]), "squares")]
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE])
    given = helper.make_tensor_value_info("determinants", TensorProto.FLOAT, ["batch", 15])
    versions.save(helper.make_graph(nodes, "determinants", [taken], [given], constants), tmp_path / "model.onnx")
    with pytest.raises(RuntimeError, match=r"left determinant \(Det\) to another provider"):
        ort.open_session(tmp_path / "model.onnx", provider="cuda")
