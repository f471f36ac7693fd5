"""Configuration: every fault is named, with a hint, and what is built says the same table again."""

from __future__ import annotations

from typing import Annotated

import pytest
import tomli_w
from pydantic import Field

from simlab.core.config import Registry, as_table, differences, load_tables, nearest
from simlab.core.errors import ConfigError

shapes: Registry = Registry("shape", "simlab.core.samples")
houses: Registry = Registry("house", "simlab.core.samples")


@shapes.register("disc")
class Disc:
    radius: float = Field(1.0, gt=0)


@houses.register("hut")
class Hut:
    rooms: int = Field(2, ge=1)
    roof: Annotated[Disc, shapes.field] = Disc()

    def __post_init__(self) -> None:
        if self.rooms == 13:
            raise ConfigError("rooms: 13 is one too many")


def test_a_table_builds_and_is_written_back_the_same() -> None:
    hut = houses.build({"kind": "hut", "rooms": 3, "roof": {"kind": "disc", "radius": 2}})
    assert (hut.rooms, hut.roof.radius) == (3, 2.0)
    table = as_table(hut)
    assert table == {"kind": "hut", "rooms": 3, "roof": {"kind": "disc", "radius": 2.0}}
    assert houses.build(table) == hut


def test_a_kind_alone_means_its_defaults() -> None:
    assert houses.build("hut") == Hut()
    assert houses.build(Hut()) == Hut()


def test_every_fault_is_shown_together_with_hints() -> None:
    with pytest.raises(ConfigError) as caught:
        houses.build({"kind": "hut", "rooms": 0, "rof": 1, "roof": {"kind": "disc", "radios": 1}})
    text = str(caught.value)
    assert "3 faults" in text
    assert "rooms: Input should be greater than or equal to 1 (found 0)" in text
    assert "rof: unknown key; did you mean 'roof'?" in text
    assert "roof.radios: unknown key; did you mean 'radius'?" in text


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("hutt", "did you mean 'hut'?"),
        ({"rooms": 2}, "no kind given"),
        (3, "expected a house"),
        ({"kind": "hut", "rooms": 13}, "rooms: 13 is one too many"),
        ({"kind": "hut", "roof": "disk"}, "roof: unknown shape kind 'disk'; did you mean 'disc'?"),
    ],
)
def test_a_fault_says_what_and_where(table: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        houses.build(table)
    assert words in str(caught.value)


def test_the_constructor_says_the_same_as_the_table() -> None:
    with pytest.raises(ConfigError, match=r"^Hut: rooms: Input should be greater") as caught:
        Hut(rooms=-1)
    assert caught.value.where == "Hut"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Hut().rooms = 5


def test_registering_a_kind_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        shapes.register("disc")(type("Other", (), {}))


def test_overrides_win_over_smoke_and_smoke_over_the_file(tmp_path) -> None:
    path = tmp_path / "case.toml"
    path.write_text(
        'solver = "auto"\n[family]\nkind = "darcy"\ncells = 64\n'
        "[campaign]\nn = 100\n[smoke]\nfamily.cells = 8\ncampaign.n = 4\n"
    )
    assert load_tables(path)["family"]["cells"] == 64
    assert "smoke" not in load_tables(path)
    small = load_tables(path, smoke=True, overrides=["family.cells=16", "solver.rtol=1e-6"])
    assert small["family"] == {"kind": "darcy", "cells": 16}
    assert small["campaign"]["n"] == 4
    assert small["solver"] == {"kind": "auto", "rtol": 1e-6}


def test_another_kind_replaces_the_whole_table(tmp_path) -> None:
    path = tmp_path / "case.toml"
    path.write_text('[solver]\nkind = "krylov"\nmethod = "cg"\n')
    changed = load_tables(path, overrides=['solver={kind="direct"}'])
    assert changed["solver"] == {"kind": "direct"}


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no case file"), ("[family", "not valid TOML")],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path, text, words) -> None:
    path = tmp_path / "case.toml"
    (tmp_path / "cases.toml").write_text(tomli_w.dumps({"title": "near"}))
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_tables(path)
    if text is None:
        assert "cases.toml" in str(caught.value)


def test_an_override_without_a_value_is_refused(tmp_path) -> None:
    path = tmp_path / "case.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"--set family\.cells: expected"):
        load_tables(path, overrides=["family.cells"])


def test_differences_name_the_key() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]
    assert differences({"a": 1}, {"a": 1, "d": 2}) == ["d: None -> 2"]
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []


def test_nearest_lists_everything_when_nothing_is_near() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == "; known: alpha, beta"
