"""What is removed of a run that came to nothing, and what is not."""

from __future__ import annotations

from pathlib import Path

from sim.run_folder import remove_unused, there


def made(folder: Path) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    return folder


def test_a_folder_with_what_hydra_writes_goes_up_to_what_was_there(tmp_path: Path) -> None:
    kept = there(tmp_path / "new")
    folder = made(tmp_path / "new" / "run")
    (folder / "run.log").touch()
    remove_unused(folder, kept)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_anything_else_stays(tmp_path: Path) -> None:
    for name, content in (("run.log", "a line"), ("notes.txt", "")):
        folder = made(tmp_path / name.partition(".")[0])
        (folder / name).write_text(content)
        remove_unused(folder, there(tmp_path))
        assert (folder / name).is_file()


def test_a_folder_without_anything_of_hydras_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.log").touch()
    remove_unused(tmp_path / "mine", there(tmp_path))
    assert (tmp_path / "mine" / "run.log").is_file()


def test_a_link_that_leads_nowhere_hides_no_other_error(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    (folder / "run.log").symlink_to(tmp_path / "nowhere")
    remove_unused(folder, there(tmp_path))
    assert (folder / "run.log").is_symlink()


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    remove_unused(folder, there(folder))
    assert folder.is_dir()
