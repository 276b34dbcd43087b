"""The five experiments. Each takes a Study and gives a Finding, whose claims are judged by the limits below."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from . import lesion, paths, shattering
from .base import Claim, Finding, Study
from .networks import KINDS, Network, error

WORSE = 2.0  # a deep plain network's training loss is at least so many times that of what it is compared with
HARMLESS = 0.1  # deleting a block costs at most this share of what deleting a plain network's layer does
CLIFF = 1 / 3  # in a smooth curve no step takes more than this share of the whole rise
MONOTONE, REORDERED = 0.9, -0.5  # rank correlations: error and number deleted, error and Kendall tau
SHORT = 0.9  # share of the gradient that paths shorter than the average path carry
ROBUST = 0.8  # mean error under deletion after stochastic depth is at most this share of the normal one
SHATTERED = 0.25  # correlation of a deep plain network's gradients is at most this share of the residual one's


def depth(study: Study) -> Finding:
    """Does a deep plain network train worse than a shallow one, and does the skip cure it?"""
    its, found, rows = study.settings, {}, []
    for kind in KINDS:
        found[kind] = []
        for blocks in its.depths:
            network, losses = study.trained(kind, blocks)
            last = max(its.steps // 10, 1)
            found[kind].append({
                "blocks": blocks, "losses": losses, "final_loss": statistics.fmean(losses[-last:]),
                "test_error": error(network, study.data.test_images, study.data.test_labels),
            })
    for plain, residual in zip(*found.values(), strict=True):
        values = [f"{its['final_loss']:.4f}" for its in (plain, residual)]
        errors = [f"{its['test_error']:.1%}" for its in (plain, residual)]
        rows.append([str(2 * plain["blocks"]), *values, *errors])
    shallow, deep, residual = found["plain"][0], found["plain"][-1], found["residual"][-1]
    over_shallow = deep["final_loss"] / shallow["final_loss"]
    over_residual = deep["final_loss"] / residual["final_loss"]
    claim = Claim(
        f"With {2 * deep['blocks']} layers a plain network ends with {over_shallow:.3g} times the training loss of one "
        f"with {2 * shallow['blocks']} and {over_residual:.3g} times a residual one's, and with the larger test error",
        min(over_shallow, over_residual) > WORSE
        and deep["test_error"] > max(shallow["test_error"], residual["test_error"]),
    )
    columns = ["layers", "plain: loss", "residual: loss", "plain: test error", "residual: test error"]
    return Finding("depth", "1. Depth", columns, rows, [claim], {"networks": found})


def deletion(study: Study) -> Finding:
    """Does a trained network bear that its blocks are deleted, one or many, or exchanged?"""
    its = study.settings
    plain, residual = study.trained("plain", its.plain_depth)[0], study.trained("residual", its.depth)[0]
    subjects = {"residual block": residual, "plain block": plain, "plain layer": lesion.single_layers(plain)}
    intact = {name: error(network, *study.test) for name, network in subjects.items()}
    single = {
        name: [error(lesion.without(network, i), *study.test) for i in range(network.depth)]
        for name, network in subjects.items()
    }
    many = {name: deleted_at_random(study, subjects[name]) for name in ("residual block", "plain layer")}
    rng, reordered = study.rng, []
    for swaps in its.swaps:
        for _ in range(its.draws if swaps else 1):
            order = lesion.swapped(its.depth, swaps, rng)
            wrong = error(lesion.arranged(residual, order), *study.test)
            reordered.append({"swaps": swaps, "kendall_tau": lesion.kendall_tau(order), "test_error": wrong})

    cost = {name: statistics.median(errors) - intact[name] for name, errors in single.items()}
    smooth = rank_correlation(**many["residual block"])
    steps = {name: largest_step(curve["errors"]) for name, curve in many.items()}
    tau = rank_correlation([row["kendall_tau"] for row in reordered], [row["test_error"] for row in reordered])
    claims = [
        Claim(
            f"Deleting one of {its.depth} residual blocks adds {cost['residual block']:.1%} to the test error in the "
            f"median (the worst {max(single['residual block']) - intact['residual block']:.0%}), deleting one of a "
            f"plain network's {2 * its.plain_depth} layers {cost['plain layer']:.0%}",
            cost["residual block"] <= HARMLESS * cost["plain layer"],
        ),
        Claim(
            f"Deleting more residual blocks raises the error smoothly (rank correlation {smooth:.2f}; the largest step "
            f"is {steps['residual block']:.0%} of the rise), deleting plain layers abruptly "
            f"({steps['plain layer']:.0%})",
            smooth >= MONOTONE and steps["residual block"] <= CLIFF < steps["plain layer"],
        ),
        Claim(
            f"The further residual blocks are reordered the larger the error: its rank correlation with Kendall's tau "
            f"is {tau:.2f}", tau <= REORDERED,
        ),
    ]
    rows = [
        [f"one {name} of {len(errors)}", f"{intact[name]:.1%}", f"{min(errors):.1%}",
         f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"]
        for name, errors in single.items()
    ]
    for swaps in its.swaps[1:]:
        errors = [row["test_error"] for row in reordered if row["swaps"] == swaps]
        rows.append([
            f"{swaps} swaps of residual blocks", f"{intact['residual block']:.1%}", f"{min(errors):.1%}",
            f"{statistics.median(errors):.1%}", f"{max(errors):.1%}",
        ])
    columns = ["deleted or exchanged", "intact error", "least", "median", "largest"]
    data = {"intact": intact, "single": single, "many": many, "reordered": reordered}
    return Finding("lesion", "2. Lesions: test error without training again", columns, rows, claims, data)


def path_lengths(study: Study) -> Finding:
    """Which of the 2^n paths through a residual network carry the gradient?"""
    its = study.settings
    network = study.trained("residual", its.depth)[0]
    images, labels = (part[: its.path_images] for part in study.test)
    norms = paths.gradient_norms(network, images, labels, its.path_draws, study.rng)
    of_paths, of_gradient = paths.by_length(norms)
    means = [statistics.fmean(draws) for draws in norms]
    shorter = sum(share for length, share in enumerate(of_gradient) if 2 * length < its.depth)
    shorter_paths = sum(share for length, share in enumerate(of_paths) if 2 * length < its.depth)
    length = paths.mean_length(of_gradient)
    claim = Claim(
        f"Paths through fewer than half of the {its.depth} blocks are {shorter_paths:.0%} of all and carry "
        f"{shorter:.1%} of the gradient at the input; its mean path length is {length:.1f}, that of the paths "
        f"{its.depth / 2:g}", shorter >= SHORT,
    )
    rows = [
        [str(k), f"{mean:.2e}", f"{paths_share:.2%}", f"{gradient_share:.2%}"]
        for k, (mean, paths_share, gradient_share) in enumerate(zip(means, of_paths, of_gradient, strict=True))
        if max(paths_share, gradient_share) >= 0.005
    ]
    columns = ["path length", "gradient norm of a path", "of all paths", "of the gradient"]
    data = {"norms": norms, "share_of_paths": of_paths, "share_of_gradient": of_gradient, "mean_length": length}
    return Finding("paths", "3. Gradient by path length, after training", columns, rows, [claim], data)


def stochastic_depth(study: Study) -> Finding:
    """Does training with random subsets of the blocks make them easier to delete?"""
    its, curves, loss = study.settings, {}, {}
    for name, drop_path in (("normal", 0.0), ("stochastic depth", its.drop_path)):
        network, losses = study.trained("residual", its.depth, drop_path)
        curves[name] = deleted_at_random(study, network)
        loss[name] = losses
    area = {name: statistics.fmean(curve["errors"]) for name, curve in curves.items()}
    intact = {name: curve["errors"][0] for name, curve in curves.items()}
    claim = Claim(
        f"After training with {its.drop_path:.0%} of the branches left out the test error under deletion, over all "
        f"numbers of blocks, is {area['stochastic depth']:.1%} in the mean against {area['normal']:.1%} (intact "
        f"{intact['stochastic depth']:.1%} against {intact['normal']:.1%})",
        area["stochastic depth"] <= ROBUST * area["normal"],
    )
    rows = [
        [f"{count} of {its.depth}", *(f"{curve['errors'][i]:.1%}" for curve in curves.values())]
        for i, count in enumerate(curves["normal"]["counts"])
    ]
    columns = ["deleted", *(f"{name} training" for name in curves)]
    data = {"drop_path": its.drop_path, "many": curves, "losses": loss}
    return Finding("stochastic_depth", "4. Stochastic depth: test error after deletion", columns, rows, [claim], data)


def gradient_correlation(study: Study) -> Finding:
    """How alike are the gradients at neighbouring inputs before training?"""
    its, found = study.settings, {kind: [] for kind in KINDS}
    images = study.data.images
    for kind in KINDS:
        for blocks in its.depths:
            lines = []
            for index in range(its.lines):
                ends = study.rng.sample(range(len(images)), 2 * its.lines)[2 * index : 2 * index + 2]
                network = shattering.calibrate(
                    study.fresh(kind, blocks, seed=study.seed * its.lines + index), images[:256]
                )
                gradients = shattering.input_gradients(
                    network, shattering.line(images[ends[0]], images[ends[1]], its.points)
                )
                lines.append(shattering.autocorrelation(gradients, its.points // 2))
            found[kind].append({"blocks": blocks, "correlation": torch.tensor(lines).mean(0).tolist()})
    rows = [
        [str(2 * plain["blocks"]), *(f"{row['correlation'][lag]:.3f}" for row in (plain, residual) for lag in (0, 3))]
        for plain, residual in zip(*found.values(), strict=True)
    ]
    deep = {kind: found[kind][-1]["correlation"][0] for kind in KINDS}
    claim = Claim(
        f"Between neighbours of {its.points} points from image to image, gradients of {2 * its.depths[-1]} plain "
        f"layers correlate by {deep['plain']:.2f}, of residual ones by {deep['residual']:.2f}",
        deep["plain"] <= SHATTERED * deep["residual"],
    )
    columns = ["layers", "plain: next", "4 places on", "residual: next", "4 places on"]
    title = "5. Correlation of input gradients along a line, before training"
    return Finding("gradient_correlation", title, columns, rows, [claim], {"networks": found})


EXPERIMENTS = (depth, deletion, path_lengths, stochastic_depth, gradient_correlation)


def deleted_at_random(study: Study, network: Network) -> dict[str, list]:
    """Mean test error after deleting 0 to all of the blocks, at most 17 counts: each draw is an order to delete in."""
    rng, depth = study.rng, network.depth
    orders = [rng.sample(range(depth), depth) for _ in range(study.settings.draws)]
    counts = sorted({depth * part // 16 for part in range(17)})
    errors = []
    for count in counts:
        choices = orders if 0 < count < depth else orders[:1]  # the others would delete the same
        lesioned = (lesion.without(network, *order[:count]) for order in choices)
        errors.append(statistics.fmean(error(its, *study.test) for its in lesioned))
    return {"counts": counts, "errors": errors}


def largest_step(curve: Sequence[float]) -> float:
    """The largest rise from one value to the next, as a share of the range of all."""
    span = max(curve) - min(curve)
    return max(b - a for a, b in zip(curve, curve[1:], strict=False)) / span if span else 0.0


def rank_correlation(counts: Sequence[float], errors: Sequence[float]) -> float:
    """Spearman's, ties sharing the mean of their ranks; 0 where either is constant."""
    if min(len(set(counts)), len(set(errors))) < 2:
        return 0.0
    return statistics.correlation(_ranks(counts), _ranks(errors))


def _ranks(values: Sequence[float]) -> list[float]:
    below = {value: sum(other < value for other in values) for value in set(values)}
    same = {value: sum(other == value for other in values) for value in set(values)}
    return [below[value] + (same[value] - 1) / 2 for value in values]
