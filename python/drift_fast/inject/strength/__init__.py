"""How strongly Δ is pushed: the formula, α, schedules and caps."""
