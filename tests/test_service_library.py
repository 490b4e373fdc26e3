"""The library: pictures, their index, and that one owner never meets another's."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from diptych.errors import DiptychError
from diptych.webui.library import INDEX, Library

APPLE = "a red apple\nNegative prompt: blur\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64"


def picture(colour: str = "red", size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture
def library(tmp_path):
    library = Library(tmp_path / "outputs")
    yield library
    library.close()


def test_a_saved_picture_carries_its_infotext_and_is_found_by_its_prompt(library):
    entry = library.save(picture(), APPLE, "", "5")
    assert library.search("", "APPLE red") == [entry] and library.search("", "pear") == []
    with Image.open(entry.path) as saved:
        assert saved.info["parameters"] == APPLE and saved.size == (8, 6)
    assert entry.prompt == "a red apple"


def test_a_search_for_thousands_of_words_is_a_search(library):
    library.save(picture(), APPLE, "")
    assert len(library.search("", "red " * 20_000)) == 1


TEXTS = ["", "Steps: 3", "a\nb\nNegative prompt: c\nSteps: 3", "größe 🍎 日本", "100%_off\\"]


@pytest.mark.parametrize("infotext", TEXTS)
def test_any_infotext_comes_back_as_it_went_in(library, infotext):
    entry = library.save(picture(), infotext, "")
    assert library.get("", entry.id) == entry and entry.infotext == infotext


@pytest.mark.parametrize("words", ["%", "_", "\\", "' OR 1=1 --", '"; DROP TABLE pictures'])
def test_words_of_a_search_are_words_and_nothing_else(library, words):
    library.save(picture(), APPLE, "")
    assert library.search("", words) == [] and len(library.search("")) == 1


def test_an_owner_sees_reads_and_deletes_only_what_is_his(library):
    hers = library.save(picture(), APPLE, "ann")
    his = library.save(picture(), APPLE, "bob")
    assert library.search("ann") == [hers] and library.search("bob") == [his] and library.search("") == []
    assert library.get("bob", hers.id) is None and not library.delete("bob", hers.id) and hers.path.exists()
    assert library.delete("ann", hers.id) and not hers.path.exists() and library.search("ann") == []


@pytest.mark.parametrize("owner", ["../../etc", "a/b", "..", "a b", "ann", "ann!", "日本", "x" * 300])
def test_an_owners_name_never_leads_out_of_the_folder(library, owner):
    entry = library.save(picture(), "", owner)
    assert entry.path.resolve().is_relative_to(library.folder / "users")
    assert library.search(owner) == [entry]


def test_a_name_never_leads_out_of_the_folder_and_never_takes_anothers_place(library):
    entries = [library.save(picture(), "", "", "../../../x") for _ in range(5)]
    assert len({entry.path for entry in entries}) == 5
    assert all(entry.path.parent == library.folder for entry in entries)


def test_a_lost_index_is_made_anew_from_the_pictures(tmp_path):
    first = Library(tmp_path)
    first.save(picture(), APPLE, "")
    first.save(picture(size=(3, 4)), "a pear\nSteps: 2", "ann")
    first.close()
    (tmp_path / INDEX).unlink()
    again = Library(tmp_path)
    assert [entry.infotext for entry in again.search("")] == [APPLE]
    assert [(entry.prompt, entry.width, entry.height) for entry in again.search("ann")] == [("a pear", 3, 4)]
    again.close()


@pytest.mark.parametrize("damage", [b"not a database at all" * 100, b""])
def test_a_damaged_index_is_made_anew_from_the_pictures(tmp_path, damage):
    first = Library(tmp_path)
    first.save(picture(), APPLE, "")
    first.close()
    (tmp_path / INDEX).write_bytes(damage)
    again = Library(tmp_path)
    assert [entry.prompt for entry in again.search("")] == ["a red apple"]
    again.close()


def test_pictures_put_there_by_other_programs_are_found_and_lost_ones_forgotten(library, tmp_path):
    gone = library.save(picture(), APPLE, "")
    gone.path.unlink()
    picture("blue").save(library.folder / "holiday.jpg")
    (library.folder / "notes.png").write_text("this is no picture")
    (tmp_path / "secret.png").write_bytes(b"x")
    (library.folder / "link.png").symlink_to(tmp_path / "secret.png")
    library.sync()
    assert [entry.path.name for entry in library.search("")] == ["holiday.jpg"]


def test_many_threads_may_save_at_once(library):
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda i: library.save(picture(), f"number {i}", "", "same"), range(24)))
    assert len({entry.path for entry in entries}) == 24
    assert len(library.search("", limit=100)) == 24
    assert not list(library.folder.glob("*.part*"))


def test_pages_of_a_search_do_not_overlap_and_begin_with_the_newest(library):
    entries = [library.save(picture(), str(i), "") for i in range(5)]
    pages = [library.search("", limit=2, offset=offset) for offset in (0, 2, 4)]
    assert [entry.id for page in pages for entry in page] == [entry.id for entry in reversed(entries)]


def test_a_folder_that_cannot_hold_pictures_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiptychError, match="file"):
        Library(tmp_path / "file")
