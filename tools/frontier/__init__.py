"""From run folders to compute-optimal frontiers: points, fits, figure, report."""
