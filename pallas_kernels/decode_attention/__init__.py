"""Attention of one or few queries to a long KV memory, contiguous or paged."""
