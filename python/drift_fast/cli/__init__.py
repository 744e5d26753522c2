"""The command `drift-fast`: one module for each of its commands."""
