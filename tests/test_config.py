"""Settings: one declaration each, read from flags, environment and file, refused by name and value."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vecsvc.config import BuildSettings, ServeSettings, option, read_settings
from vecsvc.errors import ConfigError


def test_defaults_are_what_is_declared() -> None:
    assert read_settings(ServeSettings, "serve", {}, {}) == ServeSettings()


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "vecsvc.toml"
    file.write_text("[serve]\nport = 1\nmax_k = 1\nmax_batch = 1\n")
    settings = read_settings(
        ServeSettings, "serve", {"port": "3", "max_k": None}, {"VECSVC_PORT": "2", "VECSVC_MAX_K": "2"}, file
    )
    assert (settings.port, settings.max_k, settings.max_batch) == (3, 2, 1)


def test_an_explicit_zero_is_not_taken_for_a_missing_value() -> None:
    assert read_settings(ServeSettings, "serve", {"reload_poll_s": "0", "port": 0}, {}).reload_poll_s == 0


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"VECSVC_PORT": "tcp://10.0.0.1:80"}, "VECSVC_PORT must be an integer, got 'tcp://10.0.0.1:80'"),
        ({"VECSVC_PORT": "70000"}, "VECSVC_PORT must be between 0 and 65535, got '70000'"),
        ({"VECSVC_DEVICE": "tpu"}, "VECSVC_DEVICE must be one of cpu, cuda, got 'tpu'"),
        ({"VECSVC_TIMEOUT_MS": "nan"}, "VECSVC_TIMEOUT_MS must be finite, got 'nan'"),
        ({"VECSVC_MAXK": "3"}, "VECSVC_MAXK names no setting"),
    ],
)
def test_a_bad_variable_is_refused_by_name_and_value(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings(ServeSettings, "serve", {}, environ)
    assert message in str(error.value)


def test_settings_of_another_command_are_no_typo() -> None:
    read_settings(ServeSettings, "serve", {}, {"VECSVC_SHARDS": "3"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serve]\nprot = 1\n", "[serve] has no setting 'prot'; it knows: "),
        ("[server]\nport = 1\n", "[server] is no table; known are [serve], [route], [build]"),
        ("port = 1\n", "[port] is no table"),
        ("[serve]\nport = 1.5\n", "vecsvc.toml: [serve] port must be an integer, got 1.5"),
        ("[serve]\nport = true\n", "vecsvc.toml: [serve] port must be an integer, got True"),
        ("[serve\n", "vecsvc.toml: "),
        ("serve = 3\n", "serve must be a table"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_value(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "vecsvc.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_settings(ServeSettings, "serve", {}, {}, file)
    assert message in str(error.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no settings file .*none\.toml"):
        read_settings(ServeSettings, "serve", {}, {}, tmp_path / "none.toml")


@pytest.mark.parametrize("cls", [ServeSettings, BuildSettings])
def test_every_setting_says_what_it_means_and_every_number_its_bounds(cls: type) -> None:
    for field in dataclasses.fields(cls):
        assert field.metadata["meaning"], field.name
        if isinstance(field.default, int | float):
            assert field.metadata["low"] is not None, field.name


def test_an_option_keeps_its_bounds_for_others_to_read() -> None:
    @dataclasses.dataclass(frozen=True)
    class Knobs:
        breadth: int = option(3, "more of it", low=1, high=9)

    [field] = dataclasses.fields(Knobs)
    assert (field.metadata["low"], field.metadata["high"]) == (1, 9)
