"""The whole line on real text, small enough for two cores and a quarter of an hour."""
