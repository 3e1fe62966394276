"""An engine of the model repository as a target, in this process, opened as a server opens it.

version --sha256, runtime, provider, precision, threads: open_engine--> engine --batches that are served--> logits
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.engines import open_engine
from service.audit.target import served
from service.audit.target.base import Target, TargetFailed
from service.settings import Settings

if TYPE_CHECKING:
    from typing import Self

    from export.engines.base import Engine, Images, Logits
    from export.repository import Version
    from service.audit.target.served import InputKind


class EngineTarget(Target):
    """An engine; closing the target closes it.

    Attributes:
        engine: what answers.
    """

    def __init__(self, engine: Engine, *, wanted: InputKind = "auto", max_batch: int | None = None) -> None:
        """Take an open engine.

        Args:
            engine: open; it is closed with the target.
            wanted: the plan's `target.input`.
            max_batch: images a call, if a server allows fewer than the manifest.

        Raises:
            ValueError: the engine does not take what is wanted.
        """
        super().__init__()
        manifest = engine.manifest
        self.engine = engine
        self.name = f"{manifest.model}@{manifest.version}"
        self.class_names = manifest.class_names
        self.image_shape = manifest.image_shape
        self.domain = served.domain(wanted, datatype=manifest.inputs[0].datatype, model=self.name)
        self.batch_sizes = served.batch_sizes(min(max_batch or manifest.max_batch, manifest.max_batch))

    @classmethod
    def opened(
        cls,
        version: Version,
        *,
        device: str | None = None,
        threads: int | None = None,
        settings: Settings | None = None,
        wanted: InputKind = "auto",
    ) -> Self:
        """Open the engine of a version with the device, provider, threads and batches that a server would give it.

        Args:
            version: of the model repository.
            device: in place of the settings'.
            threads: in place of the settings'.
            settings: the server's; its defaults if None.
            wanted: the plan's `target.input`.

        Raises:
            FileNotFoundError, ValueError, RuntimeError: as `open_engine`; the engine does not take what is wanted.
        """
        own = (settings or Settings()).of(version.manifest.model)
        engine = open_engine(
            version.folder,
            device=device or own.engine.device,
            provider=own.engine.provider,
            threads=threads or own.engine.threads,
            instances=own.engine.instances,
            rebuild=own.engine.rebuild,
            cache=own.engine.cache,
        )
        try:
            return cls(engine, wanted=wanted, max_batch=own.batching.max_batch_size)
        except ValueError:
            engine.close()
            raise

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _answer(self, images: Images) -> Logits:
        starts = range(0, len(images), self.max_batch)
        try:
            answers = [self.engine.classify(images[start : start + self.max_batch]) for start in starts]
        except RuntimeError as error:
            raise TargetFailed(f"{self.name}: {error}") from error
        if not answers:
            return np.empty((0, len(self.class_names)), np.float32)
        joined = answers[0] if len(answers) == 1 else np.concatenate(answers)
        return served.as_logits(joined, probabilities=self.engine.manifest.output == "probabilities")
