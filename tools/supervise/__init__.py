"""`isoflop supervise`: a run that is started again when it was cut off, and left alone when not."""
