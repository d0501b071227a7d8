"""Comparison of a random-weight transformers model with ours, shared by the family tests."""

import re
import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from compilation import few_optimizations
from jdsi.kv_cache import ContiguousContext, PackedContext
from jdsi.models import Transformer, abstract_parameters
from jdsi.models.families import family_for
from jdsi.models.weight_map import WeightMap

RTOL, ATOL = 5e-4, 5e-5


def random_torch_model(
    config: transformers.PretrainedConfig, auto_class: Any, seed: int = 0, *, attention: str = "eager"
) -> torch.nn.Module:
    """A model with every parameter random, biases and norms included, so that a forgotten one shows.

    Its class is `auto_class`, or what that makes of the config.
    """
    torch.manual_seed(seed)
    create = getattr(auto_class, "from_config", None) or auto_class._from_config
    model = create(config, attn_implementation=attention).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model


def import_weights(state: dict[str, np.ndarray], table: WeightMap) -> dict[str, jax.Array]:
    """Runs the table forwards in memory."""
    return {
        e.ours: jnp.asarray(np.concatenate([s.op.forward(state[s.name]) for s in e.sources])) for e in table.entries
    }


def stored_tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors `save_pretrained` writes; names on disk may differ from those of the modules."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def check_names(config: transformers.PretrainedConfig, stored: Iterable[str], *, bare: bool = False) -> None:
    """Every name in `stored` is a weight of the family's table or ignored by it, and no weight is ignored.

    Args:
        config: of the model.
        stored: names as found in a published checkpoint, weights and others.
        bare: whether that checkpoint leaves the table's prefix out.
    """
    family = family_for(config.model_type)
    table = family.weight_map(family.spec(config))
    prefix = table.prefix if bare else ""
    weights = {s.name.removeprefix(prefix) for e in table.entries for s in e.sources}
    stored = [table.current_name(name) for name in stored]
    weights_or_tied = weights | {name.removeprefix(prefix) for pair in table.tied for name in pair}
    unknown = [n for n in stored if n not in weights_or_tied and not any(re.fullmatch(p, n) for p in table.ignored)]
    assert not unknown
    assert not [n for n in weights if any(re.fullmatch(p, n) for p in table.ignored)]


def ours(model: torch.nn.Module) -> Transformer:
    """Our model with the weights of a transformers one; checks that the table is complete and invertible."""
    family = family_for(model.config.model_type)
    spec = family.spec(model.config)
    table = family.weight_map(spec)
    state = stored_tensors(model)
    if not any(name.startswith(table.prefix) for name in state):  # a bare backbone
        state = {table.prefix + name: value for name, value in state.items()}
    check_names(model.config, state)
    parameters = import_weights(state, table)
    shapes = {name: struct.shape for name, struct in abstract_parameters(spec).items()}
    assert shapes.keys() == parameters.keys()
    for entry in table.entries:
        for source, (start, stop), shape in zip(
            entry.sources, entry.row_ranges(shapes[entry.ours]), entry.source_shapes(shapes[entry.ours]), strict=True
        ):
            back = source.op.inverse(np.asarray(parameters[entry.ours])[start:stop])
            assert back.shape == shape
            np.testing.assert_array_equal(back, state[source.name])
    return Transformer.from_parameters(spec, parameters)


def greedy(model: Transformer, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuation of right-padded prompts through the contiguous KV cache, without an engine."""
    batch, length = len(prompts), max(map(len, prompts))
    tokens = np.zeros((batch, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
    context = ContiguousContext.create(model.spec.kv_shapes, batch, length + new_tokens)

    @jax.jit  # the weights become constants, fine at this size
    def step(tokens: jax.Array, lengths: jax.Array, context: ContiguousContext) -> tuple[jax.Array, ContiguousContext]:
        width = tokens.shape[0] // batch
        hidden, context = model.forward(tokens, context.begin(lengths, width))
        last = hidden.reshape(batch, width, -1)[jnp.arange(batch), lengths - 1]
        return jnp.argmax(model.logits(last), axis=-1).astype(jnp.int32), context

    token, context = step(jnp.asarray(tokens).reshape(-1), lengths, context)
    out = [token]
    for _ in range(new_tokens - 1):
        token, context = step(token, jnp.ones(batch, jnp.int32), context)
        out.append(token)
    return np.stack(out, axis=1).tolist()


def check_causal(
    config: transformers.PretrainedConfig,
    *,
    lengths: tuple[int, ...] = (3, 13, 8),
    seed: int = 0,
    attention: str = "eager",
) -> None:
    """Logits and greedy tokens of a batch of unequal lengths agree with transformers run one row at a time."""
    torch_model = random_torch_model(config, transformers.AutoModelForCausalLM, seed, attention=attention)
    model = ours(torch_model)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, config.vocab_size, n).tolist() for n in lengths]
    tokens = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    new_tokens = 6
    with few_optimizations():
        logits = jax.jit(lambda t, n: model(t, n))(jnp.asarray(tokens), jnp.asarray(lengths))
        generated = greedy(model, prompts, new_tokens)
    for row, prompt in enumerate(prompts):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = torch_model(torch.tensor([prompt])).logits[0].numpy()
            tail = torch_model.generate(
                torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
        np.testing.assert_allclose(logits[row, : len(prompt)], expected, rtol=RTOL, atol=ATOL)
        assert generated[row] == tail


def check_encoder(
    config: transformers.PretrainedConfig,
    auto_class: type,
    *,
    lengths: tuple[int, ...] = (3, 13, 8),
    seed: int = 0,
) -> None:
    """What an encoder gives for a batch of unequal lengths agrees with transformers run one row at a time.

    Logits or hidden states of every token, label scores or the pooler's vector of every row, whichever the class has.
    Padding holds random ids that must not matter, and the same sequences, end to end on one axis, must give the same.
    """
    torch_model = random_torch_model(config, auto_class, seed)
    torch_model.config.architectures = [type(torch_model).__name__]
    model = ours(torch_model)
    rng = np.random.default_rng(seed)
    shape = len(lengths), max(lengths)
    tokens = rng.integers(3, config.vocab_size, shape)
    types = rng.integers(0, model.spec.embedding.token_types or 1, shape)
    real = np.arange(shape[1]) < np.asarray(lengths)[:, None]

    @jax.jit
    def dense(tokens: jax.Array, types: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        by_row = None
        if model.spec.classifier is not None:
            run = model.pool if model.spec.classifier.labels is None else model.classify
            by_row = run(tokens, jnp.asarray(lengths), types)
        return model(tokens, jnp.asarray(lengths), types), by_row

    @jax.jit
    def packed(tokens: jax.Array, types: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        context = PackedContext.from_lengths(jnp.asarray(lengths), tokens.size)
        hidden, _ = model.forward(tokens, context, types)
        by_row = None if model.classifier is None else model.classifier(hidden[np.cumsum([0, *lengths[:-1]])])
        return hidden if model.head is None else model.logits(hidden), by_row

    with few_optimizations():
        by_token, by_row = dense(tokens, types)
        garbage, row_garbage = dense(np.where(real, tokens, rng.permuted(tokens)), np.where(real, types, 0))
        flat, row_flat = packed(np.append(tokens[real], [5, 7]), np.append(types[real], [0, 0]))
    np.testing.assert_array_equal(np.asarray(by_token)[real], np.asarray(garbage)[real])
    np.testing.assert_allclose(flat[:-2], np.asarray(by_token)[real], rtol=RTOL, atol=ATOL)
    if by_row is not None:
        np.testing.assert_array_equal(by_row, row_garbage)
        np.testing.assert_allclose(row_flat, by_row, rtol=RTOL, atol=ATOL)
    for row, length in enumerate(lengths):
        arguments = {"input_ids": torch.tensor(tokens[row : row + 1, :length])}
        if model.spec.embedding.token_types:
            arguments["token_type_ids"] = torch.tensor(types[row : row + 1, :length])
        with torch.no_grad():
            result = torch_model(**arguments, output_hidden_states=True)
        found = {"pooler_output": by_row, "seq_relationship_logits": by_row, "logits": by_row}
        if model.head is not None:
            found |= {"logits": by_token, "prediction_logits": by_token}
        else:
            np.testing.assert_allclose(by_token[row, :length], result.hidden_states[-1][0], rtol=RTOL, atol=ATOL)
        for key in found.keys() & result.keys():
            own = found[key]
            assert own is not None, key
            own = own[row, :length] if own is by_token else own[row]
            np.testing.assert_allclose(own, result[key][0].numpy(), rtol=RTOL, atol=ATOL, err_msg=key)


def check_decoder_classifier(config: transformers.PretrainedConfig, *, seed: int = 0) -> None:
    """Label scores of a decoder for a batch of unequal lengths agree with transformers run one row at a time.

    One row ends in tokens that are padding by their id, which are not its last ones.
    """
    torch_model = random_torch_model(config, transformers.AutoModelForSequenceClassification, seed)
    torch_model.config.architectures = [type(torch_model).__name__]
    model = ours(torch_model)
    rng = np.random.default_rng(seed)
    lengths = (3, 13, 8, 5)
    tokens = rng.integers(3, config.vocab_size, (len(lengths), max(lengths)))
    if config.pad_token_id is not None:
        tokens[2, 6:8] = config.pad_token_id
        tokens[3, :] = config.pad_token_id
    with few_optimizations():
        scores = jax.jit(model.classify)(tokens, jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = torch_model(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
        np.testing.assert_allclose(scores[row], expected, rtol=RTOL, atol=ATOL)
