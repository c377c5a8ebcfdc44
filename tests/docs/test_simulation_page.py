"""Goal: the table of the page on simulation is what the program gives. Method: make the rows of the smallest clusters again."""

from __future__ import annotations

from scripts import simulation_page


def test_rows_of_the_page_are_what_the_program_gives() -> None:
    text = simulation_page.PAGE.read_text(encoding="utf-8")
    table = text[text.index(simulation_page.BEGIN) : text.index(simulation_page.END)].splitlines()[3:]
    small = simulation_page.SIZES[:2]
    made = [
        simulation_page.line_of(name, simulation_page.row_of(size, demand))
        for size in small
        for name, demand in simulation_page.SCHEMES.items()
    ]

    assert len(table) == len(simulation_page.SIZES) * len(simulation_page.SCHEMES)
    assert table[: len(made)] == made
    assert simulation_page.PICTURE.stat().st_size < 200_000
