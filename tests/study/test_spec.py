"""Studies as files: the cells that they make, and every mistake that is refused before anything runs."""

import re
from pathlib import Path

import pytest

from tests.study.support import CHOSEN, TREE, study_file, without_search, write_study
from transmamba_jax.study import results
from transmamba_jax.study.spec import Cell, find_study, keep_file, load_study, merge, resolve_point

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_compares_with_a_plain_transformer(path):
    """A plain one has no convolution, which alone lets a layer recall. Ablations compare a layer with itself."""
    study = load_study(path)
    rate = study.config["optimizer"]["learning_rate"]
    configs = [study.cell_config(Cell(arm, "search", rate, 0), Path()) for arm in study.arms()]
    kinds = {(each.model.conv_width, each.model.conv_activation, each.model.transpoints) for each in configs}
    assert (1, "none", (configs[0].data.seq_len,)) in kinds or study.name == "s4_ablations"


def test_the_rule_makes_a_search_and_new_seeds(tmp_path):
    study = write_study(tmp_path)
    search = study.search_cells()
    assert len(search) == 2 * 2 * 5 * 3
    assert len({cell.name for cell in search}) == len(search)
    assert {cell.arm for cell in search} == {"attention/n2", "attention/n4", "ssm/n2", "ssm/n4"}
    report = study.report_cells({"ssm/n4": 3e-3})
    assert [cell.name for cell in report] == [f"ssm/n4/report-rate0.003-seed{seed}" for seed in (10, 11, 12, 13, 14)]


def test_a_cell_has_the_config_of_its_variants_rate_seed_and_split(tmp_path):
    study = write_study(tmp_path)
    config = study.cell_config(Cell(("attention", "n2"), "search", 3e-3, 2), Path("there"))
    assert (config.model.transpoints, config.model.state_dim, config.workdir) == ((12,), 2, "there")
    assert (config.train.seed, config.data.seed, config.data.eval_split) == (2, 2, "validation")
    assert config.optimizer.learning_rate * config.optimizer.learning_rate_scale == pytest.approx(3e-3)
    reported = study.cell_config(Cell(("ssm", "n4"), "report", 1e-2, 10), Path("there"))
    assert (reported.model.transpoints, reported.model.state_dim) == ((0,), 4)
    assert (reported.data.eval_split, reported.optimizer.learning_rate_scale) == ("test", 1.0)


def test_quick_keeps_the_named_variants_and_needs_no_rule(tmp_path):
    study = write_study(tmp_path, quick=True)
    assert study.quick
    assert [cell.name for cell in study.search_cells()] == [
        "attention/n4/search-rate0.01-seed0",
        "ssm/n4/search-rate0.01-seed0",
    ]


def test_rates_of_an_earlier_study_replace_the_search(tmp_path):
    study = load_study(without_search(tmp_path))
    assert study.search_cells() == []
    rates = {arm: choice.rate for arm, choice in results.choose_rates(study, tmp_path).items()}
    assert rates == {arm: float(rate) for arm, rate in CHOSEN.items()}
    cells = study.report_cells(rates)
    assert len(cells) == 4 * 5
    assert cells[-1].name == "ssm/n4/report-rate0.03-seed14"
    quick = {"axes": {"state": ["n4"]}, "chosen_rates": {"attention/n4": 1e-2, "ssm/n4": 1e-2}, "seeds": [10]}
    assert load_study(without_search(tmp_path, quick=quick), quick=True).chosen_rates == quick["chosen_rates"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": [1e-2]}, "leave out learning_rates and search_seeds"),
        ({"chosen_rates": {**CHOSEN, "ssm/n8": 1e-2}}, "one rate for each of attention/n2.*; ssm/n8 differs"),
        ({"chosen_rates": {"ssm/n4": 1e-2}}, "one rate for each of attention/n2.*; attention/n2 differs"),
        ({"chosen_rates": {**CHOSEN, "ssm/n4": 0}}, "chosen_rates positive"),
        ({"chosen_rates": {**CHOSEN, "ssm/n4": "much"}}, "a learning rate must be a number, found 'much'"),
        ({"seeds": [10]}, "at least 5 seeds are needed, found 1"),
    ],
)
def test_a_mistake_in_rates_of_an_earlier_study_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_study(without_search(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'"),
        ({"seeds": [10, 11, 12, 13]}, r"5 seeds are needed, found 5, 3 and 4"),
        ({"learning_rates": [1e-2, 1e-2, 1e-2, 1e-3, 3e-2]}, r"at least 5 learning rates.*found 3, 3 and 5"),
        ({"seeds": [2, 11, 12, 13, 14]}, "seed 2 is among search_seeds and seeds"),
        ({"better": "bigger"}, "better must be 'higher' or 'lower', found 'bigger'"),
        ({"figures": ["bar"]}, "unknown figure 'bar'; did you mean 'bars'"),
        ({"question": 3}, "question must be of type str, found 3"),
        ({"axes": {}}, "axes must have at least one axis"),
        ({"axes": {"schedule": {"a b": None}}}, "no slash and no space, found 'a b'"),
        ({"axes": {"schedule": {"x": {"model": {"transpoint": [0]}}}}}, r"cell x/.*unknown option 'model.transpoint'"),
        ({"axes": {"schedule": {"x": {"model": {"transpoints": ["T/0"]}}}}}, "must be a number of tokens, T, or T/"),
        ({"axes": {"schedule": {"x": {"model": {"num_groups": 3}}}}}, "cell x/.*num_groups must divide"),
        ({"config": {**TREE["config"], "optimizer": {}}}, "config.optimizer.learning_rate must be given"),
        ({"quick": {"axes": {"state": ["n8"]}}}, "unknown variant of axis state 'n8'"),
    ],
)
def test_a_mistake_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_study(study_file(tmp_path, **changes), quick="quick" in changes)


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("question: why\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"study.yaml: missing keys: claim, source, config"):
        load_study(path)


def test_points_scale_with_the_row():
    assert [resolve_point(point, 64) for point in (0, "T/4", "T/2", "T", 7)] == [0, 16, 32, 64, 7]


def test_a_variant_may_name_its_schedule(tmp_path):
    study = write_study(tmp_path, axes={"schedule": {"named": {"model": {"transpoints": "transformer"}}}})
    assert study.cell_config(Cell(("named",), "search", 1e-2, 0), tmp_path).model.transpoints == (12,)


def test_merge_replaces_lists_and_leaves_its_arguments_alone():
    tree = {"a": {"b": [1, 2], "c": 3}}
    assert merge(tree, {"a": {"b": [4]}, "d": 5}) == {"a": {"b": [4], "c": 3}, "d": 5}
    assert tree == {"a": {"b": [1, 2], "c": 3}}


@pytest.mark.parametrize("quick", [False, True])
def test_a_folder_knows_its_study(tmp_path, quick):
    path = study_file(tmp_path)
    study = load_study(path, quick)
    keep_file(path, study, tmp_path / "out")
    assert find_study(tmp_path / "out") == study
    with pytest.raises(ValueError, match="must be the folder of a study, with its YAML file, found none"):
        find_study(tmp_path / "nothing")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_every_study_of_the_project_loads(path, quick):
    assert load_study(path, quick).arms()


MEASURE = {"2T-kept": {"data": {"seq_len": 24}}, "2T": {"data": {"seq_len": 24}, "transpoints": "scaled"}}


def test_an_evaluation_after_training_keeps_or_scales_the_transpoints(tmp_path):
    axes = {"schedule": {"mixed": {"model": {"transpoints": [0, "T/2"]}}}}
    study = write_study(tmp_path, axes=axes, measure=MEASURE)
    config = study.cell_config(Cell(("mixed",), "report", 1e-2, 10), tmp_path)
    kept, scaled = (study.measure_config(config, name) for name in MEASURE)
    assert (config.model.transpoints, config.data.seq_len) == ((0, 6), 12)
    assert (kept.model.transpoints, kept.data.seq_len, kept.data.eval_split) == ((0, 6), 24, "test")
    assert (scaled.model.transpoints, scaled.data.seq_len) == ((0, 12), 24)
    quick = {"measure": {"4T": {"data": {"seq_len": 48}}}, "axes": {}}
    assert set(write_study(tmp_path, quick=True, axes=axes, measure=MEASURE).measure) == set(MEASURE)
    path = study_file(tmp_path, axes=axes, measure=MEASURE, quick={**TREE["quick"], **quick})
    assert list(load_study(path, quick=True).measure) == ["4T"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dta": {}}, "unknown key of measure 2T: 'dta'; did you mean 'data'"),
        (3, "measure 2T must be a mapping of data, eval, transpoints, classes, search, found 3"),
        ({"search": 2}, "measure 2T: search must be a share of the cost in [0, 1], found 2"),
        ({"transpoints": "doubled"}, "measure 2T: transpoints must be kept or scaled, found 'doubled'"),
        ({"data": {"seq_len": 0}}, "measure 2T: data.seq_len must be >= 1, found 0"),
        (
            {"data": {"source": "synthetic:recall?keys=10&values=11"}},
            "measure 2T: model.vocab_size=20 is too small for synthetic:recall?keys=10&values=11, which has ids 0..20",
        ),
    ],
)
def test_a_wrong_evaluation_after_training_is_named(tmp_path, entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_study(tmp_path, measure={"2T": entry})


@pytest.mark.parametrize("entry", [{"classes": True}, {"search": 0.5}])
def test_what_reads_one_source_is_refused_for_a_mixture(tmp_path, entry):
    mixed = {"mixture": {"bytes:a": 0.5, "bytes:b": 0.5}, "seq_len": 12, "batch_size": 4}
    config = {**TREE["config"], "model": {**TREE["config"]["model"], "vocab_size": 256}, "data": mixed}
    with pytest.raises(ValueError, match="classes and search read one source, found the mixture of bytes:a, bytes:b"):
        write_study(tmp_path, config=config, metric="eval/loss", measure={"2T": entry})
