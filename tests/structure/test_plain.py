"""Models and inputs that cannot be taken as they are: each has an error of its own that says what to do."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import secateur as sc
from secateur.structure.plain import kept_whole, unfit, with_graph

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one process."""
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:
        pytest.skip(f"no process group here: {error}")
    yield
    dist.destroy_process_group()


def fully_sharded() -> nn.Module:
    """An FSDP module as far as one comes without an accelerator."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._modules["_fsdp_wrapped_module"] = net()
    return wrapper


def sharded_in_place() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net(), mesh=init_device_mesh("cpu", (1,)))


def distributed_tensors() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    return distribute_module(net(), init_device_mesh("cpu", (1,)))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(net())


def gated() -> nn.Module:
    model = net()
    sc.attach(model, examples=(X,))
    return model


def wrapped() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    return {
        "DDP": (lambda: nn.parallel.DistributedDataParallel(net()), r"DistributedDataParallel .*use its \.module"),
        "DataParallel": (lambda: nn.DataParallel(net()), r"DataParallel .*use its \.module"),
        "FSDP": (fully_sharded, "FullyShardedDataParallel shards the model; use the module before it is sharded"),
        "fully_shard": (sharded_in_place, r"is sharded \(fully_shard\)"),
        "tensor parallel": (distributed_tensors, r"0.weight is spread over devices \(a DTensor\)"),
        "compiled": (lambda: torch.compile(net()), r"is compiled; use what was given to torch\.compile"),
        "scripted": (scripted, r"is scripted, .* use the module before torch\.jit"),
        "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)), r"0\.weight has no shape yet"),
        "gated": (gated, r"it is gated; call finalize\(\) or detach\(\)"),
    }


@pytest.mark.usefixtures("group")
class TestWrapped:
    @pytest.mark.parametrize("case", wrapped())
    def test_each_is_refused_by_every_verb(self, case: str) -> None:
        build, message = wrapped()[case]
        model = build()
        structure = sc.trace(net(), (X,))
        keep = {"0": torch.arange(3)}
        with pytest.raises(sc.TraceError, match=message):
            sc.trace(model, (X,))
        with pytest.raises(sc.CompactionError, match=message):
            sc.compact(model, structure, keep)
        with pytest.raises(sc.CompactionError, match=message):
            sc.mask(model, structure, keep)
        with pytest.raises(sc.GateError):
            sc.attach(model, examples=(X,))

    @pytest.mark.parametrize("case", ["DDP", "DataParallel", "compiled", "scripted"])
    def test_also_inside_of_a_model(self, case: str) -> None:
        build, message = wrapped()[case]
        with pytest.raises(sc.TraceError, match=f"^0: .*{message}"):
            sc.trace(nn.Sequential(build(), nn.ReLU()), (X,))

    def test_what_is_inside_of_a_wrapper_is_taken(self) -> None:
        model = nn.parallel.DistributedDataParallel(net())
        assert sc.trace(model.module, (X,)).group("0").size == 8
        compiled = torch.compile(net())
        assert sc.trace(compiled._orig_mod, (X,)).group("0").size == 8
        in_place = net()
        in_place.compile()  # a mark, no wrapper; copies lose it
        assert sc.trace(in_place, (X,)).group("0").size == 8

    def test_plain_models_are_fit(self) -> None:
        assert not unfit(net())
        assert not unfit(nn.ModuleList([net(), net()]))


class TestModels:
    def test_several_devices(self) -> None:
        model = net()
        model[2].to("meta")
        with pytest.raises(sc.TraceError, match=r"several devices \(cpu, meta\); move it to one"):
            sc.trace(model, (X,))

    @pytest.mark.parametrize("model", [nn.Linear, lambda x: x, "net", None])
    def test_no_module(self, model: object) -> None:
        with pytest.raises(sc.TraceError, match=r"expected a torch\.nn\.Module"):
            sc.trace(model, (X,))

    def test_no_parameters(self) -> None:
        with pytest.raises(sc.TraceError, match="ReLU has no parameters, so there is nothing to prune"):
            sc.trace(nn.ReLU(), (X,))

    def test_what_cannot_be_copied(self) -> None:
        model = net()
        model.lock = threading.Lock()
        with pytest.raises(sc.TraceError, match=r"cannot be copied: .*lock.*no open files, locks"):
            sc.trace(model, (X,))
        structure = sc.trace(net(), (X,))
        with pytest.raises(sc.CompactionError, match=r"cannot be copied .*in_place=True"):
            sc.compact(model, structure, {"0": torch.arange(2)})
        assert sc.compact(model, structure, {"0": torch.arange(2)}, in_place=True)[0].out_features == 2

    def test_tensors_with_a_graph_are_named(self) -> None:
        model = net()
        model[0].last = model[0](X)
        assert with_graph(model) == ["0.last"]
        structure = sc.trace(model, (X,))  # copies on fake tensors do not mind
        with pytest.raises(sc.CompactionError, match=r"tensors with a graph as attributes \(it has 0\.last\)"):
            sc.mask(model, structure, {"0": torch.arange(2)})


COMPUTED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "weight norm": (parametrizations.weight_norm, "a parametrization"),
    "spectral norm": (parametrizations.spectral_norm, "a parametrization"),
    "orthogonal": (parametrizations.orthogonal, "a parametrization"),
    "old weight norm": (nn.utils.weight_norm, "WeightNorm"),
    "old spectral norm": (nn.utils.spectral_norm, "SpectralNorm"),
    "pruning mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "BasePruningMethod"),
}


class TestComputedWeights:
    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
    @pytest.mark.parametrize("case", COMPUTED)
    def test_they_freeze_what_they_meet_and_nothing_else(self, case: str) -> None:
        install, reason = COMPUTED[case]
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))
        install(model[2])
        assert kept_whole(model)
        assert all(name.startswith("2.") and reason in why for name, why in kept_whole(model).items())
        with torch.no_grad():  # as after a first forward, which leaves a computed weight behind
            model(X)
        structure = sc.trace(model, (X,))
        assert [(group.name, group.size) for group in structure.groups] == [("4", 5)]
        for name in kept_whole(model):
            why = structure.why_frozen(name)
            assert f"is what {reason} computes a weight from" in why
            assert "undoes it" in why
        small = sc.compact(model, structure, {"4": torch.arange(2)}, examples=(X,))
        assert small[4].out_features == 2

    @pytest.mark.parametrize("case", ["weight norm", "spectral norm"])
    def test_gates_ask_to_remove_parametrizations(self, case: str) -> None:
        model = net()
        COMPUTED[case][0](model[0])
        with pytest.raises(sc.GateError, match=r"0 has parametrizations .*remove_parametrizations first"):
            sc.attach(model, examples=(X,))

    def test_plain_weights_are_not_computed(self) -> None:
        assert kept_whole(net()) == {}


class Branches(nn.Module):
    """Takes another way for other values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(2 * h if x.sum() > 0 else h)


class Selects(Branches):
    """As many rows as the values ask for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x[x[:, 0] > -9]).relu())


class TestValues:
    @pytest.mark.parametrize("kind", [Branches, Selects])
    def test_they_run_on_the_examples_themselves_and_a_note_says_so(self, kind: type[Branches]) -> None:
        model = kind().double()
        x = X.double()
        structure = sc.trace(model, (x,))
        assert structure.group("a").size == 8
        assert any("traced on the examples themselves" in note for note in structure.notes)
        small = sc.compact(model, structure, {"a": torch.arange(3)}, examples=(x,))
        assert torch.allclose(small(x), sc.mask(model, structure, {"a": torch.arange(3)})(x), atol=1e-12)

    @pytest.mark.parametrize("kind", [Branches, Selects])
    def test_on_meta_the_error_says_what_to_do(self, kind: type[Branches]) -> None:
        with pytest.raises(sc.TraceError, match=r"looks at values, .* trace a model and inputs that are on the CPU\.$"):
            sc.trace(kind().to("meta"), (X.to("meta"),))

    def test_a_number_read_from_units_freezes_them(self) -> None:
        class Reads(Branches):
            def forward(self, x: Tensor) -> Tensor:
                h = self.a(x).relu()
                return self.b(2 * h if h.sum() > 0 else h)

        structure = sc.trace(Reads(), (X,))
        assert not structure.groups
        assert "is reduced over (sum)" in structure.why_frozen("a")


class Custom:
    """An output in which no tensor can be found."""

    __slots__ = ("hidden",)

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class TestInputsAndOutputs:
    @pytest.mark.parametrize(
        ("examples", "message"),
        [
            ((torch.zeros(3, 5),), r"shapes cannot be multiplied .* called with \(float32 \(3, 5\)\)"),
            ((torch.zeros(3, 4, dtype=torch.int64),), "of one dtype, got float32 and int64"),
            ((torch.zeros(3, 4, dtype=torch.float64),), "of one dtype, got float32 and float64"),
            ((), r"in the model's forward, before its first operator: TypeError: .*missing 1 required .* with \(\);"),
            ((X, X), "takes 2 positional arguments but 3 were given"),
            (sc.Example((X,), {"mask": True}), r"with \(float32 \(3, 4\), mask=bool\)"),
            (("words",), "must be Tensor, not str"),
            ((X.to("meta"),), "The inputs are on meta and the model on cpu: move them there"),
            (X, r"got Tensor, expected a tuple of positional inputs such as examples=\(x,\)"),
            ([], "got list of length 0"),
            ([X], r"examples\[0\]: got Tensor"),
            (None, "got NoneType"),
        ],
    )
    def test_examples_that_do_not_fit(self, examples: object, message: str) -> None:
        with pytest.raises(sc.TraceError, match=message):
            sc.trace(net(), examples)

    def test_the_example_that_fails_is_named(self) -> None:
        with pytest.raises(
            sc.TraceError, match=r"^examples\[1\] does not run through the model in evaluation mode: in 0,"
        ):
            sc.trace(net(), [(X,), (torch.zeros(3, 9),)])

    def test_inputs_on_the_cpu_for_a_model_on_meta(self) -> None:
        with pytest.raises(sc.TraceError, match="The inputs are on cpu and the model on meta"):
            sc.trace(net().to("meta"), (X,))

    def test_words_that_are_no_integers(self) -> None:
        model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2))
        with pytest.raises(sc.TraceError, match="embedding takes indices of dtype int64 or int32"):
            sc.trace(model, (torch.zeros(2, 3),))
        assert sc.trace(model, (torch.zeros(2, 3, dtype=torch.int32),)).groups

    @pytest.mark.parametrize(("wrap", "kind"), [(Custom, "Custom"), (lambda out: None, "NoneType"), (id, "int")])
    def test_outputs_without_a_tensor(self, wrap: Callable[[Tensor], object], kind: str) -> None:
        class Wraps(Branches):
            def forward(self, x: Tensor) -> object:
                return wrap(self.b(self.a(x)))

        with pytest.raises(
            sc.TraceError, match=f"returned {kind}, in which no tensor was found.*forward returns the tensors"
        ):
            sc.trace(Wraps(), (X,))

    def test_one_example_for_batch_norm_is_a_note(self) -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        structure = sc.trace(model, (X[:1],))
        (note,) = structure.notes
        assert "training mode could not be traced" in note
        assert "BatchNorm cannot train on one example, so give two or more" in note
        assert structure.group("0").size == 8
        assert note in str(structure)
        assert not sc.trace(model, (X,)).notes
        # Proofs double the batch by themselves.
        sc.compact(model, structure, {"0": torch.arange(3)}, examples=(X[:1],))
