"""What is computed: pure PyTorch, importing nothing else of the project."""
