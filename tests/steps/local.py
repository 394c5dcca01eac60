"""Steps that any rows of a batch can be given: what is made of all is the mean over the rows.

With whole batches they are steps like any other.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wraploop import DistributedModel, processes

from .registry import SGD, each, mine, mlp, randint, randn, sgd, step, update

mean = partial(step, local="mean")
ROWS = (8, 7, 5, 2, 6)


def net() -> nn.Sequential:
    return mlp(3, 5, 5, 2)


def normed(i: int = 3, o: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, o))


def generator() -> nn.Sequential:
    return mlp(2, 5, 3, act=nn.ReLU)


def critic() -> nn.Sequential:
    return mlp(3, 5, 1)


def batch(k: int, rows: int = 0):
    rows = rows or ROWS[k]
    return mine(randn(k, rows, 3), randn(k + 50, rows, 2))


def latents(k: int, rows: int = 0):
    return mine(randn(k + 20, rows or ROWS[k], 2))


def real(k: int, rows: int = 0):
    return mine(randn(k, rows or ROWS[k], 3))


def fit(m, k):
    x, y = batch(k)
    return F.mse_loss(m(x), y)


@mean(net=net, steps=5)
def own_rows(m, o, k):
    update(o.net, fit(m.net, k))


@mean(net=net, optimizers=each(partial(torch.optim.Adam, lr=0.01)))
def own_rows_with_adam(m, o, k):
    update(o.net, fit(m.net, k))


@mean(net=net, steps=4)
def own_rows_fewer_than_processes(m, o, k):
    rows = (1, 3, 1, 2)[k]
    x, y = batch(k, rows)
    update(o.net, F.mse_loss(m.net(x), y))


@torch.no_grad()
def draw_apart(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Sets tensors of `model` to other numbers on each rank, if ranks share it."""
    rank = processes.rank() if isinstance(model, DistributedModel) else 0
    drawing = torch.Generator().manual_seed(rank)
    for tensor in tensors:
        tensor.normal_(generator=drawing)


@mean(net=normed)
def values_set_after_wrapping(m, o, k):
    """As in PyTorch's DCGAN tutorial; every rank draws others, and rank 0's are meant."""
    if k == 0:
        draw_apart(m.net, [*m.net.parameters(), m.net.get_buffer("1.running_mean")])
    update(o.net, fit(m.net, k))


@step(net=net, steps=4, local="sum")
def own_rows_summed(m, o, k):
    x, y = batch(k, (8, 1, 7, 2)[k])
    update(o.net, F.mse_loss(m.net(x), y, reduction="sum"))


@step(net=normed, steps=4, local="sum")
def own_rows_summed_and_normed(m, o, k):
    x, y = batch(k, (8, 3, 7, 2)[k])
    update(o.net, F.mse_loss(m.net(x), y, reduction="sum"))


@mean(net=normed, steps=5)
def own_rows_normed(m, o, k):
    update(o.net, fit(m.net, k))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=None)
        self.body, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.body(x)).mean((2, 3)))


@mean(net=Residual, steps=4)
def own_images_classified(m, o, k):
    rows = (6, 5, 2, 3)[k]
    images, labels = mine(randn(k, rows, 1, 6, 6), randint(k, 4, rows))
    update(o.net, F.cross_entropy(m.net(images), labels))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@mean(net=Recurrent)
def own_sequences(m, o, k):
    update(o.net, m.net(mine(randn(k, ROWS[k], 5, 3))).square().mean())


@mean(net=lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True))
def own_tokens(m, o, k):
    update(o.net, m.net(mine(randn(k, ROWS[k], 5, 4))).square().mean())


@mean(net=net)
def own_rows_twice_before_one_backward(m, o, k):
    update(o.net, fit(m.net, k) + m.net(real(k + 2, 3)).square().mean())


@mean(net=net)
def own_rows_in_two_backwards(m, o, k):
    o.net.zero_grad()
    a, b = fit(m.net, k), m.net(real(k + 2)).square().mean()
    a.backward()
    b.backward()
    o.net.step()


@mean(net=net)
def own_rows_with_the_graph_retained(m, o, k):
    o.net.zero_grad()
    loss = fit(m.net, k)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    o.net.step()


@mean(net=normed, steps=4)
def own_rows_accumulated(m, o, k):
    for part in range(3):
        (fit(m.net, (k + part) % 5) / 3).backward()
    o.net.step()
    o.net.zero_grad()


def without_sync(model):
    return model.no_sync() if hasattr(model, "no_sync") else torch.enable_grad()


@mean(net=normed, steps=4)
def own_rows_accumulated_without_sync(m, o, k):
    with without_sync(m.net):
        for part in range(2):
            (fit(m.net, (k + part) % 5) / 3).backward()
    (fit(m.net, (k + 2) % 5) / 3).backward()
    o.net.step()
    o.net.zero_grad()


@mean(net=net, steps=4)
def own_rows_without_sync_after_some_with(m, o, k):
    fit(m.net, k).backward()
    with without_sync(m.net):
        fit(m.net, k + 1).backward()
    (fit(m.net, 0) + sum(p.square().sum() for p in m.net.parameters())).backward()
    o.net.step()
    o.net.zero_grad(set_to_none=False)


@mean(net=net)
def own_rows_without_sync_and_a_layer_frozen_since(m, o, k):
    with without_sync(m.net):
        fit(m.net, k).backward()
    m.net[0].requires_grad_(False)
    fit(m.net, k + 1).backward()
    o.net.step()
    o.net.zero_grad()
    m.net[0].requires_grad_(True)


@mean(net=net)
def own_rows_dropped_without_sync(m, o, k):
    with without_sync(m.net):
        fit(m.net, k).backward()
    o.net.zero_grad()
    update(o.net, fit(m.net, k + 1))


@mean(net=net)
def own_rows_and_gradients_asked_for(m, o, k):
    grads = torch.autograd.grad(fit(m.net, k), list(m.net.parameters()))
    for parameter, grad in zip(m.net.parameters(), grads, strict=True):
        parameter.grad = grad
    torch.nn.utils.clip_grad_norm_(m.net.parameters(), 0.1)
    o.net.step()


@mean(net=net)
def own_rows_and_a_hessian_vector_product(m, o, k):
    parameters = list(m.net.parameters())
    grads = torch.autograd.grad(fit(m.net, k), parameters, create_graph=True)
    update(o.net, sum(g.square().sum() for g in grads))


@mean(net=net, steps=4)
def own_rows_fewer_than_processes_and_a_hessian_vector_product(m, o, k):
    x, y = batch(k, (1, 2, 1, 3)[k])
    grads = torch.autograd.grad(
        F.mse_loss(m.net(x), y), list(m.net.parameters()), create_graph=True
    )
    update(o.net, sum(g.square().sum() for g in grads))


class LossInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x, y):
        return F.mse_loss(self.body(x), y, reduction="none").sum(1)


@step(net=LossInside, steps=4, local="sum")
def own_rows_summed_in_the_model(m, o, k):
    update(o.net, m.net(*batch(k, (8, 1, 7, 2)[k])).sum())


@mean(net=net)
def own_rows_and_a_backward_with_its_graph(m, o, k):
    o.net.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a reference cycle, broken below
        fit(m.net, k).backward(create_graph=True)
    torch.stack([p.grad.square().sum() for p in m.net.parameters()]).sum().backward()
    o.net.step()
    for parameter in m.net.parameters():
        parameter.grad = None


@mean(net=net)
def own_rows_and_a_step_ahead(m, o, k):
    """A MAML step."""
    parameters = dict(m.net.named_parameters())
    grads = torch.autograd.grad(fit(m.net, k), [*parameters.values()], create_graph=True)
    ahead = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    x, y = batch(k)
    update(o.net, F.mse_loss(torch.func.functional_call(m.net, ahead, (x,)), y))


@mean(net=net)
def own_rows_and_some_inputs_only(m, o, k):
    first = next(iter(m.net.parameters()))
    o.net.zero_grad()
    fit(m.net, k).backward(inputs=[first])
    o.net.step()


@mean(net=net)
def own_rows_and_a_weight_penalty(m, o, k):
    penalty = sum(p.abs().sum() for p in m.net.parameters())
    update(o.net, fit(m.net, k) + 0.01 * penalty)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        parts = [self.a(x) if row[0] > 0 else self.b(x) for row in x]
        picked = [part[i : i + 1] for i, part in enumerate(parts)]
        return torch.cat(picked) if picked else self.a(x)


@mean(net=Gated, steps=5)
def own_rows_through_branches(m, o, k):
    """Some rows take one, some the other, and none the third."""
    update(o.net, m.net(real(k)).square().mean())


@mean(net=net)
def own_rows_with_layers_frozen_and_thawed(m, o, k):
    m.net[0].requires_grad_(k % 2 == 1)
    update(o.net, fit(m.net, k))


def frozen() -> nn.Sequential:
    return net().requires_grad_(False)


@mean(net=frozen, optimizers=lambda m: {"net": SGD(m.net.parameters())})
def own_rows_frozen_when_wrapped(m, o, k):
    if k == 1:
        m.net.requires_grad_(True)
    x, y = batch(k)
    loss = F.mse_loss(m.net(x), y)
    if k:
        update(o.net, loss)


@mean(net=lambda: net().float())
def own_rows_in_a_model_cast(m, o, k):
    m.net.double()
    update(o.net, fit(m.net, k))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x).tanh())


@mean(net=Tied)
def own_rows_through_tied_weights(m, o, k):
    tokens = mine(randint(k, 6, ROWS[k], 5))
    logits = m.net(tokens[:, :-1])
    update(o.net, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def sparse() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2))


@mean(net=sparse, optimizers=each(partial(torch.optim.SGD, lr=0.1)))
def own_rows_of_a_sparse_table(m, o, k):
    update(o.net, m.net(mine(randint(k, 9, ROWS[k], 2))).square().mean())


@mean(
    net=lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2)
    )
)
def own_rows_with_spectral_norm(m, o, k):
    update(o.net, fit(m.net, k))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = normed(3, 3), nn.Linear(3, 2), reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant and not x.requires_grad else x
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@mean(net=partial(Checkpointed, False))
def own_rows_checkpointed(m, o, k):
    update(o.net, fit(m.net, k))


@mean(net=partial(Checkpointed, True))
def own_rows_checkpointed_reentrantly(m, o, k):
    update(o.net, fit(m.net, k))


@mean(net=net)
def own_rows_with_hooks_that_clamp(m, o, k):
    if not k:
        for parameter in m.net.parameters():
            parameter.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    update(o.net, fit(m.net, k))


@mean(net=net, optimizers=lambda m: {})
def own_rows_with_the_optimizer_in_a_hook(m, o, k):
    if not k:
        for parameter in m.net.parameters():
            own = SGD([parameter])

            def hook(p, own=own):
                own.step()
                own.zero_grad()

            parameter.register_post_accumulate_grad_hook(hook)
    fit(m.net, k).backward()


@mean(net=normed)
def own_rows_evaluated_between(m, o, k):
    m.net.eval()
    with torch.no_grad():
        m.net(real(k))
    m.net.train()
    update(o.net, fit(m.net, k))


@mean(net=normed)
def own_rows_and_an_average_of_the_weights(m, o, k):
    if not k:
        m.average = copy.deepcopy(m.net)
    update(o.net, fit(m.net, k))
    with torch.no_grad():
        for mine_, theirs in zip(m.average.parameters(), m.net.parameters(), strict=True):
            mine_.lerp_(theirs, 0.1)


class Centred(nn.Module):
    """Keeps a running mean of its inputs, as a buffer, for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 2)
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.centre = self.centre.lerp(x.detach().mean(0), 0.1)
            return self.out(x)
        return self.out(x - self.centre)


@mean(net=Centred, steps=4)
def own_rows_and_a_running_mean(m, o, k):
    m.net.train()
    update(o.net, fit(m.net, k))
    m.net.eval()
    update(o.net, fit(m.net, k))


# Adversarial


@mean(g=generator, d=critic, steps=5)
def own_alternate_halves(m, o, k):
    fake = m.g(latents(k))
    update(o.d, F.softplus(m.d(fake.detach())).mean() + F.softplus(-m.d(real(k))).mean())
    update(o.g, F.softplus(-m.d(fake)).mean())


@mean(g=generator, d=critic, steps=5)
def own_alternate_halves_with_freezing(m, o, k):
    m.g.requires_grad_(False)
    update(o.d, F.softplus(m.d(m.g(latents(k)))).mean() + F.softplus(-m.d(real(k))).mean())
    m.g.requires_grad_(True)
    m.d.requires_grad_(False)
    update(o.g, F.softplus(-m.d(m.g(latents(k)))).mean())
    m.d.requires_grad_(True)


@mean(g=partial(normed, 2, 3), d=partial(normed, 3, 1), steps=4)
def own_dcgan(m, o, k):
    fake = m.g(latents(k))
    o.d.zero_grad()
    F.softplus(-m.d(real(k))).mean().backward()
    F.softplus(m.d(fake.detach())).mean().backward()
    o.d.step()
    update(o.g, F.softplus(-m.d(fake)).mean())


@mean(g=generator, d=critic, steps=4)
def own_single_forward(m, o, k):
    fake = m.g(latents(k))
    score = m.d(fake)
    o.d.zero_grad()
    (F.softplus(score).mean() + F.softplus(-m.d(real(k))).mean()).backward(retain_graph=True)
    o.g.zero_grad()
    F.softplus(-score).mean().backward(inputs=list(m.g.parameters()))
    o.d.step()
    o.g.step()


@mean(g=generator, d=critic, steps=5)
def own_gradient_penalty(m, o, k):
    with torch.no_grad():
        fake = m.g(latents(k))
    true = real(k)
    mix = torch.lerp(true, fake, mine(randn(k, ROWS[k], 1))).requires_grad_()
    (slopes,) = torch.autograd.grad(m.d(mix).sum(), mix, create_graph=True)
    penalty = (slopes.norm(dim=1) - 1).square().mean()
    update(o.d, m.d(fake).mean() - m.d(true).mean() + 10 * penalty)
    update(o.g, -m.d(m.g(latents(k))).mean())


@mean(d=critic, steps=5)
def own_r1_by_itself(m, o, k):
    true = real(k).requires_grad_()
    update(o.d, F.softplus(-m.d(true)).mean())
    (slopes,) = torch.autograd.grad(m.d(true).sum(), true, create_graph=True)
    o.d.zero_grad()
    slopes.square().sum(1).mean().mul(5).backward()
    o.d.step()


@mean(d=partial(normed, 3, 1), steps=3)
def own_r1_through_batch_norm(m, o, k):
    """Exact where all processes have as many rows: 12 are cut into 2, 3 and 4 alike."""
    true = real(k, 12).requires_grad_()
    (slopes,) = torch.autograd.grad(m.d(true).sum(), true, create_graph=True)
    update(o.d, F.softplus(-m.d(true)).mean() + slopes.square().sum(1).mean())


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = normed(3, 2), normed(2, 3)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


@mean(net=Autoencoder, methods=("encode", "decode"), steps=4)
def own_rows_encoded_and_decoded(m, o, k):
    x = real(k)
    update(o.net, F.mse_loss(m.net.decode(m.net.encode(x)), x))


@mean(a=partial(mlp, 3, 4, 3), b=partial(mlp, 3, 4, 3), steps=4)
def own_cycle(m, o, k):
    x = real(k)
    loss = F.l1_loss(m.b(m.a(x)), x) + F.l1_loss(m.a(m.b(x)), x)
    o.a.zero_grad()
    update(o.b, loss)
    o.a.step()


@mean(g=generator, d=critic, optimizers=sgd, steps=4)
def own_rows_of_two_sizes_in_one_loss(m, o, k):
    """Few labelled and many others, so that processes' shares differ within one backward."""
    few, many = real(k, 3 + k), real(k + 7, 9)
    update(o.d, m.d(few).square().mean() + m.d(many).tanh().mean())
    update(o.g, m.d(m.g(latents(k, 5))).mean())


@mean(g=generator, d=critic, optimizers=sgd, steps=3)
def values_set_after_wrapping_and_called_first_without_gradient(m, o, k):
    """A critic that begins, a frozen target: no process may go on with values of its own."""
    if k == 0:
        draw_apart(m.g, m.g.parameters())
    with torch.no_grad():
        fake = m.g(latents(k))
    update(o.d, F.softplus(m.d(fake)).mean() + F.softplus(-m.d(real(k))).mean())


class Remembering(nn.Module):
    """Each call goes on from the state of its rows that the one before has left."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 2)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.state = self.cell(x, self.state)
        return h


@mean(net=Remembering)
def own_rows_and_a_state_of_theirs(m, o, k):
    m.net.state = None
    (x, y), (later, _) = batch(k), batch(k)
    update(o.net, F.mse_loss(m.net(x), y) + F.mse_loss(m.net(later + 1), y))


@mean(net=Remembering)
def own_rows_and_a_state_of_theirs_detached(m, o, k):
    x, y = batch(k, 8)
    update(o.net, F.mse_loss(m.net(x), y))
    m.net.state = m.net.state.detach()


class Overwriting(Remembering):
    """Writes its state in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.cell(x, None if self.state is None else self.state.clone())
        if self.state is None:
            self.state = out.detach().clone()
        else:
            self.state.copy_(out.detach())
        return out


@mean(net=Overwriting, steps=4)
def own_rows_and_a_state_written_in_place(m, o, k):
    x, y = batch(k, 28)
    update(o.net, F.mse_loss(m.net(x), y))
