"""The stages of the GPU report, in order of value: a new capability adds an entry, and a function if it needs one."""

from collections.abc import Mapping, Sequence
from typing import Any

from .operator_cases import PROVEN
from .stage import Stage

_BESIDE_PEERS = 0.4  # of the GPU's memory, where PyTorch has a model of its own there
_MANY = 0.06  # where many processes share it
_UNTIMED = "untimed"


def _stage(name: str, title: str, function: str, weight: float, *, memory: float = 0.75, **settings: Any) -> Stage:
    return Stage(name, title, f"{__package__}.{function}", weight, settings, memory)


def _proof(operator: str) -> Stage:
    return Stage(
        f"right/{operator}",
        "its kernels give the reference's results, and the same bits every time",
        f"{__package__}.proofs:prove",
        40,
        {"operator": operator},
        memory=_MANY,
        group=_UNTIMED,
        operator=operator,
    )


def _preparation(name: str, title: str, function: str, **settings: Any) -> Stage:
    return Stage(f"prepare/{name}", title, f"{__package__}.{function}", 40, settings, memory=_MANY, group=_UNTIMED)


def _decode(model: str, weight: float, peers: Sequence[str] = ()) -> Stage:
    title = f"decoding with {model}'s shape, kernels on and off" + (", beside PyTorch" if peers else "")
    memory = _BESIDE_PEERS if peers else 0.75
    return _stage(
        f"decode/{model}", title, "decode:measure", weight, memory=memory, model=model, batches=[1, 8, 64], peers=peers
    )


def _prefill(model: str, weight: float, cases: Sequence[tuple[int, int]], peers: Sequence[str] = ()) -> Stage:
    title = f"reading prompts with {model}'s shape, kernels on and off" + (", beside PyTorch" if peers else "")
    memory = _BESIDE_PEERS if peers else 0.75
    return _stage(
        f"prefill/{model}", title, "prefill:measure", weight, memory=memory, model=model, cases=cases, peers=peers
    )


STAGES: tuple[Stage, ...] = (
    Stage("machine", "driver, GPU, versions, and that JAX reaches it", f"{__package__}.machine:look", 30, vital=True),
    _stage(
        "limits", "what the GPU and its link give to programs that only copy, multiply, launch", "limits:measure", 18
    ),
    *(_proof(operator) for operator in PROVEN),
    _preparation(
        "torch.compile",
        "PyTorch compiles a peer, which is then found in a cache",
        "torch_peer:compile_ahead",
        model="llama-8b",
    ),
    _preparation("streaming", "the weights that are streamed are written", "streaming:write"),
    _stage("speed/linear", "products of 1 to 64 tokens beside cuBLAS", "operators:measure", 38, operators=["linear"]),
    _decode("llama-8b", 76, ["transformers", "torch.compile"]),
    _stage(
        "speed/attention",
        "attention beside XLA's and cuDNN's",
        "operators:measure",
        36,
        operators=["decode_attention", "prefill_attention"],
    ),
    _stage(
        "speed/quantized",
        "products with int8, int4 and fp8 weights",
        "operators:measure",
        26,
        operators=["quantized_linear"],
    ),
    _stage("quantized", "all products of a decoding step in int8 and int4", "quantized:measure", 22, model="llama-8b"),
    _stage(
        "streaming",
        "weights that stay in host memory, through a few buffers on the GPU",
        "streaming:measure",
        26,
        memory=0.15,
    ),
    _stage("profile", "where the time of a decoding step goes", "step_profile:measure", 26, model="llama-8b"),
    _prefill("llama-8b", 28, [(1, 2048), (8, 512), (1, 8192), (64, 128)], ["transformers"]),
    _stage(
        "speed/others",
        "paged and ragged attention, the norm, the KV write",
        "operators:measure",
        20,
        operators=["paged_decode_attention", "ragged_paged_attention", "add_norm", "rotary_kv_write"],
    ),
    _decode("gpt-j", 16),
    _decode("gpt-2-xl", 14),
    _prefill("gpt-j", 12, [(1, 1920), (8, 512)]),
    _prefill("gpt-2-xl", 12, [(1, 896), (8, 512)]),
)


def gpu_tests(folder: str) -> Stage:
    """The stage that runs the GPU tests in a folder."""
    return _stage("tests", "the tests that need a GPU", "gpu_tests:run", 90, folder=folder)


def tuning(cases: Mapping[str, Sequence[str]], table: str) -> Stage:
    """The stage that tunes operators.

    Args:
        cases: by operator, names of its argument specs in order of what is to be gained.
        table: the file that the findings go to.
    """
    return _stage(
        "tune", "the fastest configurations where kernels fell short", "tune:tune", 1, cases=cases, table=table
    )
