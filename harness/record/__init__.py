"""Raw records of runs, where they came from, and the statistics computed from them on read."""
