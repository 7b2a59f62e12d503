import io
import pathlib

import pytest
from rich.console import Console

from models import convnet
from sos.experiments import progress, study
from sos.experiments import results as results_lib
from sos.experiments.results import Outcome
from sos.experiments.runner import Runner
from sos.files import only_process


class _Recorder(progress.Progress):
    """Remembers which runs were trained, and may stop the study."""

    def __init__(self, stop_after=None, *, terminal=False):
        self.output = io.StringIO()
        super().__init__(
            Console(
                file=self.output,
                force_terminal=terminal,
                highlight=False,
                width=80,
            )
        )
        self.trained = []
        self._stop_after = stop_after

    def begin(self, run):
        if len(self.trained) == self._stop_after:
            raise KeyboardInterrupt
        super().begin(run)

    def finish(self, run, outcome):
        self.trained.append(run)
        super().finish(run, outcome)


@pytest.fixture
def run_study(data, tmp_path):
    def call(runs, recorder, workdir="workdir"):
        return study.run_study(
            runs,
            data=data,
            build_model=convnet.build,
            workdir=pathlib.Path(tmp_path / workdir),
            progress=recorder,
            layerwise_sparsity=0.5,
        )

    return call


def _numbers(results):
    measured = {"seconds": None, "peak_memory": None}
    return [{**row, **measured} for row in results.rows()]


def test_an_interrupted_study_is_continued(run_study, config, expand):
    config.techniques = "magnitude,l0"
    runs = expand(config)
    first, second, third = _Recorder(stop_after=3), _Recorder(), _Recorder()
    with pytest.raises(KeyboardInterrupt):
        run_study(runs, first)
    continued = run_study(runs, second)
    assert first.trained + second.trained == runs
    for figure in (continued.tradeoff, continued.layerwise):
        assert figure.stat().st_size > 5_000
    table = continued.table.read_bytes()
    assert len(table.splitlines()) == 1 + len(runs)
    assert run_study(runs, third).table.read_bytes() == table
    assert third.trained == []
    assert "nothing to train" in third.output.getvalue()
    whole = run_study(runs, _Recorder(), "another")
    assert _numbers(whole) == _numbers(continued)


def test_a_result_that_cannot_be_written_is_not_lost(
    run_study, config, expand, monkeypatch, tmp_path
):
    config.techniques = "dense"
    (run,) = expand(config)

    def fail(self, run, outcome):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(results_lib.Results, "add", fail)
        with pytest.raises(OSError, match="no space left"):
            run_study([run], _Recorder())
    checkpoints = tmp_path / "workdir" / "checkpoints"
    assert list((checkpoints / run.name).iterdir())
    # It is evaluated again and not trained again.
    steps = []
    recorder = _Recorder()
    monkeypatch.setattr(recorder, "step", lambda *args: steps.append(args))
    run_study([run], recorder)
    assert recorder.trained == [run]
    assert steps == []
    assert not list(checkpoints.iterdir())


def test_a_study_has_its_directory_for_itself(
    run_study, config, expand, tmp_path
):
    (tmp_path / "workdir").mkdir()
    with only_process(tmp_path / "workdir"):
        with pytest.raises(BlockingIOError, match="Another process .* at work"):
            run_study(expand(config), _Recorder())


def test_runs_of_one_technique_share_a_step(
    run_study, config, expand, monkeypatch
):
    made = []

    class Counted(Runner):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(study, "Runner", Counted)
    config.techniques = "dense,magnitude"
    config.seeds = (0, 1)
    run_study(expand(config), _Recorder())
    assert len(made) == 2
    for runner in made:
        train = runner.trainer.steps.train
        assert train.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
    ("pattern", "text"), [("conv9", "conv9"), ("(", r"\(")]
)
def test_what_cannot_be_built_is_known_before_training(
    run_study, config, expand, pattern, text
):
    config.magnitude.keep_dense = pattern
    recorder = _Recorder()
    with pytest.raises(ValueError, match=text):
        run_study(expand(config), recorder)
    assert recorder.trained == []


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_names_every_run(run_study, config, expand, terminal):
    config.techniques = "dense,magnitude"
    recorder = _Recorder(terminal=terminal)
    results = run_study(expand(config), recorder)
    text = recorder.output.getvalue()
    for part in ("1/3", "3/3", "dense", "magnitude 50%", "magnitude 90%"):
        assert part in text
    assert "left" in text
    assert ("\x1b[" in text) == terminal
    recorder.console.print(progress.summary(results))
    assert recorder.output.getvalue().count("90.00%") >= 2


def test_the_time_left_goes_by_the_pace_of_the_run_itself(
    tmp_path, config, expand, monkeypatch
):
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    config.steps = 100
    config.techniques = "magnitude"
    first, second = expand(config)
    recorder = _Recorder()
    with recorder.study(results_lib.Results(tmp_path, [first, second])):
        recorder.begin(first)
        guess = recorder.seconds_left()
        now += 30.0  # The first step is compiled, and says nothing.
        for step in range(1, 41):
            recorder.step(step, 1.0)
            if step < 20:
                left = (200 - step) / 200
                assert recorder.seconds_left() == pytest.approx(guess * left)
            now += 0.5
        now -= 0.5
        # 60 steps of this run and 100 of the next, of half a second each.
        assert recorder.seconds_left() == pytest.approx(80.0)
    assert f"{progress._duration(80.0)}" == "1:20"
    assert "magnitude 50%: step 1 of 100, loss 1.000" in (
        recorder.output.getvalue()
    )


def test_the_time_left_goes_by_the_pace_of_each_technique(
    tmp_path, config, expand
):
    def outcome(seconds):
        return Outcome(
            achieved_sparsity=0.5,
            model_sparsity=0.5,
            test_accuracy=0.5,
            test_loss=1.0,
            seconds=seconds,
            peak_memory=1.0,
            parameters_trained=1,
        )

    config.techniques = "magnitude,l0"
    runs = expand(config)
    results = results_lib.Results(tmp_path, runs)
    recorder = _Recorder()
    with recorder.study(results):
        assert recorder.seconds_left() > 0
        results.add(runs[0], outcome(10.0))
        # A run with a penalty is taken for twice as long as a plain one.
        assert recorder.seconds_left() == pytest.approx(10 + 2 * 20)
        results.add(runs[1], outcome(10.0))
        results.add(runs[2], outcome(50.0))
        assert recorder.seconds_left() == pytest.approx(50)
        results.add(runs[3], outcome(50.0))
        assert recorder.seconds_left() == 0
