"""examples/residual_study.py: its paths, lesions and readers against their definitions, and a run from end to end."""

import copy
import json
import pickle
import random
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from examples import residual_study
from examples.study import lesion, paths, shattering
from examples.study.data import cifar10
from examples.study.experiments import largest_step, rank_correlation
from examples.study.networks import Network, error
from resfuse import blocks


def network(kind="residual", depth=3, seed=0, **options):
    """In float64 and eval mode, with statistics and BatchNorm parameters that are not those of a fresh one."""
    torch.manual_seed(seed)
    found = Network(kind, depth, width=4, **options).double()
    shattering.calibrate(found, torch.randn(16, 1, 8, 8, dtype=torch.float64))
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    return found


def images(count=5):
    return torch.randn(count, 1, 8, 8, dtype=torch.float64), torch.arange(count) % 10


def test_all_paths_add_up_to_the_gradient():
    net, (x, labels) = network(), images()
    every = [chosen for length in range(4) for chosen in combinations(range(3), length)]
    fs = paths.branches(net)
    gradients = {chosen: paths.path_gradient(net, fs, chosen, x, labels) for chosen in every}
    x.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)
    torch.testing.assert_close(sum(gradients.values()), expected, rtol=1e-10, atol=1e-12)
    without_the_longest = sum(gradients.values()) - gradients[0, 1, 2]
    assert (without_the_longest - expected).norm() > 1e-6 * expected.norm()


def test_a_path_is_the_product_of_its_jacobians():
    net, (x, labels) = network(), images(1)
    found = paths.path_gradient(net, paths.branches(net), {1}, x, labels)
    inputs = [net.stem(x)]
    for block in net.body:
        inputs.append(block(inputs[-1]))
    # Written out: the classifier's gradient at the last sum, through block 1's branch alone, then through the stem.
    last = inputs[-1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net.classify(last), labels, reduction="sum"), last)
    middle = inputs[1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.body[1](middle) - middle, middle, gradient)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(net.stem(x), x, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_norms_of_every_length_and_their_shares():
    net, (x, labels) = network(), images()
    norms = paths.gradient_norms(net, x, labels, 5, random.Random(0))
    assert [len(draws) for draws in norms] == [1, 3, 3, 1]
    fs = paths.branches(net)
    single = [paths.path_gradient(net, fs, {i}, x, labels).flatten(1).norm(dim=1).mean().item() for i in range(3)]
    assert sorted(norms[1]) == pytest.approx(sorted(single))
    of_paths, of_gradient = paths.by_length([[8.0], [4.0, 0.0], [1.0], [3.0]])
    assert of_paths == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8])
    assert of_gradient == pytest.approx([0.4, 0.3, 0.15, 0.15])
    assert paths.mean_length(of_gradient) == pytest.approx(1.05)


def test_paths_need_an_identity_skip():
    with pytest.raises(ValueError, match="identity skip"):
        paths.branches(network("plain"))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_deleted_block_is_a_network_built_without_it(kind):
    net, (x, _) = network(kind), images()
    shorter = Network(kind, 2, width=4).double().eval()
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("body.1.")}
    shorter.load_state_dict({name.replace("body.2.", "body.1."): value for name, value in state.items()})
    before = net(x)
    torch.testing.assert_close(lesion.without(net, 1)(x), shorter(x))
    assert not torch.allclose(shorter(x), before)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)  # the network itself is as it was


def test_swapped_blocks_and_kendalls_tau():
    net, (x, _) = network(), images()
    expected = copy.deepcopy(net)
    expected.body = torch.nn.Sequential(net.body[2], net.body[1], net.body[0])
    torch.testing.assert_close(lesion.arranged(net, [2, 1, 0])(x), expected(x))
    assert sorted(lesion.swapped(6, 4, random.Random(0))) == list(range(6))
    assert lesion.swapped(6, 0, random.Random(0)) == list(range(6)) != lesion.swapped(6, 1, random.Random(0))
    assert [lesion.kendall_tau(order) for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1])] == pytest.approx([1, -1, 1 / 3])


def test_the_layers_of_a_plain_network():
    net, (x, _) = network("plain"), images()
    layers = lesion.single_layers(net)
    torch.testing.assert_close(layers(x), net(x))
    y = net.body[0](net.stem(x))
    y = net.body[1].conv2(F.relu(net.body[1].bn2(y)))  # block 1 without its first layer
    torch.testing.assert_close(lesion.without(layers, 2)(x), net.classify(net.body[2](y)))
    with pytest.raises(ValueError, match="beside a skip"):
        lesion.single_layers(network("residual"))


def test_error_is_counted_in_eval_mode_only():
    net, (x, labels) = network(), images(7)
    right = (net(x).argmax(1) == labels).sum().item()
    assert error(net, x, labels, batch=3) == pytest.approx(1 - right / 7)
    with pytest.raises(AssertionError):
        error(net.train(), x, labels)


def test_autocorrelation_and_curves():
    same, turning = torch.ones(6, 3), torch.eye(2).repeat(3, 1)
    assert shattering.autocorrelation(same, 2) == pytest.approx([1, 1])
    assert shattering.autocorrelation(turning, 2) == pytest.approx([0, 1])
    assert largest_step([0.0, 0.1, 0.4, 0.5]) == pytest.approx(0.6)
    assert rank_correlation([1, 2, 3], [5, 7, 9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [5, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [4, 4, 4]) == 0


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_is_read(tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    rng, written = np.random.default_rng(0), {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        written[name] = rng.integers(0, 256, (2, 3072), dtype=np.uint8), rng.integers(0, 10, 2).tolist()
        (folder / name).write_bytes(pickle.dumps({b"data": written[name][0], b"labels": written[name][1]}))
    data = cifar10(tmp_path)
    assert data.images.shape == (10, 3, 32, 32) and data.test_images.shape == (2, 3, 32, 32)
    pixels, labels = written["data_batch_2"]
    assert data.labels[2:4].tolist() == labels and data.test_labels.tolist() == written["test_batch"][1]
    # A row holds 1024 values of red, then green, then blue, each row by row.
    assert data.images[3, 1, 2, 5].item() == pytest.approx(pixels[1, 1024 + 2 * 32 + 5] / 127.5 - 1)
    (folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4"):
        cifar10(tmp_path)


def test_quick_run_writes_all_experiments(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    code = residual_study.main(["--quick", "--out", str(tmp_path), "--seed", "1"])
    found = json.loads((tmp_path / "residual-study.json").read_text())
    experiments = found["experiments"]
    assert list(experiments) == ["depth", "lesion", "paths", "stochastic_depth", "gradient_correlation"]
    claims = [claim["held"] for its in experiments.values() for claim in its["claims"]]
    assert len(claims) == 7 and found["held"] == all(claims) and code == (0 if found["held"] else 1)
    assert found["seed"] == 1 and found["environment"]["versions"]["torch"] == torch.__version__
    assert found["fallbacks"] == []
    assert sum(experiments["paths"]["share_of_gradient"]) == pytest.approx(1)
    assert (tmp_path / "residual-study.png").stat().st_size > 10_000


def test_networks_are_made_of_fused_blocks():
    assert all(type(block) is blocks.ResidualBlock for block in network().body)
