"""The declaration as data: names are unique, defaults are legal, the documentation is current."""

import pytest

from shoal.configs.fields import Field, convert, sampling_settings, settings
from shoal.configs.reference import PATH, reference

ALL = [*settings().values(), *sampling_settings().values()]


@pytest.mark.parametrize("field", ALL, ids=lambda field: field.key)
def test_every_setting_is_described_and_its_default_is_legal(field: Field) -> None:
    assert field.description.endswith(".")
    assert convert(field, field.default) == field.default


def test_flags_and_keywords_are_unique() -> None:
    flags = [flag for field in settings().values() for flag in field.flags]
    assert len(set(flags)) == len(flags)
    keywords = [field.keyword for field in settings().values()]
    assert len(set(keywords)) == len(keywords)
    shared = {flag for field in sampling_settings().values() for flag in field.flags} & set(flags)
    assert shared == {"--seed"}, "only the engine's seed is a flag of that name"


def test_flags_are_spelt_as_vllm_users_know_them() -> None:
    flags = {flag for field in settings().values() for flag in field.flags}
    assert flags >= {
        "--tensor-parallel-size",
        "-tp",
        "--pipeline-parallel-size",
        "-pp",
        "--data-parallel-size",
        "-dp",
        "--enable-expert-parallel",
        "--max-model-len",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--gpu-memory-utilization",
        "--block-size",
        "--dtype",
        "--seed",
        "--load-format",
        "--served-model-name",
    }


def test_configuration_page_is_current() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `python -m shoal.configs.reference`"
