"""Names of the mesh axes over which kernels are partitioned; `model.sharding` has all axes."""

BATCH_AXES = ("replica", "data", "fsdp")
"""Rows of a batch are split over these."""
TENSOR_AXIS = "tensor"
"""Heads, feed-forward and vocabulary are split over this."""
