"""Reader of a parallel corpus, T5: errors name file and line; splits are by chapter."""

import pytest

from models.translation.corpus import ClassicalModernCorpus, find_chapters, read_chapter


def write_chapter(root, chapter, source, target):
    folder = root / "双语数据" / chapter
    folder.mkdir(parents=True)
    for name, content in (("source.txt", source), ("target.txt", target)):
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def library(tmp_path):
    for book in ("甲", "乙"):
        for chapter in range(50):
            lines = [f"{book}{chapter}句{i}" for i in range(3)]
            text = "\n".join(lines) + "\n"
            write_chapter(tmp_path, f"{book}书/第{chapter}章", text, text.replace("句", "语句"))
    return tmp_path


def test_read_chapter_aligns_lines_and_strips_marks_and_blanks(tmp_path):
    """T5: byte order mark, carriage returns, no final newline."""
    folder = write_chapter(
        tmp_path, "书", b"\xef\xbb\xbf" + "王怒\r\n客归 ".encode(), "君王生气\n客人回家\n"
    )
    assert read_chapter(folder) == [("王怒", "君王生气"), ("客归", "客人回家")]


def test_read_chapter_of_unequal_lines_names_file_and_line(tmp_path):
    """T5."""
    folder = write_chapter(tmp_path, "书", "一\n二\n三\n", "一\n二\n")
    with pytest.raises(ValueError, match=r"source.txt has 3 lines and target.txt has 2: line 3"):
        read_chapter(folder)


def test_read_chapter_of_bad_bytes_names_file_line_and_byte(tmp_path):
    """T5."""
    folder = write_chapter(tmp_path, "书", "一\n二\n", "一\n".encode() + b"a\xff\n")
    with pytest.raises(ValueError, match=r"target.txt, line 2, byte 2: invalid start byte"):
        read_chapter(folder)


@pytest.mark.parametrize(("sides", "missing"), [(("一", None), "target"), ((None, "一"), "source")])
def test_find_chapters_of_half_a_chapter_names_the_missing_file(sides, missing, tmp_path):
    """T5."""
    write_chapter(tmp_path, "书", *sides)
    with pytest.raises(ValueError, match=rf"has no {missing}.txt next to it"):
        find_chapters(tmp_path)


def test_find_chapters_of_a_wrong_root_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="pass as root the folder that contains 双语数据"):
        find_chapters(tmp_path)
    (tmp_path / "双语数据").mkdir()
    with pytest.raises(ValueError, match=r"contains no source.txt"):
        find_chapters(tmp_path)


def test_corpus_with_empty_and_long_pairs_drops_and_counts_them(tmp_path):
    """T5."""
    write_chapter(tmp_path, "书", "一\n\n二二二二\n三\n", "一\n二\n二\n\n")
    corpus = ClassicalModernCorpus(tmp_path, max_characters=3)
    report = corpus.report
    assert (report.n_chapters, report.n_pairs, report.n_empty, report.n_long) == (1, 1, 2, 1)


def test_corpus_with_truncated_pairs_keeps_the_beginning(tmp_path):
    """T5."""
    write_chapter(tmp_path, "书", "一二三四\n", "一\n")
    corpus = ClassicalModernCorpus(tmp_path, max_characters=3, long_pairs="truncate")
    assert corpus.chapters["双语数据/书"] == [("一二三", "一")]
    assert corpus.report.n_long == 1


def test_corpus_splits_by_chapter_and_loses_nothing(library):
    """T5: never by line."""
    corpus = ClassicalModernCorpus(library, val_fraction=0.2, test_fraction=0.2)
    parts = [{pair.source.split("句")[0] for pair in part} for part in corpus.splits()]
    assert sum(map(len, parts)) == 100
    assert len(set.union(*parts)) == 100
    assert all(len(part) >= 10 for part in parts)
    assert sum(map(len, corpus.splits())) == corpus.report.n_pairs == 300


def test_corpus_split_of_a_chapter_does_not_depend_on_the_others(library):
    """T5: the split depends on a hash of the path."""
    corpus = ClassicalModernCorpus(library)
    before = {chapter: corpus.split_of(chapter) for chapter in corpus.chapters}
    write_chapter(library, "丙书", "新\n", "新\n")
    grown = ClassicalModernCorpus(library)
    assert all(grown.split_of(chapter) == split for chapter, split in before.items())
    assert set(before.values()) == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_characters": 0}, "max_characters=0"),
        ({"long_pairs": "split"}, "long_pairs='split'"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "val_fraction=0.6 and test_fraction=0.5"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
    ],
)
def test_corpus_with_a_wrong_option_repeats_it(options, message, library):
    with pytest.raises(ValueError, match=message):
        ClassicalModernCorpus(library, **options)
