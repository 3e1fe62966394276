"""ONNX Runtime engines: the provider asked for is the provider that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime

from export.engines.base import CannotRunHere, Engine, Images, Logits

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import Manifest

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# ONNX Runtime's log severity "error": its warnings about graph details are no business of a caller's.
_LOG_ERRORS = 3


class OrtEngine(Engine):
    """An ONNX file run by ONNX Runtime; safe to call from several threads."""

    def __init__(self, folder: Path, manifest: Manifest, *, device: str, threads: int) -> None:
        super().__init__(manifest)
        path = folder / manifest.file
        provider = _provider(device)
        try:
            self._session = onnxruntime.InferenceSession(str(path), _options(threads), providers=[provider])
        except Exception as error:
            raise ValueError(f"{path}: ONNX Runtime cannot load it: {error}; export the model again") from error
        if (actual := self._session.get_providers()[0]) != provider:
            raise RuntimeError(
                f"{manifest.model}: expected {provider} to run it, ONNX Runtime fell back to {actual}; "
                "choose device 'cpu', or mend the GPU's libraries"
            )

    def _run(self, images: Images) -> Logits:
        (logits,) = self._session.run([self.manifest.outputs[0].name], {self.manifest.inputs[0].name: images})
        return logits  # type: ignore[no-any-return]

    def close(self) -> None:
        """Drop the session; ONNX Runtime frees its memory with it."""
        del self._session


def _provider(device: str) -> str:
    if device not in _PROVIDERS:
        raise ValueError(f"device {device!r}: expected one of {', '.join(_PROVIDERS)}")
    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise CannotRunHere(f"device {device!r}: this build of ONNX Runtime has no {provider}; choose 'cpu'")
    return provider


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS
    # Threads that spin for work starve their neighbours on shared cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
