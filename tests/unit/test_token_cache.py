"""The cache of tokenised rows: keyed by content, made once, made again where it is damaged."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import DataError
from peft_dist.data.tokenize import tokenize_rows
from tests.tiny import CHAT_TEMPLATE, tiny_recipe, tiny_tokenizer, tokenised, write_jsonl


def error_of(*args: Any, **sections: Any) -> str:
    with pytest.raises(DataError) as caught:
        tokenised(*args, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cache_entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache").iterdir() if path.is_dir()]


def test_the_cache_follows_content_not_paths_or_times(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    rows = tokenised(tmp_path, [{"text": "a"}, {"text": 3}], data={"max_bad_rows": 1})
    (entry,) = cache_entries(tmp_path)
    made = (entry / "rows.json").stat().st_mtime_ns
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    recipe = tiny_recipe(tmp_path / "elsewhere", tmp_path / "moved.jsonl", data={"max_bad_rows": 1})
    again = tokenize_rows(recipe, "train", tmp_path / "cache")
    assert (entry / "rows.json").stat().st_mtime_ns == made
    assert again.fingerprint == rows.fingerprint
    assert again.sources[0].reports == (f"{tmp_path}/moved.jsonl:2: text is 3, not text",)


def test_other_rows_options_or_tokenizers_get_their_own_cache(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    tokenised(tmp_path, [{"text": "a"}])
    tokenised(tmp_path, [{"text": "b"}])
    tokenised(tmp_path, [{"text": "b"}], data={"max_length": 9})
    tiny_tokenizer(tmp_path / "model", begin=True)
    tokenised(tmp_path, [{"text": "b"}])
    tiny_tokenizer(tmp_path / "model", begin=True, chat_template=CHAT_TEMPLATE + " ")
    tokenised(tmp_path, [{"text": "b"}])
    assert len(cache_entries(tmp_path)) == 5


def test_a_lower_limit_of_bad_rows_is_not_hidden_by_the_cache(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    rows: list[dict[str, Any]] = [{"text": "a"}, {"text": 3}]
    tokenised(tmp_path, rows, data={"max_bad_rows": 1})
    assert "train.jsonl:2: text is 3" in error_of(tmp_path, rows)


@pytest.mark.parametrize("name", ["tokens", "trained", "offsets", "rows.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    tiny_tokenizer(tmp_path / "model")
    before = tokenised(tmp_path, [{"text": "the cat"}, {"text": "the dog"}])
    tokens = before.tokens.tolist()  # now, for the damaged file is the one that is mapped
    (entry,) = cache_entries(tmp_path)
    path = entry / name
    content = path.read_bytes()
    match damage:
        case "flip":
            middle = len(content) // 2
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        case "cut":
            path.write_bytes(content[:-1])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
    after = tokenised(tmp_path, [{"text": "the cat"}, {"text": "the dog"}])
    assert path.read_bytes() == content
    assert after.fingerprint == before.fingerprint
    assert after.tokens.tolist() == tokens
    assert cache_entries(tmp_path) == [entry]


def test_what_a_killed_process_left_is_no_cache_and_is_cleared(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    tokenised(tmp_path, [{"text": "a"}])
    (entry,) = cache_entries(tmp_path)
    leftover = entry.with_name(f".{entry.name}.partial-killed")
    entry.rename(leftover)
    (leftover / "rows.json").unlink()
    os.utime(leftover, (0, 0))  # a younger one may have a living owner on another node
    tokenised(tmp_path, [{"text": "a"}])
    assert cache_entries(tmp_path) == [entry]


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    error_of(tmp_path, [{"text": "a"}, {"text": 3}])
    assert cache_entries(tmp_path) == []


@pytest.mark.slow
def test_two_processes_at_once_make_one_cache(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": f"the cat {n}"} for n in range(3000)])
    (tmp_path / "recipe.json").write_text(tiny_recipe(tmp_path / "model", path).model_dump_json())
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from peft_dist.config.recipe import Recipe\n"
        "from peft_dist.data.tokenize import tokenize_rows\n"
        "folder = Path(sys.argv[1])\n"
        "recipe = Recipe.model_validate_json((folder / 'recipe.json').read_text())\n"
        "rows = tokenize_rows(recipe, 'train', folder / 'cache')\n"
        "print(rows.fingerprint, rows.n_rows, int(rows.tokens.sum()))\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1]
    assert " 3000 " in said[0]
    assert len(cache_entries(tmp_path)) == 1


def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "cache").write_text("a file in the way")
    error = error_of(tmp_path, [{"text": "a"}])
    assert error.startswith(f"{tmp_path}/cache: cannot keep tokenised rows: ")


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        tiny_tokenizer(tmp_path / "model")
        path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the cat " * 50}] * 2000)
        with pytest.raises(DataError, match="No space left on device; free space there"):
            tokenize_rows(tiny_recipe(tmp_path / "model", path), "train", small)
        assert not [path for path in small.iterdir() if path.is_dir()]
    finally:
        subprocess.run(["umount", str(small)], check=True)
