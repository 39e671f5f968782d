"""Training: data from the illustrated world, flow matching, checkpoints. Runs are configured in fluxloom.recipes."""
