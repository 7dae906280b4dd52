"""How much work each run of a study is, in passes of images times multiply-adds."""

from sret_cli.spec.run import Run


def weight_of(run: Run) -> float:
    """Multiply-adds of a run's training: three times those of the forward pass, for each image.

    The number of images is that of the epochs, whose size all runs of a study share in practice;
    runs that are not trained weigh as one step. For a timm model a ViT's cost per layer stands in.
    """
    from sret_cli.cost.count import count
    from sret_cli.spec.model import ModelSpec

    macs = float(count(run.model).macs) if isinstance(run.model, ModelSpec) else 1e8
    epochs = 1 if run.train is None else run.train.epochs
    return macs * epochs
