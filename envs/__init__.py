"""Environments: tasks, the Gymnasium contract, the registry. Messages only."""
