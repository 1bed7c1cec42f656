"""The picture of a terminal: what was printed, as a terminal would have shown it."""

from xml.etree import ElementTree

from scripts.demo_picture import BLANK, COLUMNS, draw


def test_it_shows_what_was_printed() -> None:
    said = f"starting . . .\rready\n\n> 1 < 2 & so on\n{'x' * (COLUMNS + 5)}\n"
    texts = [element.text or "" for element in ElementTree.fromstring(draw("vllm-orthrus demo", said)).iter()]
    shown = [text for text in texts if not text.startswith(("text{", "The demonstration"))]
    assert [text.replace(BLANK, " ") for text in shown if text.strip()] == [
        *("$ vllm-orthrus demo", "ready", "> 1 < 2 & so on"),
        *("x" * COLUMNS, "x" * 5),
    ]
