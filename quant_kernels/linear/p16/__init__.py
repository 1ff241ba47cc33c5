"""P16: a layout of quantized weights made for Triton's tensor-core path, and the kernels that read it.

`layout` packs and unpacks; `planes` and `steps` are the inner loop; `matmul`, `gate_up` and `expand` are the kernels;
`prepared` is the linear that `linear.dispatch` hands out. Only `layout` works without triton.
"""
