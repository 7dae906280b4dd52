"""The figure of one run's training."""

from sret_cli.report.curves import write_training_figure


def test_a_run_has_a_figure_of_its_training(tmp_path):
    assert write_training_figure(tmp_path, tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 1, "loss": 2.0, "lr": 0.1}\n'
        '{"step": 2, "epoch": 1, "loss": 1.5, "lr": 0.1}\n'
        '{"epoch": 1, "train_loss": 1.75, "test_loss": 1.4, "top1_percent": 50.0}\n'
        '{"step": 3, "epo'
    )
    files = write_training_figure(tmp_path, tmp_path / "report")
    assert [f.name for f in files] == ["training.png", "training.svg", "training.pdf"]


def test_steps_of_an_unfinished_epoch_lie_after_the_finished_ones(tmp_path, monkeypatch):
    step = '{{"step": {0}, "epoch": {1}, "loss": 2.0, "lr": 0.1}}\n'
    epoch = '{"epoch": 1, "train_loss": 1.75, "test_loss": 1.4, "top1_percent": 50.0}\n'
    lines = [step.format(1, 1), step.format(2, 1), epoch, step.format(3, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    drawn = []
    monkeypatch.setattr(
        "sret_cli.report.curves.save_figure", lambda figure, stem: drawn.append(figure) or []
    )
    write_training_figure(tmp_path, tmp_path)
    assert drawn[0].axes[0].get_lines()[0].get_xdata().tolist() == [0.5, 1.0, 1.5]
