# type: ignore  # torch's types are wider than what a step knows
"""Reinforcement learning."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .registry import SGD, mlp, randint, randn, step, update


def policy() -> nn.Sequential:
    return mlp(3, 6, 2)


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.pi, self.v = mlp(3, 6, 6), nn.Linear(6, 2), nn.Linear(6, 1)
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        h = self.trunk(x).tanh()
        return self.pi(h), self.v(h).squeeze(-1), self.log_std.exp().expand(len(x), -1)

    def value(self, x):
        return self.v(self.trunk(x).tanh()).squeeze(-1)


@step(net=policy)
def policy_gradient_with_sampled_actions(m, o, k):
    log_ps, rewards = [], []
    state = randn(k, 1, 3)
    for _ in range(4):
        distribution = torch.distributions.Categorical(logits=m.net(state))
        action = distribution.sample()
        log_ps.append(distribution.log_prob(action))
        rewards.append(float(action) - float(state.mean()))
        state = state * 0.9 + action[:, None] * 0.1
    returns = torch.tensor(rewards).flip(0).cumsum(0).flip(0)
    update(o.net, -(torch.cat(log_ps) * (returns - returns.mean())).sum())
    return returns


@step(net=ActorCritic, methods=("value",))
def proximal_policy_optimization(m, o, k):
    states = randn(k, 8, 3)
    with torch.no_grad():
        mean, value, std = m.net(states)
        actions = torch.normal(mean, std)
        old = torch.distributions.Normal(mean, std).log_prob(actions).sum(1)
        advantages = states.sum(1) - value + 0.9 * m.net.value(states + 0.1)
    for _ in range(2):
        for rows in torch.randperm(8).split(3):
            mean, value, std = m.net(states[rows])
            d = torch.distributions.Normal(mean, std)
            ratio = (d.log_prob(actions[rows]).sum(1) - old[rows]).exp()
            a = advantages[rows]
            a = (a - a.mean()) / (a.std() + 1e-8)
            loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
            loss = (
                loss
                + 0.5 * (value - states[rows].sum(1)).square().mean()
                - 0.01 * d.entropy().mean()
            )
            o.net.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(m.net.parameters(), 0.5)
            o.net.step()


class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.v, self.a = mlp(3, 5, 5), nn.Linear(5, 1), nn.Linear(5, 3)

    def forward(self, x):
        h = self.body(x)
        a = self.a(h)
        return self.v(h) + a - a.mean(1, keepdim=True)


@step(q=Dueling, steps=4)
def double_q_learning_with_a_target_network(m, o, k):
    if k == 0:
        m.target = copy.deepcopy(m.q)
    elif k == 2:
        m.target.load_state_dict(m.q.state_dict())
    s, a, r, s2, done = (
        randn(k, 7, 3),
        randint(k, 3, 7),
        randn(k, 7),
        randn(k + 5, 7, 3),
        randint(k, 2, 7),
    )
    with torch.no_grad():
        best = m.q(s2).argmax(1, keepdim=True)
        target = r + 0.9 * (1 - done) * m.target(s2).gather(1, best).squeeze(1)
    error = m.q(s).gather(1, a[:, None]).squeeze(1) - target
    update(o.q, F.huber_loss(error, torch.zeros(7), reduction="none").mul(torch.rand(7)).mean())
    return error


@step(actor=lambda: mlp(3, 5, 2), q=lambda: mlp(5, 5, 1))
def deterministic_policy_gradient(m, o, k):
    if k == 0:
        m.actor2, m.q2 = copy.deepcopy(m.actor), copy.deepcopy(m.q)
    s, a, s2 = randn(k, 7, 3), randn(k, 7, 2), randn(k + 5, 7, 3)
    with torch.no_grad():
        noise = (0.2 * torch.randn_like(a)).clamp(-0.5, 0.5)
        target = s.sum(1, keepdim=True) + 0.9 * m.q2(torch.cat([s2, m.actor2(s2) + noise], 1))
    update(o.q, F.mse_loss(m.q(torch.cat([s, a], 1)), target))
    update(o.actor, -m.q(torch.cat([s, m.actor(s)], 1)).mean())
    for target_net, net in ((m.actor2, m.actor), (m.q2, m.q)):
        for p, q in zip(target_net.parameters(), net.parameters(), strict=True):
            p.data.mul_(0.95)
            p.data.add_(0.05 * q.data)


class SquashedGaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 6, 4)

    def forward(self, x):
        mean, log_std = self.body(x).chunk(2, 1)
        return torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp()).mean, log_std.clamp(
            -5, 2
        )


@step(actor=SquashedGaussian, q1=lambda: mlp(5, 5, 1), q2=lambda: mlp(5, 5, 1))
def soft_actor_critic(m, o, k):
    if k == 0:
        m.target1, m.target2 = copy.deepcopy(m.q1), copy.deepcopy(m.q2)
        m.log_alpha = torch.zeros((), requires_grad=True)
        o.alpha = torch.optim.Adam([m.log_alpha], lr=0.01)

    def act(s):
        mean, log_std = m.actor(s)
        d = torch.distributions.Normal(mean, log_std.exp())
        u = d.rsample()
        return u.tanh(), (d.log_prob(u) - (1 - u.tanh().square() + 1e-6).log()).sum(1, keepdim=True)

    s, a, s2 = randn(k, 7, 3), randn(k, 7, 2), randn(k + 5, 7, 3)
    with torch.no_grad():
        a2, log_p = act(s2)
        x2 = torch.cat([s2, a2], 1)
        target = 0.9 * (torch.minimum(m.target1(x2), m.target2(x2)) - m.log_alpha.exp() * log_p)
    loss = sum(F.mse_loss(q(torch.cat([s, a], 1)), target) for q in (m.q1, m.q2))
    o.q1.zero_grad()
    o.q2.zero_grad()
    loss.backward()
    o.q1.step()
    o.q2.step()
    for p in [*m.q1.parameters(), *m.q2.parameters()]:
        p.requires_grad = False
    a, log_p = act(s)
    x = torch.cat([s, a], 1)
    update(o.actor, (m.log_alpha.exp().detach() * log_p - torch.minimum(m.q1(x), m.q2(x))).mean())
    for p in [*m.q1.parameters(), *m.q2.parameters()]:
        p.requires_grad = True
    update(o.alpha, -(m.log_alpha * (log_p + 2).detach()).mean())
    return m.log_alpha


@step(q=lambda: mlp(3, 6, 15))
def distributional_q_learning(m, o, k):
    support = torch.linspace(-1, 1, 5)
    s, a, r, s2 = randn(k, 7, 3), randint(k, 3, 7), randn(k, 7), randn(k + 5, 7, 3)
    with torch.no_grad():
        p = m.q(s2).view(7, 3, 5).softmax(2)
        p = p[torch.arange(7), (p * support).sum(2).argmax(1)]
        b = ((r[:, None] + 0.9 * support).clamp(-1, 1) + 1) / 0.5
        low, high = b.floor().long(), b.ceil().long()
        target = torch.zeros(7, 5)
        target.scatter_add_(1, low, p * (high - b + (low == high)))
        target.scatter_add_(1, high, p * (b - low))
    log_p = m.q(s).view(7, 3, 5)[torch.arange(7), a].log_softmax(1)
    update(o.q, -(target * log_p).sum(1).mean())
    return target


@step(predictor=policy, target=policy)
def random_network_distillation(m, o, k):
    if k == 0:
        m.running = torch.zeros(())
        m.target.requires_grad_(False)
    x = randn(k, 7, 3)
    error = (m.predictor(x) - m.target(x).detach()).square().mean(1)
    m.running = 0.9 * m.running + 0.1 * error.detach().var()
    keep = (torch.rand(7) < 0.5).to(x.dtype)
    update(o.predictor, (error * keep).sum() / keep.sum().clamp(min=1.0))
    return error / (m.running.sqrt() + 1e-8)


class World(nn.Module):
    """A recurrent model of the world that dreams."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.cell, self.prior = nn.Linear(3, 4), nn.GRUCell(6, 4), nn.Linear(4, 8)
        self.posterior, self.reward = nn.Linear(8, 8), nn.Linear(4, 1)

    def forward(self, x, actions, noise):
        h = x.new_zeros(len(x), 4)
        found = []
        for t in range(x.shape[1]):
            stats = self.posterior(torch.cat([h, self.encode(x[:, t])], 1))
            mean, log_std = stats.chunk(2, 1)
            z = mean + noise[:, t] * log_std.exp()
            kl = (stats - self.prior(h)).square().sum(1)
            h = self.cell(torch.cat([z, actions[:, t]], 1), h)
            found.append((h, kl, self.reward(h)[:, 0]))
        return tuple(torch.stack(parts, 1) for parts in zip(*found, strict=True))


@step(world=World, actor=lambda: mlp(4, 5, 2))
def world_model_and_imagined_rollouts(m, o, k):
    h, kl, reward = m.world(randn(k, 7, 4, 3), randn(k, 7, 4, 2), torch.randn(7, 4, 4))
    update(o.world, (reward - randn(k + 5, 7, 4)).square().mean() + kl.clamp(min=0.1).mean())
    m.world.requires_grad_(False)
    actions = m.actor(h[:, -1].detach())
    _, _, dreamed = m.world(randn(k, 7, 1, 3), actions[:, None], torch.randn(7, 1, 4))
    update(o.actor, -dreamed.mean())
    m.world.requires_grad_(True)


@step(v=lambda: mlp(3, 5, 1), q=lambda: mlp(5, 5, 1), pi=policy)
def implicit_and_conservative_q_learning(m, o, k):
    s, a, s2 = randn(k, 7, 3), randn(k, 7, 2), randn(k + 5, 7, 3)
    x = torch.cat([s, a], 1)
    with torch.no_grad():
        q = m.q(x)
    advantage = q - m.v(s)
    weight = torch.where(advantage > 0, 0.7, 0.3)
    update(o.v, (weight * advantage.square()).mean())
    others = m.q(torch.cat([s.repeat(3, 1), torch.randn(21, 2)], 1)).view(3, 7)
    target = s.sum(1, keepdim=True) + 0.9 * m.v(s2).detach()
    update(o.q, F.mse_loss(m.q(x), target) + (others.logsumexp(0) - q.squeeze(1)).mean())
    likelihood = -(m.pi(s) - a).square().sum(1)
    update(o.pi, -(advantage.detach().squeeze(1).mul(3).exp().clamp(max=100) * likelihood).mean())


@step(
    net=ActorCritic,
    optimizers=lambda m: {
        "v": SGD([*m.net.v.parameters(), *m.net.trunk.parameters()]),
        "pi": SGD([*m.net.pi.parameters(), m.net.log_std, *m.net.trunk.parameters()]),
    },
)
def trust_region_by_conjugate_gradient(m, o, k):
    s, a = randn(k, 7, 3), randn(k, 7, 2)
    mean, value, std = m.net(s)
    ps = [*m.net.pi.parameters(), *m.net.trunk.parameters()]
    log_p = torch.distributions.Normal(mean, std).log_prob(a).sum(1)
    advantage = (s.sum(1) - value).detach()
    g = torch.cat(
        [
            x.flatten()
            for x in torch.autograd.grad((log_p * advantage).mean(), ps, retain_graph=True)
        ]
    )
    kl = ((mean - mean.detach()).square() / (2 * std.detach().square())).sum(1).mean()
    kl_grad = torch.cat([x.flatten() for x in torch.autograd.grad(kl, ps, create_graph=True)])

    def fisher(v):
        product = torch.autograd.grad((kl_grad * v).sum(), ps, retain_graph=True)
        return torch.cat([x.flatten() for x in product]) + 0.1 * v

    x, r, p = torch.zeros_like(g), g.clone(), g.clone()
    for _ in range(3):
        fp = fisher(p)
        alpha = r @ r / (p @ fp)
        x, r2 = x + alpha * p, r - alpha * fp
        p, r = r2 + (r2 @ r2) / (r @ r) * p, r2
    flat = nn.utils.parameters_to_vector(ps).detach()
    nn.utils.vector_to_parameters(flat + 0.1 * x, ps)
    update(o.v, (m.net(s)[1] - s.sum(1)).square().mean())
    return x


@step(net=policy)
def evolution_strategy_without_gradients(m, o, k):
    with torch.no_grad():
        flat = nn.utils.parameters_to_vector(m.net.parameters())
        scores, noises = [], []
        for _ in range(4):
            noise = torch.randn_like(flat)
            nn.utils.vector_to_parameters(flat + 0.1 * noise, m.net.parameters())
            scores.append(m.net(randn(k, 7, 3)).square().mean())
            noises.append(noise)
        gradient = sum(s * n for s, n in zip(scores, noises, strict=True)) / 0.4
        nn.utils.vector_to_parameters(flat - 0.1 * gradient, m.net.parameters())
    return scores
