"""Trains four models with FP32, torch.amp and mpengine on a CPU, and compares them: `make parity`."""
