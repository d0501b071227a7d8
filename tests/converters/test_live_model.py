"""Models in PyTorch's memory: read without a file, tied modules once, anything else refused by what it is."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers

import jdsi
import zoo
from checkpoints import save_llama
from jdsi.converters import load_model, open_model
from jdsi.errors import ConfigError
from jdsi.models import Transformer, parameters
from parity import random_torch_model


def same(a: Transformer, b: Transformer) -> bool:
    ours, theirs = parameters(a), parameters(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_every_family_is_as_from_its_folder(name: str, tmp_path: Path) -> None:
    for tied in (False, True):
        config = transformers.AutoConfig.for_model(name, **zoo.CONFIGS[name], tie_word_embeddings=tied)
        model = random_torch_model(config, zoo.auto_class(name))
        model.save_pretrained(tmp_path)
        before = copy.deepcopy(model.config)
        assert same(load_model(model), load_model(tmp_path))
        assert model.config == before
        assert open_model(model).spec == open_model(tmp_path).spec
        again = zoo.auto_class(name).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert same(load_model(again, dtype="bfloat16"), load_model(tmp_path, dtype="bfloat16"))
    bare = random_torch_model(config, transformers.AutoModel)
    bare.save_pretrained(tmp_path)
    assert same(load_model(bare), load_model(tmp_path))


def test_the_engine_of_a_live_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_llama(folder)
    prompt, greedy = "def f(", jdsi.SamplingParams(max_new_tokens=6)
    wanted = jdsi.init_inference(folder).generate(prompt, greedy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.name_or_path == str(folder)
    engines = [
        jdsi.init_inference(model, tokenizer=tokenizer),
        jdsi.init_inference(loaded),  # the tokenizer by its name
        jdsi.init_inference(loaded, mp_size=2, dtype=torch.float32),
    ]
    for engine in engines:
        assert engine.generate(prompt, greedy) == wanted
    alone = jdsi.init_inference(model)
    assert alone.tokenizer is None
    with pytest.raises(ConfigError, match="give like="):
        alone.save(tmp_path / "saved")
    alone.save(tmp_path / "saved", like=folder)
    assert same(load_model(tmp_path / "saved"), load_model(folder))
    with pytest.raises(ConfigError, match="in memory already"):
        jdsi.init_inference(model, offload="nvme")
    # What changes the model afterwards does not change ours.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert engines[0].generate(prompt, greedy) == wanted


def test_what_a_live_model_asks_of_generation(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    model.generation_config.suppress_tokens = [5, 6]
    model.generation_config.eos_token_id = [0, 7]
    engine = jdsi.init_inference(model)
    assert engine.eos_token_ids == (0, 7)
    assert engine.generation_defaults.values == {"suppress_tokens": (5, 6)}
    prompt = [5, 6, 9]
    found = engine.generate(prompt, jdsi.SamplingParams(max_new_tokens=12))[0].token_ids
    right = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert found == right
    ignored = jdsi.init_inference(model, generation_config="ignore")
    assert (ignored.eos_token_ids, ignored.generation_defaults.values) == ((0, 7), {})


def test_the_end_of_sequence_is_that_of_the_folder(tmp_path: Path) -> None:
    save_llama(tmp_path, eos_token_id=17)
    (tmp_path / "generation_config.json").write_text("{}")
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for source, config in ((tmp_path, "config.json"), (live, "the config of LlamaForCausalLM")):
        with pytest.warns(jdsi.JdsiWarning, match=f"names no eos_token_id: that of {config} ends"):
            assert jdsi.init_inference(source).eos_token_ids == (17,)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for source in (tmp_path, live):
        with pytest.warns(jdsi.JdsiWarning, match="the model names no eos_token_id: that of its tokenizer, 0, ends"):
            assert jdsi.init_inference(source).eos_token_ids == (0,)
        assert jdsi.init_inference(source, eos_token_ids=()).eos_token_ids == ()


def test_a_name_without_a_tokenizer(tmp_path: Path) -> None:
    zoo.save("gpt2", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert jdsi.init_inference(model).tokenizer is None
    model.config._name_or_path = model.name_or_path = "/nowhere/at/all"
    with pytest.warns(jdsi.JdsiWarning, match=r"no tokenizer for GPT2LMHeadModel '/nowhere/at/all': .*no such folder"):
        assert jdsi.init_inference(model).tokenizer is None


def test_weights_beside_an_empty_model(tmp_path: Path) -> None:
    """As large models are given to DeepSpeed: the module on the meta device, its weights as a list of files."""
    wanted = zoo.save("bloom", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"tensors are on the meta device .* name the weights with checkpoint="):
        jdsi.init_inference(empty)
    description = {"type": "BLOOM", "checkpoints": ["model.safetensors"], "version": 1.0, "base_dir": str(tmp_path)}
    (tmp_path / "list.json").write_text(json.dumps(description))
    for checkpoint in (description, str(tmp_path / "list.json"), str(tmp_path)):
        engine = jdsi.init_inference(empty, checkpoint=checkpoint, dtype="float32")
        logits = np.asarray(engine.forward([[5, 6, 7]])[0])
        with torch.no_grad():
            expected = wanted(torch.tensor([[5, 6, 7]])).logits[0].numpy()
        np.testing.assert_allclose(logits, expected, rtol=5e-4, atol=5e-5)
    streamed = jdsi.init_inference(empty, checkpoint=str(tmp_path), dtype="float32", offload="nvme")
    np.testing.assert_allclose(np.asarray(streamed.forward([[5, 6, 7]])[0]), expected, rtol=5e-4, atol=5e-5)
    streamed.close()


class OwnLlama(transformers.LlamaForCausalLM):
    """Could compute anything."""


def test_what_is_no_model_of_a_family_is_refused_by_what_it_is() -> None:
    llama = transformers.AutoConfig.for_model("llama", **zoo.CONFIGS["llama"])
    model = transformers.AutoModelForCausalLM.from_config(llama)
    wrapped = torch.nn.DataParallel(model)
    adapted = copy.copy(model)
    adapted._hf_peft_config_loaded = True
    own = OwnLlama(llama)
    vision = transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    refused: dict[str, Any] = {
        "the Linear in memory is a PyTorch module of torch.nn.modules.linear; give": torch.nn.Linear(2, 2),
        "the DataParallel in memory wraps a LlamaForCausalLM; give that, its .module": wrapped,
        r"the LlamaForCausalLM in memory has adapters \(PEFT\); merge_and_unload": adapted,
        "the OwnLlama in memory is a class of .*test_live_model, not of transformers itself": own,
        "the ViTModel in memory: unknown family 'vit'": vision,
        "the model is a dict; give a folder, a hub id, a transformers model or a jdsi Transformer": {},
    }
    for message, thing in refused.items():
        with pytest.raises(ConfigError, match=message):
            jdsi.init_inference(thing)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(jdsi.CheckpointError, match="quantised with 'bitsandbytes'"):
        jdsi.init_inference(model)


def test_what_is_not_in_the_state_dict(tmp_path: Path) -> None:
    """Rotary frequencies are those of the config that the module was made of, and a forward may be the instance's."""
    made = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 16}
    for name, rope in (("llama", made), ("gpt_neox", None), ("falcon", None)):
        changes = {} if rope is None else {"rope_parameters": rope}
        model = zoo.save(name, tmp_path, **changes)
        load_model(model)
        load_model(copy.deepcopy(model).bfloat16(), dtype="bfloat16")
        theta = dict(model.config.rope_parameters)
        model.config.rope_parameters = theta | {"rope_theta": 50.0}
        with pytest.raises(ConfigError, match=r"rotary frequencies of its .*rotary_emb are not those of its config"):
            load_model(model)
        model.config.rope_parameters = theta
        load_model(model)
    inner = model.get_submodule("transformer.h.0.mlp")
    for module, said in ((model, "it has"), (inner, r"its transformer\.h\.0\.mlp has")):
        module.forward = lambda *_: None
        with pytest.raises(ConfigError, match=f"{said} a forward of its own"):
            load_model(model)
        del module.forward


def test_memory_is_one_copy_of_the_model() -> None:
    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    load_model(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**zoo.CONFIGS["llama"])))
    process = psutil.Process()
    before = process.memory_info().rss
    ours = load_model(model)
    grown = process.memory_info().rss - before
    size = sum(array.nbytes for array in parameters(ours).values())
    assert size > 100e6
    assert grown < 1.1 * size + 30e6
