from pages import metrics_of

from sret_cli.report.page_curves import run_curves


def test_losses_and_accuracy_are_two_curves_with_their_ranges():
    loss, accuracy = run_curves(metrics_of(4))
    assert 'aria-label="Loss over epochs; at the end: training 0.5, test 0.625"' in loss
    assert ">2.5</text>" in loss and ">0.5</text>" in loss and ">4 epochs</text>" in loss
    assert '<polyline class="test" points="111,126 178,54 245,30 312,18"/>' in accuracy


def test_a_run_of_one_epoch_shows_the_loss_of_its_steps():
    steps = [{"step": n, "epoch": 1, "loss": 3.0 - n / 200} for n in range(1, 401)]
    (loss,) = run_curves([*steps, *metrics_of(1)])
    assert loss.count(",") == 100 + 1  # 400 steps, four of them in each point; the label
    assert '<circle class="test" cx="312"' in loss and ">1 epoch</text>" in loss


def test_losses_that_are_not_finite_are_left_out():
    lines = metrics_of(3)
    lines[1]["test_loss"] = float("nan")
    loss, _ = run_curves(lines)
    assert '<polyline class="test" points="133,18 312,' in loss and "nan" not in loss


def test_nothing_is_drawn_without_epochs_or_of_one_value():
    assert run_curves([]) == []
    assert run_curves([{"step": 1, "epoch": 1, "loss": 2.0}]) == []
    assert run_curves(metrics_of(1)) == []
