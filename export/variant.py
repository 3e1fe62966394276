"""Another precision or runtime of an engine that is in the repository, published as a model of its own.

source ONNX --precision: fp16 | int8, calibrated--> ONNX --runtime: tensorrt | tensorrt_rtx--> plan, the ONNX beside it
            --parity with the source on each, where it can run-->
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from export import images, parity, precision, publish, reference, sensitivity, tensorrt_plan
from export import manifest as manifests
from export.engines import ort
from export.engines.base import as_input
from export.engines.failures import one_line
from export.manifest import Build, Manifest, Parity, Quantization, Source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from export.engines.base import Images, Inputs, Logits
    from export.images import ImageSet
    from export.manifest import Method, Precision, Runtime, Target
    from export.publish import Terms
    from export.reference import Reference
    from export.repository import Draft, Repository, Version

# The ONNX file that travels with a plan: what it was built from, and is built from again.
PLAN_SOURCE = "source.onnx"

# Ranges of activations are measured on these: enough to meet the extremes, few enough to take seconds.
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Variant:
    """What to make of a source.

    Attributes:
        precision: of the graph; the source's by default.
        runtime: what will run it.
        target: the form of int8: "cpu" or "tensorrt"; by default that of the runtime.
        method: how int8 chooses the ranges of activations.
        percentile: the share of values that a range holds, in percent; for the method "percentile".
        keep: names of nodes that stay in fp32.
        max_batch: the largest batch; the source's by default.
        plan: how a plan is built.
        calibration: how many images to calibrate on, at most.
    """

    precision: Precision | None = None
    runtime: Runtime = "onnxruntime"
    target: Target | None = None
    method: Method = "minmax"
    percentile: float = 99.99
    keep: tuple[str, ...] = ()
    max_batch: int | None = None
    plan: tensorrt_plan.Options = field(default_factory=tensorrt_plan.Options)
    calibration: int = CALIBRATION_IMAGES

    @property
    def layout(self) -> Target:
        """The form that int8 takes."""
        return self.target or ("cpu" if self.runtime == "onnxruntime" else "tensorrt")


def publish_variant(
    source: Version,
    *,
    repository: Repository,
    name: str,
    variant: Variant,
    terms: Terms | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Version:
    """Publish another precision or runtime of a model that is in the repository.

    Args:
        source: an ONNX version; a plan may be made of any, another precision of fp32 alone.
        repository: where to.
        name: the variant's own name.
        variant: what to make.
        terms: what counts as proof.
        progress: is told the phase of a plan's build, its step and how many there are.

    Raises:
        CannotRunHere: the runtime that builds a plan is not installed here.
        ParityFailed: the variant does not answer as its source.
        ValueError: the combination does not exist, or a build failed; nothing is published.
    """
    terms = terms or publish.Terms()
    manifest = manifests.verify(source.folder)
    variant = replace(variant, precision=variant.precision or manifest.precision)
    _refuse_impossible(source, manifest, variant, name)
    with repository.draft(name) as draft:
        run = publish.run_of(source, repository)
        making = _Making(source=source, manifest=manifest, variant=variant, terms=terms, run=run, draft=draft)
        described = making.graph()
        checked = making.check_rounding(described)
        if checked is not None:
            described = _noting(described, checked.note)
        if variant.runtime != "onnxruntime":
            described = making.plan(described, progress)
        if checked is not None and checked.result.status == "failed":
            draft.describe(described.model_copy(update={"parity": checked.result}))
        else:
            publish.prove(draft, described, making.against, making.proof, terms=terms)
    return publish.published(repository, draft)


def bisect(
    source: Version,
    *,
    repository: Repository,
    variant: Variant,
    terms: Terms | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> sensitivity.Report:
    """Find the layers that cost fp16 or int8 its agreement, and the shortest list to keep in fp32 instead.

    Raises:
        ValueError: the variant is none that rounds, or there are no images to calibrate on.
    """
    terms = terms or publish.Terms()
    manifest = manifests.verify(source.folder)
    kind = variant.precision
    if kind is None or kind == "fp32" or manifest.precision != "fp32":
        raise ValueError(f"--bisect: expected fp16 or int8 made from fp32, got {kind}; there is nothing to round")
    run = publish.run_of(source, repository)
    shape, names = manifest.image_shape, manifest.class_names
    proof = publish.proof_images(
        terms,
        run=run,
        image_shape=shape,
        class_names=names,
        preprocessing=manifest.preprocessing,
        calibration=variant.calibration,
    )
    choose = _calibration_images if kind == "int8" else _range_images
    chosen = choose(manifest, variant, terms, run)
    limits = terms.limits(kind)

    def acceptable(answers: Logits, expected: Logits) -> bool:
        return not parity.faults(answers, expected, limits=limits, output=manifest.output)

    return sensitivity.bisect(
        source.folder / manifest.file,
        precision=kind,
        inputs=as_input(manifest, proof.images),
        calibration_inputs=as_input(manifest, chosen.images),
        target=variant.layout,
        method=variant.method,
        percentile=variant.percentile,
        keep=variant.keep,
        acceptable=acceptable,
        progress=progress,
    )


@dataclass(frozen=True)
class _Checked:
    """A comparison of something other than the engine as it runs here."""

    what: str
    result: Parity

    @property
    def note(self) -> str:
        """The comparison in a line, for the manifest."""
        assert self.result.images is not None
        assert self.result.agreement is not None
        verdict = f" ({self.result.explanation})" if self.result.status == "failed" else ""
        return (
            f"{self.what}: agrees with {self.result.reference} on {self.result.agreement:.2%} of "
            f"{self.result.images.n} {self.result.images.description}{verdict}"
        )


@dataclass(frozen=True)
class _Making:
    """One variant in the making: its source, its terms, its draft."""

    source: Version
    manifest: Manifest
    variant: Variant
    terms: Terms
    run: Path | None
    draft: Draft

    @cached_property
    def proof(self) -> ImageSet:
        """The images to compare on."""
        shape, names = self.manifest.image_shape, self.manifest.class_names
        calibration = 0 if self.variant.precision == self.manifest.precision else self.variant.calibration
        return publish.proof_images(
            self.terms,
            run=self.run,
            image_shape=shape,
            class_names=names,
            preprocessing=self.manifest.preprocessing,
            calibration=calibration,
        )

    @cached_property
    def _answers(self) -> Logits:
        return reference.of_engine(self.source).answers(self.proof.images)

    @property
    def against(self) -> Reference:
        """The source; it is asked once, however often it is compared with, and not for a plan that cannot run here."""
        return reference.Reference(str(self.source), lambda _: self._answers)

    @property
    def onnx(self) -> Path:
        """The ONNX file of the variant: the engine itself, or what its plan is built from."""
        file = "model.onnx" if self.variant.runtime == "onnxruntime" else PLAN_SOURCE
        return self.draft.folder / file

    def graph(self) -> Manifest:
        """Write the ONNX file in its precision, and describe it as an engine."""
        original, variant = self.source.folder / self.manifest.file, self.variant
        kept, quantization = self.manifest.kept_fp32, self.manifest.quantization
        if variant.precision == self.manifest.precision:
            shutil.copyfile(original, self.onnx)
        elif variant.precision == "fp16":
            kept = tuple(precision.fp16_from_onnx(original, self.onnx, keep=variant.keep, inputs=self._seen))
        else:
            kept, quantization = self._int8(original)
        return self.manifest.model_copy(
            update={
                "model": self.draft.model,
                "version": self.draft.version,
                "file": self.onnx.name,
                "sha256": manifests.sha256_of(self.onnx),
                "runtime": "onnxruntime",
                "precision": variant.precision,
                "max_batch": variant.max_batch or self.manifest.max_batch,
                "twin": None,
                "source": Source(model=self.manifest.model, version=self.manifest.version, sha256=self.manifest.sha256),
                "quantization": quantization,
                "kept_fp32": kept,
                "requires": publish.ort_requirements(self.onnx),
                "parity": publish.not_run(str(self.source), ""),
                "build": self._build(("onnxruntime-gpu", "onnx")),
                "files": {},
            }
        )

    def plan(self, graph: Manifest, progress: Callable[[str, int, int], None] | None) -> Manifest:
        """Build the plan of a graph whose rounding was checked, and describe it."""
        path, variant = self.draft.folder / "model.plan", self.variant
        built = tensorrt_plan.plan_from_onnx(
            self.onnx,
            path,
            runtime=variant.runtime,
            image=graph.inputs[0],
            max_batch=graph.max_batch,
            options=variant.plan,
            progress=progress,
        )
        return graph.model_copy(
            update={
                "file": path.name,
                "sha256": manifests.sha256_of(path),
                "runtime": variant.runtime,
                "requires": built.requires,
                "parity": publish.not_run(str(self.source), "; ".join(graph.build.notes)),
                "build": graph.build.model_copy(
                    update={
                        "options": built.options,
                        "versions": {**graph.build.versions, **built.versions},
                        "onnx": PLAN_SOURCE,
                        "log": tensorrt_plan.LOG,
                    }
                ),
            }
        )

    @cached_property
    def _seen(self) -> Inputs:
        """Images as the graph takes them: what they make of its activations must be in the range of fp16."""
        return as_input(self.manifest, _range_images(self.manifest, self.variant, self.terms, self.run).images)

    def _int8(self, original: Path) -> tuple[tuple[str, ...], Quantization]:
        variant = self.variant
        calibration = _calibration_images(self.manifest, variant, self.terms, self.run)
        kept = precision.int8_from_onnx(
            original,
            self.onnx,
            inputs=as_input(self.manifest, calibration.images),
            target=variant.layout,
            method=variant.method,
            percentile=variant.percentile,
            keep=variant.keep,
        )
        percentile = variant.percentile if variant.method == "percentile" else None
        return tuple(kept), Quantization(
            target=variant.layout, method=variant.method, percentile=percentile, images=calibration.record
        )

    def check_rounding(self, graph: Manifest) -> _Checked | None:
        """Compare what the engine's own proof would not show: a plan's graph, and fp16 as a GPU computes it.

        A plan may not run here. ONNX Runtime's CPU provider computes fp16 in fp32, which hides rounding and overflow.

        Returns:
            The comparison, which may have failed where the terms say to block; None where there is nothing to compare.
        """
        if graph.precision == self.manifest.precision:
            return None
        if graph.precision == "fp16":
            what, answers = "with activations in fp16, as on a GPU", self._fp16_answers()
        elif self.variant.runtime != "onnxruntime":
            what, answers = "the ONNX that it was built from", self._graph_answers(graph)
        else:
            return None
        result = parity.compare(
            answers,
            self.against.answers(self.proof.images),
            reference=str(self.source),
            images=self.proof,
            limits=self.terms.limits(graph.precision),
            class_names=graph.class_names,
            output=graph.output,
            machine=f"{parity.this_machine()}, {what}",
        )
        publish.judge(result, f"{graph.model} ({what})", terms=self.terms)
        return _Checked(what, result)

    def _fp16_answers(self) -> Logits:
        return sensitivity.fp16_answers(
            self.source.folder / self.manifest.file,
            inputs=as_input(self.manifest, self.proof.images),
            calibration_inputs=self._seen,
            keep=self.variant.keep,
        )

    def _graph_answers(self, graph: Manifest) -> Logits:
        # As it stands: ONNX Runtime's optimisations would add roundings of their own.
        session = ort.open_session(self.onnx, optimise=False)
        feed, answer = graph.inputs[0].name, graph.outputs[0].name

        def run(batch: Images) -> Logits:
            with one_line(graph.model):
                (given,) = session.run([answer], {feed: as_input(graph, batch)})
            return given  # type: ignore[no-any-return]

        return parity.batched(run, self.proof.images, batch=graph.max_batch)

    def _build(self, packages: tuple[str, ...]) -> Build:
        return Build(
            command=publish.command_of(self._flags(), self.draft.model, None, self.terms),
            versions=publish.versions(*packages),
            machine=parity.this_machine(),
        )

    def _flags(self) -> list[str]:
        """Return the flags of the command that makes this variant again, defaults left out."""
        variant = self.variant
        flags = ["--from", str(self.source), "--precision", f"{variant.precision}", "--runtime", variant.runtime]
        flags += [] if variant.target is None else ["--target", variant.target]
        flags += [] if variant.method == "minmax" else ["--calibration", variant.method]
        flags += ["--percentile", str(variant.percentile)] if variant.method == "percentile" else []
        flags += [] if variant.max_batch is None else ["--max-batch", str(variant.max_batch)]
        flags += [] if variant.calibration == CALIBRATION_IMAGES else ["--calibration-images", str(variant.calibration)]
        for node in variant.keep:
            flags += ["--keep-fp32", node]
        return [*flags, *variant.plan.flags()]


def _refuse_impossible(source: Version, manifest: Manifest, variant: Variant, name: str) -> None:
    if manifest.file != "model.onnx":
        made_from = "its source" if manifest.source is None else f"{manifest.source.model}@{manifest.source.version}"
        raise ValueError(f"{source}: variants are made from an ONNX model, this one is a plan; name {made_from}")
    if not manifest.servable:
        raise ValueError(
            f"{source}: its own proof is {manifest.parity.status!r}, so that nothing is made of it; complete it by "
            f"`tenet models verify {source}`"
        )
    if variant.target == "cpu" and variant.runtime != "onnxruntime":
        raise ValueError(f"{variant.runtime}: takes int8 of target tensorrt, got target cpu; leave --target out")
    if manifest.precision not in {"fp32", variant.precision}:
        raise ValueError(
            f"{source}: expected an ONNX fp32 model to make {variant.precision} of, this one is {manifest.precision}; "
            f"{'name what it was made from' if manifest.source else 'import a file of fp32'}"
        )
    if (variant.precision, variant.runtime) == (manifest.precision, "onnxruntime"):
        raise ValueError(
            f"{source}: is {manifest.precision} on onnxruntime already; choose another --precision or --runtime"
        )
    quantized = manifest.quantization
    if quantized is not None and variant.runtime != "onnxruntime" and quantized.target != "tensorrt":
        raise ValueError(
            f"{source}: is int8 for CPUs, which {variant.runtime} does not take; make the plan from "
            f"{manifest.source.model if manifest.source else 'its source'}, with --precision int8"
        )
    if name == manifest.model:
        raise ValueError(
            f"{name!r}: a variant is a model of its own; choose another name, such as '{name}-{variant.precision}'"
        )


def _calibration_images(manifest: Manifest, variant: Variant, terms: Terms, run: Path | None) -> ImageSet:
    """Return images to calibrate on, others than those of the proof as far as there are enough.

    Raises:
        ValueError: there are none: ranges that were measured on noise would fit no photograph.
    """
    shape, names = manifest.image_shape, manifest.class_names
    if terms.images is not None:
        share = images.Share(terms.images_of(shape), variant.calibration)
        return images.from_folder(
            terms.images,
            share=share,
            image_shape=shape,
            class_names=names,
            preprocessing=manifest.preprocessing,
            to_calibrate=True,
        )
    if run is None:
        raise ValueError(
            "int8 needs images for calibration: expected a folder of class folders by --images, got none, and this "
            "model has no training run to take them from"
        )
    return images.from_run(run, split="train", count=variant.calibration, class_names=names)


def _range_images(manifest: Manifest, variant: Variant, terms: Terms, run: Path | None) -> ImageSet:
    """Return images to see how far activations go: those for calibration, or noise other than that of a proof."""
    if terms.images is None and run is None:
        return images.noise(count=variant.calibration, image_shape=manifest.image_shape, seed=images.NOISE_SEED + 1)
    return _calibration_images(manifest, variant, terms, run)


def _noting(manifest: Manifest, note: str) -> Manifest:
    notes = (*manifest.build.notes, note)
    return manifest.model_copy(update={"build": manifest.build.model_copy(update={"notes": notes})})
