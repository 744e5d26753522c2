"""What is there: sources, files, headers and configurations; no weight is read."""
