"""Time of an epoch from stored soft labels, and with a live teacher, over that of plain training.

    python tests/benchmarks/distill.py [--images 96] [--rounds 7] [--preset sret_t --img-size 224]
    python tests/benchmarks/distill.py --data-dir CIFAR --preset nano --img-size 32 --steps 40

Without `--data-dir`, makes JPEG photographs as `loading.py` does. An epoch is loading with random
crops and flips, forward, backward and AdamW; plain training has the same crops and no other
augmentation. The teacher has random weights, which take as long as others. Rounds of the two
alternate; each ratio is the median of the rounds', with their quartiles.
"""

import tempfile
from itertools import islice
from pathlib import Path

import timm
import torch
from common import Call, arguments, prepare, side_by_side
from loading import write_photographs
from safetensors.torch import save_file

from sret_cli.data.classes import dataset_classes
from sret_cli.data.prepare import load_data
from sret_cli.runtime.device import choose_device
from sret_cli.spec.options import RunOptions
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.training.label_writer import write_labels
from sret_cli.training.trainer import Trainer


def epoch_of(run: Run, workers: int, steps: int | None, device: str, trains: bool) -> Call:
    """A call that trains an epoch, or so many steps of it, or only loads what it takes."""
    assert run.train is not None
    loader, _ = load_data(run.train, run.model, workers)
    trainer = Trainer(run, loader, choose_device(device))
    trainer.module.train()
    numbers = iter(range(run.train.epochs))

    def epoch() -> None:
        for images, target in islice(loader.epoch(next(numbers)), steps):
            if trains:
                trainer.step(images, target)

    return epoch


def main() -> None:
    """Prints the ratios."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=None, help="of an epoch; all if not given")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--preset", default="sret_t")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--data-dir")
    parser.add_argument("--teacher", default="resnet18")
    parser.add_argument("--crops", type=int, default=2)
    options = parser.parse_args()
    machine = prepare(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.data_dir is None:
            write_photographs(folder / "photographs", options.images)
        plain = {"data_dir": options.data_dir or str(folder / "photographs"), "warmup_epochs": 0}
        plain |= {"batch_size": options.batch_size, "epochs": 1000}
        classes = dataset_classes(TrainSpec(**plain))
        model = PRESETS[options.preset].with_values(img_size=options.img_size, num_classes=classes)
        weights = timm.create_model(options.teacher, num_classes=classes).state_dict()
        save_file(weights, folder / "teacher.safetensors")
        teacher = {
            "teacher": options.teacher,
            "teacher_checkpoint": str(folder / "teacher.safetensors"),
            "teacher_img_size": options.img_size,
        }
        where = folder / "labels"
        live = TrainSpec(**plain, **teacher)
        write_labels(
            live, model, where, crops=options.crops, options=RunOptions(workers=options.workers)
        )
        specs = {
            "stored soft labels": TrainSpec(**plain, soft_labels=str(where)),
            f"live {options.teacher}": live,
        }
        print(
            f"{options.preset} at {options.img_size} px, batch size {options.batch_size}, "
            f"{options.workers} workers, {options.rounds} rounds; {machine}"
        )
        for title, spec in specs.items():
            for trains in (True, False) if spec is not live else (True,):
                calls = [
                    epoch_of(
                        Run("benchmark", title, model, one),
                        *(options.workers, options.steps, options.device, trains),
                    )
                    for one in (spec, TrainSpec(**plain))
                ]
                ratio = side_by_side(*calls, options.device, options.rounds)
                print(f"{title} / plain, {'training' if trains else 'loading alone'}: {ratio}")


if __name__ == "__main__":
    torch.multiprocessing.set_sharing_strategy("file_system")
    main()
