"""Environments that others have written, played by our loop: `verifiers:NAME` and `openenv:URL`.

An adapter translates; it samples nothing and calls no model. What cannot be translated is refused when the environment
is made, with the reason, and never played in another way than its author meant.
"""
