"""How many replicas serve a model: a pure policy, its place inside Ray Serve, and a replay to measure it."""
