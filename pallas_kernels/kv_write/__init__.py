"""Rotary embedding of q and k together with the write of k and v into the KV memory."""
