"""What runs before and after training, on CPUs: the `isoflop` command."""
