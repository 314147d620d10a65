"""How accurate quantized models are, by method: the parts of `benchmarks/accuracy.py`, and the log of its runs."""
