"""Small checkpoints that tests make on the spot."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["def f(x):\n    return x + 1\n", "The quick brown fox jumps over the lazy dog.", "naïve café 🙂"] * 4


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with a chat template; id 0 is `</s>`, the end of sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def save_llama(folder: Path, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """A random Llama with a tokenizer, in Hugging Face format; returns the torch model."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_script(folder: Path, tokens: list[int]) -> None:
    """A Llama with a tokenizer that goes through `tokens`, all different, whichever it starts from; then `</s>`."""
    assert len(set(tokens)) == len(tokens)
    model = save_llama(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)  # layers add nothing
        for i, (token, following) in enumerate(zip(tokens, [*tokens[1:], 0], strict=True)):
            model.get_input_embeddings().weight[token, i] = 1.0
            model.get_output_embeddings().weight[following, i] = 1.0
    model.save_pretrained(folder)
