from sret_cli.study.axes import run_labels
from sret_cli.study.file import study_from_tables
from sret_cli.study.rows import planned_row

TINY = {"preset": "nano", "blocks": 1}
TRAIN = {"dataset": "digits", "epochs": 2}


def labels(tables):
    rows = [planned_row(run) for run in study_from_tables("depth", tables).runs]
    found = run_labels(rows)
    starts = [f"{row['run_id']} " if row["run_id"] else "" for row in rows]
    assert all(label.startswith(start) for label, start in zip(found, starts, strict=True))
    return [label.removeprefix(start) for label, start in zip(found, starts, strict=True)]


def test_a_run_is_told_by_all_axes_of_its_study():
    grid = {"model.recursions": [1, 2], "model.slices": [[4, 2, 1], [1, 1, 1]], "train.lr": [0.001]}
    assert labels({"model": TINY, "train": TRAIN, "grid": grid}) == [
        "nano, 3 layers, seed 0, slices 4-2-1",
        "nano, 3 layers, seed 0, slices 1-1-1",
        "nano, 6 layers, seed 0, slices 4-2-1",
        "nano, 6 layers, seed 0, slices 1-1-1",
    ]


def test_axes_of_the_training_are_told_and_one_value_for_all_is_not():
    together = {"train.lr": [0.001, 0.0005], "train.weight_decay": [0.05, 0.1]}
    tables = {"model": TINY, "train": {**TRAIN, "smoothing": 0.1}, "zip": together}
    assert labels({**tables, "grid": {"train.seed": [0, 7]}}) == [
        "nano, 6 layers, seed 0, lr 0.001, weight_decay 0.05",
        "nano, 6 layers, seed 7, lr 0.001, weight_decay 0.05",
        "nano, 6 layers, seed 0, lr 0.0005, weight_decay 0.1",
        "nano, 6 layers, seed 7, lr 0.0005, weight_decay 0.1",
    ]


def test_of_paths_the_last_part_is_told_where_it_tells_them_apart():
    def of(*values):
        return labels({"model": TINY, "train": TRAIN, "grid": {"train.init": list(values)}})

    assert of("runs/a/one", "runs/b/two") == [
        "nano, 6 layers, seed 0, init one",
        "nano, 6 layers, seed 0, init two",
    ]
    assert of("runs/a/one", "runs/b/one") == [
        "nano, 6 layers, seed 0, init runs/a/one",
        "nano, 6 layers, seed 0, init runs/b/one",
    ]


def test_runs_that_are_not_trained_have_no_seed():
    assert labels({"model": {"preset": "nano"}, "grid": {"model.nll": ["none", "per_pass"]}}) == [
        "nano, 8 layers, nll none",
        "nano, 8 layers, nll per_pass",
    ]
