"""Plans are built here by `tensorrt_rtx`, which needs no GPU for it; what runs them is tested with the engines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from export import requirements, tensorrt_plan
from export.engines import messages
from export.engines.base import CannotRunHere
from export.tensorrt_plan import Options, PlanBuild, plan_from_onnx
from tests.export import graphs
from tests.export.graphs import IMAGES, Form

rtx = pytest.importorskip("tensorrt_rtx")


def build(source: Path, *, max_batch: int = 8, form: Form = "fp32", **options: Any) -> PlanBuild:
    progress = options.pop("progress", None)
    return plan_from_onnx(
        source,
        source.parent / "model.plan",
        runtime="tensorrt_rtx",
        image=graphs.spec_of(form),
        max_batch=max_batch,
        options=Options(**options),
        progress=progress,
    )


@pytest.mark.parametrize("form", ["fp32", "uint8", "fp16", "int8"])
def test_every_form_of_a_classifier_becomes_a_plan(tmp_path: Path, form: Form) -> None:
    built = build(graphs.saved(tmp_path, form), form=form)
    assert (tmp_path / "model.plan").stat().st_size > 10_000
    assert built.options["profiles"] == [[1, 1, 1], [1, 8, 8]]
    assert built.options["tf32"] == "off"
    assert built.versions["tensorrt_rtx"] == rtx.__version__
    assert built.requires.runtime == f"=={rtx.__version__}"
    assert built.requires.platform == requirements.platform_name()
    assert built.requires.compute_capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert built.requires.driver == "13.0"


def test_a_plan_is_for_the_gpus_asked_for(tmp_path: Path) -> None:
    source = graphs.saved(tmp_path)
    assert build(source, compute_capabilities=("8.9", "12.0")).requires.compute_capabilities == ("8.9", "12.0")
    both = (tmp_path / "model.plan").read_bytes()
    build(source, compute_capabilities=("12.0",))
    assert (tmp_path / "model.plan").read_bytes() != both
    with pytest.raises(
        ValueError,
        match=r"compute capability '9\.0': expected one .* 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1; take runtime tensorrt",
    ):
        build(source, compute_capabilities=("8.9", "9.0"))


def test_the_log_holds_what_was_said_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    source = graphs.saved(tmp_path)
    build(source)
    log = (tmp_path / tensorrt_plan.LOG).read_text()
    assert "[INFO] Engine generation completed" in log
    assert "[VERBOSE]" in log
    for folder in (tmp_path, Path.cwd(), Path.home(), Path(sys.prefix)):
        assert f"{folder}/" not in log


def test_paths_are_cut_from_the_log_and_names_of_nodes_are_not(tmp_path: Path) -> None:
    from export.plan import build_log

    with build_log.kept(rtx, tmp_path / "build.log", private=(tmp_path,)) as heard:
        heard.all.append(messages.Message("INFO", f"reads {tmp_path}/weights.bin for node /layer1/conv/Conv"))
    assert (tmp_path / "build.log").read_text().endswith("[INFO] reads weights.bin for node /layer1/conv/Conv\n")


def test_a_refused_operator_is_named_with_its_node_and_the_log_is_kept(tmp_path: Path) -> None:
    source = graphs.saved(tmp_path, operators=("Relu", "Det"))
    with pytest.raises(
        ValueError,
        match=r"tensorrt_rtx cannot take it: operator Det, node 'the_Det' \(number 2\): unsupported node; serve",
    ):
        build(source)
    assert "Det" in (tmp_path / tensorrt_plan.LOG).read_text()
    assert not (tmp_path / "model.plan").exists()


def test_an_operator_of_somebody_s_own_is_named(tmp_path: Path) -> None:
    model = graphs.classifier(operators=("Relu",))
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "Sparkle", "my.operators"
    model.opset_import.append(helper.make_opsetid("my.operators", 1))
    (tmp_path / "source.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"operator Sparkle, node 'the_Relu' .*TensorRT has no such operator"):
        build(tmp_path / "source.onnx")


def test_uint8_that_does_not_go_through_a_cast_first_is_refused_with_the_way_out(tmp_path: Path) -> None:
    turn = helper.make_node("Transpose", ["images"], ["turned"], name="turn", perm=[0, 3, 1, 2])
    cast = helper.make_node("Cast", ["turned"], ["logits"], name="cast", to=TensorProto.FLOAT)
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *graphs.STORED.shape[1:]])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, 8, 8])
    model = helper.make_model(helper.make_graph([turn, cast], "g", [images], [logits]), ir_version=10)
    (tmp_path / "source.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"operator Transpose, node 'turn'.*uint8 must go through a Cast to float"):
        build(tmp_path / "source.onnx", form="uint8")


def test_a_builder_s_refusal_has_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not build a plan: .*Turing \(SM75\).*serve the ONNX model"):
        build(graphs.saved(tmp_path), compute_capabilities=("7.5",))
    assert "SM75" in (tmp_path / tensorrt_plan.LOG).read_text()


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 50, b"not a model"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "source.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"source\.onnx: expected an ONNX model, got something else"):
        build(tmp_path / "source.onnx")


def test_a_truncated_onnx_file_is_refused(tmp_path: Path) -> None:
    source = graphs.saved(tmp_path)
    source.write_bytes(source.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"source\.onnx: expected an ONNX model"):
        build(source)


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a batch of any size"):
        plan_from_onnx(
            graphs.saved(tmp_path),
            tmp_path / "model.plan",
            runtime="tensorrt_rtx",
            image=IMAGES.model_copy(update={"shape": (4, *IMAGES.shape[1:])}),
            max_batch=4,
        )


def test_weights_in_a_file_beside_the_graph_are_found(tmp_path: Path) -> None:
    onnx.save_model(
        graphs.classifier(),
        tmp_path / "source.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert (tmp_path / "weights.bin").exists()
    assert build(tmp_path / "source.onnx").requires.compute_capabilities


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"profiles": ((2, 1, 4),)}, r"profile \(2, 1, 4\): expected a smallest, a best and a largest"),
        ({"profiles": ((0, 1, 4),)}, "1 <= smallest"),
        ({"workspace_mib": 0}, "workspace: expected at least 1 MiB, got 0"),
        ({"optimization_level": 6}, "optimisation level: expected 0 to 5, got 6"),
        ({"compute_capabilities": ("sm89",)}, "compute capability 'sm89': expected a number such as 8.9"),
        ({"hardware_compatibility": "all"}, "hardware compatibility: expected one of none, ampere_plus"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Options(**options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"profiles": ((1, 1, 1), (3, 8, 8))}, "expected them to take every batch from 1 to 8, none takes 2"),
        ({"profiles": ((1, 4, 4),)}, "none takes 5"),
        ({"profiles": ((1, 8, 16),)}, "expected batches of at most 8, the engine's largest, got 16"),
        ({"version_compatible": True}, "plans of tensorrt_rtx run on the version that built them alone"),
        ({"hardware_compatibility": "ampere_plus"}, "name the compute capabilities instead"),
        ({"timing_cache": Path("timings")}, "timing cache: tensorrt_rtx has none"),
    ],
)
def test_options_that_do_not_fit_the_engine_or_the_runtime_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    source = graphs.saved(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        build(source, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source.onnx"]


def test_profiles_limits_and_levels_are_taken(tmp_path: Path) -> None:
    profiles = ((1, 1, 2), (2, 4, 8))
    built = build(graphs.saved(tmp_path), profiles=profiles, workspace_mib=64, optimization_level=0)
    assert built.options["profiles"] == [[1, 1, 2], [2, 4, 8]]
    assert built.options["workspace_mib"] == 64


@given(
    st.builds(
        Options,
        profiles=st.sampled_from([(), ((1, 2, 8),), ((1, 1, 1), (1, 8, 8))]),
        workspace_mib=st.none() | st.integers(1, 10_000),
        optimization_level=st.none() | st.integers(0, 5),
        compute_capabilities=st.sampled_from([(), ("8.9",), ("8.6", "12.0")]),
        hardware_compatibility=st.sampled_from(["none", "ampere_plus", "same_compute_capability"]),
        version_compatible=st.booleans(),
    )
)
def test_options_survive_their_record(options: Options) -> None:
    assert Options.from_record(options.as_record()) == options


def test_a_record_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="options of a plan: expected those of its build"):
        Options.from_record({"profile": "1..64"})


def test_flags_say_what_differs_from_the_defaults() -> None:
    assert Options().flags() == []
    options = Options(profiles=((1, 2, 8),), workspace_mib=64, compute_capabilities=("8.6", "8.9"))
    expected = "--profile 1,2,8 --workspace 64 --compute-capability 8.6 --compute-capability 8.9"
    assert options.flags() == expected.split()


def test_progress_is_told_by_phase_from_nothing_to_all(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build(graphs.saved(tmp_path), progress=lambda *step: told.append(step))
    whole = [(step, steps) for phase, step, steps in told if phase == "Building engine"]
    assert whole[0][0] == 0
    assert whole[-1][0] == whole[-1][1] > 1
    assert all(0 <= step <= steps for _, step, steps in told)


def test_a_progress_bar_that_fails_does_not_stop_the_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def broken(_phase: str, _step: int, _steps: int) -> None:
        nonlocal calls
        calls += 1
        raise OSError("the terminal is gone")

    build(graphs.saved(tmp_path), progress=broken)
    assert calls == 1
    assert (tmp_path / "model.plan").exists()
    assert "the build goes on" in caplog.text


def test_ctrl_c_stops_a_build_and_leaves_no_plan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = 0

    def press(_phase: str, step: int, _steps: int) -> None:
        nonlocal seen
        seen += 1
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(graphs.saved(tmp_path), progress=press)
    assert seen < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [tensorrt_plan.LOG, "source.onnx"]
    assert "BuildCanceled" in (tmp_path / tensorrt_plan.LOG).read_text()
    # Nothing of TensorRT's, which would print what a callback raises.
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_threads_build_at_once_and_each_has_its_own_log(tmp_path: Path) -> None:
    sources = []
    for form in ("fp32", "fp16"):
        (tmp_path / form).mkdir()
        sources.append(graphs.saved(tmp_path / form, form))
    threads = [threading.Thread(target=build, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logs = [(source.parent / tensorrt_plan.LOG).read_text() for source in sources]
    assert [(source.parent / "model.plan").exists() for source in sources] == [True, True]
    assert ["to_half" in log for log in logs] == [False, True]


def test_a_runtime_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(CannotRunHere, match=r"runtime 'tensorrt' is not installed here.*pip install tenet\[tensorrt\]"):
        plan_from_onnx(graphs.saved(tmp_path), tmp_path / "model.plan", runtime="tensorrt", image=IMAGES, max_batch=8)


def test_a_full_disk_leaves_no_half_of_a_plan(tmp_path: Path) -> None:
    source = graphs.saved(tmp_path)
    program = (
        "import resource, sys; from pathlib import Path; from tests.export import graphs\n"
        "from export.tensorrt_plan import plan_from_onnx\n"
        "source = Path(sys.argv[1])\n"
        # Larger files are refused, as by a full disk; the log is smaller than that.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "plan_from_onnx(source, source.parent / 'model.plan', runtime='tensorrt_rtx', image=graphs.IMAGES, max_batch=8)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(source)], cwd=root, capture_output=True, text=True, check=False
    )
    assert re.search(r"OSError: \[Errno 27\]", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == [tensorrt_plan.LOG, "source.onnx"]


@pytest.mark.gpu
@pytest.mark.parametrize("compatible", [False, True])
def test_tensorrt_builds_for_the_gpu_at_hand_and_keeps_its_timings(tmp_path: Path, *, compatible: bool) -> None:
    trt = pytest.importorskip("tensorrt")
    gpu = requirements.Machine.here().gpus[0]
    options = Options(timing_cache=tmp_path / "timings", version_compatible=compatible)
    for _ in range(2):
        built = plan_from_onnx(
            graphs.saved(tmp_path),
            tmp_path / "model.plan",
            runtime="tensorrt",
            image=IMAGES,
            max_batch=8,
            options=options,
        )
        (kept,) = (tmp_path / "timings").iterdir()
        assert kept.stat().st_size > 0
    assert built.requires.compute_capabilities == (gpu.compute_capability,)
    assert built.requires.runtime.startswith(f">={trt.__version__},<" if compatible else f"=={trt.__version__}")


@pytest.mark.gpu
def test_tensorrt_builds_for_newer_gpus_where_asked(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    options = Options(hardware_compatibility="ampere_plus")
    built = plan_from_onnx(
        graphs.saved(tmp_path), tmp_path / "model.plan", runtime="tensorrt", image=IMAGES, max_batch=8, options=options
    )
    assert built.requires.compute_capabilities == ("8.0+",)
