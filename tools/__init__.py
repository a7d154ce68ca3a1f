"""Tools: what a model may call, and calling it safely. Knows nothing of episodes, tokens or models."""
