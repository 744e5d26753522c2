"""Where Δ lives while a model trains, and how it gets there."""
