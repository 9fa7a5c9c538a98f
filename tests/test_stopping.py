"""A signal at any time ends a run with exit code 75, and the same command resumes it."""

import json
import os
import signal
import subprocess
import sys

import pytest

import benchmarks.reproduce as program
import common.train as training
import mapet.tokenizers as tokenizers
from benchmarks import stages
from common.environment import ROOT
from common.evaluate import protocols
from common.stopping import EXIT_STOPPED, STOP_SIGNALS, Stopped, finish_first, stop_if_requested, stop_on_signals, stop_requested

SHORT = ["finetune", "finetune_20_per_class", "finetune_5_per_class", "linear"]
CHANGES = [word for name in SHORT for word in ("--set", f"{name}.stage.epochs=1")]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# ---- the handlers


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_stops_at_once_and_the_old_handlers_are_restored(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        send(number)
        raise AssertionError("not reached")
    assert stopped.value.code == EXIT_STOPPED == 75
    assert signal.getsignal(number) is before
    stop_if_requested()  # the next work in this process is not stopped
    assert not stop_requested()


def test_more_signals_do_not_interrupt_a_finish_first_block():
    done = []
    with pytest.raises(Stopped), stop_on_signals():
        with finish_first():
            send(signal.SIGINT)
            send(signal.SIGINT)
            send(signal.SIGTERM)
            assert stop_requested()
            with finish_first():
                done.append("inner")
            done.append("outer")
        raise AssertionError("not reached")
    assert done == ["inner", "outer"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_is_not_lost_if_python_ignores_its_exception():
    class Held:
        def __del__(self):
            send(signal.SIGTERM)  # Python prints an exception in __del__ and ignores it

    with pytest.raises(Stopped), stop_on_signals():
        held = Held()
        del held


def test_an_error_is_not_replaced_by_the_signal_before_it():
    with pytest.raises(KeyError), finish_first():
        send(signal.SIGTERM)
        raise KeyError


# ---- whole runs


def run(out, *options: str) -> int:
    return program.main(["droppos", "--device", "cpu", "--epochs", "1", "--out", str(out), *CHANGES, *options])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(out) == 0
    return results(out)


def results(out) -> dict[str, float]:
    return {file.parent.name: json.loads(file.read_text()).get("top1") for file in sorted(out.glob("*/*/*/result.json"))}


MOMENTS = [  # the function, its module, and whether the signal comes before or after the call
    ("open_data", program, "before"),
    ("choose_recipe", program, "after"),
    ("save_checkpoint", training, "before"),
    ("save_checkpoint", training, "after"),
    ("own_metrics", stages, "after"),
    ("export_encoder", stages, "after"),
    ("accuracy", protocols, "before"),
    ("features", protocols, "after"),
    ("knn_accuracy", protocols, "before"),
    ("show", program, "before"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module", "moment"), MOMENTS)
def test_a_signal_at_any_time_exits_with_75_and_the_same_command_resumes(name, module, moment, undisturbed, tmp_path, monkeypatch):
    call, sent = getattr(module, name), []

    def signalled(*given, **options):
        first, _ = not sent, sent.append(name)
        if first and moment == "before":
            send(signal.SIGUSR2)
        found = call(*given, **options)
        if first and moment == "after":
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
        return found

    monkeypatch.setattr(module, name, signalled)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 75 and sent
    monkeypatch.undo()
    assert run(tmp_path) == 0
    assert results(tmp_path) == undisturbed


@pytest.mark.parametrize("name", ["sample_features", "fit_centroids", "write_tokens", "draw_codewords"])
def test_a_signal_while_making_tokens_exits_with_75(name, tmp_path, monkeypatch):
    call, sent = getattr(tokenizers, name), []

    def signalled(*given, **options):
        found = None if sent else call(*given, **options)
        sent.append(send(signal.SIGTERM))
        return found

    monkeypatch.setattr(tokenizers, name, signalled)
    options = ["mapet", "--prepare", "--device", "cpu", "--data-root", str(tmp_path), "--out", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stopped:
        program.main(options)
    assert stopped.value.code == 75
    monkeypatch.undo()
    assert program.main(options) == 0


def test_the_process_exits_with_75_and_prints_how_to_resume():
    code = "import os, signal, sys, benchmarks.reproduce as r\nr.open_data = lambda *_: os.kill(os.getpid(), signal.SIGUSR2)\n"
    done = subprocess.run([sys.executable, "-c", code + "sys.exit(r.main(['droppos']))"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75 and "run the same command again to resume" in done.stdout and not done.stderr
