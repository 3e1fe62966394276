"""The descriptor pool of the Open Inference Protocol's messages, apart from protobuf's default pool."""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
