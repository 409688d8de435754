"""The optimizers whose steps `benchmarks.step` measures, and the sets of tensors that they step."""
