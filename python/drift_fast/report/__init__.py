"""A delta, a pair, a merge or training runs as one page to look at in a browser."""
