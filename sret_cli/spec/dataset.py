"""What the name of a dataset (`TrainSpec.dataset`) says about it."""

WITH_COLUMNS = ("hfds", "wds")  # a sample may have several labels


def has_stored_images(dataset: str) -> bool:
    """Whether a dataset is read from the user's files; not generated or part of a package."""
    return dataset not in ("digits", "synthetic")


def is_stream(dataset: str) -> bool:
    """Whether samples are read in sequence from shards; all others have an index."""
    return dataset == "wds"


def has_lasting_indices(dataset: str) -> bool:
    """Whether an index always gives the same image; synthetic images are drawn by the seed."""
    return not is_stream(dataset) and dataset != "synthetic"


def has_label_columns(dataset: str) -> bool:
    """Whether `label_column` can choose one of several labels of a sample."""
    return dataset.partition("/")[0] in WITH_COLUMNS


def has_numbered_classes(dataset: str, label_column: str | None) -> bool:
    """Whether labels are numbers of classes whose names are not known."""
    return dataset in ("synthetic", "wds") and label_column is None
