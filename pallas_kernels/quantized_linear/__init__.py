"""Matrix products of a few rows with quantised weights."""
