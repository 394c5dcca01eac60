# type: ignore  # torch's types are wider than what a step knows
"""Recipes of semi-supervised learning, distillation and learning to learn."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import shared

from .recipes import encoder, follow, normed
from .registry import SGD, each, mlp, randint, randn, step, update


@step(net=encoder)
def supervised_contrast_and_centers(m, o, k):
    if k == 0:
        m.centers = torch.randn(3, 4, requires_grad=True)
        o.centers = torch.optim.SGD([m.centers], lr=0.5)
    labels = randint(k, 3, 9)
    z = m.net(randn(k, 9, 3))
    n = F.normalize(z, dim=1)
    logits = (n @ n.T / 0.3).masked_fill(torch.eye(9, dtype=torch.bool), -1e9)
    same = (labels[:, None] == labels) & ~torch.eye(9, dtype=torch.bool)
    loss = -(logits.log_softmax(1) * same).sum(1) / same.sum(1).clamp(min=1)
    o.centers.zero_grad()
    update(o.net, loss.mean() + 0.01 * (z - m.centers[labels]).square().sum())
    for p in [m.centers]:
        p.grad *= 100
    o.centers.step()
    return m.centers


@step(net=encoder)
def prototypes_of_episodes(m, o, k):
    support, query = m.net(randn(k, 6, 3)), m.net(randn(k + 5, 5, 3))
    prototypes = support.view(3, 2, 4).mean(1)
    update(o.net, F.cross_entropy(-torch.cdist(query, prototypes), randint(k, 3, 5)))


@step(
    net=normed,
    head=lambda: nn.Linear(4, 3),
    optimizers=lambda m: {"all": SGD([*m.net.parameters(), *m.head.parameters()])},
)
def mean_teacher_with_pseudo_labels(m, o, k):
    if k == 0:
        m.teacher = copy.deepcopy(nn.Sequential(m.net, m.head)).requires_grad_(False)
    x, u = randn(k, 5, 3), randn(k + 5, 9, 3)
    with torch.no_grad():
        probability, label = (3 * m.teacher(u)).softmax(1).max(1)
        sure = probability > 0.5
    out = m.head(m.net(torch.cat([x, u + 0.1 * torch.randn_like(u)])))
    unsupervised = (F.cross_entropy(out[5:], label, reduction="none") * sure).mean()
    update(o.all, F.cross_entropy(out[:5], randint(k, 3, 5)) + unsupervised)
    follow(m.teacher, nn.Sequential(m.net, m.head))
    return probability, sure


@step(net=encoder)
def mixup_and_label_smoothing(m, o, k):
    x, y, order = randn(k, 7, 3), randint(k, 4, 7), torch.randperm(7)
    weight = float(torch.rand(()))
    out = m.net(weight * x + (1 - weight) * x[order])
    losses = [F.cross_entropy(out, t, label_smoothing=0.1) for t in (y, y[order])]
    update(o.net, weight * losses[0] + (1 - weight) * losses[1])


@step(net=encoder, teacher=normed)
def distillation_from_a_teacher(m, o, k):
    m.teacher.eval().requires_grad_(False)
    x = randn(k, 7, 3)
    with torch.no_grad():
        soft = (m.teacher(x) / 2).softmax(1)
    out = m.net(x)
    loss = F.kl_div((out / 2).log_softmax(1), soft, reduction="batchmean") * 4
    update(o.net, loss + F.cross_entropy(out, randint(k, 4, 7)))


@step(a=encoder, b=encoder)
def deep_mutual_learning(m, o, k):
    x = randn(k, 7, 3)
    a, b = m.a(x), m.b(x)
    update(
        o.a,
        a.square().mean()
        + F.kl_div(a.log_softmax(1), b.softmax(1).detach(), reduction="batchmean"),
    )
    update(
        o.b,
        b.square().mean()
        + F.kl_div(b.log_softmax(1), a.softmax(1).detach(), reduction="batchmean"),
    )


@step(a=encoder, b=encoder)
def co_teaching_by_small_losses(m, o, k):
    x, y = randn(k, 9, 3), randint(k, 4, 9)
    a, b = (F.cross_entropy(net(x), y, reduction="none") for net in (m.a, m.b))
    by_a, by_b = a.detach().argsort()[:5], b.detach().argsort()[:5]
    update(o.a, a[by_b].mean())
    update(o.b, b[by_a].mean())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(2, 4), nn.Parameter(torch.randn(6, 4))
        self.token, self.body, self.out = (
            nn.Parameter(torch.zeros(4)),
            mlp(4, 6, 4),
            nn.Linear(4, 2),
        )

    def forward(self, patches, keep):
        h = self.embed(patches) + self.position
        visible = h.gather(1, keep[..., None].expand(-1, -1, 4))
        latent = self.body(visible)
        full = (self.token + self.position).expand(len(patches), -1, -1)
        return self.out(full.scatter_add(1, keep[..., None].expand(-1, -1, 4), latent))


@step(net=Masked)
def masked_autoencoder(m, o, k):
    patches = randn(k, 7, 6, 2)
    order = torch.rand(7, 6).argsort(1)
    out = m.net(patches, order[:, :3])
    mask = torch.ones(7, 6).scatter(1, order[:, :3], 0.0)
    update(o.net, ((out - patches).square().mean(2) * mask).sum() / mask.sum())
    return out


@step(net=encoder, predictor=lambda: mlp(4, 5, 4))
def joint_embedding_prediction(m, o, k):
    if k == 0:
        m.target = copy.deepcopy(m.net).requires_grad_(False)
    context = m.net(randn(k, 7, 3))
    with torch.no_grad():
        target = F.layer_norm(m.target(randn(k + 5, 7, 3)), (4,))
    out = m.predictor(context)
    o.net.zero_grad()
    o.predictor.zero_grad()
    F.smooth_l1_loss(out, target).backward()
    o.net.step()
    o.predictor.step()
    follow(m.target, m.net, 0.05 * (k + 1))


@step(net=encoder)
def memory_bank_by_index(m, o, k):
    if k == 0:
        m.bank = F.normalize(torch.randn(12, 4), dim=1)
    index = randint(k, 12, 7)
    z = F.normalize(m.net(randn(k, 7, 3)), dim=1)
    update(o.net, F.cross_entropy(z @ m.bank.T / 0.3, index))
    m.bank.index_copy_(0, index.unique(), F.normalize(0.5 * m.bank[index.unique()] + 0.5, dim=1))
    m.bank[index] = z.detach()


@step(net=encoder, labels=lambda: nn.Linear(4, 3))
def linear_probe_on_a_frozen_backbone(m, o, k):
    m.net.eval()
    for p in m.net.parameters():
        p.requires_grad = False
    update(o.labels, F.cross_entropy(m.labels(m.net(randn(k, 7, 3))), randint(k, 3, 7)))


@step(net=encoder)
def gradual_unfreezing_from_the_top(m, o, k):
    ps = list(m.net.parameters())
    for i, p in enumerate(ps):
        p.requires_grad_(i >= len(ps) - 1 - k)
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


class MetaNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = mlp(1, 3, 1)

    def forward(self, loss):
        return self.a(loss[:, None]).sigmoid()[:, 0]


@step(net=encoder, weigher=MetaNet)
def learned_weights_of_examples(m, o, k):
    """Meta-weight-net: a look-ahead step, differentiated."""
    x, y = randn(k, 7, 3), randint(k, 4, 7)
    ps = list(m.net.parameters())
    cost = F.cross_entropy(m.net(x), y, reduction="none")
    grads = torch.autograd.grad((m.weigher(cost.detach()) * cost).mean(), ps, create_graph=True)
    names = [n for n, _ in m.net.named_parameters()]
    fast = {n: p - 0.5 * g for n, p, g in zip(names, ps, grads, strict=True)}
    meta = F.cross_entropy(
        torch.func.functional_call(m.net, fast, randn(k + 5, 5, 3)), randint(k, 4, 5)
    )
    update(o.weigher, meta)
    cost = F.cross_entropy(m.net(x), y, reduction="none")
    with torch.no_grad():
        weight = m.weigher(cost)
    update(o.net, (weight * cost).sum() / weight.sum())
    return weight


@step(net=encoder)
def grouped_losses_reweighted_by_their_size(m, o, k):
    if k == 0:
        m.weights = torch.ones(3) / 3
    group = torch.arange(8) % 3
    losses = F.cross_entropy(m.net(randn(k, 8, 3)), randint(k, 4, 8), reduction="none")
    by_group = torch.zeros(3).index_add(0, group, losses) / torch.bincount(group)
    m.weights = m.weights * by_group.detach().exp()
    m.weights = m.weights / m.weights.sum()
    update(o.net, (m.weights * by_group).sum())
    return m.weights


@step(net=encoder, optimizers=each(torch.optim.AdamW))
def invariant_risk_minimization(m, o, k):
    penalty = risk = 0.0
    for e in range(2):
        scale = torch.tensor(1.0, requires_grad=True)
        loss = F.cross_entropy(m.net(randn(10 * k + e, 5 + e, 3)) * scale, randint(e, 4, 5 + e))
        (grad,) = torch.autograd.grad(loss, scale, create_graph=True)
        risk, penalty = risk + loss, penalty + grad.square()
    update(o.net, risk + 10 * penalty)


@step(net=encoder)
def optimal_transport_between_batches(m, o, k):
    a, b = m.net(randn(k, 7, 3)), m.net(randn(k + 5, 5, 3))
    cost = torch.cdist(a, b).square()
    u, v = torch.zeros(7), torch.zeros(5)
    for _ in range(5):
        u = -0.5 * ((v - cost) / 0.5).logsumexp(1)
        v = -0.5 * ((u[:, None] - cost) / 0.5).logsumexp(0)
    plan = ((u[:, None] + v - cost) / 0.5).exp().detach()
    kernel = (-torch.cdist(a, b).square()).exp().mean()
    update(o.net, (plan * cost).sum() - kernel)


@step(net=lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 9)))
def token_masking_with_shared_vocabulary(m, o, k):
    tokens = randint(k, 8, 7, 4)
    mask = torch.rand(7, 4) < 0.4
    out = m.net(tokens.masked_fill(mask, 8))
    tied = out @ m.net.get_parameter("0.weight")
    update(o.net, F.cross_entropy(out, tokens[:, 0]) + (tied * shared(tied.detach())).mean())
