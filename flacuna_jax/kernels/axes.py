"""Names of the mesh axes that kernels partition themselves over; `model.sharding` has them all."""

BATCH_AXES = ("replica", "data", "fsdp")
"""Rows of a batch are spread over these."""
TENSOR_AXIS = "tensor"
"""Heads, feed-forward and vocabulary are split over this."""
