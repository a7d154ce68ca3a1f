"""The agent loop: renders, samples, parses, steps, records. The one seam of messages and tokens."""
