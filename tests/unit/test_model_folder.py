"""A model that is not there: the cause, and a remedy that is true of it."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from peft_dist.common.errors import ModelError
from peft_dist.model.weights import model_folder

ANSWER = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/m"))


def test_a_folder_without_a_model_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.name: no config.json in .*; name the folder that"):
        model_folder(str(tmp_path), None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (GatedRepoError("x", response=ANSWER), "accept them on its page, and set HF_TOKEN"),
        (RepositoryNotFoundError("x", response=ANSWER), "for a private model set HF_TOKEN"),
        (OSError("no network"), "that can be reached (OSError); check the path, or download"),
    ],
)
def test_a_hub_that_gives_no_model_is_answered_by_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        model_folder("some/model", None)
    assert str(caught.value).startswith("model.name: ") and told in str(caught.value)
