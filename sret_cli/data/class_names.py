"""The names of classes: their order, and the comparison of two lists by name."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sret_cli.runtime.errors import DATA, SretError, show_note_once
from sret_cli.spec.dataset import has_numbered_classes

DIGITS = tuple(map(str, range(10)))  # the classes of `digits`


class ClassList(NamedTuple):
    """The names of the classes of data or of a model, in the order of their numbers from 0.

    `names` is None if only the numbers are known. Messages call the data or the model `owner`, and
    advise `remedy` to a user with other classes; `code` is the exit code of such an error.
    """

    names: tuple[str, ...] | None
    owner: str
    remedy: str = ""
    code: int = DATA


def natural_key(name: str) -> list[str | int]:
    """A sort key that compares numbers in names by value, and ignores upper and lower case.

    It equals `timm.utils.natural_key`, which cannot be imported without torch.
    """
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def order_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in the order in which timm numbers them, for any kind of dataset.

    Names that differ only in upper and lower case are sorted too; timm leaves their order open.
    """
    return sorted(set(names), key=lambda name: (natural_key(name), name))


def match_classes(ours: ClassList, theirs: ClassList) -> tuple[int, ...] | None:
    """The place of each of our classes in their list; None if both lists are the same.

    Another order is reported once. If one of the lists has no names, their numbers are taken as
    equal, and that is reported.

    Raises:
        SretError: the lists have different names; the message has the first difference.
    """
    if ours.names is None or theirs.names is None:
        unnamed = theirs if theirs.names is None else ours
        show_note_once(
            f"the names of the classes of {unnamed.owner} are not known: only the number of "
            f"classes can be compared with {(ours if unnamed is theirs else theirs).owner}"
        )
        return None
    if ours.names == theirs.names:
        return None
    _refuse_other_names(ours, theirs)
    places = {name: place for place, name in enumerate(theirs.names)}
    show_note_once(
        f"{theirs.owner} and {ours.owner} have the same {len(places):,} classes in another order; "
        "they are matched by name"
    )
    return tuple(places[name] for name in ours.names)


def _refuse_other_names(ours: ClassList, theirs: ClassList) -> None:
    assert ours.names is not None and theirs.names is not None
    remedy = f"; {theirs.remedy}" if theirs.remedy else ""
    differ = []
    for which, names, others in (
        ("first", theirs.names, set(ours.names)),
        ("second", ours.names, set(theirs.names)),
    ):
        only = next((name for name in names if name not in others), None)
        if only is not None:
            differ.append(f"{only!r} is only in the {which}")
    twice = [name for name, count in Counter((*ours.names, *theirs.names)).items() if count > 2]
    if twice and not differ:
        differ = [f"two have the name {twice[0]!r}, so that names cannot match them"]
    if differ:
        raise SretError(
            f"{theirs.owner} and {ours.owner} have different classes: {', '.join(differ)}{remedy}",
            theirs.code,
        )


def all_outputs(order: Sequence[int], outputs: int) -> list[int]:
    """An order of classes, extended by a model's further outputs in their places."""
    return [*order, *range(len(order), outputs)]


def config_classes(config: Any) -> tuple[str, ...] | None:
    """The classes of the model that a `config.json` describes, in the order of its outputs.

    None if their names are not known, because the model was not trained here, or its data number
    their classes only.
    """
    config = config if isinstance(config, Mapping) else {}
    train = config.get("train")
    train = train if isinstance(train, Mapping) else {}
    if train.get("dataset") == "digits":
        return DIGITS
    if has_numbered_classes(str(train.get("dataset")), train.get("label_column")):
        return None  # configs of earlier versions list numbers as names
    names = config.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
