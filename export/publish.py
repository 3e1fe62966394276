"""Publish engines: build the file, prove its parity, describe it, and only then let readers see it.

run, or a factory and weights --onnx_graph--> ONNX fp32 --parity with PyTorch-----------> model@1
anybody's ONNX                --foreign-----> ONNX      --parity with the file itself---> model@1
model@1                       --variant-----> variant   --parity with model@1-----------> variant@1
"""

from __future__ import annotations

import platform
import shlex
import shutil
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx

from export import foreign, images, onnx_file, onnx_graph, parity, reference, twin
from export import manifest as manifests
from export.engines import open_engine
from export.engines.base import CannotRunHere
from export.graph import classifier
from export.labels import check, class_names
from export.manifest import Build, Manifest, Parity, Preprocessing, Provenance, Requirements, Twin
from export.parity import ParityFailed
from export.reference import Reference
from export.requirements import Machine
from training import checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.images import ImageSet
    from export.manifest import Precision
    from export.mapping import Mapping
    from export.repository import Draft, Repository, Version

# Images an engine takes at once unless the export says otherwise.
MAX_BATCH = 64

# Images of a proof: a true disagreement of 1 % is then measured to within one point. Of images above 128 x 128 half as
# many: each takes PyTorch, the engine and the reader of files 20 to 50 times as long.
PARITY_IMAGES = 512
PARITY_IMAGES_LARGE = 256
_LARGE_PIXELS = 128 * 128

TWIN_FOLDER = "checkpoint"

# What stands for the repository's place in the command of a manifest: it may be elsewhere tomorrow.
REPOSITORY = "REPOSITORY"

# The first ONNX Runtime that takes files of an IR version.
_ORT_OF_IR = {9: "1.17", 10: "1.18", 11: "1.23"}


@dataclass(frozen=True)
class Form:
    """What an engine takes and gives.

    Attributes:
        input: "float32", NCHW in [0, 1], or "uint8", NHWC.
        output: "logits" or "probabilities".
        max_batch: the largest batch it will take.
        preprocessing: how images of other sizes come to that of its input.
    """

    input: Literal["float32", "uint8"] = "float32"
    output: Literal["logits", "probabilities"] = "logits"
    max_batch: int = MAX_BATCH
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def flags(self, verb: str) -> list[str]:
        """Return the flags of a command that gives an engine this form, defaults left out."""
        flags = [] if self.input == "float32" else ["--input", self.input]
        flags += [] if self.output == "logits" or verb == "import" else ["--output", self.output]
        flags += [] if self.max_batch == MAX_BATCH else ["--max-batch", str(self.max_batch)]
        for name, value in self.preprocessing.model_dump(exclude_defaults=True).items():
            flags += [f"--{name}", str(value)]
        return flags


@dataclass(frozen=True)
class Terms:
    """What counts as proof, and what becomes of an engine without it.

    Attributes:
        images: a folder of class folders to calibrate and to compare with, instead of a run's own images.
        count: how many images to compare on, at most; by default 512, of images above 128 x 128 pixels 256.
        max_disagreement: the largest share of images whose top-1 class may differ; the precision's own by default.
        block: publish an engine that fails, as one that is not served, instead of publishing nothing.
    """

    images: Path | None = None
    count: int | None = None
    max_disagreement: float | None = None
    block: bool = False

    def limits(self, precision: str) -> parity.Limits:
        """Return what a precision is allowed."""
        return parity.LIMITS[precision].allowing(self.max_disagreement)

    def images_of(self, image_shape: tuple[int, int, int]) -> int:
        """Return how many images of this shape to compare on, at most."""
        if self.count is not None:
            return self.count
        _, height, width = image_shape
        return PARITY_IMAGES_LARGE if height * width > _LARGE_PIXELS else PARITY_IMAGES

    def flags(self) -> list[str]:
        """Return the flags of a command with these terms, defaults left out; a folder by its name alone."""
        flags = [] if self.images is None else ["--images", self.images.resolve().name]
        flags += [] if self.count is None else ["--parity-images", str(self.count)]
        flags += [] if self.max_disagreement is None else ["--max-disagreement", str(self.max_disagreement)]
        return [*flags, *(["--block"] if self.block else [])]


def publish_checkpoint(
    run: Path, *, repository: Repository, name: str, form: Form | None = None, terms: Terms | None = None
) -> Version:
    """Publish a training run as ONNX fp32, together with its checkpoint.

    Raises:
        FileNotFoundError: the run or the images are missing.
        ParityFailed: the engine does not answer as the checkpoint; nothing is published, or it is as blocked.
        ValueError: the checkpoint is damaged or cannot be exported; nothing is published.
    """
    form, terms = form or Form(), terms or Terms()
    trained, record = checkpoint.load(run), checkpoint.record(run)
    shape, names = trained.input_shape, trained.class_names
    proof = proof_images(terms, run=run, image_shape=shape, class_names=names)
    with repository.draft(name) as draft:
        folder = draft.folder / TWIN_FOLDER
        folder.mkdir()
        for file in (checkpoint.WEIGHTS, checkpoint.RUN):  # without the metrics and pictures beside them
            shutil.copy2(run / file, folder / file)
        path = draft.folder / "model.onnx"
        onnx_graph.onnx_from_module(
            trained.model, path, image_shape=shape, class_names=names, input=form.input, output=form.output
        )
        source = record.model_dump(mode="json")
        provenance = Provenance(
            kind="run", file=checkpoint.WEIGHTS, sha256=trained.sha256, recipe=source["recipe"], data=source["data"],
            commit=record.commit,
        )  # fmt: skip
        manifest = _original(draft, form, class_names=names, provenance=provenance, twin=_twin(draft))
        manifest = manifest.model_copy(update={"build": _build([str(run.name)], name, form, terms, _EXPORTER)})
        against = reference.of_module(trained.model, name=reference.CHECKPOINT, output=form.output)
        prove(draft, manifest, against, proof, terms=terms)
    return published(repository, draft)


def publish_network(
    network: twin.Network,
    weights: Path,
    *,
    repository: Repository,
    name: str,
    form: Form | None = None,
    terms: Terms | None = None,
) -> Version:
    """Publish a PyTorch network of somebody's own as ONNX fp32, together with its weights.

    Args:
        network: its factory, input, classes and normalisation.
        weights: its plain state_dict, a safetensors file or one that `weights_only` can read.
        repository: where to.
        name: the model's name.
        form: what the engine takes and gives.
        terms: what counts as proof.

    Raises:
        FileNotFoundError: no such file.
        ParityFailed: the engine does not answer as the network.
        ValueError: the factory or the weights do not fit, or the network cannot be exported.
    """
    form, terms = form or Form(), terms or Terms()
    proof = proof_images(
        terms,
        run=None,
        image_shape=network.input_shape,
        class_names=network.class_names,
        preprocessing=form.preprocessing,
    )
    with repository.draft(name) as draft:
        module = twin.write(draft.folder / TWIN_FOLDER, network, weights)
        path, shape, names = draft.folder / "model.onnx", network.input_shape, network.class_names
        onnx_graph.onnx_from_module(
            module, path, image_shape=shape, class_names=names, input=form.input, output=form.output
        )
        provenance = Provenance(
            kind="weights", file=weights.name, sha256=manifests.sha256_of(weights), factory=network.factory
        )
        manifest = _original(draft, form, class_names=names, provenance=provenance, twin=_twin(draft))
        command = ["--factory", network.factory, "--weights", weights.name, *_network_flags(network)]
        manifest = manifest.model_copy(update={"build": _build(command, name, form, terms, _EXPORTER)})
        against = reference.of_module(module, name=reference.NETWORK, output=form.output)
        prove(draft, manifest, against, proof, terms=terms)
    return published(repository, draft)


def publish_onnx(
    path: Path,
    *,
    repository: Repository,
    name: str,
    mapping: Mapping,
    labels: str | Path | None = None,
    form: Form | None = None,
    terms: Terms | None = None,
) -> Version:
    """Publish anybody's ONNX classifier, adapted to take images in [0, 1].

    Args:
        path: the file; external data lie in its folder.
        repository: where to.
        name: the model's name.
        mapping: what its input and output mean.
        labels: class names "a,b,c", or a file with one a line; None for the mapping's, or those in the file's metadata.
        form: what the engine takes; its output is what the mapping says.
        terms: what counts as proof.

    Raises:
        FileNotFoundError: no such file.
        ParityFailed: the adapted graph does not answer as the file does.
        ValueError: the file is no classifier that can be served; nothing is published.
    """
    form, terms = form or Form(), terms or Terms()
    model = onnx_file.load(path)
    count = foreign.class_count(model, mapping)
    names = (
        check(mapping.labels, count=count) if mapping.labels and labels is None else class_names(labels, model, count)
    )
    adapted = foreign.adapted(model, mapping, class_names=names, input=form.input)
    form = replace(form, output=adapted.output)
    from_file = labels is None and not mapping.labels
    with repository.draft(name) as draft:
        onnx_file.write(adapted.model, draft.folder / "model.onnx")
        original = draft.folder / reference.ORIGINAL
        onnx_file.write(classifier.pruned(model, mapping), original)
        (draft.folder / reference.MAPPING).write_text(mapping.model_dump_json(indent=2) + "\n")
        provenance = Provenance(kind="onnx", file=path.name, sha256=manifests.sha256_of(path))
        rounded = onnx_file.precision_of(model)
        manifest = _original(draft, form, class_names=names, provenance=provenance, twin=None, precision=rounded)
        command = [path.name, *([] if from_file else label_flags(names)), *mapping_flags(mapping)]
        build = _build(command, name, form, terms, ("onnx",), verb="import", notes=adapted.notes)
        manifest = manifest.model_copy(update={"build": build})
        proof = proof_images(
            terms,
            run=None,
            image_shape=manifest.image_shape,
            class_names=names,
            preprocessing=manifest.preprocessing,
        )
        against = reference.of_original(original, mapping, name=path.name, class_names=names)
        # The file as it came is as coarse as what was made of it: the two may differ by the order of sums alone.
        prove(draft, manifest, against, proof, terms=terms, precision="fp32")
    return published(repository, draft)


def verify(
    version: Version, *, repository: Repository, images: Path | None = None, terms: Terms | None = None
) -> Version:
    """Complete, or repeat, the proof of parity of a published version on this machine, and record its result.

    Args:
        version: what to prove.
        repository: where it, and what it was made from, are.
        images: a folder of class folders, instead of the run's own test images.
        terms: what counts as proof.

    Raises:
        CannotRunHere: its runtime cannot run here.
        ParityFailed: parity failed; that is recorded, too.
        ValueError: a file is damaged, or there is nothing to compare with.
    """
    terms = terms or Terms(images=images)
    manifest = manifests.verify_all(version.folder)
    against = reference.of_version(version, repository=repository)
    run = run_of(version, repository)
    _refuse_weaker(version, terms, run)
    proof = proof_images(
        terms,
        run=run,
        image_shape=manifest.image_shape,
        class_names=manifest.class_names,
        preprocessing=manifest.preprocessing,
    )
    result = _measured(version.folder, against, proof, limits=_limits(manifest, terms))
    repository.record_proof(version, result)
    if result.status == "failed":
        raise ParityFailed(f"{version}: parity with {against.name} failed: {result.explanation}", result)
    return repository.find(manifest.model, manifest.version)


def exported(run: Path, *, repository: Repository, form: Form) -> Version | None:
    """Return a servable engine of a repository that was exported from a run's weights in this form, if there is one."""
    sha256 = checkpoint.record(run).sha256
    fitting = (one for one in repository.readable() if one.manifest.servable and _is_export(one.manifest, sha256, form))
    return next(fitting, None)


def _is_export(manifest: Manifest, sha256: str, form: Form) -> bool:
    kind = "uint8" if manifest.channels_last else "float32"
    made_of = None if manifest.source is not None or manifest.provenance is None else manifest.provenance.sha256
    return (made_of, kind, manifest.output) == (sha256, form.input, form.output)


def _refuse_weaker(version: Version, terms: Terms, run: Path | None) -> None:
    """Refuse to replace a proof on images by one on noise."""
    proved = version.manifest.parity.images
    if proved is not None and proved.seed is None and terms.images is None and run is None:
        raise ValueError(
            f"{version}: its proof was on {proved.n} {proved.description}, and there are none here; name a folder by "
            "--images, or check its files alone by --files-only"
        )


def run_of(version: Version, repository: Repository) -> Path | None:
    """Return the folder of the training run that an engine descends from, if it is one of ours."""
    files = repository.twin_of(version)
    return files.folder if files is not None and (files.folder / checkpoint.RUN).is_file() else None


def proof_images(
    terms: Terms,
    *,
    run: Path | None,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 - it is frozen
    calibration: int = 0,
) -> ImageSet:
    """Return the images to compare on: the user's, the run's test images, or noise where there is neither.

    Of the user's images, `calibration` are left for that, or of few images a part.
    """
    count = terms.images_of(image_shape)
    if terms.images is not None:
        share = images.Share(count, calibration)
        return images.from_folder(
            terms.images,
            share=share,
            image_shape=image_shape,
            class_names=class_names,
            preprocessing=preprocessing,
        )
    if run is not None:
        return images.from_run(run, split="test", count=count, class_names=class_names)
    return images.noise(count=count, image_shape=image_shape)


def prove(
    draft: Draft, manifest: Manifest, against: Reference, proof: ImageSet, *, terms: Terms, precision: str | None = None
) -> None:
    """Describe the draft, run the engine it has become, and refuse or block it if its answers are not its source's.

    An engine that cannot run here is described as not proved yet. What is allowed is what the engine's precision may
    cost, or what `precision` may.

    Raises:
        ParityFailed: the answers differ, and the terms do not say to publish it as blocked.
    """
    draft.describe(manifest)
    try:
        result = _measured(draft.folder, against, proof, limits=terms.limits(precision or manifest.precision))
    except CannotRunHere as error:
        explanation = "; ".join(filter(None, (str(error), manifest.parity.explanation)))
        result = not_run(against.name, explanation)
    judge(result, manifest.model, terms=terms)
    draft.describe(manifest.model_copy(update={"parity": result}))


def judge(result: Parity, name: str, *, terms: Terms) -> None:
    """Raise ParityFailed for a failed proof, unless the terms say to publish it as blocked."""
    if result.status == "failed" and not terms.block:
        raise ParityFailed(
            f"{name}: not published, parity with {result.reference} failed: {result.explanation}", result
        )


def published(repository: Repository, draft: Draft) -> Version:
    """Return what a draft has become."""
    return repository.find(draft.model, draft.version)


def not_run(name: str, explanation: str) -> Parity:
    """Return the proof of an engine that has not been compared with `name` yet."""
    return Parity(status="not run", reference=name, explanation=explanation)


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of packages, for a manifest."""
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}


def ort_requirements(path: Path) -> Requirements:
    """Return what a machine needs to run an ONNX file."""
    ir = onnx.load(path, load_external_data=False).ir_version
    return Requirements(runtime=f">={_ORT_OF_IR.get(max(ir, min(_ORT_OF_IR)), metadata.version('onnxruntime-gpu'))}")


def command_of(arguments: Sequence[str], name: str, form: Form | None, terms: Terms, *, verb: str = "export") -> str:
    """Return the command line that makes a version again; REPOSITORY stands for the repository's place."""
    flags: list[str] = ["--repository", REPOSITORY, "--name", name]
    if form is not None:
        flags += form.flags(verb)
    return shlex.join(["tenet", verb, *arguments, *flags, *terms.flags()])


_EXPORTER = ("torch", "onnx", "onnxscript")


def _build(
    arguments: Sequence[str],
    name: str,
    form: Form,
    terms: Terms,
    packages: Sequence[str],
    *,
    verb: str = "export",
    notes: tuple[str, ...] = (),
) -> Build:
    return Build(
        command=command_of(arguments, name, form, terms, verb=verb),
        options={"input": form.input, "output": form.output},
        versions=versions(*packages),
        machine=parity.this_machine(),
        notes=notes,
    )


def label_flags(names: tuple[str, ...]) -> list[str]:
    """Return the flag that gives class names: themselves, or the file of the model's folder if they have commas."""
    return ["--labels", "labels.txt" if any("," in name for name in names) else ",".join(names)]


def mapping_flags(mapping: Mapping) -> list[str]:
    """Return the flags of `tenet import` that say what a mapping says, its labels left out."""
    names = {"input": "input-name", "output": "output-name"}
    flags = []
    for key, value in mapping.model_dump(exclude_defaults=True, exclude={"labels"}).items():
        flag = names.get(key, key.replace("_", "-"))
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return flags


def _network_flags(network: twin.Network) -> list[str]:
    flags = ["--input-shape", ",".join(map(str, network.input_shape)), *label_flags(network.class_names)]
    for flag, values in (("--mean", network.mean), ("--std", network.std)):
        flags += [flag, ",".join(map(str, values))] if values else []
    return flags


def _twin(draft: Draft) -> Twin:
    weights = draft.folder / TWIN_FOLDER / twin.WEIGHTS
    return Twin(folder=TWIN_FOLDER, file=twin.WEIGHTS, sha256=manifests.sha256_of(weights))


def _original(
    draft: Draft,
    form: Form,
    *,
    class_names: tuple[str, ...],
    provenance: Provenance,
    twin: Twin | None,
    precision: Precision = "fp32",
) -> Manifest:
    """Describe an ONNX engine that was made from no other."""
    path = draft.folder / "model.onnx"
    inputs, outputs = onnx_graph.specs(path)
    manifest = Manifest(
        model=draft.model,
        version=draft.version,
        file="model.onnx",
        sha256=manifests.sha256_of(path),
        runtime="onnxruntime",
        precision=precision,
        inputs=inputs,
        outputs=outputs,
        output=form.output,
        class_names=class_names,
        max_batch=form.max_batch,
        twin=twin,
        requires=ort_requirements(path),
        provenance=provenance,
        parity=not_run("its source", ""),
    )
    form.preprocessing.check(manifest.image_shape)
    return manifest.model_copy(update={"preprocessing": form.preprocessing})


def _limits(manifest: Manifest, terms: Terms) -> parity.Limits:
    """Return what a version is allowed: what it was published under, unless the terms say otherwise."""
    allowed = terms.max_disagreement
    if allowed is None:
        allowed = manifest.parity.limits.get("disagreement")
    precision = "fp32" if manifest.source is None else manifest.precision
    return parity.LIMITS[precision].allowing(allowed)


def _measured(folder: Path, against: Reference, proof: ImageSet, *, limits: parity.Limits) -> Parity:
    with open_engine(folder) as engine:
        answers = engine.classify(proof.images)
        return parity.compare(
            answers,
            against.answers(proof.images),
            reference=against.name,
            images=proof,
            limits=limits,
            class_names=engine.manifest.class_names,
            output=engine.manifest.output,
            machine=_machine(engine.manifest),
        )


def _machine(manifest: Manifest) -> str:
    """Return what has run an engine just now, for the reader of its proof."""
    if manifest.runtime == "onnxruntime":
        return parity.this_machine()
    gpu = Machine.here().gpus[0]
    return f"{gpu.name}, compute capability {gpu.compute_capability}"
