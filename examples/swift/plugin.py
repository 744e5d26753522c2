"""Registers the callback `drift_fast` with ms-swift."""

import drift_fast.integrations.swift  # noqa: F401
