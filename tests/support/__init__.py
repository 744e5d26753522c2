"""Builders, references and processes that the tests share."""
