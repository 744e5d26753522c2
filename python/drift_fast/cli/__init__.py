"""The command `drift-fast`: one module a command."""
