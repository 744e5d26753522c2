"""Every training stack against one float64 gradient: the world, the stacks, how they are run."""
