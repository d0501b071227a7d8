"""Attention of a batch that mixes prompt chunks and decodes over paged KV memory."""
