"""Real servers with invented models, for tests."""
