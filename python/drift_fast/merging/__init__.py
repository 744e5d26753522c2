"""Merge a reasoning model into a multimodal one, in place of an injection."""
