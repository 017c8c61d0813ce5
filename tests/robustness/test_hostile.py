"""Inputs that somebody made to do harm, or that went wrong in an unlikely way: each is refused in one line, in bounded memory
and time, and none is read as something else."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import BertNormalizer

import predict
import report
import train
from common.errors import UserError, run_cli
from data import batching, long_texts, tokenize
from lora.files import read_bytes, read_json
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, pretrained, save_pretrained
from reporting.results import read_metrics
from training.loading import MOST_CLASSES

ROOT = Path(__file__).parents[2]
ROWS = [
    {"text": f"the film is {word}", "label": label, "label_text": name}
    for word, label, name in [("bad", 0, "no"), ("good", 1, "yes")]
]


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.hub.hub_is_reachable", lambda: False)
        yield


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer) -> Path:
    """A tiny base model, data, and a run on them that has ended: base/, data/, run/. To copy, not to change."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    save_pretrained(DistilBertForSequenceClassification(config), tokenizer, folder / "base")
    change_weights(folder / "base", lambda weights: [weights.pop(key) for key in pretrained.HEAD])
    write_data(folder / "data", ROWS * 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*COMMAND, "--output-dir", "run"]) == 0
    return folder


COMMAND = ["--model", "base", "--dataset", "data", "--epochs", "1", "--batch-size", "4", "--quiet"]


@pytest.fixture
def here(source, tmp_path, monkeypatch) -> Path:
    """The current folder: a copy of it."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_data(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_weights(folder: Path, change, name: str = "model.safetensors") -> None:
    weights = safetensors.torch.load_file(folder / name)
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    change(weights)
    safetensors.torch.save_file(weights, folder / name)


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(capsys, main, *arguments: object) -> str:
    """The one line that the program prints when it ends with status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ".py: " in line]
    assert len(lines) == 1
    return lines[0]


# Nothing is read as something else


def other_weights(weights) -> None:
    for tensor in weights.values():
        tensor.mul_(1.5)


def test_another_base_of_the_same_shapes_is_refused(capsys, here):
    change_weights(here / "base", other_weights)
    said = "base is not what run was trained on: the sha256 of its weights differs"
    assert said in refusal(capsys, predict.main, "run", "a text")
    assert report.main(["run"]) == 0
    page = (here / "run" / "report.html").read_text()
    assert "left out, because the weights of the base model base have changed" in page
    assert "Singular values" not in page


def test_a_base_with_another_number_of_heads_is_refused(capsys, here):
    """Its weights, and so their sha256, are the same."""
    config = json.loads((here / "base" / "config.json").read_text())
    (here / "base" / "config.json").write_text(json.dumps(config | {"transformers_version": "6"}))
    assert predict.main(["run", "a text"]) == 0
    capsys.readouterr()
    (here / "base" / "config.json").write_text(json.dumps(config | {"n_heads": 2 * config["n_heads"]}))
    said = "base is not what run was trained on: the sha256 of its config differs"
    assert said in refusal(capsys, predict.main, "run", "a text")
    assert predict.main(["run", "a text", "--model", "base"]) == 0
    assert said in capsys.readouterr().err


def test_names_of_classes_that_are_exchanged_are_another_data_set(capsys, here):
    assert stopped(capsys, "stopped") == 0
    write_data(here / "data", [row | {"label_text": {"no": "yes", "yes": "no"}[row["label_text"]]} for row in ROWS * 8])
    assert "the data has changed since the run" in refusal(capsys, train.main, "--resume", "stopped")


def stopped(capsys, folder: str) -> int:
    """A run with a checkpoint after its second step, as if it had been killed then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.checkpoint.KEEP", 100)
        patch.setattr("shutil.rmtree", lambda *arguments, **keywords: None)
        patch.setattr("training.artifacts.save_run", lambda *arguments: None)
        patch.setattr("train.save_run", lambda *arguments: None)
        ended = train.main([*COMMAND, "--output-dir", folder, "--checkpoint-every", "1"])
    for path in sorted(Path(folder, "checkpoints").iterdir())[3:]:
        path.unlink()
    capsys.readouterr()
    return ended


def test_a_base_that_is_rewritten_during_training_changes_nothing_and_is_named(capsys, here, monkeypatch):
    """The weights in memory are a copy, not a map of the file."""
    path = here / "base" / "model.safetensors"
    model, _ = load_pretrained("base", 2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    original = train.train
    monkeypatch.setattr(
        train, "train", lambda *arguments: [change_weights(here / "base", other_weights), original(*arguments)][1]
    )
    message = refusal(capsys, train.main, *COMMAND, "--output-dir", "new")
    assert "the weights of the base model base have changed since the run began" in message
    assert list(here.glob("new/checkpoints/*"))  # so it can be resumed with the old file


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("distilbert.embeddings.LayerNorm.weight", "distilbert.embeddings.LayerNorm.gamma"),
        ("distilbert.embeddings.LayerNorm.weight", "embeddings.LayerNorm.weight"),
        ("distilbert.transformer.layer.0.attention.q_lin.bias", "bert.encoder.layer.0.attention.self.query.bias"),
    ],
)
def test_a_tensor_under_two_names_is_refused(here, key, other):
    change_weights(here / "base", lambda weights: weights.update({other: weights[key] + 1}))
    with pytest.raises(UserError) as caught:
        load_pretrained("base", 2)
    assert key in str(caught.value)
    assert other in str(caught.value)
    assert "one tensor here" in str(caught.value)


def test_a_size_under_two_names_is_refused(here):
    change_json(here / "base" / "config.json", lambda config: config.update(model_type="bert", num_attention_heads=4))
    with pytest.raises(UserError, match="num_attention_heads is 4, but n_heads, which means the same, is 2"):
        load_pretrained("base", 2)


CLS, SEP, TEXT = (
    {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
    {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
)


@pytest.mark.parametrize("order", [[TEXT, CLS, SEP], [CLS, SEP, TEXT], [SEP, TEXT, CLS], [CLS, TEXT], [CLS, TEXT, SEP, SEP]])
def test_a_tokenizer_with_cls_and_sep_at_other_places_is_refused(here, order):
    change_json(here / "base" / "tokenizer.json", lambda it: it["post_processor"].update(single=order))
    with pytest.raises(UserError, match=r"does not put a text between \[CLS\] and \[SEP\]"):
        load_pretrained("base", 2)


def test_threads_may_share_a_tokenizer(tokenizer):
    texts = [["a " * length, "b"] * 20 for length in (1, 3, 50, 300)]
    alone = {length: [tokenize(tokenizer, part, length).ids.tolist() for part in texts] for length in (8, 64)}
    failures: list[object] = []

    def work(length: int) -> None:
        for _ in range(5):
            try:
                if [tokenize(tokenizer, part, length).ids.tolist() for part in texts] != alone[length]:
                    failures.append("other tokens")
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(length,)) for length in (8, 64) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert tokenizer.truncation is None


def test_a_users_own_truncation_is_not_changed(tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(20)
    tokenize(tokenizer, ["a text"], 8)
    assert tokenizer.truncation["max_length"] == 20


# Long texts

NASTY = [
    *"ab  .-[]#",
    "[MASK]",
    "[SEP]",
    "[UN",
    "##a",
    "un",
    "ing",
    "e\u0301",
    "\u0301",
    "\u0308",
    "\x00",
    "\u200b",
    "\ufffd",
    "日",
    "각",
    "İ",
    "ß",
]
NASTY += [
    "≮",
    "😀",
    "\u302e",
    "\u3000",
    "\t",
    "\n",
    "x" * 60,
    "y" * 120,
    "\u0301" * 50,
    " " * 70,
    "\x01" * 40,
    "ΑΣ",
    "\U0001d15e",
    "\U0001d165",
]


@pytest.mark.parametrize(
    "options", [{}, {"lowercase": False}, {"strip_accents": False}, {"handle_chinese_chars": False}, {"clean_text": False}]
)
def test_a_text_that_is_cut_has_the_same_tokens(tokenizer_file, monkeypatch, options):
    """Cut words, accents after the cut, [MASK] cut in two, words of over 100 characters, characters that are dropped."""
    content = json.loads(tokenizer_file.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: id for token, id in vocabulary.items() if id < 3000}  # quicker
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.normalizer = BertNormalizer(**options)
    tokenizer.add_tokens([AddedToken("#e\u00e9t#", normalized=True)])
    monkeypatch.setattr(long_texts, "FEWEST", 32)
    monkeypatch.setattr(long_texts, "CHARACTERS", 2)
    rng = random.Random(0)
    squeezed: list[str] = []
    squeeze = long_texts.squeeze
    monkeypatch.setattr(long_texts, "squeeze", lambda *given: squeezed.append(squeeze(*given)) or squeezed[-1])
    for window, long in [(64, 19), (200, 25), (1000, 64)] * 12:
        monkeypatch.setattr(long_texts, "WINDOW", window)
        monkeypatch.setattr(long_texts, "LONG", long)
        alphabet = rng.sample(NASTY, 4)
        text = "".join(rng.choices(alphabet, k=rng.randrange(1000)))
        tokens = rng.randrange(1, 30)
        whole = tokenizer.encode(text).ids
        expected = whole if len(whole) <= tokens + 2 else [*whole[: tokens + 1], whole[-1]]
        assert tokenize(tokenizer, [text], tokens + 2).ids.tolist() == expected, (text, tokens)
    assert squeezed


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", None),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("[two words]")]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("word")]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("[x]", single_word=True)]),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("[x]", lstrip=True)]),
    ],
)
def test_a_text_is_not_cut_where_the_effect_is_not_known(tokenizer_file, change):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    change(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert long_texts.words_at_risk(tokenizer) is None
    assert len(next(long_texts.encode(tokenizer, ["a b " * 10_000], 10))) == (20_002 if tokenizer.pre_tokenizer else 3)


@pytest.mark.parametrize(
    "text", ["word " * 200_000, "x" * 200_000, " " * 200_000, "e\u0301\u0301\u0301" * 50_000, "\x01" * 200_000]
)
def test_the_tokenizer_never_sees_many_characters_at_once(tokenizer, monkeypatch, text):
    seen = []

    class Spy:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, **keywords):
            seen.append(len(text))
            return tokenizer.encode(text, **keywords)

        def encode_batch_fast(self, texts):
            seen.append(sum(map(len, texts)))
            return tokenizer.encode_batch_fast(texts)

        def encode_batch(self, texts):
            seen.append(sum(map(len, texts)))
            return tokenizer.encode_batch(texts)

    spy = Spy()
    monkeypatch.setattr(long_texts, "WINDOW", 1 << 14)
    monkeypatch.setattr(long_texts, "words_at_risk", lambda _: original(tokenizer))
    ids = tokenize(spy, [text], 256).ids
    assert max(seen) < 1 << 15
    assert ids[0] == tokenizer.token_to_id("[CLS]")
    assert ids[-1] == tokenizer.token_to_id("[SEP]")
    assert len(ids) == {"w": 256, " ": 2, "\x01": 2}.get(text[0], 3)


original = long_texts.words_at_risk


def test_slices_are_bounded_by_characters():
    parts = list(batching.slices(["x" * 10] * 7 + ["y" * 100, "z"], 4, 25))
    assert [len(part) for part in parts] == [3, 3, 2, 1]
    assert [text for part in parts for text in part] == ["x" * 10] * 7 + ["y" * 100, "z"]
    assert [len(part) for part in batching.slices(["x"] * 9, 4, 25)] == [4, 4, 1]


# Sizes


@pytest.mark.parametrize(
    "changes", [{"n_layers": 1_000_000}, {"dim": 1_000_000}, {"hidden_dim": 1_000_000}, {"vocab_size": 1_000_000}]
)
def test_a_size_that_the_weights_do_not_have_is_refused_before_anything_is_built(here, monkeypatch, changes):
    built: list[DistilBertConfig] = []
    real = pretrained.DistilBertForSequenceClassification
    monkeypatch.setattr(
        pretrained, "DistilBertForSequenceClassification", lambda config: [built.append(config), real(config)][1]
    )
    change_json(here / "base" / "config.json", lambda config: config.update(changes))
    start = time.monotonic()
    with pytest.raises(UserError, match="belong"):
        load_pretrained("base", 2)
    assert all(config.dim < 32 for config in built)  # only the one that gives the shapes
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("shape", [(2**40, 0), (2**19, 1), (2**19, 0)])
def test_a_head_without_numbers_makes_no_names(capsys, here, shape):
    key = "base_model.model.classifier"
    change_weights(
        here / "run" / "adapter",
        lambda tensors: tensors.update({f"{key}.weight": torch.zeros(shape), f"{key}.bias": torch.zeros(1)}),
        "adapter_model.safetensors",
    )
    (here / "run" / "adapter" / "label_names.json").unlink()
    message = refusal(capsys, predict.main, "run", "a text")
    assert "has no classifier head" in message or "524,288 classes are needed" in message


def test_a_whole_model_with_a_head_of_2_to_the_40_rows_is_refused(capsys, here):
    model = DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64))
    save_pretrained(model, Tokenizer.from_file("base/tokenizer.json"), "whole")
    change_weights(here / "whole", lambda weights: weights.update({"classifier.weight": torch.zeros(2**40, 0)}))
    assert "1099511627776 are needed" in refusal(capsys, predict.main, "whole", "a text")


def test_thousands_of_classes_are_refused_with_the_likely_reason(capsys, here):
    write_data(here / "data", [{"text": "a text", "label": number} for number in [*range(MOST_CLASSES + 1)] * 2])
    message = refusal(capsys, train.main, *COMMAND, "--output-dir", "new")
    assert "data has 1,001 classes" in message
    assert "is another column the label?" in message
    assert not Path("new").exists()


# Files that are no files


@pytest.mark.parametrize(
    "name",
    [
        "base/config.json",
        "base/tokenizer.json",
        "base/model.safetensors",
        "run/adapter/adapter_config.json",
        "run/adapter/label_names.json",
        "run/adapter/adapter_model.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "huge"])
def test_a_pipe_a_device_or_a_huge_file_in_place_of_a_file_is_refused(capsys, here, name, kind):
    path = here / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)  # a sparse file: it takes no space
    else:
        path.symlink_to(kind)
    message = refusal(capsys, predict.main, "run", "a text")
    assert str(Path(name)) in message
    if name.startswith("base"):
        assert str(Path(name)) in refusal(capsys, train.main, *COMMAND, "--output-dir", "new")


def test_a_run_in_place_of_its_base_is_refused(capsys, here):
    said = refusal(capsys, train.main, *COMMAND, "--output-dir", "new", "--model", "run")
    assert "run/config.json is missing" in said


def test_a_json_file_at_the_bound_is_read(tmp_path):
    (tmp_path / "a.json").write_text("{}  ")
    assert read_json(tmp_path / "a.json") == {}
    assert read_bytes(tmp_path / "a.json", largest=4) == b"{}  "
    with pytest.raises(UserError, match="more than 3 bytes"):
        read_bytes(tmp_path / "a.json", largest=3)


# What a user can mend


def test_a_length_that_is_too_small_is_refused(capsys, here):
    assert "--max-length is 2. For this model it must be between 3 and 512" in refusal(
        capsys, predict.main, "run", "a text", "--max-length", 2
    )


def test_a_long_text_in_place_of_the_folder_is_refused(capsys):
    assert "there is no folder a long text" in refusal(capsys, predict.main, "a long text " * 50)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        lambda it: it["post_processor"]["special_tokens"].pop("[CLS]"),
        lambda it: it.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    ],
)
def test_a_tokenizer_that_panics_is_refused(here, change):
    change_json(here / "base" / "tokenizer.json", change)
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_pretrained("base", 2)


def test_a_tokenizer_that_panics_at_a_text_is_refused(tokenizer_file):
    content = json.loads(tokenizer_file.read_text())
    content["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    with pytest.raises(UserError, match=r"the tokenizer fails .*chunk size"):
        tokenize(Tokenizer.from_str(json.dumps(content)), ["a text"], 8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
def test_an_adapter_or_a_base_in_another_type_is_refused(capsys, here, dtype):
    change_weights(
        here / "run" / "adapter",
        lambda it: it.update({key: tensor.to(dtype) for key, tensor in it.items()}),
        "adapter_model.safetensors",
    )
    assert f"contains {dtype}, not floating-point numbers" in refusal(capsys, predict.main, "run", "a text")
    change_weights(here / "base", lambda it: it.update({key: tensor.to(dtype) for key, tensor in it.items()}))
    with pytest.raises(UserError, match="not floating point of 16, 32 or 64 bits"):
        load_pretrained("base", 2)


DAMAGE = [
    b"[" * 100_000,
    b'{"step": 1e999, "loss": 1, "learning_rate": 1}',
    b'{"step": 1}',
    b"[1]",
    b"7",
    b"\xff",
    b"null",
    b'{"step": "x"}',
]
DAMAGE += [b'{"step": 1, "loss": NaN, "learning_rate": 1}', b'{"step": 1' + b"0" * 400 + b', "loss": 1, "learning_rate": 1}']


@pytest.mark.parametrize("line", DAMAGE, ids=lambda line: line[:20].decode("latin-1"))
def test_damaged_metrics_are_left_out_of_a_report(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1, "learning_rate": 1}\n')
    assert len(read_metrics(path)) == 1
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert read_metrics(path) == []
    path.unlink()
    os.mkfifo(path)
    assert read_metrics(path) == []


def test_damaged_metrics_are_named_when_a_run_is_resumed(capsys, here):
    assert stopped(capsys, "stopped") == 0
    path = here / "stopped" / "metrics.jsonl"
    good = path.read_bytes()
    for line in (b"[" * 100_000, b"[1]", b"\xff", b'{"step": "x"}'):
        path.write_bytes(good + line + b"\n")
        assert "metrics.jsonl, line" in refusal(capsys, train.main, "--resume", "stopped")
    path.unlink()
    os.mkfifo(path)
    assert "metrics.jsonl is not a regular file" in refusal(capsys, train.main, "--resume", "stopped")


@pytest.fixture
def nobody(here):
    """In the test the process is a user who is not root, if it is root at all."""
    os.chmod(here, 0o755)
    for folder in here.parents:
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp") and Path("/tmp") in folder.parents:
            os.chmod(folder, 0o755)
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows")
@pytest.mark.parametrize("mode", [0o000, 0o600, 0o200])
@pytest.mark.parametrize(
    "name",
    [
        "run",
        "run/adapter",
        "base",
        "data",
        "run/adapter/adapter_config.json",
        "run/adapter/adapter_model.safetensors",
        "base/model.safetensors",
        "base/tokenizer.json",
    ],
)
def test_what_may_not_be_read_is_named(capsys, here, nobody, name, mode):
    before = os.geteuid()
    os.seteuid(os.getuid())
    (here / name).chmod(mode)
    (here / "runs").mkdir()
    (here / "runs").chmod(0o777)
    os.seteuid(before)
    try:
        if name == "data":
            message = refusal(capsys, train.main, *COMMAND, "--output-dir", "runs/new")
        else:
            message = refusal(capsys, predict.main, "run", "a text")
    finally:
        os.seteuid(os.getuid())
        (here / name).chmod(0o755)
        os.seteuid(before)
    assert name.split("/")[0] in message


def test_an_error_of_the_system_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    def raise_(error):
        raise error

    assert run_cli("x.py", lambda: raise_(OSError(28, "No space left on device"))) == 2
    assert run_cli("x.py", lambda: raise_(PermissionError(13, "Permission denied", "a/b"))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(". ")[0] for line in lines] == ["x.py: a file: No space left on device", "x.py: a/b: Permission denied"]
    for bug in (FileNotFoundError(2, "No such file", "a"), OSError("no number"), SystemError()):
        with pytest.raises(type(bug)):
            run_cli("x.py", lambda bug=bug: raise_(bug))


def test_an_output_path_that_is_a_loop_of_links_is_refused(capsys, here):
    Path("loop").symlink_to("loop")
    assert "loop" in refusal(capsys, train.main, *COMMAND, "--output-dir", "loop")
    assert "loop" in refusal(capsys, train.main, *COMMAND, "--output-dir", "new", "--merged-output", "loop/merged")
    assert "loop" in refusal(capsys, report.main, "run", "--output", "loop/page.html")
    assert "loop" in refusal(capsys, predict.main, "loop", "a text")


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_ctrl_c_during_the_imports_ends_with_one_line(script):
    command, pipe = [sys.executable, str(ROOT / script), "--help"], subprocess.PIPE
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - also where this suite runs in the background
    with subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, preexec_fn=heeded) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "interrupted\n")
