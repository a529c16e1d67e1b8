"""How models are trained: what runs under the deepspeed launcher."""
