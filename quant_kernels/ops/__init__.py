"""The operations of a decoder layer between its matmuls, for each device: `LayerOps`, in torch and in Triton."""
