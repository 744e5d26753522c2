"""Measure and subtract, on the CPU or on an accelerator."""
