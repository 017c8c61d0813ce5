"""Loading from the hub, with its real client, from a hub on this machine that can be made to fail.

The client reads its environment when it is imported, so each scenario is a process of its own.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub_server import Hub
from processes import Python, python

from data.datasets import SAMPLE

MODEL, FULL_NAME = "distilbert-base-uncased", "distilbert/distilbert-base-uncased"  # the hub redirects to the full name
TINY = "ann/tiny"
DATASET = "datasets/SetFit/ag_news"
BAD_DAY = ["500", "later", "circle", "stall", "trickle", "other", "longer"]
CONFIG = {
    "activation": "gelu",
    "architectures": ["DistilBertForMaskedLM"],
    "attention_dropout": 0.1,
    "dim": 768,
    "dropout": 0.1,
    "hidden_dim": 3072,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "model_type": "distilbert",
    "n_heads": 12,
    "n_layers": 6,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "vocab_size": 30522,
}
CLIENT = """
import json, sys, time
import torch
from safetensors.torch import load_file
import common.hub  # its import is not part of the seconds below
from data import load_dataset
from common.errors import UserError
from model import load_pretrained

def attempt(call, *arguments):  # anything but an answer and a UserError is a bug: it ends the process with a traceback
    start = time.monotonic()
    try:
        result = {"value": call(*arguments)}
    except UserError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    return result | {"seconds": time.monotonic() - start}

def mark(name, revision=None):  # what `tiny` filled the weights with
    return load_pretrained(name, 4, revision)[0].distilbert.embeddings.position_embeddings.weight[3, 5].item()

def same_as(file, classifier=None):  # whether the encoder that the hub delivers has the weights of this file, and no others
    theirs = {key: tensor for key, tensor in load_file(file).items() if not key.startswith("vocab_")}
    classifier = classifier or load_pretrained("distilbert-base-uncased", 4)[0]
    ours = classifier.distilbert.state_dict(prefix="distilbert.")
    return theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)

"""


def environment(endpoint: str, home: Path) -> dict[str, str]:
    # Telemetry stays on, as users have it: it waits for the network, too, and goes to the endpoint only.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }


def start(endpoint: str, home: Path, code: str, *arguments: object, **more: str) -> Python:
    """A process that runs `code` after CLIENT, which is to print one JSON value."""
    return Python("-c", CLIENT + code, *arguments, env=environment(endpoint, home) | more)


def finish(process: Python):
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out)


def run(endpoint: str, home: Path, code: str, *arguments: object, **more: str):
    return finish(start(endpoint, home, code, *arguments, **more))


def published(config: dict, fill) -> dict[str, torch.Tensor]:
    """A checkpoint as the hub has it: with the head for masked language modelling, and without one for classification."""
    dim, hidden, vocab = config["dim"], config["hidden_dim"], config["vocab_size"]
    shapes = {
        "vocab_transform.weight": (dim, dim),
        "vocab_transform.bias": (dim,),
        "vocab_layer_norm.weight": (dim,),
        "vocab_layer_norm.bias": (dim,),
        "vocab_projector.bias": (vocab,),
        "distilbert.embeddings.word_embeddings.weight": (vocab, dim),
        "distilbert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], dim),
        "distilbert.embeddings.LayerNorm.weight": (dim,),
        "distilbert.embeddings.LayerNorm.bias": (dim,),
    }
    for i in range(config["n_layers"]):
        for name, rows, columns in [
            ("attention.q_lin", dim, dim),
            ("attention.k_lin", dim, dim),
            ("attention.v_lin", dim, dim),
            ("attention.out_lin", dim, dim),
            ("sa_layer_norm", dim, None),
            ("ffn.lin1", hidden, dim),
            ("ffn.lin2", dim, hidden),
            ("output_layer_norm", dim, None),
        ]:
            shapes[f"distilbert.transformer.layer.{i}.{name}.weight"] = (rows, columns) if columns else (rows,)
            shapes[f"distilbert.transformer.layer.{i}.{name}.bias"] = (rows,)
    return {key: fill(shape) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def full(tmp_path_factory, tokenizer_file) -> Iterator[dict[str, bytes | Path]]:
    """The files of distilbert-base-uncased, at full size, with random weights."""
    random = torch.Generator().manual_seed(0)
    weights = tmp_path_factory.mktemp("full") / "model.safetensors"
    safetensors.torch.save_file(
        published(CONFIG, lambda shape: torch.empty(shape).normal_(std=0.02, generator=random)), weights, {"format": "pt"}
    )
    yield {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": tokenizer_file, "model.safetensors": weights}
    weights.unlink()  # pytest would keep its 265 megabytes for three runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer_file):
    """Makes the files of a small model in which every weight is the same number."""

    def make(number: float) -> dict[str, bytes | Path]:
        config = CONFIG | {"dim": 12, "hidden_dim": 24, "n_layers": 1}
        weights = tmp_path_factory.mktemp("tiny") / "model.safetensors"
        safetensors.torch.save_file(published(config, lambda shape: torch.full(shape, number)), weights, {"format": "pt"})
        return {"config.json": json.dumps(config).encode(), "tokenizer.json": tokenizer_file, "model.safetensors": weights}

    return make


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def home(tmp_path) -> Iterator[Path]:
    """Where the client puts its cache."""
    yield tmp_path / "home"
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


@pytest.fixture(scope="module")
def homes() -> dict[str, Path]:
    """Where the client of each slow scenario puts its cache."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def slow(tmp_path_factory, tiny, homes) -> Iterator[dict[str, Python]]:
    """What takes long because it waits, started before the first test and looked at in the last ones."""
    unreachable = """
print(json.dumps([attempt(mark, "ann/tiny"), attempt(lambda: len(load_dataset("ag_news").train))]))
"""
    one_file = 'print(json.dumps(attempt(mark, "ann/tiny")))'
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # connects, and that is all
        with socket.create_server(("127.0.0.1", 0)) as free:
            refused = free.getsockname()[1]
        broken, portal, broken_head, silent_get = (stack.enter_context(Hub()) for _ in range(4))
        bad_day = {fault: stack.enter_context(Hub()) for fault in BAD_DAY}
        for fault, each in bad_day.items():
            each.add(TINY, tiny(1.0))
            each.fault(fault, "GET", f"{TINY}/model.safetensors")
        broken.fault("500")
        portal.fault("portal")
        broken_head.fault("500", "HEAD", f"{TINY}/config.json")
        silent_get.fault("silent", "GET", f"{TINY}/model.safetensors")
        for each in (broken_head, silent_get):
            each.add(TINY, tiny(1.0))
        hanging = "import socket\nsocket.getaddrinfo = lambda *arguments, **more: time.sleep(600)\n"
        started: dict[str, Python] = {}

        def begin(name: str, endpoint: str, code: str, **more: str) -> None:
            homes[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
            started[name] = start(endpoint, homes[name], code, **more)

        begin("refused", f"http://127.0.0.1:{refused}", unreachable)
        begin("silent", f"http://127.0.0.1:{silent.getsockname()[1]}", unreachable)
        begin("name server hangs", "http://hub.invalid", hanging + unreachable)
        begin("out of order", broken.url, unreachable)
        begin("portal", portal.url, unreachable)
        begin("500 for one file", broken_head.url, one_file)
        begin("silent in one file", silent_get.url, one_file, HF_HUB_DOWNLOAD_TIMEOUT="3")
        for fault, each in bad_day.items():
            begin(fault, each.url, one_file)
        yield started
        for process in started.values():
            process.kill()


@pytest.mark.slow
def test_a_checkpoint_of_full_size_loads_with_a_random_head(hub, home, full):
    """The encoder has the file's weights; the cache serves later runs, with the hub and without it."""
    hub.add(FULL_NAME, full)
    code = """
classifier, tokenizer = load_pretrained("distilbert-base-uncased", 4)
head = classifier.pre_classifier.weight
print(json.dumps({
    "same": same_as(sys.argv[1], classifier),
    "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
    "head": [head.mean().item(), head.std().item(), classifier.pre_classifier.bias.abs().max().item()],
    "ids": tokenizer.encode("Hello, world!").ids,
    "logits": classifier(torch.tensor([[101, 7592, 102]])).isfinite().tolist(),
}))
"""
    got = run(hub.url, home, code, full["model.safetensors"])
    assert got["same"] is True
    assert got["parameters"] == 66_956_548
    assert got["head"] == pytest.approx([0, 0.02, 0], abs=2e-4)
    assert got["ids"] == [101, 7592, 1010, 2088, 999, 102]
    assert got["logits"] == [[True] * 4]

    fetched = [request.file for request in hub.requests if request.method == "GET"]
    assert sorted(fetched) == sorted(full)

    # The same cache again, with the hub and without it.
    hub.requests.clear()
    again = "print(json.dumps(same_as(sys.argv[1])))"
    assert run(hub.url, home, again, full["model.safetensors"]) is True
    assert {request.method for request in hub.requests} == {"HEAD"}  # asked, and nothing fetched
    hub.stop()
    assert run(hub.url, home, again, full["model.safetensors"]) is True


@pytest.mark.slow
def test_a_cut_connection_leaves_no_file_that_a_later_run_reads(hub, home, full):
    hub.add(FULL_NAME, full)
    hub.fault("cut", "GET", f"{FULL_NAME}/model.safetensors")
    attempt = "print(json.dumps(attempt(same_as, sys.argv[1])))"
    cut = run(hub.url, home, attempt, full["model.safetensors"])
    assert cut["error"] == "UserError"
    assert "model.safetensors" in cut["message"]
    assert "try again" in cut["message"]
    assert "\n" not in cut["message"]
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file() and not path.is_symlink()) < 1e6

    # A single cut does no harm: the later run takes up where it was cut, and has the right bytes.
    hub.heal()
    hub.requests.clear()
    hub.fault("cut", "GET", f"{FULL_NAME}/model.safetensors", times=1)
    assert run(hub.url, home, attempt, full["model.safetensors"])["value"] is True
    ranges = [request.range for request in hub.requests if request[::3] == ("GET", "model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) > 100e6


def test_a_revision_may_be_a_branch_or_a_commit(hub, home, tiny):
    first = hub.add(TINY, tiny(1.0), branch="v1")
    hub.add(TINY, tiny(2.0), branch="feature/two")
    hub.add(TINY, tiny(3.0))
    code = "print(json.dumps([mark('ann/tiny', revision or None) for revision in sys.argv[1:]]))"
    assert run(hub.url, home, code, "", "feature/two", first) == [3.0, 2.0, 1.0]


def test_all_files_come_from_one_commit(hub, home, tiny):
    """Even if main moves between two downloads."""
    old, new = tiny(1.0), tiny(2.0)
    commit = hub.add(TINY, old)

    def move(request) -> None:
        if request[::3] == ("GET", "config.json"):
            hub.add(TINY, new)

    hub.after = move
    assert run(hub.url, home, "print(json.dumps(mark('ann/tiny')))") == 1.0
    assert hub.branches[TINY]["main"] != commit  # it did move
    later = [request.revision for request in hub.requests if request.file in ("tokenizer.json", "model.safetensors")]
    assert set(later) == {commit}


def test_a_run_uses_and_reports_one_commit(hub, home, tiny, tmp_path):
    """Even if main moves during training."""
    files = tiny(0.5)
    commit = hub.add(TINY, files)

    def move(request) -> None:
        if request.file == "model.safetensors" and hub.branches[TINY]["main"] == commit:
            hub.add(TINY, files | {"config.json": b"{}"})

    hub.after = move
    process = train(hub.url, home, "--model", TINY, "--dataset", "sample", "--output-dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["commit"] == commit != hub.branches[TINY]["main"]
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["revision"] == commit
    assert results["sha256"]["weights"] == hashlib.sha256(files["model.safetensors"].read_bytes()).hexdigest()


def test_what_the_hub_lacks_is_refused_by_name_in_one_line(hub, home, tiny):
    hub.add(TINY, tiny(1.0))
    files = tiny(2.0)
    hub.add("ann/pickled", {"pytorch_model.bin": files.pop("model.safetensors")} | files)
    hub.add("ann/slow-tokenizer", {"config.json": files["config.json"], "vocab.txt": b"[PAD]\n"})
    code = """
cases = [("ann/none", None), ("ann/tiny", "v9"), ("ann/tiny", "0" * 40), ("ann/pickled", None), ("ann/slow-tokenizer", None),
         ("no such/name!", None)]
print(json.dumps([attempt(mark, *case) for case in cases] + [attempt(lambda: len(load_dataset("ag_news").train))]))
"""
    expected = [
        ["'ann/none'", "folder", hub.url],
        ["ann/tiny", "no revision 'v9'"],
        ["ann/tiny", "no revision", "0" * 40],
        ["ann/pickled has no model.safetensors"],
        ["ann/slow-tokenizer has no tokenizer.json"],
        ["'no such/name!'", "folder", hub.url],
        ["'SetFit/ag_news'", "data set", hub.url],
    ]
    refusals = run(hub.url, home, code)
    for refusal, words in zip(refusals, expected, strict=True):
        assert refusal["error"] in ("UserError", "NotOnHub", "FileNotOnHub"), refusal
        assert all(word in refusal["message"] for word in words), refusal
        assert "\n" not in refusal["message"]
    assert not [request for request in hub.requests if request.file == "pytorch_model.bin"]


def test_ag_news_comes_from_the_hub_and_then_from_the_cache(hub, home):
    hub.add(DATASET, {name: SAMPLE / name for name in ("train.jsonl", "test.jsonl")})
    code = """
got, sample = load_dataset("ag_news"), load_dataset("sample")
print(json.dumps([
    got.train.texts == sample.train.texts and got.test.texts == sample.test.texts,
    got.train.labels.tolist() == sample.train.labels.tolist(),
    got.label_names,
]))
"""
    expected = [True, True, ["World", "Sports", "Business", "Sci/Tech"]]
    assert run(hub.url, home, code) == expected
    assert sorted(request.file for request in hub.requests if request.method == "GET") == ["test.jsonl", "train.jsonl"]
    hub.stop()
    assert run(hub.url, home, code) == expected


def test_a_data_set_of_a_user_comes_from_the_hub_and_then_from_the_cache(hub, home):
    """As .jsonl or .csv, in the root or in data/, at one commit even if main moves, and without a test part."""
    rows = [b'{"text": "text %d", "label": "%s"}\n' % (i, b"a" if i % 2 else b"b") for i in range(20)]
    table = [b"text,label\n", *(b"row %d,%d\n" % (i, i % 2) for i in range(20))]
    whole, few = b"".join(rows), b"".join(rows[:2])
    whole_table, few_table = b"".join(table), b"".join(table[:5])
    old = hub.add("datasets/ann/lines", {"train.jsonl": whole, "test.jsonl": few, "train.csv": b"not this one"})
    pinned = hub.add("datasets/ann/table", {"data/train.csv": whole_table, "data/test.csv": few_table}, branch="v1")
    hub.add("datasets/ann/table", {"README.md": b""})
    hub.add("datasets/ann/one", {"train.csv": whole_table})
    hub.add("datasets/ann/parquet", {"data/train-00000-of-00001.parquet": b"PAR1"})

    def move(request) -> None:
        if request[::3] == ("GET", "train.jsonl"):
            hub.add("datasets/ann/lines", {"train.jsonl": b"", "test.jsonl": b""})

    hub.after = move
    code = """
def sizes(name, revision=None):
    data = load_dataset(name, revision=revision)
    return [len(data.train), len(data.test), data.label_names, data.commit]
cases = [("ann/lines", sys.argv[1] or None), ("ann/table", "v1"), ("ann/one",), ("ann/table",), ("ann/parquet",), ("ann/none",),
         ("sample", "v1")]
print(json.dumps([attempt(sizes, *case) for case in cases]))
"""
    lines, pinned_table, one, *refused = run(hub.url, home, code, "")
    assert lines["value"] == [20, 2, ["a", "b"], old]
    assert hub.branches["datasets/ann/lines"]["main"] != old  # it did move
    assert pinned_table["value"] == [20, 4, ["0", "1"], pinned]
    assert one["value"][:3] == [18, 2, ["0", "1"]]
    says = [
        "ann/table has no train.jsonl, train.csv",
        "ann/parquet has no train.jsonl, train.csv",
        "'ann/none'",
        "no revisions",
    ]
    for refusal, words in zip(refused, says, strict=True):
        assert refusal["error"] in ("UserError", "NotOnHub", "FileNotOnHub"), refusal
        assert words in refusal["message"]
    hub.stop()
    cached = run(hub.url, home, code, old)
    assert [answer.get("value") for answer in cached[:3]] == [lines["value"], pinned_table["value"], one["value"]]
    assert cached[5]["error"] == "HubUnreachable"


def test_without_a_hub_the_embedded_model_and_data_are_used(hub, home, tmp_path):
    """The run says so first and last."""
    hub.stop()
    process = train(hub.url, home, "--output-dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    notice = (
        "distilbert-base-uncased: not on this machine, and the hub cannot be reached. Using the embedded minilm instead\n"
        "ag_news: not on this machine, and the hub cannot be reached. Using the embedded sample instead\n"
    )
    assert process.stdout.startswith(notice)
    assert process.stdout.endswith(notice)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["model"], results["dataset"], results["embedded"]) == ("minilm", "sample", True)


def test_without_a_hub_a_model_that_was_named_is_refused(hub, home, tmp_path):
    hub.stop()
    process = train(hub.url, home, "--output-dir", tmp_path / "out", "--model", MODEL, "--dataset", "sample")
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith(f"train.py: {hub.url} cannot be reached")
    assert f"config.json of the model {MODEL}" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def train(endpoint: str, home: Path, *arguments: object) -> subprocess.CompletedProcess:
    limits = ["--train-limit", "32", "--test-limit", "16", "--epochs", "1", "--max-length", "32"]
    return python("train.py", *limits, *arguments, env=environment(endpoint, home))


@pytest.mark.parametrize("case", ["refused", "silent", "name server hangs", "out of order", "portal"])
def test_an_unreachable_hub_is_noticed_in_10_s_and_asked_once(slow, case):
    model, dataset = finish(slow[case])
    assert model["error"] == dataset["error"] == "HubUnreachable"
    assert "config.json of the model ann/tiny" in model["message"]
    assert "train.jsonl of the data set SetFit/ag_news" in dataset["message"]
    assert model["seconds"] < 13  # the machine is busy with all of them at once
    assert dataset["seconds"] < 1


@pytest.mark.parametrize(("case", "file"), [("500 for one file", "config.json"), ("silent in one file", "model.safetensors")])
def test_a_hub_that_fails_for_one_file_is_given_up_in_a_minute(slow, case, file):
    result = finish(slow[case])
    assert result["error"] == "UserError"
    assert f"{file} of {TINY}" in result["message"]
    assert "try again" in result["message"]
    assert "\n" not in result["message"]
    assert result["seconds"] < 60


@pytest.mark.parametrize("fault", BAD_DAY)
def test_a_faulty_download_is_given_up_within_half_a_minute(slow, homes, fault):
    """No partial file is used."""
    result = finish(slow[fault])
    assert result["error"] == "UserError", result
    assert "model.safetensors of ann/tiny" in result["message"]
    assert "try again" in result["message"]
    assert "\n" not in result["message"]
    assert result["seconds"] < 35  # the machine is busy with all of them at once
    assert not list(homes[fault].rglob("snapshots/*/model.safetensors"))


@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_a_download_beyond_the_promised_size_is_given_up(tmp_path, monkeypatch, fault):
    """Bytes without end, and a gzip bomb, in place of the 500 bytes that were promised."""
    from huggingface_hub.file_download import http_get

    import common.hub

    given = {}
    monkeypatch.setattr(common.hub, "_in_thread", lambda function, *arguments, **keywords: given.update(keywords) or Future())
    monkeypatch.setattr(common.hub, "wait", lambda *arguments, **keywords: sys.exit())
    with pytest.raises(SystemExit):
        common.hub._download("ann/a", "config.json", None, "model")
    with Hub() as hub, open(tmp_path / "config.json", "wb") as file:
        commit = hub.add("ann/a", {"config.json": b"{}" + b" " * 498})
        hub.fault(fault, "GET", "ann/a/config.json")
        with pytest.raises(OSError, match="more than it promised"):
            http_get(f"{hub.url}/ann/a/resolve/{commit}/config.json", file, expected_size=500, tqdm_class=given["tqdm_class"])
    assert (tmp_path / "config.json").stat().st_size < 1 << 20
