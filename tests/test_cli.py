"""The command as a user types it: a few in processes of their own, the others in this one, which is much faster."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from checkpoints import save_llama, save_script, save_tokenizer
from jdsi.cli import main
from without_torch import WITHOUT_TORCH
from zoo import save_as

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-python-lm"

Command = Callable[..., subprocess.CompletedProcess[str]]


def process(*arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from jdsi.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False, env=env)


@pytest.fixture
def jdsi(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The entry point of the command, called in this process."""

    def run(*arguments: object, stdin: str = "", encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["jdsi", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            with pytest.raises(SystemExit) as ended:
                main()
        stdout, stderr = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), stdout, stderr)

    return run


def test_convert_then_generate_gives_the_same(jdsi: Command, folder: Path, tmp_path: Path) -> None:
    converted, back = tmp_path / "orbax", tmp_path / "hf"
    first = process("convert", folder, converted, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["bytes"] > 0
    assert jdsi("convert", converted, back, "--to", "hf").returncode == 0
    options = ("--prompt", "def f(", "--prompt-ids", "5,6,7", "--max-new-tokens", 8, "--json")
    answers = [jdsi("generate", path, *options) for path in (folder, converted, back)]
    assert all(a.returncode == 0 for a in answers), [a.stderr for a in answers]
    completions = [json.loads(a.stdout)["completions"] for a in answers]
    assert completions[0] == completions[1] == completions[2]
    assert jdsi("convert", folder, tmp_path / "streaming", "--to", "streaming").returncode == 0
    assert jdsi("inspect", tmp_path / "streaming", "--verify").returncode == 0
    streamed = jdsi("generate", tmp_path / "streaming", *options, "--offload", "nvme", "--memory-limit", "400.4MiB")
    assert streamed.returncode == 0, streamed.stderr
    answer = json.loads(streamed.stdout)
    assert answer["completions"] == completions[0]
    assert answer["stats"]["stream"]["blocks"] >= 2 * answer["stats"]["new_tokens"] / 2
    assert completions[0][0].keys() >= {"text", "token_ids", "finish_reason"}
    assert json.loads(answers[0].stdout)["stats"]["new_tokens"] == sum(len(c["token_ids"]) for c in completions[0])


def test_classify(jdsi: Command, tmp_path: Path, folder: Path) -> None:
    save_as(AutoModelForSequenceClassification, "bert", tmp_path, id2label={0: "bad", 1: "good"})
    texts = ("--text", "a film", "--text", "bad", "--pair", "good .", "--pair", "b", "--prompt-ids", "5,6,7")
    shown, answer = jdsi("classify", tmp_path, *texts), jdsi("classify", tmp_path, *texts, "--json")
    assert shown.returncode == answer.returncode == 0, shown.stderr + answer.stderr
    found = json.loads(answer.stdout)
    assert found["stats"]["prompt_tokens"] == 7 + 5 + 3
    assert [one["labels"] for one in found["classifications"]] == [["bad", "good"]] * 3
    lines = [line.split("\t") for line in shown.stdout.splitlines()]
    assert [label for label, _ in lines] == [one["label"] for one in found["classifications"]]
    assert [float(score) for _, score in lines] == pytest.approx([one["score"] for one in found["classifications"]])
    spread = jdsi("classify", tmp_path, *texts, "--tensor-parallel", 2, "--pipeline-parallel", 2)
    assert [line.split("\t")[0] for line in spread.stdout.splitlines()] == [label for label, _ in lines]
    assert "classifier:" in jdsi("inspect", tmp_path).stdout
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}b{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chats")
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "bad film"}]))
    chat = ("--chat-file", tmp_path / "chat.json", "--tokenizer", tmp_path / "chats")
    ids = ",".join(map(str, tokenizer("bad film", add_special_tokens=False)["input_ids"]))
    assert jdsi("classify", tmp_path, *chat).stdout == jdsi("classify", tmp_path, "--prompt-ids", ids).stdout != ""
    for arguments, message in (
        ((tmp_path, "--text", "a", "--pair", "b", "--pair", "c"), "2 --pair for 1 --text"),
        ((tmp_path,), "at least one --text, --chat-file or --prompt-ids"),
        ((folder, "--text", "a"), "this llama model is not a sequence classifier; use generate()"),
    ):
        failed = jdsi("classify", *arguments)
        assert failed.returncode in (1, 2)
        assert message in " ".join(failed.stderr.replace("│", " ").split())
        assert "Traceback" not in failed.stderr


def test_stream_prints_what_generate_prints(jdsi: Command, folder: Path) -> None:
    options = ("--prompt-file", "-", "--max-new-tokens", 12, "--temperature", 1, "--seed", 3)
    streamed = process("generate", folder, *options, "--stream", stdin="The quick")
    whole = jdsi("generate", folder, *options, "--json", stdin="The quick")
    assert streamed.stdout == json.loads(whole.stdout)["completions"][0]["text"] + "\n"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model that says "🙂é", `</s>`, "!×" and `</s>`, and the token to start it with."""
    path = tmp_path_factory.mktemp("script")
    save_tokenizer(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokens = [*tokenizer.encode("x🙂é"), tokenizer.eos_token_id, *tokenizer.encode("!×")]
    save_script(path, tokens)
    return path, tokens[0]


def test_stop_strings_may_have_special_tokens_in_them(jdsi: Command, script: tuple[Path, int]) -> None:
    model, start = script
    options = ("generate", model, "--prompt-ids", start, "--ignore-eos", "--max-new-tokens", 30, "--json")
    for stop, text in (("</s>", "🙂é"), ("é</s>!", "🙂"), ("×</s>", "🙂é!"), ("</s>é", None)):
        (answer,) = json.loads(jdsi(*options, "--stop", stop).stdout)["completions"]
        assert answer["finish_reason"] == ("length" if text is None else "stop")
        assert text is None or answer["text"] == text


def test_what_standard_output_cannot_show_is_escaped(jdsi: Command, script: tuple[Path, int], folder: Path) -> None:
    model, start = script
    options = ("generate", model, "--prompt-ids", start)
    for more, encoding, shown in (
        (("--stream",), "ascii", "\\U0001f642\\xe9"),
        ((), "ascii", "\\U0001f642\\xe9"),
        ((), "latin-1", "\\U0001f642é"),
        ((), "utf-8", "🙂é"),
    ):
        answer = jdsi(*options, *more, encoding=encoding)
        assert (answer.returncode, answer.stdout.rstrip("\n")) == (0, shown)
    inspected = jdsi("inspect", folder, "--parameters", encoding="ascii")
    assert (inspected.returncode, "300 \\xd7 48" in inspected.stdout) == (0, True)
    assert jdsi("--help", encoding="ascii").returncode == 0
    mistake = jdsi("generate", "nowhere-é/", "--prompt", "x", encoding="ascii")
    assert (mistake.returncode, "nowhere-\\xe9" in mistake.stderr) == (1, True)
    # A terminal without UTF-8, and a variable that says so; what it asks for besides is kept.
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environment, shown in ((plain, "\\U0001f642\\xe9\n"), ({"PYTHONIOENCODING": "ascii:replace"}, "??\n")):
        found = process(*options, "--stream", **environment)
        assert (found.returncode, found.stdout, found.stderr) == (0, shown, "")


def test_an_output_that_takes_nothing_ends_in_a_line(folder: Path) -> None:
    code = WITHOUT_TORCH + "from jdsi.cli import main; main()"
    for redirected, status, said in (
        (">/dev/full", 1, "jdsi: error: [Errno 28] No space left on device\n"),
        (">&-", 1, "jdsi: error: standard output is closed; redirect it to a file, or to /dev/null\n"),
        ("| true", 141, ""),
    ):
        command = f'set -o pipefail; "$@" {redirected}'
        run = ["bash", "-c", command, "bash", sys.executable, "-c", code, "inspect", folder]
        found = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
        assert (found.returncode, found.stderr) == (status, said), redirected


def test_weights_that_do_not_fit_are_told_in_a_line(jdsi: Command, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, 1:].copy()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    found = jdsi("generate", tmp_path / "model", "--prompt", "x")
    assert (found.returncode, found.stdout) == (1, "")
    (line,) = found.stderr.splitlines()
    assert line.startswith("jdsi: error: ")
    assert "does not fit the model its config describes" in line
    assert "model.norm.weight" in line
    assert "lm_head.weight" in line


def test_chats_from_files(jdsi: Command, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    options = ("generate", folder, "--max-new-tokens", 4, "--json")

    def answers(chat: object, *more: object) -> list[dict[str, object]]:
        file.write_text(json.dumps(chat))
        found = jdsi(*options, "--chat-file", file, *more)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)["completions"]

    messages = [{"role": "user", "content": "naïve"}]
    (expected,) = json.loads(jdsi(*options, "--chat", "--prompt", "naïve").stdout)["completions"]
    assert answers(messages) == answers({"messages": messages}) == [expected]
    assert answers(messages, "--chat", "--prompt", "naïve") == [expected, expected]
    file.write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
    found = jdsi(*options, "--chat-file", file, "--chat-file", "-", stdin=json.dumps(messages))
    assert json.loads(found.stdout)["completions"] == [expected, expected]
    template = "{{ tools[0].name }}{{ x }}{{ messages[0].content }}"
    more = {"tools": [{"name": "def "}], "variables": {"x": "f("}, "chat_template": template}
    (expected,) = json.loads(jdsi(*options, "--prompt", "def f(naïve").stdout)["completions"]
    assert answers({"messages": messages} | more) == [expected]
    for text, message in (
        ("[{", f"the chat file {file} cannot be read"),
        ("3", f"the chat file {file} must hold a list of messages"),
        ('{"mesages": []}', f"the chat file {file}: a chat has no 'mesages' (did you mean 'messages'?)"),
        ('{"tools": []}', f"the chat file {file}: a chat has no messages"),
        ('[{"content": "a"}]', "prompt has a message with keys ['content']"),
    ):
        file.write_text(text)
        found = jdsi(*options, "--chat-file", file)
        assert (found.returncode, found.stdout) == (1, "")
        assert message in found.stderr


def test_a_folder_that_says_two_things(jdsi: Command, folder: Path, tmp_path: Path) -> None:
    """Two sets of weights, a head that the config ties, tensors of no use, weights elsewhere: each a line, once."""
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(folder, model)
    save_llama(other, seed=1)
    ask = ("--prompt-ids", "5,6,7", "--max-new-tokens", 8, "--json")

    def tokens(*arguments: object) -> tuple[list[int], list[str]]:
        done = jdsi("generate", *arguments, *ask)
        assert done.returncode == 0, done.stderr
        warned = [line for line in done.stderr.splitlines() if line.startswith("jdsi: warning: ")]
        return json.loads(done.stdout)["completions"][0]["token_ids"], warned

    plain, warned = tokens(folder)
    assert warned == []
    elsewhere = tokens(other)[0]
    assert tokens(model, "--checkpoint", other) == (elsewhere, [])
    assert plain != elsewhere
    (other / "list.json").write_text(json.dumps({"type": "x", "checkpoints": ["model.safetensors"], "version": 1}))
    assert tokens(model, "--checkpoint", other / "list.json") == (elsewhere, [])

    tensors = load_file(model / "model.safetensors") | {"v_head.weight": np.ones((1, 48), np.float32)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "pytorch_model.bin").write_bytes(b"of yesterday")
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    for arguments in ((model,), (model, "--offload", "nvme"), (model, "--tensor-parallel", 2)):
        found, warned = tokens(*arguments)
        assert found == plain
        assert [line.split(": ", 3)[3].split(" ")[0] for line in warned] == ["holds", "the", "not"], warned
    refused = jdsi("generate", model, *ask, "--strict")
    assert refused.returncode == 1
    assert "1 not known to this family" in refused.stderr
    assert jdsi("convert", model, tmp_path / "hf", "--to", "hf", "--strict").returncode == 1
    assert jdsi("convert", model, tmp_path / "hf", "--to", "hf").returncode == 0
    assert tokens(tmp_path / "hf") == (plain, [])


def test_inspect(jdsi: Command, folder: Path) -> None:
    report = json.loads(jdsi("inspect", folder, "--json").stdout)
    assert report["family"] == "llama"
    assert report["weight_bytes"]["bfloat16"] == 2 * report["parameters"]
    assert sum(1 for name in report["shapes"] if name.startswith("layers.1.")) == 6
    shown = jdsi("inspect", folder, "--parameters")
    assert shown.returncode == 0
    assert "layers 0 to 1" in shown.stdout
    assert "layers.1.feed_forward.down.weight" in shown.stdout


def test_inspect_and_plan_without_the_weights(jdsi: Command, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clone")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "clone" / "model.safetensors").write_text(pointer)
    wanted = jdsi("inspect", folder, "--json").stdout
    for arguments in (("inspect", "--json"), ("plan", "--topology", "h200:1", "--no-compile", "--context", 64)):
        shown = jdsi(*arguments, tmp_path / "clone")
        assert shown.returncode == 0, shown.stderr
        (told,) = [line for line in shown.stderr.splitlines() if line.startswith("jdsi: warning: ")]
        assert "config.json alone says what the model is" in told
        assert "git lfs pull" in told
        if "--json" in arguments:
            assert shown.stdout == wanted


def test_what_the_folder_asks_for_and_the_command_says(jdsi: Command, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    asked = {"eos_token_id": 1, "do_sample": True, "top_p": 0.5, "max_new_tokens": 6, "top_h": 0.4}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(asked))
    (tmp_path / "sampling.json").write_text('{"top_p": 0.5, "top_k": 50, "max_new_tokens": 7, "seed": 3}')

    def answer(*options: object) -> tuple[str, str]:
        done = jdsi("generate", tmp_path / "model", "--prompt", "def ", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    by_folder, said = answer("--seed", 3)
    assert "jdsi: warning: " in said
    assert "asks for top_h, which cannot be honoured\n" in said
    file = f"@{tmp_path / 'sampling.json'}"
    asked_anew, said = answer(
        "--generation-config", "ignore", "--temperature", 1, "--max-new-tokens", 6, "--sampling", file
    )
    assert asked_anew == by_folder
    assert "warning" not in said
    greedy = answer("--temperature", 0)[0]
    assert greedy == answer("--generation-config", "ignore", "--sampling", '{"max_new_tokens": 6}')[0]
    assert greedy != by_folder
    report = json.loads(jdsi("inspect", tmp_path / "model", "--json").stdout)
    assert report["generation"] == {
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.5,
        "max_new_tokens": 6,
        "eos_token_ids": [1],
        "unsupported": ["top_h"],
    }
    assert "generation: temperature=1.0, top_k=50," in jdsi("inspect", tmp_path / "model").stdout


def test_several_results_and_what_must_not_be_in_them(jdsi: Command, folder: Path) -> None:
    options = ("generate", folder, "--prompt", "def f(", "--max-new-tokens", 9)
    sampled = (*options, "--temperature", 1, "--seed", 3, "--n", 3, "--bad-words", "x", "--suppress-tokens", "5,6")
    found = json.loads(jdsi(*sampled, "--json").stdout)["completions"][0]
    assert len(found["alternatives"]) == 2
    results = [found, *found["alternatives"]]
    assert not any({5, 6} & set(one["token_ids"]) for one in results)
    shown = jdsi(*sampled)
    assert shown.stdout == "".join(f"def f({one['text']}\n" for one in results)
    beams = json.loads(jdsi(*options, "--num-beams", 3, "--n", 2, "--length-penalty", 0.5, "--json").stdout)
    first = beams["completions"][0]
    assert first["score"] > first["alternatives"][0]["score"]
    guided = jdsi(*options, "--guidance-scale", 2, "--negative-prompt", "def g(", "--stop-token-ids", "7")
    assert guided.returncode == 0, guided.stderr
    assert guided.stdout != jdsi(*options).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "FOLDER", "--prompt", "x", "--stream", "--n", "2", "--temperature", "1"), "--n"),
        (("generate", "FOLDER", "--prompt", "x", "--suppress-tokens", "1;2"), "--suppress-tokens '1;2' must be"),
        (("generate", "FOLDER", "--prompt", "x", "--n", "2"), "greedy search has one result"),
        (("generate", "FOLDER", "--prompt", "x", "--sampling", "{"), "cannot be read"),
        (("generate", "FOLDER", "--prompt", "x", "--sampling", "[1]"), "must be an object"),
        (("generate", "FOLDER", "--prompt", "x", "--sampling", '{"stop_strings": "x"}'), "did you mean 'stop'"),
        (("generate", "FOLDER"), "at least one --prompt"),
        (("generate", "FOLDER", "--prompt-ids", "5,x"), "numbers with commas"),
        (("generate", "FOLDER", "--prompt-file", "/nowhere/file"), "cannot be read"),
        (("generate", "FOLDER", "--prompt", "x", "--top-p", "0.5"), "temperature"),
        (("generate", "FOLDER", "--prompt", "x", "--max-new-tokens", "1000"), "more than the 256"),
        (("generate", "FOLDER", "--prompt", "x", "--prompt", "y", "--stream"), "one prompt"),
        (("generate", "nowhere-at-all/", "--prompt", "x"), "nowhere-at-all"),
        (("inspect", "nowhere-at-all/"), "nowhere-at-all"),
        (("convert", "FOLDER", "FOLDER"), "FOLDER"),
        (("convert", "FOLDER", "/proc/x"), "/proc"),
        (("generate", "FOLDER", "--promt", "x"), "--prompt"),
    ],
)
def test_mistakes_get_a_line_and_no_traceback(
    jdsi: Command, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = jdsi(*(str(folder) if a == "FOLDER" else a for a in arguments))
    assert result.returncode in (1, 2)
    assert message.replace("FOLDER", folder.name) in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_mistake_ends_a_process_with_a_line_alone() -> None:
    result = process("generate", "nowhere-at-all/", "--prompt", "x")
    assert result.returncode == 1
    assert result.stderr.startswith("jdsi: error: nowhere-at-all")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_generate_on_a_mesh_and_a_named_error_without_devices(jdsi: Command) -> None:
    arguments = ("generate", str(TINY), "--prompt", "def ", "--max-new-tokens", "5")
    one = jdsi(*arguments)
    spread = jdsi(*arguments, "--tensor-parallel", "2", "--pipeline-parallel", "2")
    assert spread.returncode == 0, spread.stderr
    assert spread.stdout == one.stdout
    chosen = jdsi(*arguments, "--parallelism", "latency")
    assert chosen.stdout == one.stdout
    assert "Chosen:" in chosen.stderr
    failed = jdsi(*arguments, "--tensor-parallel", "64")
    assert failed.returncode == 1
    assert "tensor 64 takes 64 devices" in failed.stderr


def test_plan_compiles_for_devices_from_a_config_alone(jdsi: Command, tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path / "config.json")
    options = ("--context", 256, "--batch", 4, "--dtype", "float32")
    degrees = ("--tensor-parallel", 2, "--pipeline-parallel", 2)
    done = process("plan", tmp_path, "--topology", "cpu:4", *options, *degrees, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["parallelism"] == {"tensor": 2, "pipeline": 2, "data": 1}
    assert plan["fits"]
    first, last = plan["stages"]
    reduced = [c for c in first["decode"]["collectives"] if c["kind"] == "all-reduce" and c["axis"] == "tensor"]
    # Two layers with two each, and the embedding.
    assert sum(c["count"] for c in reduced) == 5
    assert {c["bytes"] for c in reduced} == {2 * plan_width(tmp_path) * 4}
    assert last["decode"]["arguments"] >= last["memory"]["weights"] + last["memory"]["kv"] // 2
    text = jdsi("plan", tmp_path / "config.json", "--topology", "h200:4", *options, "--no-compile")
    assert text.returncode == 0, text.stderr
    assert "Chosen:" in text.stdout
    assert "fits:" in text.stdout
    wrong = jdsi("plan", tmp_path, "--topology", "h300:8")
    assert wrong.returncode == 1
    assert "did you mean" in wrong.stderr


def plan_width(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["hidden_size"]
