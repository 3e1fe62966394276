"""A plan that cannot run here, built again for this machine from the ONNX file that travels with it.

version folder --key: ONNX, options, runtime, GPU, driver--> cache/<key>, whole? --yes--> that folder
                                       --no, or damaged--> build, compare with the ONNX file, publish in the cache

Whoever opens an engine calls this, before it is served; never a request. Processes that want the same plan at the same
time wait for the first of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export import manifest as manifests
from export import parity, rebuild_cache, requirements, tensorrt_plan
from export.engines import cuda, ort
from export.engines.base import CannotRunHere
from export.engines.failures import one_line
from export.engines.messages import import_runtime
from export.engines.trt import TrtEngine
from export.manifest import Images, Manifest, Parity
from export.store import atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.engines.base import Inputs, Logits
    from export.engines.cuda import Gpu
    from export.requirements import Machine

_log = logging.getLogger(__name__)

# Noise that a new plan and its ONNX file must agree on: some batches of any engine, under a second on two cores.
NOISE_IMAGES = 64
NOISE_SEED = 0


def rebuilt(folder: Path, manifest: Manifest, *, cache: Path, ordinal: int = 0) -> Path:
    """Return a folder with the same engine, built for this machine; from the cache, if it was built before.

    Args:
        folder: the version's, whose plan cannot run here.
        manifest: the version's.
        cache: where rebuilt plans are kept; folders in it may be removed at any time when no engine is being opened.
        ordinal: the number of the GPU that shall run it.

    Raises:
        CannotRunHere: this machine has no GPU, no runtime, or a GPU that the runtime does not build for.
        FileNotFoundError: the ONNX file has been removed.
        ValueError: no ONNX file travels with the plan, it is damaged, its build failed, or the new plan does not agree
            with it; nothing is kept.
    """
    source = _source(folder, manifest)
    machine = requirements.Machine.here()
    gpu = _gpu(manifest, machine, ordinal)
    options = options_for(manifest, gpu)

    def make(place: Path) -> None:
        _log.info("%s@%s: building its plan again for %s", manifest.model, manifest.version, gpu.name)
        # TensorRT builds for the GPU that the thread works on.
        cuda.Device(ordinal)
        described = build_into(place, source, manifest, options=options)
        proof = agreement(place, source, described, ordinal=ordinal)
        described = described.model_copy(update={"parity": _carried(manifest.parity, proof)})
        atomic.write(place / manifests.FILE_NAME, described.as_json())

    return rebuild_cache.kept(cache, key(manifest, machine, gpu, options), make)


def options_for(manifest: Manifest, gpu: Gpu) -> tensorrt_plan.Options:
    """Return how the plan is built for one GPU: as it was, for that GPU alone.

    Raises:
        CannotRunHere: the runtime is not installed, or does not build for that GPU.
    """
    options = tensorrt_plan.Options.from_record(manifest.build.options)
    if manifest.runtime != "tensorrt_rtx":
        return options
    known = tensorrt_plan.known_compute_capabilities(import_runtime(manifest.runtime))
    if gpu.compute_capability not in known:
        raise CannotRunHere(
            f"{manifest.model}: {manifest.runtime} builds for GPUs of compute capability {', '.join(known)}, got "
            f"{gpu.compute_capability} ({gpu.name}); take runtime tensorrt, or serve the ONNX model"
        )
    return replace(options, compute_capabilities=(gpu.compute_capability,))


def key(manifest: Manifest, machine: Machine, gpu: Gpu, options: tensorrt_plan.Options) -> str:
    """Return the name of a rebuilt plan: a hash of everything that another plan would come of."""
    assert manifest.build.onnx is not None
    parts: dict[str, Any] = {
        "onnx": manifest.files[manifest.build.onnx],
        "options": options.as_record(),
        "max_batch": manifest.max_batch,
        "runtime": [manifest.runtime, machine.runtimes.get(manifest.runtime)],
        "platform": machine.platform,
        "gpu": [gpu.name, gpu.compute_capability],
        "driver": machine.driver,
        # The record beside the plan is a version's own.
        "manifest": [manifest.model, manifest.version, manifest.sha256, manifest.parity.status],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build_into(place: Path, source: Path, manifest: Manifest, *, options: tensorrt_plan.Options) -> Manifest:
    """Build the plan into a folder, with its log and a manifest, not proved yet.

    Args:
        place: an empty folder.
        source: the ONNX file.
        manifest: of the version that it replaces here.
        options: how to build.
    """
    plan = place / manifest.file
    image, runtime = manifest.inputs[0], manifest.runtime
    built = tensorrt_plan.plan_from_onnx(
        source, plan, runtime=runtime, image=image, max_batch=manifest.max_batch, options=options
    )
    build = manifest.build.model_copy(
        update={
            "options": built.options,
            "versions": {**manifest.build.versions, **built.versions},
            "machine": parity.this_machine(),
            # That file stays where it was.
            "onnx": None,
            "log": tensorrt_plan.LOG,
            "notes": (*manifest.build.notes, f"built again here from {source.name}, in place of {manifest.sha256}"),
        }
    )
    described = manifest.model_copy(
        update={
            "sha256": manifests.sha256_of(plan),
            "requires": built.requires,
            "build": build,
            "parity": Parity(status="not run", reference=source.name),
            "twin": None,
            "files": manifests.files_below(place, engine=manifest.file),
        }
    )
    atomic.write(place / manifests.FILE_NAME, described.as_json())
    return described


def agreement(place: Path, source: Path, manifest: Manifest, *, ordinal: int = 0) -> Parity:
    """Compare a plan with the ONNX file that it was built from, run by ONNX Runtime on the CPU, on seeded noise.

    Raises:
        ValueError: they do not agree.
        RuntimeError: one of the runtimes failed.
    """
    inputs = noise(manifest)
    # As TensorRT gets it: ONNX Runtime would round in more places of an int8 graph than the file says.
    session = ort.open_session(source, optimise=manifest.precision != "int8")
    with TrtEngine(place, manifest, ordinal=ordinal, graphs=False) as engine:
        answers = _batched(engine, inputs, batch=manifest.max_batch)
    feed, output = manifest.inputs[0].name, manifest.outputs[0].name
    with one_line(source.name):
        expected = _batched(lambda part: session.run([output], {feed: part})[0], inputs, batch=manifest.max_batch)
    return judged(answers, expected, inputs=inputs, source=source, manifest=manifest)


def judged(answers: Logits, expected: Logits, *, inputs: Inputs, source: Path, manifest: Manifest) -> Parity:
    """Return what is recorded of a comparison that was passed.

    Raises:
        ValueError: answers are not finite, or name other classes more often than the precision allows.
    """
    limit = parity.LIMITS[manifest.precision].disagreement
    share = float(np.mean(answers.argmax(axis=1) != expected.argmax(axis=1)))
    if not np.isfinite(answers).all() or share > limit:
        fault = f"top-1 differs on {share:.2%}" if np.isfinite(answers).all() else "some answers are not finite"
        raise ValueError(
            f"{manifest.model}: the plan built here does not agree with {source.name}: {fault} of {len(inputs)} images "
            f"of noise, allowed are {limit:.2%}; serve the ONNX model"
        )
    difference = np.abs(answers - expected)
    digest = hashlib.sha256(np.ascontiguousarray(inputs).reshape(-1).data).hexdigest()
    return Parity(
        status="passed",
        reference=source.name,
        images=Images(description=f"noise of seed {NOISE_SEED}", n=len(inputs), sha256=digest, seed=NOISE_SEED),
        agreement=1 - share,
        max_abs_difference=float(difference.max()),
        mean_abs_difference=float(difference.mean()),
        limits={"disagreement": limit},
        machine=parity.this_machine(),
        explanation="built again here; the images of its first proof were not at hand",
    )


def noise(manifest: Manifest) -> Inputs:
    """Draw seeded inputs as the engine takes them: grey levels that vary from image to image, with noise on them."""
    generator = np.random.default_rng(NOISE_SEED)
    shape = manifest.inputs[0].shape[1:]
    levels = generator.random((NOISE_IMAGES, 1, 1, 1), dtype=np.float32)
    grain = generator.random((NOISE_IMAGES, *shape), dtype=np.float32)
    images = (levels + grain) / 2
    return np.rint(images * 255).astype(np.uint8) if manifest.channels_last else images


def _source(folder: Path, manifest: Manifest) -> Path:
    """Return the ONNX file of a plan, whose sha256 is that of its manifest."""
    name = manifest.build.onnx
    if name is None or name not in manifest.files:
        raise ValueError(
            f"{manifest.model}: expected an ONNX file beside its plan to build it again from, found none; "
            f"export it again here by `{manifest.build.command or 'tenet export'}`"
        )
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the ONNX file of the plan here, found none; export it again")
    if manifests.sha256_of(path) != manifest.files[name]:
        raise ValueError(f"{path}: its sha256 is not that of its manifest: it was changed or damaged; export it again")
    return path


def _gpu(manifest: Manifest, machine: Machine, ordinal: int) -> Gpu:
    if not 0 <= ordinal < len(machine.gpus):
        raise CannotRunHere(
            f"{manifest.model}: a plan of {manifest.runtime} needs an NVIDIA GPU to be built and to run, and number "
            f"{ordinal} is none of the {len(machine.gpus)} that CUDA finds on this machine; serve the ONNX model"
        )
    return machine.gpus[ordinal]


def _carried(first: Parity, again: Parity) -> Parity:
    """Return the proof of the rebuilt plan: none, if the first was not passed. Noise proves less than images."""
    if first.status == "passed":
        return again
    explanation = "; ".join(part for part in (first.explanation, again.explanation) if part)
    return first.model_copy(update={"explanation": explanation})


def _batched(run: Callable[[Any], Any], inputs: Inputs, *, batch: int) -> Logits:
    """Run one image alone, then batches: both are tuned for apart."""
    starts = [0, *range(1, len(inputs), batch)]
    return np.concatenate([run(inputs[a:b]) for a, b in zip(starts, [*starts[1:], len(inputs)], strict=True)])
