"""Open an engine and run it, whatever its runtime; never imports torch.

<version>/ --sha256--> manifest --runtime--> ort | trt --warm-up--> Engine: images -> logits
"""

from __future__ import annotations

from pathlib import Path

from export import manifest as manifests
from export.engines.base import Engine


def open_engine(version_folder: Path, *, device: str = "cpu", threads: int = 1) -> Engine:
    """Open the engine of one published version, warmed up.

    Args:
        version_folder: `<repository>/<model>/<version>`.
        device: "cpu" or "cuda".
        threads: CPU threads that one call may use; ignored on a GPU.

    Raises:
        FileNotFoundError: manifest or engine file is missing.
        ValueError: the sha256 differs from the manifest, or the runtime cannot take the file.
        CannotRunHere: this machine lacks what the runtime asked for needs: a GPU, a library.
        RuntimeError: another runtime would have run it, or the runtime failed.
    """
    manifest = manifests.verify(version_folder)
    engine: Engine
    if manifest.runtime == "onnxruntime":
        from export.engines.ort import OrtEngine  # noqa: PLC0415 - each runtime is a heavy import of its own

        engine = OrtEngine(version_folder, manifest, device=device, threads=threads)
    else:
        from export.engines.trt import TrtEngine  # noqa: PLC0415 - as above

        engine = TrtEngine(version_folder, manifest)
    engine.warm_up()
    return engine
