"""Matplotlib's SVG inside a page: unique ids, colours of the theme, and points as links."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

DROPPED = ("metadata", "style", "script", "foreignObject", "title", "desc")
SPACED = ("text", "tspan")  # elements whose white space is shown
COLORED = ("style", "fill", "stroke")
GREY = re.compile(r"#([0-9a-f]{2})\1\1\b", re.IGNORECASE)
REFERENCE = re.compile(r"url\(#([^)]*)\)")
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


@dataclass(frozen=True)
class Point:
    """Where a point of a figure leads to, and what its tooltip says."""

    href: str
    tip: str


def inline_svg(svg: str, prefix: str, label_id: str, points: Mapping[str, Point]) -> str:
    """The SVG as an element of a page.

    Black, white and grey become mixtures of the text's and the background's colours, so that a
    figure follows the theme; other colours stay. Ids start with `prefix`, so that figures of one
    page do not refer to each other's shapes. There is no script in it, and nothing to load.

    Args:
        svg: what Matplotlib wrote.
        prefix: start of all ids.
        label_id: id of the element that names the figure.
        points: where links lead, by the address in the SVG; other links are removed.
    """
    root = ElementTree.fromstring(NOT_XML.sub("", svg))
    _drop_namespaces(root)
    names = _new_names(root, prefix)
    for element in root.iter():
        attributes = {}
        for key, value in element.attrib.items():
            if key == "id" and value not in names:
                continue
            attributes[key] = _attribute(element.tag, key, value, names)
        element.attrib.clear()
        element.attrib.update({k: v for k, v in attributes.items() if v is not None})
        if element.tag == "a":
            _link(element, points)
    width = root.attrib.pop("width", "")
    for key in ("height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "group", "aria-labelledby": label_id}
    if re.fullmatch(r"[\d.]+(pt|px)?", width):
        root.set("style", f"--width: {width}")
    return ElementTree.tostring(root, encoding="unicode")


def has_color_map(svg: str) -> bool:
    """Whether colours stand for values, so that black and white text on them must stay."""
    return 'id="QuadMesh' in svg or "<image" in svg


def _drop_namespaces(element: Element) -> None:
    """Names without namespaces, which HTML does not have; elements of `DROPPED` are removed."""
    element.tag = element.tag.rpartition("}")[2]
    for key in list(element.attrib):
        element.attrib[key.rpartition("}")[2]] = element.attrib.pop(key)
    if element.tag not in SPACED:
        element.text = None
    for child in list(element):
        _drop_namespaces(child)
        if element.tag not in SPACED:
            child.tail = None
        if child.tag in DROPPED:
            element.remove(child)


def _new_names(root: Element, prefix: str) -> dict[str, str]:
    """New ids for the elements that others refer to, by their old ids."""
    used = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            used.update(REFERENCE.findall(value))
            if key == "href" and element.tag != "a":
                used.add(value[1:])
    found = dict.fromkeys(e.get("id", "") for e in root.iter())
    return {name: f"{prefix}{number}" for number, name in enumerate(n for n in found if n in used)}


def _attribute(tag: str, key: str, value: str, names: Mapping[str, str]) -> str | None:
    if key.startswith("on") or key == "target":
        return None
    if key == "id":
        return names[value]
    if key == "href" and tag != "a":
        if value.startswith("data:image/"):
            return value
        return f"#{names[value[1:]]}" if value[1:] in names else None
    value = REFERENCE.sub(lambda m: f"url(#{names.get(m[1], '')})", value)
    if key in COLORED:
        return GREY.sub(lambda m: _grey(int(m[1], 16)), value)
    if key in ("d", "x", "y"):
        return " ".join(LONG_NUMBER.sub(lambda m: f"{float(m[0]):.2f}", value).split())
    return value


def _grey(level: int) -> str:
    """A grey of Matplotlib, 0 (black) to 255 (white), as a mixture of text and background."""
    if level in (0, 255):
        return "currentColor" if level == 0 else "var(--paper)"
    return f"color-mix(in srgb, currentColor {100 - level / 2.55:.0f}%, var(--paper))"


def _link(element: Element, points: Mapping[str, Point]) -> None:
    point = points.get(element.attrib.pop("href", ""))
    if point is not None:
        element.attrib |= {"href": point.href, "class": "point", "aria-label": point.tip}
        title = Element("title")
        title.text = point.tip
        element.insert(0, title)
