"""Ways into the training stacks; each module serves one of them."""
