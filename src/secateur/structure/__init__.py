"""What can go from a model: tracing, coupling, groups, and the plan of a cut."""
