"""A foreign model -> a classifier of images: one input, one output, a batch of any size, the image's size settled.

model --opset--> --output chosen, rest pruned--> --input chosen--> --batch named, size fixed--> --shapes--> classifier
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from export import onnx_file
from export.graph import batch_dimension, limits, onnx_parts
from export.mapping import feed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from export.manifest import TensorSpec
    from export.mapping import Mapping

_IMAGE_TYPES = ("FP32", "FP16", "UINT8")
_SCORE_TYPES = ("FP32", "FP16", "FP64")

# Channels that images of files have: grey, colour, colour with transparency.
_USUAL_CHANNELS = {1, 3, 4}


@dataclass(frozen=True)
class Classifier:
    """The original, of a recent opset, pruned to one input and one output, its batch and its image's size settled.

    Attributes:
        model: the pruned graph; its nodes are the original's.
        native: the original's input, with the shape that it had there.
        output: the original's output, -1 for the batch.
        image_shape: (channels, height, width) of its images.
        notes: what was changed or assumed.
    """

    model: onnx.ModelProto
    native: TensorSpec
    output: TensorSpec
    image_shape: tuple[int, int, int]
    notes: tuple[str, ...]

    @property
    def classes(self) -> int:
        """How many scores the graph gives."""
        return self.output.shape[1]


def classifier_from_model(original: onnx.ModelProto, mapping: Mapping) -> Classifier:
    """Return the classifier of images in a foreign model.

    Args:
        original: as onnx_file.load returns it; it is not changed.
        mapping: which input and output to take, and what the input takes.

    Raises:
        ValueError: there is none, or the mapping does not fit it; one line says why.
    """
    model = onnx.ModelProto()
    model.CopyFrom(onnx_file.upgraded(original))
    notes = _choose(model.graph, mapping)
    if model.opset_import != original.opset_import:
        notes.insert(0, f"its operators were converted to opset {onnx_file.BASE_OPSET}")
    ((native,), (output,)) = onnx_file.specs(model)
    shape = _image_shape(native, mapping)
    if native.shape[0] != -1:
        notes.append(_release(model, native, mapping))
    _set_shape(model.graph.input[0], _native_shape(shape, mapping))
    scores = batch_dimension.check(model, image=native.name, output=output.name)
    output = output.model_copy(update={"shape": _checked_scores(output, scores)})
    # Once more: the file may leave the image's size open, and with it that of everything else.
    limits.check_tensors(onnx_parts.inferred(model))
    if native.shape[0] != -1:
        _try_out(model, native, mapping, shape)
    if -1 in native.shape[1:]:
        notes.append(f"the size of its images, which it leaves open, was fixed at {_words(shape)}")
    return Classifier(model, native, output, shape, tuple(notes))


def pruned(original: onnx.ModelProto, mapping: Mapping) -> onnx.ModelProto:
    """Return a copy of a foreign model with the one output that is chosen and the one input that this depends on.

    It is what an adapted graph is to be compared with: it takes what `feed` makes of images, and needs nothing else.
    Raises as `classifier_from_model` does.
    """
    model = onnx.ModelProto()
    model.CopyFrom(original)
    _choose(model.graph, mapping)
    return model


def _choose(graph: onnx.GraphProto, mapping: Mapping) -> list[str]:
    """Prune a graph, in place, to one output and one input; return what was dropped."""
    all_inputs, all_outputs = _value_names(graph.input), _value_names(graph.output)
    output = _one(all_outputs, mapping.output, kind="output")
    onnx_parts.prune(graph, output)
    inputs = _value_names(graph.input)
    if not inputs or not graph.node:
        raise ValueError(f"output {output!r}: expected scores computed from an image, got a constant; choose another")
    if mapping.input in all_inputs and mapping.input not in inputs:
        raise ValueError(f"input {mapping.input!r}: output {output!r} does not depend on it; choose another input")
    chosen = _one(inputs, mapping.input, kind="input")
    if unfed := [name for name in inputs if name != chosen]:
        raise ValueError(
            f"inputs {_quoted(unfed)}: expected one input, the image {chosen!r}; export the model with the others as "
            "constants"
        )
    dropped = [f"its output {name!r} was dropped" for name in all_outputs if name != output]
    return dropped + [f"its input {name!r} was dropped" for name in all_inputs if name != chosen]


def _one(names: list[str], choice: str | None, *, kind: str) -> str:
    if choice is None and len(names) == 1:
        return names[0]
    if choice in names:
        return choice
    problem = f"got {len(names)}" if choice is None else f"got {choice!r}"
    raise ValueError(
        f"{kind}: expected one of {_quoted(names)}, {problem}; choose it by --{kind}-name or in the mapping"
    )


def _image_shape(native: TensorSpec, mapping: Mapping) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that the graph takes."""
    where = f"input {native.name!r}"
    if native.datatype not in _IMAGE_TYPES or len(native.shape) != 4:
        raise ValueError(
            f"{where}: expected images, 4 dimensions of one of {', '.join(_IMAGE_TYPES)}, got {native.datatype} of "
            f"shape {_words(native.shape)}; choose the input that takes the images"
        )
    first, last = native.shape[1:], (native.shape[3], native.shape[1], native.shape[2])
    channels, *size = last if mapping.layout == "NHWC" else first
    if (
        channels not in {-1, *_USUAL_CHANNELS}
        and "layout" not in mapping.model_fields_set
        and last[0] in _USUAL_CHANNELS
    ):
        raise ValueError(
            f"{where}: expected NCHW, got shape {_words(native.shape)}, which looks like NHWC; "
            "give --layout NHWC, or NCHW if it is that"
        )
    return _channels(channels, mapping, where), *_size(tuple(size), mapping, where)


def _channels(channels: int, mapping: Mapping, where: str) -> int:
    wanted = 1 if mapping.channels == "L" else 3
    if channels == -1:
        channels = wanted
    # RGB is the default and says nothing about graphs of other channels, BGR and L do.
    if channels != wanted and mapping.channels != "RGB":
        raise ValueError(
            f"{where}: expected {wanted} channels for {mapping.channels}, got {channels}; correct --channels"
        )
    for name in ("mean", "std"):
        if (count := len(getattr(mapping, name))) not in {0, 1, channels}:
            raise ValueError(f"{name}: expected 1 or {channels} numbers, one a channel, got {count}; correct --{name}")
    return channels


def _size(size: tuple[int, ...], mapping: Mapping, where: str) -> tuple[int, int]:
    height, width = size
    wanted = mapping.image_size
    if wanted is None and -1 in size:
        raise ValueError(f"{where}: it leaves the size of its images open; give --image-size HEIGHT,WIDTH")
    if wanted is None:
        return height, width
    if any(have not in {-1, want} for have, want in zip(size, wanted, strict=True)):
        raise ValueError(
            f"{where}: expected images of {height} x {width}, got --image-size {wanted[0]},{wanted[1]}; drop it"
        )
    return wanted


def _release(model: onnx.ModelProto, native: TensorSpec, mapping: Mapping) -> str:
    """Replace a fixed batch, in place, by one of any size; return what was done."""
    batch = native.shape[0]
    if not mapping.dynamic_batch:
        raise ValueError(
            f"input {native.name!r}: expected a batch of any size, got one fixed at {batch}; export the model with a "
            "dynamic batch, or give --dynamic-batch to have it replaced"
        )
    batch_dimension.release(model, image=native.name, shapes=onnx_parts.shapes(model))
    return f"its fixed batch of {batch} was replaced by one of any size"


def _try_out(model: onnx.ModelProto, native: TensorSpec, mapping: Mapping, shape: tuple[int, int, int]) -> None:
    images = np.zeros((native.shape[0] + 1, *shape), dtype=np.float32)
    batch_dimension.try_out(model, feed(images, mapping, native))


def _checked_scores(output: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    where = f"output {output.name!r}"
    if output.datatype not in _SCORE_TYPES:
        raise ValueError(
            f"{where}: expected scores, one of {', '.join(_SCORE_TYPES)}, got {output.datatype}; name the output that "
            "has the scores"
        )
    got = _words(("N", *shape[1:])) if shape else "none"
    if len(shape) not in {2, 4} or shape[2:] not in {(), (1, 1)} or shape[1] < 1:
        raise ValueError(
            f"{where}: expected scores of shape (N, classes), got {got}; choose the output that has them, or export "
            "a classifier"
        )
    return shape


def _native_shape(image_shape: tuple[int, int, int], mapping: Mapping) -> tuple[str | int, ...]:
    channels, height, width = image_shape
    rest = (height, width, channels) if mapping.layout == "NHWC" else image_shape
    return batch_dimension.NAME, *rest


def _set_shape(value: onnx.ValueInfoProto, shape: tuple[str | int, ...]) -> None:
    value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, shape))


def _value_names(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _words(shape: tuple[str | int, ...]) -> str:
    return f"({', '.join('?' if dim == -1 else str(dim) for dim in shape)})"
