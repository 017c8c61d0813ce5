"""A newcomer's wrong turns: each gets one line that says what to do, before anything large is loaded, and status 2."""

import re
import shutil
from pathlib import Path

import pytest

import compare
import predict
import report
import train
from training import loading, options

RUN, STOPPED, BOTH = "runs/2026-11-25-101010", "runs/2026-11-24-090000", "runs/2026-11-26-100000-compare"
TICKETS = ["--dataset", "tickets.csv", "--text-column", "ticket", "--label-column", "category"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_model) -> Path:
    """A folder with a table, a model, a run that has ended, one that was stopped, and the runs of compare.py."""
    place = tmp_path_factory.mktemp("place")
    rows = "".join(f"ticket {i},{'Billing' if i % 2 else 'Login'}\n" for i in range(40))
    (place / "tickets.csv").write_text("ticket,category\n" + rows)
    shutil.copytree(small_model, place / "model")
    for run in (RUN, f"{BOTH}/lora", f"{BOTH}/head"):
        (place / run / "adapter").mkdir(parents=True)
        (place / run / "results.json").write_text("{}")
    (place / STOPPED / "checkpoints").mkdir(parents=True)
    (place / STOPPED / "checkpoints" / "step-00000010.safetensors").touch()
    return place


@pytest.fixture(autouse=True)
def nothing_large_is_loaded(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("common.hub.hub_is_reachable", lambda: False)
    for name in ("load_pretrained", "tokenize_examples"):
        monkeypatch.setattr(loading, name, lambda *arguments: pytest.fail("something large is loaded"))


MODEL = ["--model", "model"]


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        # the model and the data
        (train, ["--model", "MiniLM", *TICKETS], "Did you mean minilm?"),
        (train, ["--model", "modle", *TICKETS], "Did you mean model?"),
        (train, [*MODEL, "--dataset", "ticket.csv"], "Did you mean tickets.csv?"),
        (train, [*MODEL, "--dataset", "agnews"], "Did you mean ag_news?"),
        (train, ["tickets.csv"], "unrecognized arguments: tickets.csv. Did you mean --dataset tickets.csv?"),
        (train, [*MODEL, *TICKETS[:2], "--text-column", "tikcet", *TICKETS[4:]], "Did you mean ticket?"),
        (train, [*MODEL, *TICKETS[:4], "--label-column", "catgory"], "Did you mean category?"),
        # options and their values
        (train, ["--learnig-rate", "1e-3"], "Did you mean --learning-rate?"),
        (train, ["--method", "lroa"], "--method is 'lroa'. Choose from lora, full, head. Did you mean lora?"),
        (train, ["--dtype", "flaot32"], "Did you mean float32?"),
        (train, ["--class-weights", "balance"], "Did you mean balanced?"),
        (train, ["--bias", "loraonly"], "Did you mean lora_only?"),
        (train, [*MODEL, *TICKETS, "--target-modules", "q_lin", "v_lim"], "no layer is named 'v_lim'. Choose from"),
        (train, [*MODEL, *TICKETS, "--target-modules", "q_lin", "v_lim"], "Did you mean v_lin?"),
        (train, [*MODEL, *TICKETS, "--target-modules", "all-linaer"], "Did you mean all-linear?"),
        (train, [*MODEL, *TICKETS, "--target-modules", "layer.2.attention.q_lin"], "Did you mean layer.1.attention.q_lin?"),
        (train, [*MODEL, *TICKETS, "--r", "500"], "--r is 500, but the weights of model have rank 32 at most"),
        (train, [*MODEL, *TICKETS, "--max-length", "513"], "model reads at most 512 tokens"),
        (train, [*MODEL, *TICKETS, "--output-dir", "tickets.csv/run"], "cannot be written: Not a directory"),
        (train, [*MODEL, *TICKETS, "--output-dir", "/proc/run"], "/proc/run cannot be written"),
        (train, [*MODEL, *TICKETS, "--output-dir", RUN], "is not an empty folder"),
        # folders of runs
        (train, ["--resume", "runs/2026-11-24-09000"], f"Did you mean {STOPPED}? The newest run to resume is {STOPPED}"),
        (
            train,
            ["--resume", "run/2026"],
            f"there is no folder run/2026. Did you mean runs? The newest run to resume is {STOPPED}",
        ),
        (train, ["--resume", BOTH], f"the runs in {BOTH} have ended"),
        (train, ["--resume", "runs"], f"Name one of them, for example {STOPPED}"),
        (predict, ["runs/2026-11-25-10101", "a"], f"Did you mean {RUN}? The newest run is {RUN}"),
        (predict, ["elsewhere", "a"], f"there is no folder elsewhere. The newest run is {RUN}"),
        (predict, [STOPPED, "a"], f"has not ended. Finish it first: python train.py --resume {STOPPED}"),
        (predict, [BOTH, "a"], f"is a folder of runs: head, lora. Name one of them, for example {BOTH}/"),
        (predict, [RUN, "tickets.csv"], "tickets.csv is a file. To label the texts in it, pass --input tickets.csv"),
        (predict, [RUN, "--input", "tickts.csv"], "Did you mean tickets.csv?"),
        (predict, [RUN, "--input", "tickets.csv", "--text-column", "tikcet"], "Did you mean ticket?"),
        (predict, [RUN, "a", "--dtype", "flaot32"], "Did you mean float32?"),
        (predict, [RUN, "a", "--device", "gpu"], "choose from 'auto', 'cpu', 'cuda', 'mps'"),
        (report, ["runs/2026-11-25-10101"], f"Did you mean {RUN}? The newest run is {RUN}"),
        (report, [f"{RUN}/adapter"], f"Did you mean {RUN}?"),
        (report, [f"{RUN}/results.json"], f"Did you mean {RUN}?"),
        (report, [STOPPED], f"has not ended. Finish it first: python train.py --resume {STOPPED}"),
        (report, [BOTH], f"is a folder of runs: head, lora. Name one of them, for example {BOTH}/"),
        (report, [RUN, "--agains", RUN], "Did you mean --against?"),
        (compare, ["--method", "lora"], "leave it out"),
    ],
)
def test_a_wrong_turn_gets_one_line(script, words, says, place, capsys):
    before = sorted(place.rglob("*"))
    assert script.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in re.sub(r"head, lora|lora, head", "head, lora", captured.err)
    assert sorted(place.rglob("*")) == before


def test_what_is_spelt_right_passes_the_checks(place):
    """A layer of the last number, and a regular expression, as the model has them."""
    for targets in (["layer.1.attention.q_lin"], [r".*\.layer\.1\..*lin"], ["all-linear"], ["q_lin", "lin1"]):
        with pytest.raises(pytest.fail.Exception, match="something large"):
            train.main([*MODEL, *TICKETS, "--output-dir", "new/run", "--target-modules", *targets])
    assert not (place / "new").exists()


def test_every_option_is_in_a_group_of_the_help(capsys):
    for script in (train, compare):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        groups = capsys.readouterr().out.split("options:")[1]
        titles = list(options.GROUPS.values())
        yours, lora, training, machine = (part.split(":\n", 1)[1] for part in re.split(f"\n(?={'|'.join(titles)})", groups)[1:])
        assert "--dataset" in yours
        assert "--output-dir" in yours
        assert "--r INT" in lora
        assert "--epochs" in training
        assert "--dtype" in machine
        for name in options.LORA_OPTIONS:
            assert options.flag(name) in lora
