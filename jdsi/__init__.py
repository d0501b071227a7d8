"""DeepSpeed Inference on JAX/XLA: load a PyTorch checkpoint and run it fast on whatever is there.

Load and generate in three lines:

    import jdsi
    engine = jdsi.init_inference("path/to/checkpoint")
    print(engine.generate("The capital of France is")[0].text)
"""

from jdsi.config import InferenceConfig
from jdsi.converters import load_model
from jdsi.engine import InferenceEngine
from jdsi.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    JdsiError,
    JdsiWarning,
    PeerError,
    PromptError,
)
from jdsi.generation import Chat, Classification, Completion, SamplingParams, TokenAutomaton, TokenLogprob
from jdsi.generation.defaults import GenerationDefaults
from jdsi.generation.stream_events import StreamEvent
from jdsi.inference import init_inference
from jdsi.models import Transformer, TransformerSpec
from jdsi.runtime import GenerationStats

__all__ = [
    "CapacityError",
    "Chat",
    "CheckpointError",
    "Classification",
    "Completion",
    "ConfigError",
    "GenerationDefaults",
    "GenerationStats",
    "InferenceConfig",
    "InferenceEngine",
    "JdsiError",
    "JdsiWarning",
    "PeerError",
    "PromptError",
    "SamplingParams",
    "StreamEvent",
    "TokenAutomaton",
    "TokenLogprob",
    "Transformer",
    "TransformerSpec",
    "init_inference",
    "load_model",
]
