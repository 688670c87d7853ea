"""ResolvedConfig: the checked settings together with where each value came from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shoal.configs.fields import SAMPLING, sampling_settings, settings
from shoal.configs.problems import ConfigError, Problem
from shoal.configs.sampling import SamplingParams
from shoal.configs.sampling_check import contradictions, convert_sampling
from shoal.configs.schema import ShoalConfig

COMMAND_LINE = "command line"
KEYWORD = "Python keyword"
DEFAULT = "default"
GENERATION_CONFIG = "generation_config.json"

_FROM_CHECKPOINT = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of a generation_config that are defaults of sampling, and their names here (vLLM takes the same)."""

_MAX_BYTES = 1 << 20


class Setting(NamedTuple):
    """One line of `shoal explain`: the key, its value, and where the value came from."""

    key: str
    value: Any
    source: str


class ResolvedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `load_config` returns. sources: for every key, sampling's included, where its value came from.

    A source is "command line", "Python keyword", "<file>:<line>", "generation_config.json" or "default".
    """

    config: ShoalConfig
    sources: dict[str, str]

    def settings(self) -> list[Setting]:
        """Every setting in the declared order, sampling last."""
        rows = []
        for field in settings().values():
            value = getattr(getattr(self.config, field.section), field.name)
            rows.append(Setting(field.key, value, self.sources[field.key]))
        for field in sampling_settings().values():
            value = self.config.sampling.get(field.name, field.default)
            rows.append(Setting(field.key, value, self.sources[field.key]))
        return rows

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """The parameters of a request that gives none, with `changes` on top. Raises ConfigError for a bad change."""
        values, problems = convert_sampling({**self.config.sampling, **changes})
        problems = problems or contradictions(values)
        if problems:
            raise ConfigError(problems)
        return SamplingParams(**values)

    def with_generation_config(self, folder: Path) -> "ResolvedConfig":
        """These settings with the checkpoint's sampling defaults: below everything that was set, above the defaults.

        Without a generation_config.json in `folder` nothing changes. `do_sample: false` there means temperature 0.
        Raises ConfigError when the file cannot be used, also together with what was set.
        """
        found = {
            name: value
            for name, value in _generation_defaults(folder / GENERATION_CONFIG).items()
            if self.sources[f"{SAMPLING}.{name}"] == DEFAULT
        }
        if not found:
            return self
        values, problems = convert_sampling(found)
        merged = {**self.config.sampling, **values}
        problems = problems or contradictions(merged)
        if problems:
            raise ConfigError([msgspec.structs.replace(problem, source=GENERATION_CONFIG) for problem in problems])
        sources = self.sources | {f"{SAMPLING}.{name}": GENERATION_CONFIG for name in values}
        return ResolvedConfig(config=msgspec.structs.replace(self.config, sampling=merged), sources=sources)


def _generation_defaults(path: Path) -> dict[str, Any]:
    """Sampling fields of a Hugging Face generation_config.json; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            [Problem(key=GENERATION_CONFIG, value=str(path), message=f"cannot be read: {error}")]
        ) from None
    if not isinstance(content, dict):
        raise ConfigError([Problem(key=GENERATION_CONFIG, value=str(path), message="must hold a JSON object")])
    found = {ours: content[theirs] for theirs, ours in _FROM_CHECKPOINT.items() if content.get(theirs) is not None}
    if content.get("do_sample") is False:
        for name in ("top_k", "top_p", "min_p"):
            found.pop(name, None)
        found["temperature"] = 0.0
    return found
