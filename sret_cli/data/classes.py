"""How many classes the data of a training have."""

from pathlib import Path

from sret_cli.data.folders import folder_classes
from sret_cli.spec.dataset import is_stream
from sret_cli.spec.train import TrainSpec

DIGITS_CLASSES = 10


def dataset_classes(train: TrainSpec) -> int | None:
    """How many classes a run's data has; None where it has as many as the model.

    Raises:
        SretError: the data are missing or hold fewer than two classes.
    """
    if train.dataset == "synthetic":
        return None
    if train.dataset == "digits":
        return DIGITS_CLASSES
    if train.dataset == "folder":
        return len(folder_classes(Path(train.data_dir or "")))
    if is_stream(train.dataset):
        from sret_cli.data.streams import find_shards

        return find_shards(str(train.data_dir), True, train.label_column).classes
    from sret_cli.data.readers import named_source

    source = named_source(train.dataset, train.data_dir, True, train.label_column)
    return len(source.classes)
