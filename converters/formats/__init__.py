"""One module per on-disk quantization format; each maps a file's tensors to PackedWeight and back."""
