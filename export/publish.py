"""Publish engines: build the file, prove its parity, describe it, and only then let readers see it.

checkpoint --onnx_graph--> fp32 ONNX --parity with PyTorch--> model@1
model@1 --precision, tensorrt_plan--> variant --parity with model@1--> variant@1
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from export import manifest as manifests
from export import onnx_graph, parity, precision, tensorrt_plan
from export.engines import open_engine
from export.engines.base import CannotRunHere
from export.manifest import Manifest, Parity, Source, Twin, sha256_of
from training import augment, checkpoint, data, datasets

if TYPE_CHECKING:
    from export.engines.base import Engine, Images, Logits
    from export.manifest import Precision, Runtime
    from export.repository import Draft, Repository, Version

# Images an engine takes at once unless the export says otherwise.
MAX_BATCH = 64

# Ranges are minima and maxima over these images: enough to meet the extremes, few enough to take a second.
CALIBRATION_IMAGES = 256

PARITY_IMAGES = 512

_TWIN_FOLDER = "checkpoint"


@dataclass(frozen=True)
class ImageSet:
    """Images for a proof: float32 NCHW in [0, 1], and what they are for the reader of the manifest."""

    images: Images
    description: str


def publish_checkpoint(
    run: Path, *, repository: Repository, name: str, images: Path | None = None, max_batch: int = MAX_BATCH
) -> Version:
    """Publish a training run as ONNX fp32, together with its checkpoint.

    Args:
        run: the folder that training wrote.
        repository: where to.
        name: the model's name; a first version makes the model.
        images: a folder of class folders for the parity check, instead of the run's own test images.
        max_batch: the largest batch the engine will take.

    Raises:
        FileNotFoundError: the run or the images are missing.
        ValueError: the checkpoint is damaged, cannot be exported, or failed parity; nothing is published.
    """
    trained = checkpoint.load(run)
    proof = images_for(run, images, split="test", count=PARITY_IMAGES)
    with repository.draft(name) as draft:
        path = draft.folder / "model.onnx"
        shape, names = trained.input_shape, trained.class_names
        onnx_graph.onnx_from_module(trained.model, path, image_shape=shape, class_names=names)
        _copy_checkpoint(run, draft.folder / _TWIN_FOLDER)
        inputs, outputs = onnx_graph.specs(path)
        manifest = Manifest(
            model=name,
            version=draft.version,
            file="model.onnx",
            sha256=sha256_of(path),
            runtime="onnxruntime",
            precision="fp32",
            inputs=inputs,
            outputs=outputs,
            class_names=names,
            max_batch=max_batch,
            twin=Twin(folder=_TWIN_FOLDER, file=checkpoint.WEIGHTS, sha256=trained.sha256),
            parity=_not_run("PyTorch checkpoint", "the comparison has not been made yet"),
            build=_build("torch", "onnx", "onnxscript"),
        )
        _prove(draft, manifest, _twin_answers(run, proof), proof, reference="PyTorch checkpoint")
    return repository.find(name, draft.version)


def publish_variant(
    source: Version,
    *,
    repository: Repository,
    name: str,
    kind: Precision,
    runtime: Runtime,
    images: Path | None = None,
    max_batch: int | None = None,
) -> Version:
    """Publish another precision or runtime of a model that is in the repository.

    Args:
        source: an ONNX fp32 version.
        repository: where to.
        name: the variant's own name.
        kind: "fp32" or "int8".
        runtime: "onnxruntime", "tensorrt" or "tensorrt_rtx".
        images: a folder of class folders for calibration and parity, instead of the run's own images.
        max_batch: the largest batch the engine will take; the source's by default.

    Raises:
        RuntimeError: the runtime is not installed here.
        ValueError: the combination does not exist, or parity failed; nothing is published.
    """
    manifest = manifests.verify(source.folder)
    if manifest.file != "model.onnx" or manifest.precision != "fp32":
        raise ValueError(f"{source}: variants are made from an ONNX fp32 model, this one is {manifest.precision}")
    if (kind, runtime) not in _BUILDERS:
        known = ", ".join(f"{precision} on {runtime}" for precision, runtime in _BUILDERS)
        raise ValueError(f"{kind} on {runtime}: no such variant; expected one of {known}")
    if name == manifest.model:
        raise ValueError(f"{name!r}: a variant is a model of its own; choose another name, such as '{name}-{kind}'")
    twin = repository.twin_of(source)
    with repository.draft(name) as draft:
        file: Literal["model.onnx", "model.plan"] = "model.onnx" if runtime == "onnxruntime" else "model.plan"
        max_batch = max_batch or manifest.max_batch
        job = _Job(source, draft.folder / file, runtime, max_batch, twin, images)
        build = _BUILDERS[kind, runtime](job)
        described = manifest.model_copy(
            update={
                "model": name,
                "version": draft.version,
                "file": file,
                "sha256": sha256_of(job.path),
                "runtime": runtime,
                "precision": kind,
                "max_batch": max_batch,
                "twin": None,
                "source": Source(model=manifest.model, version=manifest.version, sha256=manifest.sha256),
                "parity": _not_run(str(source), "the comparison has not been made yet"),
                "build": build,
            }
        )
        proof = images_for(twin, images, split="test", count=PARITY_IMAGES)
        _prove(draft, described, _engine_answers(source, proof), proof, reference=str(source))
    return repository.find(name, draft.version)


def verify(version: Version, *, repository: Repository, images: Path | None = None) -> Version:
    """Complete, or repeat, the proof of parity of a published version on this machine, and record its result.

    Args:
        version: what to prove.
        repository: where it, and what it was made from, are.
        images: a folder of class folders, instead of the run's own test images.

    Raises:
        RuntimeError: its runtime cannot run here.
        ValueError: a file is damaged, there is nothing to compare with, or parity failed (which is recorded, too).
    """
    run = repository.twin_of(version)
    proof = images_for(run, images, split="test", count=PARITY_IMAGES)
    source = version.manifest.source
    if source is not None:
        origin = repository.find(source.model, source.version)
        reference, expected = str(origin), _engine_answers(origin, proof)
    elif run is not None:
        reference, expected = "PyTorch checkpoint", _twin_answers(run, proof)
    else:
        raise ValueError(f"{version}: expected a source or a checkpoint to compare with, found none; export it again")
    result = _measure(open_engine(version.folder), expected, proof, reference=reference)
    repository.record_proof(version, result)
    if result.status == "failed":
        raise ValueError(f"{version}: parity with {reference} failed: {result.explanation}")
    return repository.find(version.manifest.model, version.manifest.version)


@dataclass(frozen=True)
class _Job:
    source: Version
    path: Path
    runtime: str
    max_batch: int
    twin: Path | None
    images: Path | None


def _build_int8(job: _Job) -> dict[str, str]:
    calibration = images_for(job.twin, job.images, split="train", count=CALIBRATION_IMAGES)
    source = job.source.folder / job.source.manifest.file
    input_name = job.source.manifest.inputs[0].name
    precision.int8_from_onnx(source, job.path, images=calibration.images, input_name=input_name)
    return {**_build("onnxruntime-gpu", "onnx"), "calibration": calibration.description}


def _build_plan(job: _Job) -> dict[str, str]:
    source = job.source.folder / job.source.manifest.file
    image = job.source.manifest.inputs[0]
    options = tensorrt_plan.plan_from_onnx(source, job.path, runtime=job.runtime, image=image, max_batch=job.max_batch)
    return {**_build("onnx"), **options}


_BUILDERS = {
    ("int8", "onnxruntime"): _build_int8,
    ("fp32", "tensorrt"): _build_plan,
    ("fp32", "tensorrt_rtx"): _build_plan,
}


def _prove(draft: Draft, manifest: Manifest, expected: Logits, proof: ImageSet, *, reference: str) -> None:
    """Describe the draft, run the engine it has become, and refuse it if its answers are not its source's."""
    draft.describe(manifest)
    try:
        engine = open_engine(draft.folder)
    except CannotRunHere as error:
        draft.describe(manifest.model_copy(update={"parity": _not_run(reference, str(error))}))
        return
    result = _measure(engine, expected, proof, reference=reference)
    if result.status == "failed":
        raise ValueError(f"{manifest.model}: not published, parity with {reference} failed: {result.explanation}")
    draft.describe(manifest.model_copy(update={"parity": result}))


def _measure(engine: Engine, expected: Logits, proof: ImageSet, *, reference: str) -> Parity:
    with engine:
        answers = parity.batched(engine, proof.images, batch=engine.manifest.max_batch)
    limits = parity.LIMITS[engine.manifest.precision]
    return parity.compare(answers, expected, reference=reference, images=proof.description, limits=limits)


def _twin_answers(run: Path, proof: ImageSet) -> Logits:
    model = checkpoint.load(run).model

    def answer(batch: Images) -> Logits:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(batch)).numpy())

    return parity.batched(answer, proof.images, batch=MAX_BATCH)


def _engine_answers(version: Version, proof: ImageSet) -> Logits:
    with open_engine(version.folder) as engine:
        return parity.batched(engine, proof.images, batch=version.manifest.max_batch)


def _copy_checkpoint(run: Path, folder: Path) -> None:
    """Copy the weights and their record, without the metrics and pictures beside them."""
    folder.mkdir()
    for name in (checkpoint.WEIGHTS, checkpoint.RUN):
        shutil.copy2(run / name, folder / name)


def _not_run(reference: str, explanation: str) -> Parity:
    return Parity(status="not run", reference=reference, images="none", explanation=explanation)


def images_for(run: Path | None, folder: Path | None, *, split: str, count: int) -> ImageSet:
    """Return images for calibration or parity: the user's folder, or the data set that the run was trained on."""
    source = None if run is None else checkpoint.record(run).recipe.data
    size = None if run is None else _side(checkpoint.record(run))
    if folder is not None:
        return _subset(data.from_folder(folder), f"images of {folder.name}", count, size=size)
    if source is None:
        raise ValueError("this model has no training run to take images from; name a folder by --images")
    root = None if source.root is None else Path(source.root)
    try:
        stored = datasets.find(source.name, split=split, root=root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or name a folder of images by --images") from error
    return _subset(stored, f"{source.name} {split} images", count, size=source.size)


def _side(record: checkpoint.RunRecord) -> int | None:
    """Return the side that other images are brought to, in pixels; images of oblong inputs must have their size."""
    _, height, width = record.input_shape
    return height if height == width else None


def _subset(stored: data.Images, description: str, count: int, *, size: int | None) -> ImageSet:
    # Image folders are sorted by class: without a shuffle the first images would be of one class.
    chosen = np.random.default_rng(0).permutation(len(stored))[:count]
    images = augment.unit_range(torch.from_numpy(stored.subset(chosen).read(size).images)).numpy()
    return ImageSet(images, f"{len(chosen)} {description}")


def _build(*packages: str) -> dict[str, str]:
    versions = {package: metadata.version(package) for package in packages}
    return {"machine": platform.machine(), "python": platform.python_version(), **versions}
