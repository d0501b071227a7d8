"""Attention of many queries: prompts, packed batches, continuations."""
