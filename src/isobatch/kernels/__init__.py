"""Row 1: a folder per op. Each holds its launchers, a float64 reference, its cases and its record."""
