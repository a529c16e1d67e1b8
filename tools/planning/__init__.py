"""What a run will take before it is started: memory, time, energy and disk, from shapes alone."""
