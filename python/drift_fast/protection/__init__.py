"""A Δ without what would disturb a model's skills: gradients measured, and their span removed."""
