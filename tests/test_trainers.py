"""Trainers train as a loop written by hand does: same parameters, same statistics, with accumulation and after a resume."""

from __future__ import annotations

import gc
import pickle
import sys
import types
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import curvlib
from curvlib.trainers import decay_groups, hf_factory, register_timm
from tests.listening import F64

KFAC = {"lr": 0.1, "refresh_every": 2}
METHODS = pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("kfac", KFAC),
        ("kfac", {**KFAC, "labels": "sampled"}),
        ("mbf", {"lr": 0.01, "of": "samples", "refresh_every": 2}),
        ("tnt", {"lr": 0.01}),
    ],
    ids=["KFAC", "KFAC of drawn labels", "MBF of samples", "TNT"],
)
ACCUMULATE = pytest.mark.parametrize("parts", [1, 3])


class Net(nn.Module):
    """A classifier in the form of Hugging Face's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def examples(batches=12, size=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, 4, dtype=F64, generator=generator)
    y = torch.randint(0, 3, (batches * size,), generator=generator)
    return [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]


def loader(batches=12, size=4):
    return DataLoader(examples(batches, size), size)


def build(method, model, **settings):
    return hf_factory(method)()(model, weight_decay=0.01, **settings)


def by_hand(method, settings, parts=1):
    """A loop over whole batches, each as large as all that a trainer accumulates; in parts where these have draws."""
    model = Net()
    optimizer = build(method, model, **settings)
    pieces = parts if method == "tnt" or settings.get("labels") == "sampled" else 1
    for batch in loader(12 // parts, 4 * parts):
        optimizer.zero_grad()
        for x, labels in zip(batch["x"].chunk(pieces), batch["labels"].chunk(pieces), strict=True):
            outputs = model(x, labels)
            optimizer.observe(outputs["logits"], "categorical")
            (outputs["loss"] / pieces).backward()
        optimizer.step()
    return model, optimizer


def assert_same(model, optimizer, reference, exact=False):
    other, theirs = reference
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-10, "atol": 1e-12}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, **tolerance)
    assert not any("on the batch gradient" in why for why in optimizer.routing().values())
    assert optimizer.health().residual.keys() == theirs.health().residual.keys()
    mine, held = ({one.unit.name: one.dense() for one in each.held()} for each in (optimizer, theirs))
    assert mine.keys() == held.keys() != set()
    for name, value in mine.items():
        torch.testing.assert_close(value, held[name], **tolerance)


# -- groups -----------------------------------------------------------------------------------------------------------


def test_groups_spare_biases_and_norms_and_leave_out_what_is_frozen():
    model = Net()
    model.body[0].weight.requires_grad_(False)
    groups = decay_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [[names[one] for one in group["params"]] for group in groups] == [
        ["body.3.weight"],
        ["body.0.bias", "body.1.weight", "body.1.bias", "body.3.bias"],
    ]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "mbf", "foof", "singd"])
def test_a_bias_of_another_group_is_still_joined_and_keeps_its_own_decay(method):
    x, y = torch.randn(8, 4, dtype=F64), torch.randint(0, 3, (8,))
    stepped = []
    for decays in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        model = Net()
        groups = decay_groups(model, decays[0])
        groups[1]["weight_decay"] = decays[1]
        optimizer = curvlib.optimizers.catalogue.methods()[method](groups, lr=0.1, model=model)
        assert optimizer.routing()["body.0.bias"] == "joined to body.0.weight"
        model(x, y)["loss"].backward()
        optimizer.step()
        stepped.append(model.body[0])
    start = Net().body[0]
    plain, weight, bias = stepped
    torch.testing.assert_close(weight.weight, plain.weight - 0.1 * 0.5 * start.weight)
    torch.testing.assert_close(bias.bias, plain.bias - 0.1 * 0.5 * start.bias)
    assert torch.equal(weight.bias, plain.bias)
    assert torch.equal(bias.weight, plain.weight)


def test_a_joined_curvature_has_the_settings_of_the_weights_group():
    x, y = torch.randn(8, 4, dtype=F64), torch.randint(0, 3, (8,))
    stepped = []
    for damping in (None, 0.3):
        model = Net()
        groups = decay_groups(model, 0.0)
        if damping is not None:
            groups[0]["damping"], groups[1]["damping"] = 0.3, 1e-5
        optimizer = curvlib.KFAC(groups, damping=0.3, model=model)
        model(x, y)["loss"].backward()
        optimizer.step()
        stepped.append(model.body[0])
    assert torch.equal(stepped[0].weight, stepped[1].weight)
    assert torch.equal(stepped[0].bias, stepped[1].bias)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def test_a_factory_takes_names_and_classes_and_later_settings_win():
    by_name, by_class = (hf_factory(method, lr=0.1, damping=0.5)() for method in ("KFAC", curvlib.KFAC))
    assert curvlib.optimizers.hf_factory is hf_factory
    for make in (by_name, by_class):
        optimizer = make(Net(), lr=0.2)
        assert isinstance(optimizer, curvlib.KFAC)
        assert [(group["lr"], group["damping"]) for group in optimizer.param_groups] == [(0.2, 0.5)] * 2
    decays = [group["weight_decay"] for group in hf_factory("adamw")()(Net()).param_groups]
    assert decays == [0.01, 0.0]
    with pytest.raises(ValueError, match=r"method must be a subclass .* one of .*kfac.*, got 'kfak'"):
        hf_factory("kfak")


def test_a_factory_tells_the_optimizer_of_the_processes(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        optimizer = build("kfac", Net())
        assert optimizer.process_group is dist.group.WORLD
    finally:
        dist.destroy_process_group()
    assert build("kfac", Net()).process_group is None


def hugging_face(folder, how, parts=1, epochs=1, observe=False, resume=None, model=None, **arguments):
    transformers = pytest.importorskip("transformers", reason="needs the extra trainers")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if observe:
                self.optimizer.optimizer.observe(outputs["logits"], "categorical")
            return (loss, outputs) if return_outputs else loss

    model = Net() if model is None else model
    defaults = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": parts,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    trainer = Trainer(
        model,
        transformers.TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=examples(),
        optimizer_cls_and_kwargs=how,
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer.optimizer.optimizer


@METHODS
@ACCUMULATE
def test_hugging_faces_trainer_trains_as_a_loop_does(tmp_path, method, settings, parts):
    how = hf_factory(method), {**settings, "weight_decay": 0.01}
    assert_same(*hugging_face(tmp_path, how, parts, observe=True), by_hand(method, settings, parts))


def test_hugging_faces_trainer_takes_the_class_too(tmp_path):
    settings = {**KFAC, "weight_decay": 0.01}
    with pytest.warns(curvlib.TapWarning, match=r"Give the model"):
        _, optimizer = hugging_face(tmp_path, (curvlib.KFAC, dict(settings)))
    assert all("on the batch gradient" in why for why in optimizer.routing().values())
    model = Net()
    # The Trainer hands a model in the dictionary over in the place of its groups.
    _, optimizer = hugging_face(tmp_path, (curvlib.KFAC, {**settings, "model": model}), model=model)
    assert len(optimizer.param_groups) == 1
    assert not any("on the batch gradient" in why for why in optimizer.routing().values())


def test_a_loss_divided_by_the_items_of_unequal_parts_is_heard_as_one_batch(tmp_path):
    class Items(Net):
        def forward(self, x, labels, num_items_in_batch=None, **_):
            logits = self.body(x)
            loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
            return {"loss": loss, "logits": logits}

    how = hf_factory("kfac"), {**KFAC, "weight_decay": 0.01}
    # 48 examples in batches of 20: one step of 20 + 20 + 8.
    model, optimizer = hugging_face(tmp_path, how, 3, model=Items(), per_device_train_batch_size=20)
    assert_same(model, optimizer, by_hand("kfac", KFAC, parts=12))


@pytest.mark.parametrize("observe", [False, True])
def test_hugging_faces_trainer_resumes_bitwise(tmp_path, observe):
    settings = {**KFAC, "weight_decay": 0.01, "labels": "sampled" if observe else "data"}
    how = hf_factory("kfac"), settings
    options = {"parts": 2, "epochs": 2, "observe": observe}
    whole = hugging_face(tmp_path / "whole", how, **options)
    saving = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}
    hugging_face(tmp_path / "first", how, **options, **saving)
    again = hugging_face(tmp_path / "again", how, **options, resume=str(tmp_path / "first" / "checkpoint-5"))
    assert_same(*again, whole, exact=True)


def test_groups_are_those_of_hugging_faces_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra trainers")
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    models = [
        transformers.BertForSequenceClassification(transformers.BertConfig(**small)),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11)),
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
        ),
    ]
    arguments = transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    for model in models:
        theirs = transformers.Trainer(model, arguments).create_optimizer().param_groups
        for mine, other in zip(decay_groups(model, 0.1), theirs, strict=True):
            assert mine["weight_decay"] == other["weight_decay"]
            assert [id(one) for one in mine["params"]] == [id(one) for one in other["params"]]


# -- Lightning --------------------------------------------------------------------------------------------------------


def lightning_run(method, settings, parts=1, epochs=1, manual=False, checkpoint=None, save=None, validate=True):
    lightning = pytest.importorskip("lightning", reason="needs the extra trainers")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.automatic_optimization = not manual

        def training_step(self, batch, index):
            outputs = self.net(**batch)
            self.optimizers().observe(outputs["logits"], "categorical")
            if not manual:
                return outputs["loss"]
            self.manual_backward(outputs["loss"] / parts)
            if (index + 1) % parts == 0:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None

        def validation_step(self, batch, index):
            self.net(**batch)

        def configure_optimizers(self):
            return build(method, self.net, **settings)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=1 if manual else parts,
        num_sanity_val_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader(2) if validate else None, ckpt_path=checkpoint)
    if save is not None:
        trainer.save_checkpoint(save)
    return module.net, trainer.optimizers[0]


@METHODS
@ACCUMULATE
@pytest.mark.parametrize("manual", [False, True])
def test_lightning_trains_as_a_loop_does(method, settings, parts, manual):
    assert_same(*lightning_run(method, settings, parts, manual=manual), by_hand(method, settings, parts))


def test_lightning_serves_methods_that_evaluate_a_closure_again():
    model, optimizer = lightning_run("kbfgs", {"lr": 0.01}, validate=False)
    other = Net()
    reference = build("kbfgs", other, lr=0.01)
    for batch in loader():

        def closure(batch=batch):
            reference.zero_grad()
            loss = other(**batch)["loss"]
            loss.backward()
            return loss

        reference.step(closure)
    assert_same(model, optimizer, (other, reference))


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_lightning_resumes_bitwise(tmp_path, labels):
    settings, path = {**KFAC, "labels": labels}, tmp_path / "half.ckpt"
    whole = lightning_run("kfac", settings, parts=2, epochs=4)
    lightning_run("kfac", settings, parts=2, epochs=2, save=path)
    assert_same(*lightning_run("kfac", settings, parts=2, epochs=4, checkpoint=path), whole, exact=True)


# -- accelerate -------------------------------------------------------------------------------------------------------


def accelerate_run(method, settings, parts=1):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra trainers")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
    model = Net()
    model, optimizer, batches = accelerator.prepare(model, build(method, model, **settings), loader())
    for batch in batches:
        with accelerator.accumulate(model):
            outputs = model(**batch)
            optimizer.optimizer.observe(outputs["logits"], "categorical")
            accelerator.backward(outputs["loss"])
            optimizer.step()
            optimizer.zero_grad()
    return accelerator, model, optimizer


@METHODS
@ACCUMULATE
def test_accelerate_trains_as_a_loop_does(method, settings, parts):
    _, model, optimizer = accelerate_run(method, settings, parts)
    assert_same(model, optimizer.optimizer, by_hand(method, settings, parts))


def test_accelerate_prepares_saves_and_copies(tmp_path):
    accelerator, model, optimizer = accelerate_run("kfac", KFAC)
    accelerator.save_state(tmp_path)
    reference = [parameter.detach().clone() for parameter in model.parameters()]
    copied = pickle.loads(pickle.dumps(optimizer))
    assert torch.equal(
        next(iter(copied.state.values()))["factor_0_0"], next(iter(optimizer.state.values()))["factor_0_0"]
    )
    held = [one.dense() for one in optimizer.optimizer.held()]
    for parameter in model.parameters():
        parameter.data.zero_()
    for batch in loader(2):
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), reference, strict=True))
    assert all(torch.equal(one.dense(), two) for one, two in zip(optimizer.optimizer.held(), held, strict=True))


@pytest.mark.parametrize("how", ["free_memory", "detach"])
def test_a_model_is_let_go(how):
    accelerator, model, optimizer = accelerate_run("kfac", KFAC)
    layer = weakref.ref(model.body[0])
    kept = optimizer.optimizer if how == "detach" else None
    if how == "detach":
        kept.detach()
    del optimizer
    model = accelerator.free_memory(model)[0]
    gc.collect()
    assert layer() is None
    assert (kept is None) == (how == "free_memory")


# -- timm -------------------------------------------------------------------------------------------------------------


@dataclass
class _Info:
    """What timm is told of an optimizer."""

    name: str
    opt_class: Any
    description: str = ""
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False


def test_registration_tells_timm_what_each_method_takes(monkeypatch):
    """Against a stand-in of timm's registry, so that it also runs where timm cannot be imported."""
    told: dict[str, _Info] = {}
    layers = types.SimpleNamespace(
        **{name: type(name, (getattr(nn, name),), {}) for name in ("GroupNorm", "LayerNorm", "Linear")}
    )
    registry = types.SimpleNamespace(register=lambda info: told.update({info.name: info}))
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(layers=layers))
    monkeypatch.setitem(sys.modules, "timm.optim", types.SimpleNamespace(OptimInfo=_Info))
    monkeypatch.setitem(sys.modules, "timm.optim._optim_factory", types.SimpleNamespace(default_registry=registry))
    assert register_timm() == list(told)
    assert set(told) == {f"curvlib-{name}" for name in curvlib.optimizers.catalogue.methods()}
    assert not any("_" in name for name in told)  # timm would look for what follows
    kfac, adam = told["curvlib-kfac"], told["curvlib-adamw"]
    assert kfac.opt_class is curvlib.KFAC
    assert kfac.description.startswith("Kronecker-factored")
    assert (kfac.has_eps, kfac.has_momentum, kfac.has_betas) == (False, True, False)
    assert (adam.has_eps, adam.has_momentum, adam.has_betas) == (True, False, True)


@pytest.fixture(scope="module")
def timm():
    """Timm, with our methods registered."""
    module = pytest.importorskip("timm", reason="needs the extra trainers, and torchvision beside it")
    register_timm()
    return module


def test_timm_makes_every_method(timm):
    for method in curvlib.optimizers.catalogue.methods():
        model = Net()
        settings = {"lr": 1e-3, "weight_decay": 0.05, "model": model}
        optimizer = timm.optim.create_optimizer_v2(model, f"curvlib-{method}", **settings)
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]
        assert not any("its layer is unknown" in why for why in optimizer.routing().values())


@pytest.mark.parametrize("attach", ["model", "attach"])
@pytest.mark.filterwarnings("ignore::curvlib.TapWarning")
def test_timm_trains_as_a_loop_does(timm, attach):
    model, (other, reference) = Net(), by_hand("kfac", KFAC)
    options = {"model": model} if attach == "model" else {}
    optimizer = timm.optim.create_optimizer_v2(model, "curvlib-kfac", weight_decay=0.01, **KFAC, **options)
    if attach == "attach":
        optimizer.attach(model)
    for batch in loader():
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    assert_same(model, optimizer, (other, reference))


def test_timms_twins_of_torchs_layers_are_heard_and_others_are_not(timm):
    twins = nn.Sequential(
        timm.layers.Linear(4, 6), timm.layers.LayerNorm(6, eps=1e-5), nn.Tanh(), timm.layers.Linear(6, 3)
    )
    model = Net()
    model.body = twins.double()
    model.load_state_dict(Net().state_dict())
    optimizer = build("kfac", model, **KFAC)
    for batch in loader():
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    assert_same(model, optimizer, by_hand("kfac", KFAC))
    with pytest.warns(curvlib.TapWarning, match=r"ScaledStdConv2d has a forward of its own"):
        curvlib.KFAC(timm.layers.ScaledStdConv2d(3, 4, 3))
