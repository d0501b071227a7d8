"""Runs in an interpreter that has llama.cpp but perhaps not jdsi, and so imports nothing of ours.

One argument: settings as JSON. Then one line of JSON in, one out, until the input ends. See `llama_process.py`.
"""

import ctypes
import importlib
import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any

_INSTALL = "not installed in this interpreter: pip install llama-cpp-python gguf numpy, or name one that has them"
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a Hugging Face Llama tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


def interleave_rotary(weight: Any, heads: int) -> Any:
    """Rows of q or k from rotating the two halves of a head (Hugging Face) to rotating neighbours (GGUF's Llama)."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.transpose(0, 2, 1, 3).reshape(rows, width)


def tensors(folder: Path) -> Any:
    """Names and float32 arrays of a safetensors checkpoint."""
    import numpy as np

    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(mapped[:8], "little")
        for name, entry in json.loads(mapped[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            if entry["dtype"] != "F32":
                raise ValueError(f"{name} is {entry['dtype']}; this peer is measured with float32 checkpoints")
            values = np.frombuffer(mapped, np.float32, (stop - start) // 4, 8 + size + start)
            yield name, values.reshape(entry["shape"])


def write_gguf(folder: Path, path: str) -> None:
    """The checkpoint as a float32 GGUF file without a tokenizer."""
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(f"only plain Llama is measured, not {config['model_type']} with rotary settings {rope}")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, values in tensors(folder):
        if name.endswith("q_proj.weight"):
            values = interleave_rotary(values, heads)
        elif name.endswith("k_proj.weight"):
            values = interleave_rotary(values, kv_heads)
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A loaded GGUF file; every call of `generate` starts with an empty cache."""

    def __init__(self, path: str, threads: int, context: int, rows: int) -> None:
        api: Any = importlib.import_module("llama_cpp")
        self._api = api
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        self._model = api.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise ValueError("llama.cpp does not load the GGUF file")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, context, 512, rows
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = api.GGML_TYPE_F32
        # One buffer for all sequences, of which each may use what it needs.
        params.kv_unified = True
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError("llama.cpp makes no context of this size")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(context, 0, rows)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy tokens of prompts of equal length, all rows in one batch per step."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        last = self._step([[(token, i) for i, token in enumerate(p)] for p in prompts])
        found = [[token] for token in last]
        for step in range(new_tokens - 1):
            position = len(prompts[0]) + step
            last = self._step([[(token, position)] for token in last])
            for row, token in zip(found, last, strict=True):
                row.append(token)
        return found

    def _step(self, rows: list[list[tuple[int, int]]]) -> list[int]:
        import numpy as np

        batch, n, ends = self._batch, 0, []
        for sequence, row in enumerate(rows):
            for token, position in row:
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, 0
                batch.seq_id[n][0] = sequence
                n += 1
            batch.logits[n - 1] = 1
            ends.append(n - 1)
        batch.n_tokens = n
        if status := self._api.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode returned {status}")
        found = []
        for end in ends:
            logits = self._api.llama_get_logits_ith(self._context, end)
            found.append(int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()))
        return found


def main() -> None:
    # What llama.cpp prints must not get between the lines of the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    # Python looks for imports beside a script first, and the files there have common names.
    sys.path.pop(0)
    settings = json.loads(sys.argv[1])
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
        write_gguf(Path(settings["checkpoint"]), settings["gguf"])
        model = Model(settings["gguf"], settings["threads"], settings["context"], settings["rows"])
        say({"ready": True, "version": llama_cpp.__version__})
        for line in sys.stdin:
            say({"tokens": model.generate(**json.loads(line))})
    except ImportError as error:
        say({"error": f"{error.name} is {_INSTALL}"})
    except (KeyError, ValueError, OSError) as error:
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
