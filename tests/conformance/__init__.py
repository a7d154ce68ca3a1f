"""Requests that any engine of the gym must answer alike: the embedded one, and vLLM."""
