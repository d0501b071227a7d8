"""DeepSpeed Inference on JAX/XLA."""
