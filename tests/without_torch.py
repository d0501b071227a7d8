"""For the processes that tests start."""

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"
"""Code to run first where nothing needs PyTorch: transformers imports it, which takes seconds, wherever it finds it."""
