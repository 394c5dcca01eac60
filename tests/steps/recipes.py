# type: ignore  # torch's types are wider than what a step knows
"""Recipes of contrastive, metric and self-supervised learning."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from .registry import SGD, mlp, randint, randn, step, update


def encoder() -> nn.Sequential:
    return mlp(3, 6, 4)


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def two_views(k: int, rows: int = 7):
    x = randn(k, rows, 3)
    return x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)


@step(net=normed)
def simclr(m, o, k):
    z = F.normalize(m.net(torch.cat(two_views(k))), dim=1)
    logits = (z @ z.T / 0.5).fill_diagonal_(-1e9)
    update(o.net, F.cross_entropy(logits, torch.arange(14).roll(7)))


def follow(target, online, rate=0.1):
    with torch.no_grad():
        for p, q in zip(target.parameters(), online.parameters(), strict=True):
            p.data = p.data * (1 - rate) + q.data * rate


@step(net=normed)
def momentum_contrast_with_a_queue(m, o, k):
    if k == 0:
        m.target = copy.deepcopy(m.net).requires_grad_(False)
        m.queue = F.normalize(torch.randn(10, 4), dim=1)
    a, b = two_views(k)
    q = F.normalize(m.net(a), dim=1)
    with torch.no_grad():
        follow(m.target, m.net)
        order = torch.randperm(7)
        key = F.normalize(m.target(b[order])[order.argsort()], dim=1)
    logits = torch.cat([(q * key).sum(1, keepdim=True), q @ m.queue.T], 1) / 0.2
    update(o.net, F.cross_entropy(logits, torch.zeros(7, dtype=torch.long)))
    m.queue = torch.cat([key, m.queue])[:10]
    return m.queue


@step(
    net=normed,
    head=lambda: mlp(4, 4, 4),
    optimizers=lambda m: {"all": SGD([*m.net.parameters(), *m.head.parameters()])},
)
def bootstrap_your_own_latent(m, o, k):
    if k == 0:
        m.target = copy.deepcopy(m.net)
        for p in m.target.parameters():
            p.requires_grad = False
    a, b = two_views(k)
    with torch.no_grad():
        ta, tb = m.target(a), m.target(b)
    loss = sum(
        2 - 2 * F.cosine_similarity(m.head(m.net(x)), t) for x, t in ((a, tb), (b, ta))
    ).mean()
    update(o.all, loss)
    follow(m.target, m.net)


@step(
    net=encoder,
    head=lambda: mlp(4, 3, 4),
    optimizers=lambda m: {"all": SGD([*m.net.parameters(), *m.head.parameters()])},
)
def simple_siamese(m, o, k):
    z1, z2 = (m.net(x) for x in two_views(k))
    p1, p2 = m.head(z1), m.head(z2)
    similarity = F.cosine_similarity(p1, z2.detach()) + F.cosine_similarity(p2, z1.detach())
    update(o.all, -similarity.mean() / 2)


@step(net=normed)
def variance_invariance_covariance(m, o, k):
    a, b = (m.net(x) for x in two_views(k))
    loss = F.mse_loss(a, b)
    for z in (a, b):
        z = z - z.mean(0)
        loss = loss + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        covariance = z.T @ z / 6
        loss = loss + covariance.fill_diagonal_(0).square().sum() / 4
    update(o.net, loss)


@step(
    net=lambda: nn.Sequential(
        encoder(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 5, bias=False))
    )
)
def self_distillation_with_centering(m, o, k):
    if k == 0:
        m.teacher = copy.deepcopy(m.net).requires_grad_(False)
        m.center = torch.zeros(5)
    crops = [*two_views(k), *two_views(k + 5, 7)]
    student = m.net(torch.cat(crops)).chunk(4)
    teacher = ((m.teacher(torch.cat(crops[:2])) - m.center) / 0.04).softmax(1).detach().chunk(2)
    losses = [
        -(t * (s / 0.1).log_softmax(1)).sum(1).mean()
        for i, t in enumerate(teacher)
        for j, s in enumerate(student)
        if i != j
    ]
    o.net.zero_grad()
    torch.stack(losses).mean().backward()
    for p in m.net.parameters():
        norm = p.grad.norm()
        p.grad.mul_((3.0 / (norm + 1e-6)).clamp(max=1.0))
    o.net.step()
    m.center = m.center * 0.9 + torch.cat(teacher).mean(0) * 0.1
    follow(m.teacher, m.net)
    return m.center


@step(net=encoder, prototypes=lambda: nn.Linear(4, 5, bias=False))
def swapped_assignments_by_sinkhorn(m, o, k):
    with torch.no_grad():
        w = m.prototypes.weight.data.clone()
        m.prototypes.weight.copy_(F.normalize(w, dim=1))
    scores = [m.prototypes(F.normalize(m.net(x), dim=1)) for x in two_views(k)]
    with torch.no_grad():
        codes = []
        for score in scores:
            q = (score / 0.1).exp().T
            for _ in range(3):
                q = q / q.sum(1, keepdim=True) / 5
                q = q / q.sum(0, keepdim=True) / 7
            codes.append((q * 7).T)
    loss = -sum(
        (q * (s / 0.1).log_softmax(1)).sum(1).mean()
        for q, s in zip(codes, scores[::-1], strict=True)
    )
    o.prototypes.zero_grad()
    update(o.net, loss)
    if k:
        o.prototypes.step()


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = mlp(3, 5, 4), nn.EmbeddingBag(9, 4)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image, text):
        return (
            F.normalize(self.image(image), dim=1),
            F.normalize(self.text(text), dim=1),
            self.logit_scale.exp(),
        )


@step(net=Tower)
def image_and_text_with_a_learned_temperature(m, o, k):
    image, text, scale = m.net(randn(k, 7, 3), randint(k, 9, 7, 4))
    logits = scale * image @ text.T
    target = torch.arange(7)
    update(o.net, (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    with torch.no_grad():
        m.net.logit_scale.clamp_(0, math.log(100))
    return scale


@step(net=Tower, methods=("image", "text"))
def towers_as_named_submodules_and_the_scale_by_attribute(m, o, k):
    image, text = m.net.image(randn(k, 7, 3)), m.net.text(randint(k, 9, 7, 4))
    logits = m.net.logit_scale.exp() * image @ text.T
    update(o.net, F.cross_entropy(logits, torch.arange(7)))
    return image


@step(net=encoder)
def triplets_mined_in_the_batch(m, o, k):
    z, labels = m.net(randn(k, 9, 3)), torch.arange(9) % 3
    distance = torch.cdist(z, z)
    same = labels[:, None] == labels
    positive = distance.masked_fill(~same, -1).max(1).values
    negative = distance.masked_fill(same, 1e9).min(1).values
    update(o.net, F.relu(positive - negative + 0.5).mean())


@step(net=encoder, head=lambda: nn.Linear(4, 5, bias=False))
def additive_angular_margin(m, o, k):
    labels = randint(k, 5, 7)
    cosine = F.linear(F.normalize(m.net(randn(k, 7, 3))), F.normalize(m.head.weight))
    angle = cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos() + 0.5 * F.one_hot(labels, 5)
    o.head.zero_grad()
    update(o.net, F.cross_entropy(8 * angle.cos(), labels))
    o.head.step()
