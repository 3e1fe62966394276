"""ONNX Runtime engines: the provider asked for is the provider that runs, for every layer, or an error says why.

model.onnx --open_session: libraries, options, checks--> InferenceSession --run | I/O binding--> logits
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime

from export.engines import providers
from export.engines.base import Engine, Inputs, Logits
from export.engines.bindings import DeviceBinding, HostBinding
from export.engines.failures import one_line, reason
from export.engines.places import NAMES, Place, checked_provider
from export.engines.providers import Profile
from export.engines.session_options import session_options

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import Manifest

# Arithmetic on shapes and constants. GPU providers leave it to the CPU on purpose, where its results are needed;
# whatever else runs there is a layer that the provider could not take.
_SHAPE_OPERATORS = {
    "Add", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "NonZero", "Not",
    "OneHot", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split",
    "Squeeze", "Sub", "Tile", "Unsqueeze", "Where",
}  # fmt: skip

# Nodes that a message names; more do not help.
_NAMED_NODES = 5

_CPU = Place("cpu")

_BINDINGS: dict[str, type[DeviceBinding | HostBinding]] = {
    "cuda": DeviceBinding,
    "tensorrt": DeviceBinding,
    "nv_tensorrt_rtx": HostBinding,
}


def open_session(
    path: Path,
    *,
    provider: str = "cpu",
    ordinal: int = 0,
    threads: int | None = None,
    cache: Path | None = None,
    profile: Profile | None = None,
    optimise: bool = True,
) -> onnxruntime.InferenceSession:
    """Open an ONNX file, published or not, where it was asked for and nowhere else.

    Args:
        path: the file.
        provider: "cpu", "cuda", "tensorrt" or "nv_tensorrt_rtx".
        ordinal: which GPU, counted from 0.
        threads: CPU threads that one call may use; all that this process may use if None.
        cache: where engines that TensorRT builds are kept; None to build them at every start.
        profile: what will come, for TensorRT.
        optimise: whether ONNX Runtime may fuse nodes; without, each is computed as it stands in the file. Among others
            it adds pairs of QuantizeLinear and DequantizeLinear, which another runtime of the file would not.

    Raises:
        ValueError: there is no such provider, or ONNX Runtime cannot take the file.
        CannotRunHere: the provider lacks a GPU or a library here.
        RuntimeError: another provider would have run the model, or some of its layers.
    """
    place = Place(checked_provider(provider), ordinal)
    options = session_options(threads, optimise=optimise)
    named = _arranged(path, place, options, cache=cache, profile=profile)
    try:
        # Without a fall-back: ONNX Runtime would print an error and go on, on the CPU.
        session = onnxruntime.InferenceSession(str(path), options, providers=named, enable_fallback=0)
    except Exception as error:
        raise ValueError(f"{path}: ONNX Runtime cannot load it: {reason(error)}; export the model again") from error
    check_provider(session, NAMES[provider], path=path)
    if provider != "cpu":  # beside which there is none to fall back to
        check_layers(session, NAMES[provider], path=path)
    return session


def _arranged(
    path: Path, place: Place, options: onnxruntime.SessionOptions, *, cache: Path | None, profile: Profile | None
) -> list[tuple[str, dict[str, str]]] | None:
    """Return the providers that a session is given; None for a plug-in, which is put into the options."""
    if place.provider == "cpu":
        return [(NAMES["cpu"], {})]
    hardware = providers.require(place)
    given = providers.device_options(path, place, cache=cache, profile=profile, hardware=hardware)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if place.provider == "nv_tensorrt_rtx":
        options.add_provider_for_devices([providers.rtx_device(place.ordinal)], given)
        return None
    return [(NAMES[place.provider], given)]


def check_provider(session: onnxruntime.InferenceSession, name: str, *, path: Path) -> None:
    """Refuse a session that another provider runs than the one of this name.

    Raises:
        RuntimeError: names the provider that took its place.
    """
    if (actual := session.get_providers()[0]) != name:
        raise RuntimeError(
            f"{path}: expected {name} to run it, ONNX Runtime fell back to {actual}; "
            "choose provider 'cpu', or mend the GPU's libraries"
        )


def check_layers(session: onnxruntime.InferenceSession, name: str, *, path: Path) -> None:
    """Refuse a session some of whose layers another provider runs.

    Raises:
        RuntimeError: names the layers.
    """
    left = layers_elsewhere(session, name)
    more = f" and {len(left) - _NAMED_NODES} more" if len(left) > _NAMED_NODES else ""
    if left:
        raise RuntimeError(
            f"{path}: expected {name} to run every layer, ONNX Runtime left {', '.join(left[:_NAMED_NODES])}{more} to "
            "another provider; choose another provider, or export the model in a precision that this one takes"
        )


def layers_elsewhere(session: onnxruntime.InferenceSession, name: str) -> list[str]:
    """Return the layers that another provider than this one runs: `name (operator)`, in the graph's order.

    The session must have been opened with `session.record_ep_graph_assignment_info`.
    """
    return [
        f"{node.name or 'unnamed'} ({node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != name
        for node in part.get_nodes()
        if node.domain not in {"", "ai.onnx"} or node.op_type not in _SHAPE_OPERATORS
    ]


class OrtEngine(Engine):
    """An ONNX file run by ONNX Runtime; safe to call from several threads, which take turns on a GPU."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        place: Place = _CPU,
        threads: int | None = None,
        cache: Path | None = None,
    ) -> None:
        super().__init__(manifest)
        profile = Profile(manifest.inputs[0], manifest.max_batch)
        self._session: onnxruntime.InferenceSession | None = open_session(
            folder / manifest.file,
            provider=place.provider,
            ordinal=place.ordinal,
            threads=threads,
            cache=cache,
            profile=profile,
        )
        self._input, self._outputs = manifest.inputs[0].name, [manifest.outputs[0].name]
        self._binding: DeviceBinding | HostBinding | None = None
        if place.provider != "cpu":
            self._binding = _BINDINGS[place.provider](self._session, manifest, ordinal=place.ordinal)

    def _run(self, inputs: Inputs) -> Logits:
        # Both are kept for the length of the call: another thread may close the engine meanwhile.
        binding, session = self._binding, self._session
        if session is None:
            raise RuntimeError("the engine is closed; open it again")
        with one_line(self.manifest.model):
            if binding is not None:
                return binding.run(inputs)
            return session.run(self._outputs, {self._input: inputs})[0]  # type: ignore[no-any-return]

    def close(self) -> None:
        """Drop the session; ONNX Runtime frees its memory with it. Once more does nothing."""
        self._session = self._binding = None
