"""What everything that measures shares: cells on disk, conditions, timing, intervals, tables."""
