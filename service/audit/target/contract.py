"""What a model behind an endpoint takes and gives: its server's metadata, completed by what the plan says.

metadata | target.mapping | target.labels --checked--> Contract --encoded: normalised, layout, type--> what is sent
Nothing is asked of the model for it: what does not fit is said before a query is spent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from export import mapping as mappings
from export.manifest import TensorSpec
from export.mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.engines.base import Images, Inputs
    from service.client import ModelMetadata, TensorMetadata

# The protocol's datatypes in which images can be sent; answers are the first of them.
_DATATYPES = ("FP32", "UINT8")

# Grey, and RGB or BGR.
_CHANNELS = (1, 3)

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class Contract:
    """What is sent to a model and what comes back.

    Attributes:
        described: the model, with the one input and the one output that are used.
        mapping: how an image in [0, 1] becomes the input; its layout is the input's.
        image_shape: (channels, height, width).
        class_names: in the order of the answers.
        probabilities: whether it answers with those, and not with logits.
        fixed_batch: images that each request must have; None for any number.
    """

    described: ModelMetadata
    mapping: Mapping
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    probabilities: bool
    fixed_batch: int | None

    @property
    def datatype(self) -> str:
        """The protocol's datatype of the input."""
        return self.described.inputs[0].datatype

    def encoded(self, images: Images) -> Inputs:
        """Return images as the model takes them.

        Args:
            images: (n, C, H, W) float32 in [0, 1].
        """
        tensor = self.described.inputs[0]
        spec = TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return mappings.feed(images, self.mapping, spec)


def contract(described: ModelMetadata, *, mapping: Mapping | None = None, labels: Sequence[str] = ()) -> Contract:
    """Read a model's metadata, and check that images can be sent and classes read.

    Args:
        described: by its server.
        mapping: what its user knows of it; what it leaves out is taken from the metadata.
        labels: names of the classes in the order of the answers; by default those of the mapping or of the server,
            and numbers if nobody names them.

    Raises:
        ValueError: it takes no images, is no classifier, or mapping and labels do not fit it.
    """
    given = mapping or Mapping()
    source = _tensor(described, described.inputs, given.input, kind="input", among=_DATATYPES)
    scores = _tensor(described, described.outputs, given.output, kind="output", among=_DATATYPES[:1])
    layout = _layout(source, mapping)
    image_shape = _image_shape(described.name, source, layout, given)
    _check_channels(described.name, source, image_shape[0], given)
    probabilities = given.probabilities
    narrowed = replace(described, inputs=(source,), outputs=(scores,))
    return Contract(
        described=narrowed,
        mapping=given.model_copy(update={"layout": layout}),
        image_shape=image_shape,
        class_names=_class_names(narrowed, tuple(labels) or given.labels),
        probabilities=narrowed.answers_probabilities if probabilities is None else probabilities,
        fixed_batch=source.shape[0] if source.shape[0] > 0 else None,
    )


def _tensor(
    described: ModelMetadata,
    tensors: tuple[TensorMetadata, ...],
    name: str | None,
    *,
    kind: Literal["input", "output"],
    among: tuple[str, ...],
) -> TensorMetadata:
    found = [tensor for tensor in tensors if name in {None, tensor.name}]
    if len(found) != 1:
        there = ", ".join(tensor.name for tensor in tensors) or "none"
        wanted = "one" if name is None else repr(name)
        raise ValueError(
            f"{described.name}: expected {wanted} among its {kind}s, which are {there}; name one as "
            f"target.mapping.{kind}"
        )
    (tensor,) = found
    if tensor.datatype not in among:
        raise ValueError(
            f"{described.name}: expected {kind} {tensor.name!r} of datatype {' or '.join(among)}, got "
            f"{tensor.datatype}; serve the model with a cast around it"
        )
    return tensor


def _layout(source: TensorMetadata, mapping: Mapping | None) -> Layout:
    """Return the mapping's layout, unless only with the other one there are 1 or 3 channels."""
    # Bytes are mostly sent as images are stored.
    usual: Layout = "NHWC" if source.datatype == "UINT8" else "NCHW"
    said = usual if mapping is None else mapping.layout
    if len(source.shape) != 4:
        return said
    first, last = source.shape[1] in _CHANNELS, source.shape[3] in _CHANNELS
    if first == last:
        return said
    return "NHWC" if last else "NCHW"


def _image_shape(model: str, source: TensorMetadata, layout: Layout, given: Mapping) -> tuple[int, int, int]:
    if len(source.shape) != 4:
        raise ValueError(
            f"{model}: expected input {source.name!r} to take images, with 4 dimensions, got shape {source.shape}"
        )
    _, *rest = source.shape
    channels, height, width = rest if layout == "NCHW" else (rest[2], rest[0], rest[1])
    size = given.image_size or (height, width)
    if channels < 1:
        channels = 1 if given.channels == "L" else 3
    if min(size) < 1:
        raise ValueError(
            f"{model}: expected one size of images, got any (input {source.name!r} has shape {source.shape}); give "
            "target.mapping.image_size"
        )
    if any(taken > 0 and taken != side for taken, side in zip((height, width), size, strict=True)):
        raise ValueError(
            f"target.mapping.image_size: expected {height} x {width} as {model} takes, got {size[0]} x {size[1]}"
        )
    return channels, *size


def _check_channels(model: str, source: TensorMetadata, channels: int, given: Mapping) -> None:
    if channels not in _CHANNELS:
        raise ValueError(
            f"{model}: expected images of 1 or 3 channels, got {channels} (input {source.name!r} has shape "
            f"{source.shape}); give target.mapping.layout if it is another"
        )
    if given.channels == ("BGR" if channels == 1 else "L"):
        raise ValueError(f"target.mapping.channels: {model} takes images of {channels} channels, got {given.channels}")
    for name, values in (("mean", given.mean), ("std", given.std)):
        if len(values) not in {0, 1, channels}:
            raise ValueError(f"target.mapping.{name}: expected 1 or {channels} numbers, got {len(values)}")
    if source.datatype == "UINT8" and given.normalised():
        raise ValueError(
            f"target.mapping: expected no mean and std for {model}, which takes UINT8, got some; leave them out"
        )


def _class_names(described: ModelMetadata, labels: tuple[str, ...]) -> tuple[str, ...]:
    scores = described.outputs[0]
    names = labels or described.class_names
    # -1 where the metadata leave the number open: then the names tell it.
    classes = scores.shape[-1] if len(scores.shape) == 2 and scores.shape[-1] > 0 else len(names)
    if len(scores.shape) != 2 or classes < 2:
        raise ValueError(
            f"{described.name}: expected output {scores.name!r} of shape (batch, classes), at least 2 of them, got "
            f"{scores.shape}; give target.labels if it leaves the classes open"
        )
    names = names or tuple(map(str, range(classes)))
    if len(names) != classes:
        raise ValueError(f"target.labels: expected {classes} names as {described.name} has classes, got {len(names)}")
    return names
