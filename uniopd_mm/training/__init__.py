"""The training step, the DeepSpeed engine around the student, checkpoints and resume."""
