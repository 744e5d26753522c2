"""Measure and subtract, on the host or on a device."""
