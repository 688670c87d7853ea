"""Writes docs/configuration.md from the declaration; a test fails when it is stale.

Run as `python -m shoal.configs.reference` in a checkout.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shoal.configs.fields import Field, sampling_settings, section_types, settings
from shoal.configs.loader import shipped_layouts

PATH = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_HEAD = """\
# Configuration

Made from `configs/schema.py` and `configs/sampling.py` by `python -m shoal.configs.reference`; do not edit by hand.

A setting has one declaration and four spellings: a key in a YAML file, a flag of `shoal`, a Python keyword of `LLM`,
and `--set section.key=VALUE`, which takes any of them. What is given on the command line goes before Python keywords,
these before the YAML file, that before the checkpoint's `generation_config.json` (sampling only), that before the
default. `shoal explain MODEL` prints every value and where it came from.

```yaml
# my.yaml, used as: shoal generate --config my.yaml -p "..."
model:
  path: demo
parallel:
  tensor: 2
cache:
  memory: 512MiB
sampling:
  temperature: 0.7
```

- `--config` takes a path or the name of a shipped layout: {layouts}. Shipped layouts carry no model.
- YAML is read by the 1.2 core schema: `1e-5` is a number, `no` is a text, `0o17` is octal. Duplicate keys, tags and
  unknown keys are refused; anchors are fine. NaN and infinity are refused everywhere.
- Sizes are bytes, or `4GiB`, `512MiB` (powers of 1024), `1.5GB` (powers of 1000).
- On the command line a list is `2,1,1`, a truth value `--flag` or `--no-flag`, nothing `null`. Flags are not
  abbreviated.
- Every mistake is reported at once, before a process starts, with the key, the value, the limit and the nearest key.
- `--seed` is the engine's seed (`runtime.seed`): the seeds of requests without one are drawn from it, so the same
  command gives the same text. A seed of the requests themselves is `sampling.seed` (`--set sampling.seed=7`,
  `SamplingParams(seed=7)`).
"""

_SAMPLING_HEAD = """\
## sampling

The defaults of requests that bring no `SamplingParams`. Flags of `shoal generate` and `shoal chat`; the keyword is the
field's name in `SamplingParams(...)`. `--stop` and `--bad-words` may be repeated.
"""


def reference() -> str:
    """The whole page."""
    parts = [_HEAD.format(layouts=", ".join(f"`{name}`" for name in shipped_layouts()))]
    for section, kind in section_types().items():
        fields = [field for field in settings().values() if field.section == section]
        parts.append(f"## {section}\n\n{_first_line(kind.__doc__)}\n\n{_table(fields)}")
    parts.append(f"{_SAMPLING_HEAD}\n{_table(sampling_settings().values())}")
    return "\n".join(parts)


def _table(fields: Iterable[Field]) -> str:
    lines = ["| Key | Flag | Python keyword | Default | Accepts | Meaning |", "|---|---|---|---|---|---|"]
    for field in fields:
        flags = "`--set` only" if field.key == "sampling.seed" else ", ".join(f"`{flag}`" for flag in field.flags)
        cells: list[Any] = [
            f"`{field.key}`",
            flags,
            f"`{field.keyword}`",
            f"`{field.default_text}`",
            field.accepts,
            field.description,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0]


def main() -> int:
    """Write the page into a checkout's docs folder."""
    if not (PATH.parents[1] / "pyproject.toml").is_file():
        print(f"{PATH.parents[1]} is no checkout of shoal: nothing written", file=sys.stderr)
        return 1
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(reference(), encoding="utf-8")
    print(PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
