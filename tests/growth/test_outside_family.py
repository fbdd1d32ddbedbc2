"""A growth family of another package: growth.family="MODULE:NAME"."""

import re

import numpy as np
import pytest
from conftest import with_fields
from growth_cases import SMALL, growth_error

from flmjax.config import ConfigError, GrowthConfig, RunConfig, StageConfig, resize
from flmjax.config.validate import validate
from flmjax.growth.growth import Growth

PAGE = '''
"""New MLP units are fresh, but read with the factor 0; their moments start at 0."""
from flmjax.config import FamilyTraits
from flmjax.growth import zero
from flmjax.growth.families import EXACT, Family

FAMILY = Family("as zero, with shrunk fresh values", EXACT, zero.AXES, lambda leaf, x, fresh, config: x + 0.0,
                traits=FamilyTraits(("shrink",)))
WORD = "no family"
MASKED = FAMILY._replace(traits=FamilyTraits(("ramp_steps",)))
'''


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A module `my_growth` in the current folder, which is not on Python's path."""
    (tmp_path / "my_growth.py").write_text(PAGE)
    (tmp_path / "broken_growth.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)


def test_a_family_of_another_package_grows_exactly(page):
    assert growth_error(SMALL, "my_growth:FAMILY", {"mlp_dim": 41, "embed_dim": 37}) <= 1e-12


def test_a_family_of_another_package_reads_its_settings(page):
    stages = (StageConfig("a"), StageConfig("b", mlp_dim=1024, growth=GrowthConfig("my_growth:FAMILY", shrink=0.5)))
    assert validate(RunConfig(stages=stages)).schedule[1].model.mlp_dim == 1024
    stages = (StageConfig("a"), StageConfig("b", mlp_dim=1024, growth=GrowthConfig("my_growth:FAMILY", split="equal")))
    with pytest.raises(ConfigError, match=r"split=equal is not read by family 'my_growth:FAMILY'"):
        validate(RunConfig(stages=stages))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("my_growht:FAMILY", "growth family 'my_growht:FAMILY': my_growht cannot be imported: ModuleNotFoundError"),
        ("broken_growth:FAMILY", "broken_growth cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ("my_growth:FAMILI", "my_growth has no 'FAMILI'; did you mean FAMILY?"),
        ("my_growth:", "my_growth has no ''"),
        ("my_growth:WORD", "is no flmjax.growth.families.Family but str"),
        ("my_growth:MASKED", "cannot read ramp_steps"),
        ("zerro", "did you mean zero"),
    ],
)
def test_a_family_that_cannot_be_read_is_one_line(family, message, page):
    stages = (StageConfig("a"), StageConfig("b", mlp_dim=1024, growth=GrowthConfig(family)))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        validate(RunConfig(stages=stages))
    assert "\n" not in str(error.value)


def test_growth_with_a_family_of_another_package_has_its_claim(page):
    growth = Growth(SMALL, resize(with_fields(SMALL), mlp_dim=41), GrowthConfig("my_growth:FAMILY"))
    assert growth.family.is_exact
    assert growth.family.needs_training is None
    assert np.all(growth.dimensions["mlp"].source[:29] == np.arange(29))
