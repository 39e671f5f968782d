"""Pool, loss, optimiser: each by itself."""

from __future__ import annotations

import pytest
import torch

from fluxloom import world
from fluxloom.core.text import Tokenizer
from fluxloom.recipes import nano
from fluxloom.train.autoencoder import kl_to_normal, reconstruction_loss
from fluxloom.train.data import Chunks, DataSpec, Pool, token_any, warm_atlas
from fluxloom.train.graphs import CapturedBackward
from fluxloom.train.model import Draw, Trainee, flow_loss, guidance_loss, velocity
from fluxloom.train.muon import Muon, orthogonalised
from fluxloom.train.optim import Optimiser, is_hidden_matrix

CPU = torch.device("cpu")


def chunk(value: int, draws: int = 2) -> dict[str, torch.Tensor]:
    return {
        "draw.image": torch.full((draws, 16, 16, 3), value, dtype=torch.uint8),
        "draw.ids": torch.full((draws, 2, 4), value, dtype=torch.int16),
        "draw.weight": torch.ones(draws, 1, dtype=torch.float16),
    }


def test_pool_is_a_ring() -> None:
    pool = Pool(4, lambda x: x, CPU)
    for value in range(3):
        pool.put(chunk(value))
    assert sorted(pool.tensors["draw.ids"][:, 0, 0].tolist()) == [1, 1, 2, 2]
    batch = pool.draw("draw", 64, torch.Generator().manual_seed(0))
    assert set(batch["ids"][:, 0].tolist()) == {1, 2}
    assert torch.allclose(batch["image"][:, 0, 0, 0], batch["ids"][:, 0] / 127.5 - 1)


def test_chunks_are_a_function_of_their_index() -> None:
    spec = DataSpec(mix=world.Mix.objects(), size=64, draws=2, edits=2)
    tokenizer = Tokenizer(nano.vocabulary(), 48)
    a, b = (Chunks(spec, tokenizer, seed=3, rank=0, first=first, count=4) for first in (0, 2))
    assert all(torch.equal(a[2][name], b[0][name]) for name in a[2])
    assert not torch.equal(a[2]["draw.image"], a[1]["draw.image"])
    assert a[0]["edit.source"].shape == (2, 64, 64, 3)
    assert a[0]["edit.weight"].shape == (2, 16)


def test_a_warm_atlas_decodes_nothing_more() -> None:
    cache, stamps = world.load_atlas().sprite, world.load_atlas().stamp
    cache.cache_clear()
    stamps.cache_clear()
    warm_atlas(world.Mix.scenes())
    decoded = cache.cache_info().misses
    backdrop = world.Backdrop("plain", None, None, None, "blue", (0,) * 6)
    for style in world.STYLES:
        world.render(world.Scene(backdrop, style, (world.Item("dog", 0.5, 0.95, 0.8),)), 256)
    assert cache.cache_info().misses == decoded
    world.render(world.Scene(backdrop, "3d", (world.Item("car", 0.5, 0.95, 0.8, "red"),)), 256)
    assert cache.cache_info().misses == decoded + 1


def test_token_any() -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool).numpy()
    mask[5, 20] = True
    assert token_any(mask).tolist() == [False, True, False, False]


def loss_of(**changes: object) -> float:
    torch.manual_seed(0)
    model = Trainee(nano.TOY)
    model.initialise()
    torch.nn.init.normal_(model.transformer.final_layer.linear.weight, std=0.1)
    torch.nn.init.normal_(model.transformer.single_blocks[0].modulation.lin.weight, std=0.5)
    batch = {
        "image": torch.randn(4, 16, 4, 4),
        "weight": torch.ones(4, 4),
        "ids": torch.randint(3, 50, (4, 48)),
        "source": torch.randn(4, 16, 4, 4),
    }
    batch |= {k: v for k, v in changes.items() if k in batch}  # type: ignore[assignment]
    with torch.no_grad():
        draw = Draw(mean=0.5, std=1.0, dropout=float(changes.get("dropout", 0.0)))  # type: ignore[arg-type]
        loss = flow_loss(model, draw.add(batch, torch.zeros(48, dtype=torch.long), torch.Generator().manual_seed(5)))
    return float(loss)


def test_loss_depends_on_text_source_and_weights() -> None:
    base = loss_of()
    assert loss_of() == base
    assert loss_of(ids=torch.ones(4, 48, dtype=torch.long)) != base
    assert loss_of(source=torch.zeros(4, 16, 4, 4)) != base
    assert loss_of(dropout=1.0) != base
    only_first = torch.zeros(4, 4)
    only_first[:, 0] = 1
    assert loss_of(weight=only_first) != base
    assert loss_of(weight=torch.full((4, 4), 7.0)) == pytest.approx(base, rel=1e-6)


def test_untrained_loss_is_the_variance_of_the_target() -> None:
    """Zero velocity at the start, so the loss is E|e - x|^2 = 2 for unit data."""
    model = Trainee(nano.TOY)
    model.initialise()
    batch = {
        "image": torch.randn(64, 16, 8, 8),
        "weight": torch.ones(64, 16),
        "ids": torch.zeros(64, 48, dtype=torch.long),
    }
    loss = flow_loss(model, Draw(mean=0.0, std=1.0).add(batch, batch["ids"][0], torch.Generator()))
    assert float(loss.detach()) == pytest.approx(2.0, rel=0.03)


def awake(seed: int) -> Trainee:
    """A toy whose velocity depends on everything, as an untrained one's is zero."""
    torch.manual_seed(seed)
    model = Trainee(nano.TOY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False)


def noisy_batch(guidance: tuple[float, float]) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    batch = {
        "image": torch.randn(4, 16, 4, 4),
        "source": torch.randn(4, 16, 4, 4),
        "weight": torch.ones(4, 4),
        "ids": torch.randint(3, 50, (4, 48)),
    }
    draw = Draw(mean=0.5, std=1.0, guidance=guidance)
    return draw.add(batch, torch.zeros(48, dtype=torch.long), torch.Generator().manual_seed(5))


def test_guidance_is_drawn_between_its_bounds() -> None:
    assert noisy_batch((1.0, 1.0))["guidance"].tolist() == [1.0] * 4
    drawn = noisy_batch((2.0, 6.0))["guidance"]
    assert 2 <= float(drawn.min()) < float(drawn.max()) <= 6


def test_distilled_guidance_is_that_of_two_evaluations() -> None:
    """A student that computes the guided velocity itself has no loss; one that ignores the scale has."""
    teacher, empty = awake(0), torch.zeros(48, dtype=torch.long)

    class Guided(torch.nn.Module):
        def forward(self, ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            *inputs, guidance = rest
            one = torch.ones_like(guidance)
            wanted, unwanted = teacher(ids, *inputs, one), teacher(empty.expand_as(ids), *inputs, one)
            return unwanted + guidance[:, None, None] * (wanted - unwanted)  # type: ignore[no-any-return]

    batch = noisy_batch((2.0, 6.0))
    assert float(guidance_loss(Guided(), teacher, empty, batch)) < 1e-10
    assert float(guidance_loss(teacher, teacher, empty, batch)) > 1e-3
    unguided = {**batch, "guidance": torch.ones(4)}
    assert float(guidance_loss(teacher, teacher, empty, unguided)) < 1e-10


def test_velocity_sees_the_source_and_returns_only_the_target() -> None:
    model, batch = awake(1), noisy_batch((1.0, 1.0))
    v = velocity(model, batch, batch["ids"], batch["guidance"])
    assert v.shape == (4, 4, 64)
    other = {**batch, "source": batch["source"] + 1}
    assert not torch.allclose(v, velocity(model, other, batch["ids"], batch["guidance"]))


def test_muon_is_torchs_own_in_batches() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in ((24, 8), (24, 8), (8, 40), (16, 16))]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    muon = Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step(0.02)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # Batched products may round the bfloat16 rounds otherwise.
        assert torch.allclose(a, b.detach(), atol=2e-3)
    assert not torch.allclose(ours[0], ours[1], atol=0.1)


def test_orthogonalised_has_singular_values_near_one() -> None:
    g = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(g).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.gpu
def test_captured_backward_is_the_plain_one() -> None:
    """Same loss and gradients from the graph as from Python, also with other inputs than it was recorded with."""
    model = awake(0).requires_grad_(True).to("cuda")
    optimiser = Optimiser(model, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.99), ema=0.9, clip=1.0)
    first = {k: v.cuda() for k, v in noisy_batch((1.0, 1.0)).items()}
    second = {**first, "image": first["image"].flip(0) * 0.5}
    captured = CapturedBackward(lambda batch: flow_loss(model, batch), first, optimiser.gradient)
    assert not optimiser.gradient.any(), "recording leaves no gradients behind"
    for batch in (second, first):
        loss = captured(batch)
        from_graph = optimiser.gradient.clone()
        optimiser.gradient.zero_()
        plain = flow_loss(model, batch)
        plain.backward()
        assert torch.allclose(loss, plain.detach(), rtol=1e-5)
        assert torch.allclose(from_graph, optimiser.gradient, rtol=1e-3, atol=1e-6)
        optimiser.gradient.zero_()


def test_optimiser_moves_masters_and_averages() -> None:
    model = Trainee(nano.TOY)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = Optimiser(model, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.99), ema=0.9, clip=1.0)
    assert {is_hidden_matrix(n, p) for n, p in before.items()} == {True, False}
    for p in model.parameters():
        assert p.grad is not None
        p.grad.normal_()
    optimiser.step(1.0, 100)
    for (name, p), average in zip(model.named_parameters(), optimiser.average, strict=True):
        assert not torch.equal(p.detach(), before[name]), name
        assert torch.allclose(average, 0.9 * before[name] + 0.1 * p.detach(), atol=1e-6), name
    assert not optimiser.gradient.any()


def test_reconstruction_and_kl() -> None:
    x = torch.rand(2, 3, 8, 8)
    assert float(reconstruction_loss(x, x, 0.5)) == 0
    assert float(reconstruction_loss(x + 0.5, x, 0.5)) == pytest.approx(0.5, rel=1e-5)
    assert float(kl_to_normal(torch.zeros(4), torch.zeros(4))) == 0
    assert float(kl_to_normal(torch.ones(4), torch.zeros(4))) == pytest.approx(0.5)
