"""What the kernels compile to, without a GPU: registers, spills, opcodes, bytes, predicted times."""
