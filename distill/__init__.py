"""On-policy distillation: teacher scores, loss, student, checkpoints, the run."""
