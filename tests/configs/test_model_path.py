"""Finding the checkpoint's folder, without a network."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from shoal.configs.model_path import is_local, resolve_model_path
from shoal.configs.problems import ConfigError


def refusal(path: str, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        resolve_model_path(path, revision)
    return str(refused.value)


def test_folder_with_a_config_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model_path(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("llama").resolve() == folder
    assert "did you mean llama?" in refusal("./lama")
    assert "only hub repositories have revisions" in refusal("llama", "main")


def test_folders_and_files_that_are_no_checkpoint_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("")
    assert "has no config.json" in refusal(str(tmp_path)) and "weights.bin" in refusal(str(tmp_path))
    assert "give the folder" in refusal(str(tmp_path / "weights.bin"))
    assert "no such folder" in refusal(str(tmp_path / "missing"))
    assert "GGUF files are not supported" in refusal("llama-q4.gguf")
    (tmp_path / "model.gguf").write_text("")
    assert "holds GGUF files" in refusal(str(tmp_path))


def test_what_looks_like_a_path_is_never_sent_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    for path in ("./x", "../x", "/x/y", "~/x", "a/b/c", ".", "x.safetensors", "-x", "a b"):
        assert is_local(path)
        refusal(path)
    assert not is_local("gpt2") and not is_local("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError("no route to host"), OfflineModeIsEnabled("offline mode")])
def test_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch, failure: OSError) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal("someone/some-model")
    assert str(failure) in message and "model.path = someone/some-model" in message


def test_download_takes_only_what_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_path("someone/some-model", "v1") == tmp_path
    assert asked["repo"] == "someone/some-model" and asked["revision"] == "v1"
    assert not any("bin" in pattern or "gguf" in pattern for pattern in asked["allow_patterns"])


def test_demo_is_the_folder_in_the_package() -> None:
    assert (resolve_model_path("demo") / "config.json").is_file()
    assert "only hub repositories have revisions" in refusal("demo", "main")
