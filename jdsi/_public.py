"""The public names of `jdsi`, which its root hands out; importing them imports JAX and Flax."""

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
