from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from export import manifest as manifests
from export import parity, publish, variant
from export.engines import open_engine
from export.engines.base import CannotRunHere
from export.mapping import Mapping
from export.parity import ParityFailed
from export.publish import Terms
from export.variant import Variant, publish_variant

if TYPE_CHECKING:
    from pathlib import Path

    from export.repository import Repository, Version


def test_int8_carries_its_source_its_calibration_and_its_proof(digits_models: Repository) -> None:
    fp32, int8 = digits_models.find("digits").manifest, digits_models.find("digits-int8").manifest
    assert int8.parity.reference == "digits@1"
    assert int8.parity.agreement is not None
    assert 0.97 <= int8.parity.agreement <= 1
    assert int8.source is not None
    assert int8.source.sha256 == fp32.sha256
    assert int8.quantization is not None
    assert (int8.quantization.target, int8.quantization.method) == ("cpu", "minmax")
    assert (int8.quantization.images.n, int8.quantization.images.description) == (256, "digits train images")
    assert len(int8.kept_fp32) == 2
    assert int8.build.command == (
        "tenet export --from digits@1 --precision int8 --runtime onnxruntime --repository REPOSITORY --name digits-int8"
    )


def test_int8_weights_are_int8_per_channel_but_at_the_ends(digits_models: Repository) -> None:
    version = digits_models.find("digits-int8")
    graph = onnx.load(version.folder / "model.onnx").graph
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert not convolutions[0].input[1].endswith("DequantizeLinear_Output")
    assert all(node.input[1].endswith("DequantizeLinear_Output") for node in convolutions[1:])
    assert kinds == {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT}
    scales = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.name.endswith("weight_scale")}
    assert any(list(dims) > [1] for dims in scales.values())
    assert {node.op_type for node in graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_fp16_answers_nearly_as_fp32(own_models: Repository) -> None:
    version = publish_variant(own_models.find("digits"), repository=own_models, name="half", variant=Variant("fp16"))
    proof = version.manifest.parity
    assert (version.manifest.precision, proof.status) == ("fp16", "passed")
    assert proof.max_abs_difference is not None
    assert 0 < proof.max_abs_difference < 0.5
    size, whole = ((v.folder / "model.onnx").stat().st_size for v in (version, own_models.find("digits")))
    assert size < 0.7 * whole


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_calibrations_leave_their_mark(own_models: Repository, method: manifests.Method) -> None:
    version = publish_variant(
        own_models.find("digits"),
        repository=own_models,
        name="other",
        variant=Variant("int8", method=method, percentile=99.9, calibration=64),
    )
    quantization = version.manifest.quantization
    assert quantization is not None
    assert (quantization.method, quantization.images.n) == (method, 64)
    assert quantization.percentile == (99.9 if method == "percentile" else None)
    assert version.manifest.sha256 != own_models.find("digits-int8").manifest.sha256


def test_layers_can_be_kept_in_fp32(own_models: Repository) -> None:
    source = own_models.find("digits")
    nodes = [n.name for n in onnx.load(source.folder / "model.onnx").graph.node if n.op_type == "Conv"]
    version = publish_variant(source, repository=own_models, name="mixed", variant=Variant("int8", keep=(nodes[2],)))
    assert nodes[2] in version.manifest.kept_fp32
    assert f"--keep-fp32 {nodes[2]}" in version.manifest.build.command
    with pytest.raises(ValueError, match="nowhere"):
        publish_variant(source, repository=own_models, name="x", variant=Variant("int8", keep=("nowhere",)))


def test_a_variant_that_does_not_agree_is_refused_and_nothing_is_published(own_models: Repository) -> None:
    with pytest.raises(ParityFailed, match=r"coarse: not published, parity with digits@1 failed: top-1") as failed:
        _coarse(own_models, Terms(max_disagreement=0.0))
    assert not (own_models.folder / "coarse").exists()
    assert len(failed.value.result.worst) == 10
    blocked = _coarse(own_models, Terms(max_disagreement=0.0, block=True))
    assert not blocked.manifest.servable
    allowed = _coarse(own_models, Terms(max_disagreement=1.0))
    assert allowed.manifest.parity.limits == {"disagreement": 1.0}


def _coarse(models: Repository, terms: Terms) -> Version:
    """Make int8 with ranges that cut off half of the values, so that it goes wrong."""
    cut = Variant("int8", method="percentile", percentile=60.0)
    return publish_variant(models.find("digits"), repository=models, name="coarse", variant=cut, terms=terms)


def test_nothing_is_made_of_what_is_blocked(own_models: Repository) -> None:
    source = own_models.find("digits")
    own_models.record_proof(source, source.manifest.parity.model_copy(update={"status": "failed"}))
    with pytest.raises(ValueError, match="digits@1: its own proof is 'failed', so that nothing is made of it"):
        publish_variant(own_models.find("digits"), repository=own_models, name="x", variant=Variant("fp16"))


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_rounding_that_only_a_gpu_would_show_blocks_as_well(
    own_models: Repository, monkeypatch: pytest.MonkeyPatch, kind: manifests.Precision
) -> None:
    """ONNX Runtime computes fp16 in fp32 on a CPU, and a plan does not run there: what is checked instead counts."""
    runtime: manifests.Runtime = "onnxruntime" if kind == "fp16" else "tensorrt_rtx"
    pytest.importorskip("tensorrt_rtx")
    strict = parity.Limits(disagreement=0.0, logit_difference=1e-9)
    monkeypatch.setitem(parity.LIMITS, kind, strict)
    source = own_models.find("digits")
    wanted = Variant(kind, runtime)
    with pytest.raises(ParityFailed, match="not published"):
        publish_variant(source, repository=own_models, name="x", variant=wanted)
    version = publish_variant(source, repository=own_models, name="x", variant=wanted, terms=Terms(block=True))
    assert version.manifest.parity.status == "failed"
    assert not version.manifest.servable


def test_a_bisection_ranks_the_layers_of_what_failed(own_models: Repository) -> None:
    cut = Variant("int8", method="percentile", percentile=60.0, calibration=64)
    told: list[str] = []
    report = variant.bisect(
        own_models.find("digits"),
        repository=own_models,
        variant=cut,
        terms=Terms(count=128, max_disagreement=0.01),
        progress=lambda done, total, layer: told.append(f"{done}/{total} {layer}"),
    )
    costs = [layer.mean_abs_difference for layer in report.layers]
    assert len(costs) >= 5
    assert report.disagreement_before > 0.01
    assert told
    with pytest.raises(ValueError, match="expected fp16 or int8 made from fp32"):
        variant.bisect(own_models.find("digits"), repository=own_models, variant=Variant("fp32"))


def test_a_plan_is_built_without_a_gpu_and_its_onnx_is_proved(own_models: Repository) -> None:
    pytest.importorskip("tensorrt_rtx")
    kinds: dict[str, manifests.Precision] = {"rtx": "fp32", "rtx-int8": "int8"}
    for name, kind in kinds.items():
        version = publish_variant(
            own_models.find("digits"), repository=own_models, name=name, variant=Variant(kind, "tensorrt_rtx")
        )
        manifest = version.manifest
        assert (manifest.file, manifest.precision, manifest.build.onnx) == ("model.plan", kind, "source.onnx")
        assert {"source.onnx", "build.log"} <= set(manifest.files)
        assert manifest.requires.compute_capabilities
        assert manifest.requires.runtime.startswith("==")
        manifests.verify_all(version.folder)
        if manifest.parity.status == "not run":
            assert "GPU" in manifest.parity.explanation
            assert ("the ONNX that it was built from: agrees" in manifest.parity.explanation) == (kind == "int8")
            assert not manifest.servable
            with pytest.raises(CannotRunHere, match="GPU"):
                open_engine(version.folder)
            with pytest.raises(CannotRunHere, match="GPU"):
                publish.verify(version, repository=own_models)


def test_a_plan_whose_rounding_fails_is_refused_without_a_gpu(own_models: Repository) -> None:
    pytest.importorskip("tensorrt_rtx")
    cut = Variant("int8", "tensorrt_rtx", method="percentile", percentile=60.0)
    with pytest.raises(ParityFailed, match=r"bad \(the ONNX that it was built from\): not published"):
        publish_variant(
            own_models.find("digits"), repository=own_models, name="bad", variant=cut, terms=Terms(max_disagreement=0)
        )
    assert not (own_models.folder / "bad").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_a_plan_answers_as_its_source(
    own_models: Repository, runtime: manifests.Runtime, kind: manifests.Precision
) -> None:
    pytest.importorskip(runtime)
    version = publish_variant(
        own_models.find("digits"), repository=own_models, name="plan", variant=Variant(kind, runtime)
    )
    assert version.manifest.parity.status == "passed"


def test_a_damaged_source_is_refused_before_it_is_parsed(own_models: Repository) -> None:
    version = own_models.find("digits")
    path = version.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.onnx: expected sha256"):
        publish_variant(version, repository=own_models, name="x", variant=Variant("int8"))
    assert not (own_models.folder / "x").exists()


def test_variants_that_make_no_sense_are_refused(own_models: Repository) -> None:
    fp32, int8 = own_models.find("digits"), own_models.find("digits-int8")
    for source, name, wanted, complaint in [
        (int8, "x", Variant("fp16"), "expected an ONNX fp32 model to make fp16 of, this one is int8"),
        (int8, "x", Variant("int8"), "is int8 on onnxruntime already"),
        (int8, "x", Variant("int8", "tensorrt_rtx"), "is int8 for CPUs, which tensorrt_rtx does not take"),
        (fp32, "x", Variant(), "is fp32 on onnxruntime already"),
        (fp32, "digits", Variant("int8"), "a variant is a model of its own"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            publish_variant(source, repository=own_models, name=name, variant=wanted)


def test_int8_of_a_model_without_images_asks_for_them(own_models: Repository, tmp_path: Path) -> None:
    source = own_models.find("digits")
    path = tmp_path / "theirs.onnx"
    path.write_bytes((source.folder / "model.onnx").read_bytes())
    imported = publish.publish_onnx(path, repository=own_models, name="theirs", mapping=Mapping())
    with pytest.raises(ValueError, match="int8 needs images for calibration: expected a folder"):
        publish_variant(imported, repository=own_models, name="x", variant=Variant("int8"))
    half = publish_variant(imported, repository=own_models, name="half", variant=Variant("fp16"))
    assert half.manifest.parity.images is not None
    assert half.manifest.parity.images.seed == 0


def test_the_graph_that_a_plan_would_be_built_from_is_the_fp32_one_s_equal(own_models: Repository) -> None:
    """Where no rounding is asked for, the ONNX that travels with a plan is its source's, byte for byte."""
    pytest.importorskip("tensorrt_rtx")
    source = own_models.find("digits")
    version = publish_variant(source, repository=own_models, name="rtx", variant=Variant(runtime="tensorrt_rtx"))
    assert version.manifest.files["source.onnx"] == source.manifest.sha256


def test_limits_of_a_proof_are_kept_when_it_is_repeated(own_models: Repository) -> None:
    version = _coarse(own_models, Terms(max_disagreement=1.0))
    assert publish.verify(version, repository=own_models).manifest.servable
    assert parity.LIMITS["int8"].disagreement < 1
    images = np.zeros((1, 3, 32, 32), np.float32)
    with open_engine(version.folder) as engine:
        assert engine(images).shape == (1, 10)
