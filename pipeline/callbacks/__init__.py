"""What happens beside the training loop: records, evaluations, checkpoints, the live line."""
