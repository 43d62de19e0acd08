"""Tables of the README, from files."""

from benchmarks.readme import PARTS, sections
from benchmarks.results import Spread, save


def test_sections_name_what_was_not_measured_with_its_command(tmp_path):
    texts = sections(tmp_path)
    assert len(texts) == len(PARTS)
    for name, text in zip(PARTS, texts, strict=True):
        module, _, part = name.partition("-")
        command = f"{module} --parts {part}" if part else module
        assert f"run python -m benchmarks.{command} first" in text


def test_section_quotes_figures_with_command_and_date(tmp_path, capsys):
    ratio = Spread.of([1.1, 1.2, 1.3])
    figures = {"snapshot": ratio, "restore": ratio, "amortised_share": 0.0012}
    save("snapshot", tmp_path, figures)
    text = sections(tmp_path)[[*PARTS].index("snapshot")]
    assert "| snapshot | x1.200 (1.150 to 1.250) |" in text
    assert "| a snapshot's share of a step | 0.12 % |" in text
    assert "snapshot.json" in text
