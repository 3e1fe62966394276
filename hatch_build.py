"""Generate the gRPC code from `protos/` before each build, editable ones too.

    protos/**/*.proto --protoc--> *_pb2.py, *_pb2.pyi, *_pb2_grpc.py, *_pb2_grpc.pyi   (never committed)

The Open Inference Protocol's messages share their full names with tritonclient's and kserve's, and two files
may not define one name in one descriptor pool. Ours therefore live in a pool of their own, `protos.pool.POOL`
(docs/adr/0006).
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_DEFAULT_POOL = "_descriptor_pool.Default()"
_OWN_POOL = "_POOL"
_OWN_POOL_IMPORT = "from protos.pool import POOL as _POOL\n"
_FIRST_IMPORT = "from google.protobuf import descriptor as _descriptor\n"


class GrpcCode(BuildHookInterface[Any]):
    """Hatchling's custom build hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the code beside each `.proto` file."""
        generate(Path(self.root))


def generate(root: Path) -> None:
    """Run protoc over every `.proto` file under `root/protos`.

    Raises:
        RuntimeError: protoc refused a file; its own messages are on stderr.
    """
    from importlib.resources import files  # noqa: PLC0415 - build-time only

    from grpc_tools import protoc  # noqa: PLC0415 - build-time only

    sources = sorted(str(path.relative_to(root)) for path in (root / "protos").rglob("*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    outputs = [f"--{kind}_out={root}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    arguments = ["protoc", f"-I{root}", f"-I{well_known}", *outputs, *(str(root / source) for source in sources)]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"expected protoc to accept {', '.join(sources)}; it did not, see its messages above")
    for generated in (root / "protos" / "inference").glob("*_pb2.py"):
        _move_to_own_pool(generated)


def _move_to_own_pool(generated: Path) -> None:
    code = generated.read_text()
    assert _DEFAULT_POOL in code, f"{generated}: protoc's output has changed its form"
    assert _FIRST_IMPORT in code, f"{generated}: protoc's output has changed its form"
    code = code.replace(_DEFAULT_POOL, _OWN_POOL).replace(_FIRST_IMPORT, _OWN_POOL_IMPORT + _FIRST_IMPORT)
    generated.write_text(code)
