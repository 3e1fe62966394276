"""Server reflection: what grpcurl and its kin ask to learn which services there are.

service descriptors, of several pools --their files, each once--> one pool --> grpc.reflection.v1alpha
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection, reflection_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    import grpc
    from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

    Context = grpc.aio.ServicerContext[Any, Any]

DESCRIPTOR = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]


class ReflectionServicer(reflection.aio.ReflectionServicer):  # type: ignore[misc]
    """Describes the services of a server, itself among them."""

    def __init__(self, descriptors: Iterable[ServiceDescriptor]) -> None:
        every = [DESCRIPTOR, *descriptors]
        # The descriptors come from two pools (docs/adr/0006), and reflection answers from one.
        pool, seen = DescriptorPool(), set[str]()
        for descriptor in every:
            _add_file(pool, descriptor.file, seen)
        super().__init__([descriptor.full_name for descriptor in every], pool=pool)

    async def ServerReflectionInfo(  # noqa: N802 - the protocol names it
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: Context
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        """Answer each question of a stream."""
        async for response in super().ServerReflectionInfo(requests, context):
            yield response


def _add_file(pool: DescriptorPool, file: FileDescriptor, seen: set[str]) -> None:
    if file.name in seen:
        return
    seen.add(file.name)
    for dependency in file.dependencies:
        _add_file(pool, dependency, seen)
    pool.AddSerializedFile(file.serialized_pb)
