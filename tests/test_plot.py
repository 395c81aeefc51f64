"""tools/plot.py: the figures show what the logs and the formulas say."""

import numpy as np
import pytest
import torch

from activations import ACTIVATIONS, Activation
from plumbing.command import UserError
from runs import error
from tools import plot


@pytest.fixture
def axes_of(monkeypatch):
    """A function that calls one of plot.draw_… and returns the axes of its figure."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))

    def axes_of(draw, *folders):
        draw(*folders, None)
        return figures.pop().axes

    return axes_of


def curves(axis):
    return {line.get_label(): np.column_stack(line.get_data()) for line in axis.lines}


def texts(labels):
    return [label.get_text() for label in labels]


def band(axis, number):
    """(lowest, highest) y of a band at its last x."""
    points = axis.collections[number].get_paths()[0].vertices
    last = points[points[:, 0] == points[:, 0].max()]
    return last[:, 1].min(), last[:, 1].max()


def test_loss(fake_run, axes_of):
    """Runs that have not ended count as far as all of their group have come."""
    runs = [
        fake_run("relu2", 1, [5.0, 3.0, 2.0, 1.0]),
        fake_run("relu2", 2, [5.0, 3.2, 2.4, 1.2]),
        fake_run("xielu", 2, [5.0, 3.1, 2.3, 1.1]),
        fake_run("xielu", 1, [5.0, 2.9, 1.8, 0.9]),
    ]
    log = runs[0][0] / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-2]) + '{"kind": "val", "st')
    left, right = axes_of(plot.draw_loss, [folder for folder, _ in runs])
    assert np.allclose(curves(left)["relu2"], [[10_000, 3.1], [20_000, 2.2]])  # the untrained model is left out
    assert np.allclose(curves(left)["xielu"], [[10_000, 3.0], [20_000, 2.05], [30_000, 1.0]])
    assert len(left.lines) == 4 + 2  # a thin line for each seed
    # of one seed: 1.8 − 2.0 and 2.3 − 2.4; two rows and two seeds make Student's interval with one degree of freedom
    assert np.allclose(curves(right)["xielu"], [[10_000, -0.1], [20_000, -0.15]])
    half = 12.7062 * 0.05
    assert np.allclose(band(right, 0), (-0.15 - half, -0.15 + half), rtol=1e-4)
    assert "nats" in left.get_ylabel() and "tokens" in left.get_xlabel() and "relu2, seeds: 2" in right.get_ylabel()


def test_runs_that_share_no_seed_or_diverged(fake_run, axes_of):
    first, _ = fake_run("relu2", 1, [5.0, 3.0, 2.0])
    diverged, _ = fake_run("gelu", 1, [5.0, 3.0, float("nan")])
    left, right = axes_of(plot.draw_loss, [first, diverged])
    assert all(map(np.isfinite, (*left.get_ylim(), *right.get_ylim())))
    with pytest.raises(UserError, match="relu2, xielu share no seed"):
        plot.draw_loss([first, fake_run("xielu", 2, [5.0, 3.0, 2.0])[0]], None)


def row_of(label, ratio, difference, half):
    interval = None if half is None else [difference - half, difference + half]
    name, reference = f"{label} tokens_per_parameter={ratio}", f"xielu tokens_per_parameter={ratio}"
    sizes = {"tokens": 1000 * ratio, "parameters": 1000}
    return sizes | {"name": name, "reference": reference, "difference": difference, "interval": interval}


def test_budget(axes_of):
    rows = [row_of("relu2", 10, -0.02, 0.01), row_of("relu2", 40, 0.03, 0.01), row_of("xielu lr=1", 10, 0.01, None)]
    rows += [row_of("xielu", ratio, None, None) for ratio in (10, 40)]
    (axis,) = axes_of(plot.draw_budget, [rows[1], rows[0], *rows[2:]])
    ratios, differences = next(line for line in axis.lines if line.get_linewidth() == 1.6).get_data()
    assert np.allclose(differences, [-0.02, 0.03]) and axis.get_xscale() == "log"
    assert np.allclose(ratios, [10, 40], rtol=0.03)  # moved a little, so that bars do not hide each other
    assert texts(axis.get_xticklabels()) == ["10", "40"]
    assert texts(axis.get_legend().get_texts()) == ["xielu", "relu2", "xielu lr=1"]
    bar = axis.containers[0].lines[2][0].get_segments()[0]
    assert np.allclose(bar[:, 1], [-0.03, -0.01])
    with pytest.raises(UserError, match="no difference to draw"):
        plot.draw_budget(rows[3:], None)


def test_tuning(axes_of):
    inf = float("inf")
    tuning = {
        "xielu": {0.002: [1.0, 1.2], 0.001: [1.5, 1.5], 0.004: [9.0, 9.0]},
        "relu2": {0.002: [1.3, 1.3], 0.001: [1.2, 1.2], 0.004: [inf, 1.4]},
        "gelu": {0.001: [inf, inf], 0.002: [inf, inf]},
    }
    (axis,) = axes_of(lambda out: plot.draw_tuning(tuning, "lr", out))
    lines = [line.get_xydata() for line in axis.lines]
    assert np.allclose(lines[0], [[0.001, 1.5], [0.002, 1.1], [0.004, 9.0]]) and np.allclose(lines[1], [0.002, 1.1])
    assert np.allclose(lines[2][:2], [[0.001, 1.2], [0.002, 1.3]]) and np.isnan(lines[2][2, 1])
    assert np.allclose(lines[3], [0.001, 1.2]) and lines[4][0, 0] == 0.004  # the cross of relu2
    assert [line.get_marker() for line in axis.lines] == ["o", "o", "o", "o", "x", "o", "o", "x", "x"]
    low, high = axis.get_ylim()
    assert low < 1.1 and 1.5 < high < 9  # a loss that is far higher than the others leaves the figure
    assert axis.get_xscale() == "log" and texts(axis.get_xticklabels()) == ["0.001", "0.002", "0.004"]
    assert texts(axis.get_legend().get_texts()) == list(tuning)


def test_scalars(fake_run, axes_of):
    alphas = {"alpha_p": [[0.8, 0.8], [0.9, 0.7], [1.0, 0.5]], "alpha_n": [[0.8, 0.8], [0.8, 0.8], [0.7, 0.6]]}
    more = {"alpha_p": [[0.8, 0.8], [0.9, 0.7], [1.2, 0.3]], "alpha_n": alphas["alpha_n"]}
    runs = [fake_run("xielu", 1, [5.0, 3.0, 2.0], alphas), fake_run("xielu", 2, [5.0, 3.0, 2.0], more)]
    by_step, by_layer, n_by_step, n_by_layer = axes_of(plot.draw_scalars, [folder for folder, _ in runs])
    assert np.allclose(curves(by_step)["layer 1"][:, 1], [0.8, 0.9, 1.1])
    assert np.allclose(curves(by_step)["layer 2"][:, 1], [0.8, 0.7, 0.4])
    assert np.allclose(by_layer.lines[0].get_xydata(), [[1, 1.1], [2, 0.4]])
    assert np.allclose(n_by_layer.lines[0].get_xydata(), [[1, 0.7], [2, 0.6]])
    assert by_step.get_ylabel() == "xielu: αp" and n_by_step.get_ylabel() == "xielu: αn"
    log = runs[0][0] / "log.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])  # this run has only begun
    by_step, *_ = axes_of(plot.draw_scalars, [folder for folder, _ in runs])
    assert np.allclose(curves(by_step)["layer 1"], [[0, 0.8]])


def test_every_activation_is_drawn_with_its_gradient(axes_of, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "elu", Activation("eˣ − 1 below 0", torch.nn.ELU))  # whose alpha is a number
    names = [name for name in ACTIVATIONS if name not in ("xielu_reference", "xielu_inverted")]  # drawn as xielu
    all_axes = axes_of(plot.draw_activations)
    axes = dict(zip(names, all_axes))
    for name, axis in axes.items():
        assert axis.get_title() == name
        drawn = curves(axis)
        x, value = drawn["activation"].T
        # the drawn gradient is the slope of the drawn activation, away from a kink
        slope = np.gradient(value, x)
        away = np.abs(x) > 0.02
        assert np.allclose(slope[away][1:-1], drawn["gradient"][away][1:-1, 1], atol=2e-3), name
    assert np.allclose(curves(axes["glu"])["activation"][:, 1], 1 / (1 + np.exp(-x)))  # at y = 1
    assert not any(axis.get_title() for axis in all_axes[len(names) :])
    assert axes["swiglu"].texts[0].get_text() == "y = 1"
    assert axes["xsilu"].texts[0].get_text() == "α = 0.25"


def test_xielu_is_drawn_by_its_formula(axes_of):
    left, right = axes_of(plot.draw_xielu)
    x, value = curves(left)["αp = 0.8, αn = 0.8 (start)"].T
    assert np.allclose(value, np.where(x > 0, 0.8 * x**2, 0.8 * (np.expm1(x) - x)) + 0.5 * x, atol=1e-6)
    x, gradient = curves(right)["αp = 0.8, αn = 0.8 (start)"].T
    assert np.allclose(gradient, np.where(x > 0, 1.6 * x, 0.8 * np.expm1(x)) + 0.5, atol=1e-6)


def test_figures_are_written(fake_run, tmp_path, capsys):
    scalars = {"alpha_p": [[0.8] * 24] * 3, "alpha_n": [[0.8] * 24] * 3}
    folder, _ = fake_run("xielu", 1, [5.0, 3.0, 2.0], scalars)
    for name, folders in {"loss": [folder], "scalars": [folder], "xielu": [], "activations": []}.items():
        path = tmp_path / "new" / f"{name}.png"
        assert plot.main([name, *map(str, folders), f"--out={path}"]) == 0
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
        assert str(path) in capsys.readouterr().out
    assert plot.main(["xielu", f"--out={tmp_path}/again.png"]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "new/xielu.png").read_bytes()


MISTAKES = [
    (["losses"], "invalid choice: 'losses' (choose from"),
    (["loss"], "give the folders of runs"),
    (["loss", "nothing"], "nothing is not the folder of a run"),
    (["loss", "relu2-seed=1", "again"], "relu2 with seed 1 is given twice"),
    (["loss", "xielu-seed=1"], "too few validations"),
    (["loss", "relu2-seed=1", "begun"], "begun is not the folder of a run, or it has no validation in its log yet"),
    (["scalars", "relu2-seed=1"], "no trained scalars"),
    (["scalars", "relu2-seed=1", "xielu-seed=1"], "differ only in their seed"),
    (["xielu", "relu2-seed=1"], "is not drawn from runs"),
    (["loss", "relu2-seed=1", "--out=figure.pdf"], "--out=figure.pdf is not the name of a .png file"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes(fake_run, tmp_path, monkeypatch, capsys, arguments, message):
    fake_run("relu2", 1, [5.0, 3.0, 2.0])
    fake_run("relu2", 1, [5.0, 3.0, 2.0], folder="again")
    fake_run("xielu", 1, [5.0, 3.0])
    begun, _ = fake_run("xielu", 2, [5.0, 3.0], folder="begun")
    (begun / "log.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, *arguments, main=plot.main)
