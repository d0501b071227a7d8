"""Answers that have to be one of a few texts, and a bias of one's own: constraints in the jitted step.

python examples/constraints.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdsi

MODEL = Path(__file__).parent / "tiny-python-lm"


def one_of(texts: Sequence[str], tokenizer: Any, vocab_size: int, end: int) -> jdsi.TokenAutomaton:
    """The automaton of a trie: what is generated is one of `texts`, then the token `end`."""
    states: list[dict[int, int]] = [{}]
    for text in texts:
        state = 0
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], end]:
            if token not in states[state]:
                states[state][token] = len(states)
                states.append({})
            state = states[state][token]
    table = np.full((len(states), vocab_size), -1, np.int32)
    for state, ways in enumerate(states):
        for token, following in ways.items():
            table[state, token] = following
    return jdsi.TokenAutomaton(table)


def shorter(tokens: jax.Array, lengths: jax.Array, logits: jax.Array) -> jax.Array:
    """Likes the tokens of a line's end the better the longer the text is; row by row, as a batch requires."""
    return logits.at[:, jnp.asarray(NEWLINES)].add(0.05 * lengths[:, None])


engine = jdsi.init_inference(MODEL)
NEWLINES = [i for i in range(engine.spec.vocab_size) if "\n" in engine.tokenizer.decode([i])]


def main() -> None:
    """Prints what the embedded model makes of a few prompts."""
    vocabulary, end = engine.spec.vocab_size, engine.eos_token_ids[0]
    prompts = ["import ", "x = [1, 2]\nfor i in ", "if x is "]
    choices = [["os\n", "json\n", "numpy\n"], ["x:\n", "range(x):\n"], ["None:\n", "True:\n", "not None:\n"]]
    params = [
        jdsi.SamplingParams(allowed_tokens=one_of(texts, engine.tokenizer, vocabulary, end), num_beams=3, n=2)
        for texts in choices
    ]
    for prompt, best in zip(prompts, engine.generate(prompts, params), strict=True):
        ranked = ", ".join(f"{one.text.strip()} ({one.score:.2f})" for one in (best, *best.alternatives))
        print(f"{prompt.splitlines()[-1]}-> {ranked}")
    sampled = jdsi.SamplingParams(temperature=0.7, n=3, seed=1, max_new_tokens=24, logits_processor=shorter)
    first = engine.generate("def f(x):\n    return ", sampled)[0]
    print(*(one.text.splitlines()[0] for one in (first, *first.alternatives)), sep="\n")


if __name__ == "__main__":
    main()
