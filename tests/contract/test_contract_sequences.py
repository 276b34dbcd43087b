"""Whatever is done to a model, in any order, a fused one stays its eager twin."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from test_contract_state import COPIES
from torch import nn
from twins import alike, is_fused

import resfuse
from resfuse.testing.cases import CASES, make_block

NETWORKS = [("small-strided",), ("small-basic-strided",), ("small-preact-bottleneck", "small-strided")]
# Of outputs and buffers, of gradients and parameters: in float32 a value now and then rounds to the other side of a
# ReLU's kink, and takes its gradient with it.
TOLERANCES = {torch.float64: (1e-7, 1e-7), torch.float32: (1e-3, 0.03)}
LAYOUTS = torch.channels_last, torch.contiguous_format
ANY = st.integers(0, 30)  # which of a model's modules or parameters, counted round
INPUTS = dict(
    shape=st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(3, 9)), seed=st.integers(0, 99),
    layout=st.sampled_from(LAYOUTS),
)  # fmt: skip


# Hooks that show in the values; copies of a module share them.


def cosine_of_input(module, inputs):
    return (inputs[0].cos(),)


def cosine_of_output(module, inputs, output):
    return output.cos()


def tripled(module, gradients, _):
    return tuple(None if g is None else 3 * g for g in gradients)


HOOKS = {
    "register_forward_pre_hook": (cosine_of_input, (nn.Conv2d, nn.BatchNorm2d)),
    "register_forward_hook": (cosine_of_output, (nn.Conv2d, nn.BatchNorm2d)),
    "register_full_backward_hook": (tripled, nn.Conv2d),  # a BatchNorm's output is rectified in place, which it forbids
}


def inner_modules(model, kinds):
    return [module for module in model.modules() if isinstance(module, kinds)]


def norms(model):
    return inner_modules(model, nn.BatchNorm2d)


def pick(found: list, which: int):
    return found[which % len(found)]


def hooks_of(module) -> list[dict]:
    return [module._forward_pre_hooks, module._forward_hooks, module._backward_hooks]


def is_hooked(block) -> bool:
    """Then it is not converted, and runs its original forward where it was."""
    return any(any(hooks_of(module)) for module in block.modules())


def fallbacks(model) -> int:
    """Calls of fused blocks that ran the original forward."""
    return sum(count for block in model if is_fused(block) for count, _ in block.resfuse_state.fallbacks.values())


def state(model) -> dict[str, torch.Tensor]:
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **gradients}


class Twins(RuleBasedStateMachine):
    """An eager model and ours, which is fused or not at any time; every rule does the same to both."""

    @initialize(names=st.sampled_from(NETWORKS), dtype=st.sampled_from(list(TOLERANCES)),
                layout=st.sampled_from(LAYOUTS), fused=st.booleans(), pace=st.integers(1, 3))  # fmt: skip
    def make(self, names, dtype, layout, fused, pace):
        blocks = [make_block(CASES[name], seed, dtype, layout) for seed, name in enumerate(names)]
        self.models = [nn.Sequential(*blocks), nn.Sequential(*copy.deepcopy(blocks))]
        self.channels = CASES[names[0]].in_channels
        self.fused = [False] * len(blocks)
        self.pace, self.done = pace, 0
        self.new_optimizers()
        if fused:
            self.fuse("auto")

    def new_optimizers(self):
        self.optimizers = [torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9) for model in self.models]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.models[0].parameters()).dtype

    # What is done to ours alone

    @rule(backend=st.sampled_from(["auto", "eager"]))
    def fuse(self, backend):
        ours = self.models[1]
        assert resfuse.fuse(ours, config=resfuse.FuseConfig(backend)) is ours
        self.fused = [fused or not is_hooked(block) for fused, block in zip(self.fused, ours, strict=True)]

    @rule()
    def unfuse(self):
        assert resfuse.unfuse(self.models[1]) is self.models[1]
        self.fused = [False] * len(self.fused)

    # What is done to both

    @rule(training=st.booleans())
    def train(self, training):
        for model in self.models:
            model.train(training)

    @rule(which=ANY, frozen=st.booleans())
    def freeze(self, which, frozen):
        for model in self.models:
            pick(norms(model), which).train(not frozen)

    @rule(which=ANY, eps=st.sampled_from([1e-5, 1e-3, 0.1]), momentum=st.sampled_from([0.1, 0.7, 0.0, None]))
    def set_norm(self, which, eps, momentum):
        for model in self.models:
            norm = pick(norms(model), which)
            norm.eps, norm.momentum = eps, momentum

    @rule(which=ANY, wanted=st.booleans())
    def ask_for_a_gradient(self, which, wanted):
        for model in self.models:
            pick(list(model.parameters()), which).requires_grad_(wanted)

    @rule(to=st.sampled_from([dict(dtype=dtype) for dtype in TOLERANCES] + [dict(memory_format=f) for f in LAYOUTS]))
    def move(self, to):
        for model in self.models:
            model.to(**to)

    @rule(way=st.sampled_from(sorted(COPIES)))
    def go_on_with_a_copy(self, way):
        self.models = [COPIES[way](model) for model in self.models]
        self.new_optimizers()

    @rule(assign=st.booleans())
    def load_the_others_state(self, assign):
        states = [copy.deepcopy(model.state_dict()) for model in reversed(self.models)]
        for model, found in zip(self.models, states, strict=True):
            model.load_state_dict(found, strict=True, assign=assign)
        if assign:  # other parameters
            self.new_optimizers()

    @rule(way=st.sampled_from(sorted(HOOKS)), which=ANY)
    def add_a_hook(self, way, which):
        hook, kinds = HOOKS[way]
        for model in self.models:
            getattr(pick(inner_modules(model, kinds), which), way)(hook)

    @rule()
    def remove_the_hooks(self):
        for model in self.models:
            for module in model.modules():  # not by their handles, which know nothing of copies
                for hooks in hooks_of(module):
                    hooks.clear()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        for model in self.models:
            model.zero_grad(set_to_none)

    @rule()
    def optimize(self):
        for optimizer in self.optimizers:
            optimizer.step()
        self.compare({}, {}, TOLERANCES[self.dtype])
        theirs, ours = self.optimizers
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))

    # What computes

    @rule(**INPUTS)
    def step(self, **inputs):
        self.run(**inputs)

    @rule(**INPUTS)
    def forward_alone(self, **inputs):
        with torch.no_grad():
            self.run(**inputs)

    @rule(**INPUTS)
    def step_disabled(self, **inputs):
        with resfuse.disabled():
            self.run(**inputs, fuses=False)

    def run(self, fuses=True, **inputs):
        """One call of each and, where gradients are recorded, its backward. Without a fused forward bits agree."""
        ours = self.models[1]
        hooked = [is_hooked(block) for block in ours if fuses and is_fused(block)]
        before = fallbacks(ours)
        results = [self.call(model, **inputs) for model in self.models]
        assert fallbacks(ours) - before == sum(hooked)
        inside = any(is_fused(module) for block in ours for module in block.modules() if module is not block)
        self.compare(*results, tolerances=(0, 0) if all(hooked) and not inside else TOLERANCES[self.dtype])

    def call(self, model, shape, seed, layout) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        batch, *sides = shape
        x = torch.randn((batch, self.channels, *sides), generator=generator, dtype=self.dtype)
        x = x.contiguous(memory_format=layout).requires_grad_()
        out = model(x)
        if not torch.is_grad_enabled():
            return {"out": out}
        out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype))
        return {"out": out.detach(), "dx": x.grad}

    def compare(self, theirs, ours, tolerances):
        """Results and state; then ours takes over its twin's, so that rounding errors do not add up over a sequence."""
        eager, model = self.models
        theirs, ours = theirs | state(eager), ours | state(model)
        exact = {"out", *(name for name, _ in eager.named_buffers())}
        for chosen, tolerance in zip((True, False), tolerances, strict=True):
            found = ({n: t for n, t in made.items() if (n in exact) == chosen} for made in (ours, theirs))
            alike(*found, tolerance)
        model.load_state_dict(eager.state_dict())
        for its, p in zip(eager.parameters(), model.parameters(), strict=True):
            if p.grad is not None:
                p.grad.copy_(its.grad)

    @invariant()
    def steps_in_between(self):
        """After each operation, each second or each third, as the sequence has it."""
        self.done += 1
        if self.done % self.pace == 0:
            shape = 1 + self.done % 4, 3 + self.done % 5, 9 - self.done % 6
            self.run(shape=shape, seed=self.done, layout=LAYOUTS[self.done % 2])

    @invariant()
    def is_what_was_asked_for(self):
        eager, ours = self.models
        assert [is_fused(block) for block in ours] == self.fused
        assert not any(map(is_fused, eager))
        assert list(ours.state_dict()) == list(eager.state_dict())
        for theirs, module in zip(eager.modules(), ours.modules(), strict=True):
            assert isinstance(module, type(theirs)) and module.training == theirs.training


class CompiledTwins(Twins):
    @rule(**INPUTS)
    def step_compiled(self, **inputs):
        torch._dynamo.reset()
        eager, ours = self.models
        compiled = torch.compile(ours, backend="eager")
        self.compare(self.call(eager, **inputs), self.call(compiled, **inputs), TOLERANCES[self.dtype])


SETTINGS = settings(
    max_examples=50, stateful_step_count=15, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:resfuse.fuse fused nothing")  # of blocks with hooks


def test_any_sequence_of_operations_leaves_the_twins_alike():
    run_state_machine_as_test(Twins, settings=SETTINGS)


@pytest.mark.slow
def test_many_sequences_leave_the_twins_alike_compiled_or_not():
    run_state_machine_as_test(CompiledTwins, settings=settings(SETTINGS, max_examples=500))
    torch._dynamo.reset()
