"""Whether two models fit each other, from configurations and headers."""
